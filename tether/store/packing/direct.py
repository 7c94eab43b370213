"""Writes large blobs past the system's cache, which would cost more than the disk does: each byte a copy, each page new memory.

What comes from elsewhere is written once and read once, for its files. In the cache it would take the room of what is in use, and where
memory is given slowly (by the host of a virtual machine) to fill it takes five to fifteen times the CPU time. The system wants whole blocks
at places of blocks, in memory and in the file: they go through a buffer, the odd bytes at both ends of a blob the usual way.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from tether.store.faults import reach
from tether.store.packing.disk import write_at
from tether.store.packing.parallel import buffer

__all__ = ["DirectWriting", "whole_blocks"]

_BLOCK = 4096
"""Of memory and of nearly all disks; one that wants larger ones refuses, and is written to the usual way."""
_LEAST_NBYTES = 1 << 20
"""Smaller blobs go together and may be read soon; a call that waits for the disk is not worth it for them."""
_FLAG = getattr(os, "O_DIRECT", 0)
_REFUSED = {errno.EINVAL, errno.ENOTSUP}
_TRIED_NBYTES = 64 << 20
_SLOW = 100e6
"""Bytes a second and thread, below which the disk is what one waits for: reading back what is not in the cache would take as long again."""


def whole_blocks(offset: int, nbytes: int) -> slice:
    """Of `nbytes` that go to `offset` those that fill whole blocks of the file.

    >>> whole_blocks(4000, 10_000), whole_blocks(4096, 4096), whole_blocks(1, 4096)
    (slice(96, 8288, None), slice(0, 4096, None), slice(4095, 4095, None))
    """
    start = -offset % _BLOCK
    return slice(start, max(start, nbytes - (offset + nbytes) % _BLOCK))


class DirectWriting:
    """Of one file. It ends where the file system refuses it, or the disk turns out to be slow. For several threads."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError."""
        self._descriptor: int | None = None
        self._is_refused = False
        self._nbytes, self._seconds = 0, 0.0
        """That were written, and took. Threads may count past each other: then it is a little later found to be slow."""
        if _FLAG:
            try:
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | _FLAG)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise

    def write(self, usual: int, offset: int, data: bytes | memoryview, point: str) -> bool:
        """Write all of `data`, passing the crash point in the middle; False: it is to be written the usual way, all of it.

        `usual`: the same file, opened as usual. Raises: OSError.
        """
        descriptor = self._descriptor
        if descriptor is None or len(data) < _LEAST_NBYTES or self._is_refused or self._is_slow():
            return False
        whole, view = whole_blocks(offset, len(data)), memoryview(data)
        try:
            self._write_blocks(descriptor, offset + whole.start, view[whole], point)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._is_refused = True  # not closed here: other threads may be using it
            return False
        write_at(usual, offset, view[: whole.start])
        write_at(usual, offset + whole.stop, view[whole.stop :])
        return True

    def close(self) -> None:
        """Nobody may be writing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _is_slow(self) -> bool:
        return self._nbytes >= _TRIED_NBYTES and self._nbytes < self._seconds * _SLOW

    def _write_blocks(self, descriptor: int, offset: int, data: memoryview, point: str) -> None:
        half = len(data) // 2 // _BLOCK * _BLOCK
        with buffer() as view:
            aligned = view[: len(data)]
            aligned[:] = data
            began = time.perf_counter()
            write_at(descriptor, offset, aligned[:half])
            reach(point)
            write_at(descriptor, offset + half, aligned[half:])
            self._seconds += time.perf_counter() - began
        self._nbytes += len(data)
