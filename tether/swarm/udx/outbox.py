"""Pure: what the application wrote and is not sent yet."""

from __future__ import annotations

from collections import deque

from tether.swarm.udx.wire import Buffer

__all__ = ["Outbox"]

_LARGE_NBYTES = 1 << 15
"""From which on a piece that is nearly what was asked for is given as it is: what follows it would have to be joined to it."""


class Outbox:
    """A queue of bytes that remembers how they came and gives them out in any size."""

    __slots__ = ("_pieces", "nbytes")

    def __init__(self) -> None:
        self._pieces: deque[Buffer] = deque()
        self.nbytes = 0
        """Bytes that wait."""

    def put(self, data: Buffer) -> None:
        """Append; the bytes are not copied, so they must not change until they are taken."""
        self._pieces.append(data)
        self.nbytes += len(data)

    def take(self, nbytes: int) -> Buffer:
        """The next bytes, at most `nbytes`: without a copy where one piece holds them, or, of many, nearly so many; then a few less."""
        first = self._part(nbytes)
        if len(first) == nbytes or not self._pieces or len(first) >= max(_LARGE_NBYTES, nbytes - nbytes // 16):
            return first
        parts = [first]
        missing = nbytes - len(first)
        while missing and self._pieces:
            parts.append(self._part(missing))
            missing -= len(parts[-1])
        return b"".join(parts)

    def clear(self) -> None:
        """Forget what waits."""
        self._pieces.clear()
        self.nbytes = 0

    def _part(self, nbytes: int) -> Buffer:
        """Of the first piece only."""
        piece = self._pieces[0]
        if len(piece) <= nbytes:
            self._pieces.popleft()
            self.nbytes -= len(piece)
            return piece
        view = memoryview(piece)
        self._pieces[0] = view[nbytes:]
        self.nbytes -= nbytes
        return view[:nbytes]
