"""Large request bodies in memory that a gateway shares with the workers of its host: written once, read in place (FASTPATH.md §2).

One ring belongs to one gateway, which alone gives out blocks: two writers would hand out the same bytes twice.
"""

from __future__ import annotations

import mmap
import os

__all__ = ["RING_FROM_NBYTES", "Ring", "RingView"]

RING_FROM_NBYTES = 64 << 10
"""Bodies from this size go through the ring; below it the socket is as fast."""
_PAGE = 4096


class Ring:
    """The writer's side. Pages are taken from the system as they are first touched, lowest offsets first."""

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("tether-ring", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, nbytes)
        self._map = mmap.mmap(self.fd, nbytes)
        self._view = memoryview(self._map)
        self._free = [(0, nbytes)]

    def put(self, body: bytes) -> int | None:
        """Copy `body` in; its offset, or None when no block is free (it then travels in the frame)."""
        nbytes = _pages(len(body))
        for index, (offset, length) in enumerate(self._free):
            if length >= nbytes:
                if length == nbytes:
                    del self._free[index]
                else:
                    self._free[index] = (offset + nbytes, length - nbytes)
                self._view[offset : offset + len(body)] = body
                return offset
        return None

    def give_back(self, offset: int, nbytes: int) -> None:
        """The reader is done with a block of `nbytes` body bytes."""
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (offset, _pages(nbytes))]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged

    def close(self) -> None:
        """Unmap; readers keep their own mapping."""
        self._view.release()
        self._map.close()
        os.close(self.fd)


class RingView:
    """The reader's side: maps the descriptor that the gateway sent."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ)
        self._view = memoryview(self._map)

    def block(self, offset: int, nbytes: int) -> memoryview:
        """A body in place; read-only, valid until the reply is sent."""
        return self._view[offset : offset + nbytes]

    def close(self) -> None:
        """Unmap, once no array looks into it any more; until then the mapping stays with those arrays."""
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            pass  # an array still views a block: the mapping is freed with it


def _pages(nbytes: int) -> int:
    return (nbytes + _PAGE - 1) & ~(_PAGE - 1)
