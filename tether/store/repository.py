"""The model store on one disk: the one door to its parts. Opens it, and keeps names, aliases and trust; the rest is inherited."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tether.errors import FormatTooNewError, StoreError
from tether.serving_settings import ServingSettings
from tether.store.collecting.sharing import attach, is_shared
from tether.store.format.records import AliasChange
from tether.store.index import serving_tables
from tether.store.packing.disk import PARTIAL, disk_errors, sync_folder, write_atomically
from tether.store.packing.reserve import reserve_of
from tether.store.packing.writer_lock import WriterLock
from tether.store.publishing import checked_alias
from tether.store.upkeep import Upkeep
from tether.types import Digest, ModelRef

__all__ = ["FORMAT", "Repository"]

FORMAT = 1
"""Of the data folder: what lies where, the pack format, the catalog's tables."""
_FOLDERS = ("packs", "staging", "manifests", "cache")


class Repository(Upkeep):
    """A store. One process writes; any number read it meanwhile. Methods may be called from any thread.

    Reading is `Library`, publishing `Publishing`, maintenance `Upkeep`.
    Each method raises StoreError (NoSpaceError where the disk is full) when the disk refuses; what was acknowledged before stays.
    """

    def __init__(self, root: Path, lock: WriterLock | None, clock: Callable[[], float]) -> None:
        """Use `open`. `lock`: the held writer's lock; None reads only."""
        super().__init__(root, clock, read_only=lock is None)
        self._lock = lock
        if lock is not None:
            self._catalog.guard(lock.check)

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        read_only: bool = False,
        own: str | None = None,
        packs: Path | None = None,
        keys: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open the store in a folder; a writer makes it if need be, and clears away what an earlier one left when it died.

        `own` is the public key (hex) of this lab: the publisher that bare names mean first. It is remembered.
        `packs`: a folder that this store's packs lie in together with those of stores on other hosts (sharing.py). It is remembered, too.

        `keys`: the folder of the cluster keys (None: `keys` beside this folder); nothing is looked for there before a model is encrypted.

        Raises: FormatTooNewError: a newer Tether wrote it; ConflictError: another process writes here; StoreError; NoSpaceError.
        """
        root = root.absolute()
        _check_format(root, required=read_only)
        repository = cls(root, None, clock) if read_only else reserve_of(root).spend(lambda: cls._open_to_write(root, own, packs, clock))
        repository.keep_keys_in(keys or root.parent / "keys")
        return repository

    @classmethod
    def _open_to_write(cls, root: Path, own: str | None, packs: Path | None, clock: Callable[[], float]) -> Self:
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            lock = WriterLock.take(root / "writer.lock")
        try:
            _make_folders(root, packs)
            repository = cls(root, lock, clock)
            repository._start(own, named=packs is not None)
        except BaseException:
            lock.release()
            raise
        return repository

    def _start(self, own: str | None, *, named: bool) -> None:
        """`named`: whether the user said where the packs are."""
        with disk_errors(self.root):
            if not (self.root / "format").exists():
                write_atomically(self.root / "format", f"{FORMAT}\n".encode(), "format")
            for name in ("manifests",) if self._shared.is_shared else ("packs", "manifests"):
                for path in (self.root / name).glob(f"*{PARTIAL}"):
                    path.unlink(missing_ok=True)
            for folder in (self.root, self.root / "packs", self.root / "manifests"):
                sync_folder(folder)  # who died between a rename and this left a name that the next publish relies on
        if own is not None and own != self._catalog.own():
            self._catalog.set_own(own)
        self._shared.join(self._catalog, named=named)
        self._collector.finish()
        self._marker.adopt()
        self._staging.sweep(self._stored, self._clock())
        self._checkouts.sweep()
        self._reserve.keep()

    def _stored(self, digests: Iterable[Digest]) -> set[Digest]:
        return set(self._blobs.locate(digests))

    def close(self) -> None:
        """Give up the files and the writer's lock; a second call does nothing."""
        with ExitStack() as stack:  # each is closed whatever another says, the lock last
            stack.callback(self._unlock)
            stack.callback(self._catalog.close)
            stack.callback(self._blobs.files.end)
            stack.callback(self._keeper.close)
            with self._publishing:
                self._staging.close()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _check_writable(self) -> None:
        super()._check_writable()
        if self._lock is not None:
            self._lock.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Repository({str(self.root)!r}{', read_only=True' if self.read_only else ''})"

    # --- versions' names, publishers

    def delete_version(self, name: str, version: int) -> None:
        """Forget a version; its number is not given again. `latest` falls back to the newest that is left.

        Raises: UnknownModelError, UnknownVersionError; ConflictError: an alias points at it.
        """
        self._check_writable()
        self._reserve.spend(lambda: self._catalog.delete_version(_bare(name), version, self._clock()))

    def set_alias(self, name: str, alias: str, version: int) -> AliasChange:
        """Point an alias at a version. `name` as in a URL. Raises: BadNameError, UnknownModelError, UnknownVersionError."""
        self._check_writable()
        (change,) = self._catalog.set_alias(_bare(name), [checked_alias(alias)], version)
        return change

    def delete_alias(self, name: str, alias: str) -> None:
        """Raises: UnknownModelError, UnknownAliasError; ConflictError: `latest` stays."""
        self._check_writable()
        self._catalog.delete_alias(_bare(name), alias)

    def rollback(self, name: str, alias: str | None = None) -> AliasChange:
        """Move an alias (None: the one that the bare name means) back to what it was before; called again it goes further back.

        Raises: UnknownModelError, UnknownAliasError; ConflictError: there is nothing before.
        """
        self._check_writable()
        return self._catalog.rollback(_bare(name), alias)

    def set_serving(self, name: str, changes: Mapping[str, Any] | None) -> ServingSettings:
        """Say how this lab serves a model: what is named is changed, None takes one back; no `changes`: all. The answer: all that is said.

        Raises: UnknownModelError; BadInputError: there is no such setting, or it can't have that value.
        """
        self._check_writable()
        model = self._catalog.resolve(_bare(name))
        with self._catalog.writing() as db:
            return serving_tables.amend(db, model.publisher, model.name.rpartition("~")[2], changes)

    def name_publisher(self, publisher: str, label: str) -> None:
        """Give another lab's key (hex) a petname: `label/name`. Raises: BadNameError; ConflictError: it is taken."""
        self._check_writable()
        self._catalog.name_publisher(publisher, label)

    def trust(self, publisher: str, scopes: Sequence[str]) -> None:
        """Add scopes (`code`, …) to what a publisher is trusted for."""
        self._check_writable()
        self._catalog.trust(publisher, scopes)

    def distrust(self, publisher: str, scopes: Sequence[str]) -> None:
        """Take scopes away again."""
        self._check_writable()
        self._catalog.distrust(publisher, scopes)

    def trusted(self, publisher: str, scope: str) -> bool:
        """Whether a publisher is trusted for a scope; the lab's own is for all."""
        return self._catalog.trusted(publisher, scope)


def _check_format(root: Path, *, required: bool) -> None:
    path = root / "format"
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        if required:
            raise StoreError(f"there is no store at {root}: start the lab (`tether up`) or name its data folder with --data") from None
        return
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} can't be read ({error}): restore it (it holds the number {FORMAT})") from error
    if not text.strip().isdecimal():
        raise StoreError(f"{path} holds no format number: restore it (it holds the number {FORMAT})")
    if int(text) > FORMAT:
        raise FormatTooNewError(f"the data folder {root} has format {int(text)}; this Tether understands up to {FORMAT}: update Tether")


def _make_folders(root: Path, packs: Path | None) -> None:
    if packs is not None:
        attach(root, packs)
    if is_shared(root) and not (root / "packs").exists():
        raise StoreError(f"the folder that the packs of {root} lie in, {(root / 'packs').readlink()}, is not there: mount it")
    with disk_errors(root):
        for name in _FOLDERS:
            (root / name).mkdir(exist_ok=True)


def _bare(name: str) -> ModelRef:
    ref = ModelRef.parse(name)
    return ModelRef(ref.name, ref.publisher)
