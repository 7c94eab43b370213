"""Memory for arrays that are made here: from the system in large pieces, and used again as soon as nobody holds what was in it.

New memory costs more than what is done with it: the system clears each page, and the host of a virtual machine may have to find it first.
So a load takes no more than its consumer holds at one time. What nobody can reach any more Python knows: each array is made over a
`_Lease`, which every view, slice, memoryview and foreign tensor that comes of the array keeps. Its end gives the memory back, by the rule
by which an array's memory goes back to the system everywhere else; here the next array gets it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from tether.store.packing.parallel import new_memory

__all__ = ["ArrayMemory"]

Bytes = npt.NDArray[np.uint8]
_Shelf = deque[memoryview]

APART = 1 << 18
"""For arrays that go one by one: how much small ones share. Who keeps a bias of a hundred bytes keeps this much."""
TOGETHER = 1 << 25
"""For arrays that are held together: large pages are filled to the end, and few mappings are made. A kept array keeps this much."""
_HUGE = 1 << 21
"""Bytes of a large page."""
_PAGE = 1 << 12
_ALIGNED = 64
"""Where an array begins: what vector units and other libraries ask for."""
_SHARE = 4
"""Arrays of at least this part of what is shared have memory of their own."""
_IDLE_NBYTES = 1 << 26
"""Of one size that may lie idle: a consumer that held many arrays and drops them all gets the rest back for others."""
_IDLE = 2
"""Pieces of one size that may, however large: one is dropped when the next but one is begun."""


class _Block:
    """A piece of memory in use. Its end, in whatever thread, gives it back."""

    __slots__ = ("_home", "_memory", "_shelf", "address")

    def __init__(self, memory: memoryview, shelf: _Shelf, home: ArrayMemory) -> None:
        self._memory, self._shelf, self._home = memory, shelf, home
        self.address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def __del__(self) -> None:
        # No lock: the collector may call this within any line of any thread. Each step is one operation of a deque, and what is put
        # down after `close` looked is seen here.
        self._shelf.append(self._memory)
        if self._home.is_closed:
            self._shelf.clear()


class _Lease:
    """A range of a block for one array. NumPy asks for its interface and keeps it with the array and all that is made of that."""

    __slots__ = ("__array_interface__", "_block")

    def __init__(self, block: _Block, offset: int, nbytes: int) -> None:
        self._block = block
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (block.address + offset, False),
        }


class ArrayMemory:
    """The memory of one load. `take` is for one thread; arrays may end in any."""

    def __init__(self, shared: int, nbytes: int) -> None:
        """`shared`: how much small arrays share, in bytes, `nbytes`: of all that are to come."""
        self.is_closed = False
        self._shared, self._left = shared, nbytes
        self._shelves: dict[int, _Shelf] = {}
        self._open: _Block | None = None
        """The block that small arrays come from, its first `_used` bytes taken."""
        self._used = 0

    def take(self, nbytes: int) -> Bytes:
        """A writable array; what it holds is undefined. Once it, and all that was made of it, is gone, another gets the memory."""
        left, self._left = self._left, self._left - nbytes
        if nbytes * _SHARE >= self._shared:
            return np.asarray(_Lease(self._block(nbytes), 0, nbytes))
        if self._open is None or self._used + nbytes > self._open.nbytes:
            self._open, self._used = None, 0  # first: if nobody holds the old one it is the new one
            self._open = self._block(max(nbytes, min(self._shared, left)))
        offset, self._used = self._used, self._used + nbytes + -nbytes % _ALIGNED
        return np.asarray(_Lease(self._open, offset, nbytes))

    def close(self) -> None:
        """What lies idle goes back to the system now, and what is in use as soon as it is dropped."""
        self.is_closed = True
        self._open = None
        self._forget()

    def _block(self, nbytes: int) -> _Block:
        size = _rounded(nbytes)
        shelf = self._shelves.get(size)
        if shelf is None:
            shelf = self._shelves[size] = deque(maxlen=max(_IDLE, _IDLE_NBYTES // size))
        try:
            memory = shelf.pop()  # the last that came back: perhaps it is still in the processor's cache
        except IndexError:
            self._forget()  # before more is taken: a load never has more than was held at one time
            memory = new_memory(size, large=nbytes - nbytes % _HUGE)
        return _Block(memory, shelf, self)

    def _forget(self) -> None:
        for shelf in self._shelves.values():
            shelf.clear()


def _rounded(nbytes: int) -> int:
    """The size of the block: alike for arrays that are nearly alike, whole pages, large ones from 2 MiB on.

    What is added, up to an eighth or a page, is never touched and so costs nothing.
    """
    step = max(_HUGE if nbytes >= _HUGE else _PAGE, 1 << max(0, nbytes.bit_length() - 4))
    return max(step, nbytes + -nbytes % step)
