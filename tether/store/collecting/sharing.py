"""Pack folders that several hosts share: which stores use one, what each needs of it, and the moments in which only one may act.

    <packs>/<BLAKE3>.pack        written once by any of the stores, appears by a rename
    <packs>/stores/<id>.json     one store: host, data folder, when it was last heard of, what it needs of which pack
    <packs>/stores/lock          flock: held while packs are claimed, and while unclaimed ones are deleted

A store claims a pack before its catalog relies on it and then looks whether the pack is still there; who deletes one looks at all claims
first. The lock keeps the two apart, so what is claimed and there stays there. Claims name packs, not blobs: a line for each pack (of
which a terabyte has hundreds, where it has 250,000 blobs), and a publish rewrites its file only when it uses a pack for the first time.
The price: of a pack that two stores need parts of nothing is freed before either rewrites; that is why a claim says which part, too.

A data folder whose packs are shared has a link in place of its folder `packs`: readers need not be told.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from tether.errors import ConflictError, NotFoundError, StoreError
from tether.store.collecting.collection import WHOLE, Claim, Need
from tether.store.index import collection_tables as tables
from tether.store.index.catalog import Catalog
from tether.store.packing.disk import PARTIAL, disk_errors, write_atomically
from tether.store.packing.pending import DATA

__all__ = ["SHARED_GRACE", "LocalPacks", "PackFolder", "SharedPacks", "StoreRecord", "attach", "is_shared"]

STORES = "stores"
SHARED_GRACE = 3600.0
"""Seconds for which a pack of a shared folder is kept, whatever is asked for: another store wrote it and is about to claim it."""
_SILENT = 14 * 24 * 3600.0
"""Seconds after which a store that was not heard of may be gone for good; a person decides. A store that is used is heard of daily."""
_LOCK_TIMEOUT = 30.0
"""Seconds; who holds the lock writes a small file or renames some. One whose host died loses it when the file server notices."""
_POLL = 0.02
_ABANDONED = 2 * 24 * 3600.0
"""Seconds; an upload that nobody goes on with is given up after one day by the store that took it."""
_MAX_RECORD = 64 * 1024 * 1024
_ID = re.compile(r"[0-9a-f]{32}")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class StoreRecord(msgspec.Struct, frozen=True):
    """What a store says of itself in the shared folder."""

    id: str
    host: str
    folder: str
    renewed: float
    """Unix time by the clock of its host."""
    tokens: tuple[str, ...]
    """Change with each opening: a copy of the data folder has an old one, and must not speak for the store it was copied from."""
    needs: dict[str, Need]


class PackFolder(Protocol):
    """Who else uses the packs."""

    is_shared: bool
    least_grace: float
    """Seconds that a grace period is never shorter than."""

    def join(self, catalog: Catalog, *, named: bool) -> None:
        """Before anything else. `named`: whether the user said where the folder is. Raises: StoreError: it does not know this store."""
        ...

    def forget(self, store: str) -> str:
        """Take another store out; gives a description of it. Raises: NotFoundError: there is none of this id; ConflictError: it is this."""
        ...

    def claim(self, packs: Collection[str]) -> None:
        """Say, before relying on them, that these are needed."""
        ...

    def lacking(self, packs: Collection[str]) -> set[str]:
        """Claim them; gives those that are not there."""
        ...

    @contextmanager
    def deleting(self) -> Iterator[None]:
        """Nobody claims a pack meanwhile. Raises: StoreError: that can't be made sure."""
        ...

    def claims(self) -> tuple[dict[str, tuple[Claim, ...]], list[str]]:
        """What others need, by pack; and why that is not fully known."""
        ...

    def begin(self) -> None:
        """A collection begins: what is claimed from now on outlives its `declare`."""
        ...

    def declare(self, needs: Mapping[str, Need]) -> None:
        """Claim exactly this, and what was claimed since `begin`."""
        ...


