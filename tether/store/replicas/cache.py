"""Keeps what a host holds for speed only under a number of bytes: checkouts, and the versions of a replica, the longest unused go first.

What a process has loaded it pins: it holds a shared lock on a small file, `cache/uses/<digest of the manifest>`, whose time is that of the
last use. Who evicts needs that lock alone. The system gives up the locks of a process that died, so no pin outlives its owner.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from tether.errors import ConflictError, TetherError
from tether.store.format.manifest import is_digest
from tether.store.packing.disk import disk_errors
from tether.store.repository import Repository
from tether.types import Digest

__all__ = ["CacheBudget", "Evicted", "Pin", "default_nbytes"]

log = structlog.get_logger("tether.store")
_USES = "uses"
_MOST = 50_000_000_000
_SHARE = 10


def default_nbytes(folder: Path) -> int:
    """A tenth of the disk that the folder lies on, at most 50 GB. Raises: StoreError."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    with disk_errors(there):
        return min(_MOST, shutil.disk_usage(there).total // _SHARE)


@dataclass(frozen=True, slots=True)
class Evicted:
    """What had to go."""

    digests: tuple[Digest, ...]
    freed_nbytes: int
    used_nbytes: int
    """That are left."""
    fits: bool
    """Whether that is within the budget. If not, the rest is loaded, or being fetched."""


class Pin:
    """Holds one version in the cache until it is released. A context manager."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Let it go; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class CacheBudget:
    """The budget of one repository's folder: of all of it where it is a replica, else of its checkouts.

    Several processes may have one for the same folder. Methods may be called from any thread.
    """

    def __init__(self, repository: Repository, nbytes: int, *, checkouts_only: bool = False) -> None:
        """`checkouts_only`: the repository is no replica; one that may only be read is none. Raises: StoreError, NoSpaceError."""
        self._repository, self.nbytes = repository, nbytes
        self._checkouts_only = checkouts_only or repository.read_only
        self._cache = repository.root / "cache"
        self._folder = self._cache / _USES
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def pin(self, digest: Digest) -> Pin:
        """Keep a version's checkout and blobs, whether they are here or come later, and note its use. Waits while it is being evicted."""
        path = self._folder / digest
        with disk_errors(path):
            while True:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    if _is_at(descriptor, path):
                        os.utime(descriptor)
                        return Pin(descriptor)
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)  # it was evicted, and its file removed, since we opened it

    def used_nbytes(self) -> int:
        """On the disk, of what this budget is about."""
        folders = [self._cache]
        if not self._checkouts_only:
            folders += [self._repository.root / name for name in ("packs", "staging", "manifests")]
        return sum(_allocated(folder) for folder in folders)

    def make_room(self, nbytes: int = 0) -> Evicted:
        """Evict what is not pinned, the longest unused first, until `nbytes` more would fit. Raises: StoreError."""
        used = before = self.used_nbytes()
        gone: list[Digest] = []
        for digest in self._by_last_use():
            if used + nbytes <= self.nbytes:
                break
            if self._evict(digest):
                gone.append(digest)
                used = self.used_nbytes()
        if gone:
            log.info("evicted", versions=len(gone), nbytes=before - used, store=str(self._repository.root))
        return Evicted(tuple(gone), before - used, used, fits=used + nbytes <= self.nbytes)

    def _by_last_use(self) -> list[Digest]:
        """What could go. What was never pinned was last used when it was made."""
        times: dict[Digest, float] = {}
        if not self._checkouts_only:
            times = {version.digest: version.created for model in self._repository.models() for version in model.versions}
        times |= _times(self._cache)
        times |= {digest: time for digest, time in _times(self._folder).items() if digest in times}
        return sorted(times, key=times.__getitem__)

    def _evict(self, digest: Digest) -> bool:
        with self._alone(digest) as alone:
            if not alone:
                return False
            self._repository.discard(digest)
            if not self._checkouts_only:
                self._forget(digest)
            with suppress(FileNotFoundError):
                (self._folder / digest).unlink()
        return True

    def _forget(self, digest: Digest) -> None:
        records = [version for model in self._repository.models() for version in model.versions if version.digest == digest]
        for record in records:
            try:
                self._repository.delete_version(record.name, record.version)
            except ConflictError:  # an alias points at it: somebody wants it here
                return
            except TetherError as error:
                log.warning("not evicted", model=record.name, version=record.version, error=str(error))
                return
        if records:
            self._repository.gc(grace=0.0)

    @contextmanager
    def _alone(self, digest: Digest) -> Iterator[bool]:
        """Whether nobody has it pinned; nobody pins it meanwhile."""
        path = self._folder / digest
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                yield False
                return
        try:
            yield _is_at(descriptor, path)
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _times(folder: Path) -> dict[Digest, float]:
    """What is called like a manifest's digest, and when it was changed."""
    found = {}
    with disk_errors(folder):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                if is_digest(entry.name):
                    found[Digest(entry.name)] = entry.stat().st_mtime
    return found


def _allocated(folder: Path) -> int:
    """Bytes on the disk of all files below the folder; holes are none."""
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.lstat(f"{base}/{name}").st_blocks * 512
    return total
