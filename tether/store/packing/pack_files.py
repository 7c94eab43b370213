"""The packs of a folder, opened once and read many times: by position, from any thread, also after a fork."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tether.store.format.packs import Located, read_index
from tether.store.packing.disk import disk_errors, read_at

__all__ = ["PackFiles", "mapped", "scan"]

_OPEN = 64
"""Packs that stay open. A version lies in one pack for each publish that it shares bytes with."""
_LOOK = 1.0
"""Seconds after which a reader looks whether packs that it keeps open were deleted."""


def scan(path: Path) -> list[Located]:
    """The index of a pack, checked. Raises: StoreError: it is not a pack, was cut, or its index was altered."""
    with disk_errors(path), path.open("rb") as file:
        return read_index(path.name, file)


class _Handle:
    """An open pack; closed when the last reader leaves it after it was let go."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.descriptor)
        self.identity = (status.st_dev, status.st_ino)
        self.users = 0
        self.kept = True

    def close_if_unused(self) -> None:
        if not self.kept and self.users == 0 and self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class PackFiles:
    """Descriptors of the packs in `folder`, the least recently used closed first.

    A pack whose file was deleted, or replaced by one of the same name, is noticed at the next use: its path is looked at each time (1 µs).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ended = False
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._looked = time.monotonic()
        self._lock = threading.Lock()
        self._handles: OrderedDict[str, _Handle] = OrderedDict()

    @contextmanager
    def opened(self, pack: str) -> Iterator[int]:
        """Its descriptor, valid inside. Raises: OSError: FileNotFoundError where there is no such pack."""
        handle = self._take(pack)
        try:
            yield handle.descriptor
        finally:
            with self._lock:
                handle.users -= 1
                handle.close_if_unused()

    def _take(self, pack: str) -> _Handle:
        if self._process != os.getpid():
            # A fork: another thread of the parent may have held the lock. The descriptors are shared, which reading by position allows.
            self._forget()
        if time.monotonic() > self._looked + _LOOK:
            self.let_go_of_deleted()
        path = f"{self.folder}/{pack}"
        with self._lock:
            handle = self._current(pack, path)
            handle.users += 1
            return handle

    def _current(self, pack: str, path: str) -> _Handle:
        known = self._handles.get(pack)
        if known is not None and self._is_same(known, path):
            self._handles.move_to_end(pack)
            return known
        self._let_go(pack)
        if self._ended:
            handle = self._open(path)
            handle.kept = False
            return handle
        while len(self._handles) >= _OPEN:
            self._let_go(next(iter(self._handles)))
        handle = self._handles[pack] = self._open(path)
        return handle

    def _open(self, path: str) -> _Handle:
        try:
            return _Handle(path)
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE} or not self._handles:
                raise
        for pack in list(self._handles):
            self._let_go(pack)
        return _Handle(path)

    def _is_same(self, handle: _Handle, path: str) -> bool:
        try:
            status = os.stat(path)  # noqa: PTH116 (a Path costs more than the call)
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == handle.identity

    def _let_go(self, pack: str) -> None:
        handle = self._handles.pop(pack, None)
        if handle is not None:
            handle.kept = False
            handle.close_if_unused()

    def read_into(self, pack: str, offset: int, view: memoryview) -> int:
        """Fill `view` with the bytes from `offset`; gives how many there were. Raises: OSError."""
        with self.opened(pack) as descriptor:
            return read_at(descriptor, offset, view)

    def let_go_of_deleted(self) -> None:
        """Close the packs that nobody reads now and that are gone from the folder: only then the disk has their space back."""
        with self._lock:
            for pack, handle in list(self._handles.items()):
                if not self._is_same(handle, f"{self.folder}/{pack}"):
                    self._let_go(pack)
            self._looked = time.monotonic()

    def close(self) -> None:
        """Close what nobody reads now; the rest when it was read. A later use opens again."""
        if self._process != os.getpid():
            self._forget()
        with self._lock:
            for pack in list(self._handles):
                self._let_go(pack)

    def end(self) -> None:
        """As `close`; a later use keeps nothing open: threads of zarr's may read on after one that failed was told."""
        self._ended = True
        self.close()


def mapped(descriptor: int) -> mmap.mmap:
    """The whole file, read-only. It stays readable when the descriptor is closed and the file deleted."""
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