class LocalPacks:
    """Nobody else."""

    is_shared = False
    least_grace = 0.0

    def __init__(self, packs: Path) -> None:
        self._packs = packs

    def join(self, catalog: Catalog, *, named: bool) -> None:
        """Nothing to join."""

    def forget(self, store: str) -> str:
        raise NotFoundError(f"no other store uses the packs of this one, {store[:64]!r} neither")

    def claim(self, packs: Collection[str]) -> None:
        """Nobody to tell."""

    def lacking(self, packs: Collection[str]) -> set[str]:
        return {name for name in packs if not (self._packs / name).exists()}

    @contextmanager
    def deleting(self) -> Iterator[None]:
        yield

    def claims(self) -> tuple[dict[str, tuple[Claim, ...]], list[str]]:
        return {}, []

    def begin(self) -> None:
        """Nothing to remember."""

    def declare(self, needs: Mapping[str, Need]) -> None:
        """Nobody to tell."""


class SharedPacks:
    """One store's place in a shared folder. The caller sees to it that one thread at a time claims and declares."""

    is_shared = True
    least_grace = SHARED_GRACE

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._packs = root / "packs"
        self._clock = clock
        self._record = StoreRecord("", socket.gethostname(), str(root), 0.0, (), {})
        self._claimed: dict[str, Need] = {}
        self._held = False

    # --- joining

    def join(self, catalog: Catalog, *, named: bool) -> None:
        """A store that is new to the folder, or a copy of one that is there, gets an id of its own; all that it knows is claimed."""
        with catalog.reading() as db:
            known, packs = tables.membership(db), tables.blobs_by_pack(db)
        found = self._read(self._path(known[0])) if known else None
        if known and found is None and not named:
            raise StoreError(
                f"{self._packs.resolve()} does not know this store (any more): mount it, or open the store with that folder named again"
            )
        if known and found is not None and known[1] in found.tokens:
            identity, tokens, needs = found.id, found.tokens, found.needs
        else:
            identity, tokens, needs = uuid.uuid4().hex, (), dict.fromkeys(packs, WHOLE)
        token = uuid.uuid4().hex
        self._write(identity, (token, *tokens), needs)
        with catalog.writing() as db:
            tables.set_membership(db, identity, token)
        self._write(identity, (token,), needs)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what was half-written so long ago, by the file server's clock, that its writer is gone, on whichever host."""
        with disk_errors(self._packs):
            before = self._path(self._record.id).stat().st_mtime - _ABANDONED
            for path in (*self._packs.glob(f"*{PARTIAL}"), *self._packs.glob(f"*{DATA}"), *(self._packs / STORES).glob(f"*{PARTIAL}")):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < before:
                        path.unlink()

    def _write(self, identity: str, tokens: tuple[str, ...], needs: Mapping[str, Need]) -> None:
        record = msgspec.structs.replace(self._record, id=identity, tokens=tokens, needs=dict(needs), renewed=self._clock())
        path = self._path(identity)
        with disk_errors(path):
            write_atomically(path, msgspec.json.encode(record, order="sorted"), "shared")
        self._record = record

    def _path(self, identity: str) -> Path:
        return self._packs / STORES / f"{identity}.json"

    def _read(self, path: Path) -> StoreRecord | None:
        """None: there is none. Raises: StoreError: it can't be read."""
        try:
            with disk_errors(path), path.open("rb") as file:
                return msgspec.json.decode(file.read(_MAX_RECORD), type=StoreRecord)
        except msgspec.MsgspecError as error:
            raise StoreError(
                f"{path} can't be read ({error}): if that store still exists, let it collect its garbage, which writes it; else delete it"
            ) from None
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    # --- claims

    def claim(self, packs: Collection[str]) -> None:
        new = dict.fromkeys((name for name in packs if name not in self._record.needs), WHOLE)
        self._claimed |= dict.fromkeys(packs, WHOLE)
        if new:
            with self._exclusive(required=False):
                self._write(self._record.id, self._record.tokens, self._record.needs | new)

    def lacking(self, packs: Collection[str]) -> set[str]:
        self.claim(packs)
        return {name for name in packs if not _is_there(self._packs / name)}

    def begin(self) -> None:
        self._claimed = {}

    def declare(self, needs: Mapping[str, Need]) -> None:
        with self._exclusive(required=False):
            self._write(self._record.id, self._record.tokens, {**needs, **self._claimed})

    def claims(self) -> tuple[dict[str, tuple[Claim, ...]], list[str]]:
        claims: dict[str, tuple[Claim, ...]] = {}
        problems = []
        for path in self._others():
            try:
                record = self._read(path)
            except StoreError as error:
                problems.append(str(error))
                continue
            for pack, need in record.needs.items() if record else ():
                claims[pack] = (*claims.get(pack, ()), Claim(self._described(record), need))
        return claims, problems

    def _others(self) -> list[Path]:
        with disk_errors(self._packs):
            found = sorted((self._packs / STORES).glob("*.json"))
        return [path for path in found if path != self._path(self._record.id)]

    def _described(self, record: StoreRecord | None) -> str:
        if record is None:
            return "a store that just went"
        heard = datetime.fromtimestamp(record.renewed, UTC)
        text = f"host {record.host} ({record.folder}), last heard of {heard:%Y-%m-%d %H:%M} UTC"
        if self._clock() - record.renewed < _SILENT:
            return text
        return f"{text}; if it is gone for good: tether gc --forget {record.id}"

    def forget(self, store: str) -> str:
        if store == self._record.id:
            raise ConflictError("this is the store itself: it can't take itself out of the folder that its packs lie in")
        with self._exclusive(required=True):
            path = self._path(store)
            if not _ID.fullmatch(store) or not path.exists():
                raise NotFoundError(f"no store {store[:64]!r} uses {self._packs.resolve()}; `tether gc --dry-run` names those that do")
            try:
                text = self._described(self._read(path))
            except StoreError:
                text = f"store {store}, of which nothing could be read"
            with disk_errors(path):
                path.unlink()
        return text

    # --- alone

    @contextmanager
    def deleting(self) -> Iterator[None]:
        with self._exclusive(required=True):
            yield

    @contextmanager
    def _exclusive(self, *, required: bool) -> Iterator[None]:
        """The folder's lock. Where the file system has none, nobody deletes, so one may do without for anything else."""
        if self._held:
            yield
            return
        path = self._packs / STORES / "lock"
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._wait_for(descriptor, path, required=required)
            self._held = True
            yield
        finally:
            self._held = False
            os.close(descriptor)

    def _wait_for(self, descriptor: int, path: Path, *, required: bool) -> None:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    if not required:
                        return
                    raise StoreError(
                        f"{path}: this file system has no locks, so nothing can be deleted safely: mount it with them"
                    ) from error
                if error.errno not in {errno.EAGAIN, errno.EACCES, errno.EINTR}:
                    raise StoreError(f"{path} can't be locked ({error}): check the mount and the folder's permissions") from error
            if time.monotonic() > deadline:
                raise StoreError(f"another host has held {path} for {_LOCK_TIMEOUT:.0f} s: see which of the stores beside it hangs")
            time.sleep(_POLL)


def is_shared(root: Path) -> bool:
    """Whether the packs of a data folder lie in a shared one."""
    return (root / "packs").is_symlink()


def attach(root: Path, folder: Path) -> None:
    """Let the packs of a data folder lie in `folder`, which is made if only it is missing.

    Raises: ConflictError: the data folder has packs of its own, or others; StoreError.
    """
    packs, folder = root / "packs", folder.absolute()
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        (folder / STORES).mkdir(exist_ok=True)
    with disk_errors(packs):
        if packs.is_symlink():
            if not packs.exists() or not packs.samefile(folder):
                raise ConflictError(
                    f"the packs of {root} lie in {packs.readlink()}, not in {folder}: move them there, then change the link {packs}"
                )
            return
        if packs.is_dir():
            if any(packs.iterdir()):
                raise ConflictError(f"{root} has packs of its own: move {packs}/*.pack to {folder} and remove {packs}, then open it again")
            packs.rmdir()
        packs.symlink_to(folder, target_is_directory=True)


def _is_there(path: Path) -> bool:
    """By opening it: what a network's file system says of a name may be old, what it opens is not."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return False
    return True
