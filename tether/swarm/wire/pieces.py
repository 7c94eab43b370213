"""Pure: large bodies travel in pieces, so that what is sent beside them need not wait, and are put together again."""

from __future__ import annotations

import io

from tether.errors import ProtocolError

__all__ = ["LEAST_NBYTES", "PIECE_NBYTES", "Body"]

PIECE_NBYTES = 128 * 1024
"""0.3 ms of encryption: a call behind it waits no longer."""
LEAST_NBYTES = 1024
"""All pieces but the last are at least this long, or a peer could make a million messages of one body."""
_RESERVED_NBYTES = 16 << 20
"""A buffer of zeros, which the system gives as they are written to, need not grow; beyond this one that does is good enough."""


class Body:
    """A body that comes in pieces; each byte is copied once. What was announced and has not come takes no memory."""

    __slots__ = ("_data", "missing_nbytes", "nbytes")

    def __init__(self, nbytes: int) -> None:
        """`nbytes`: as announced, and found to be allowed."""
        self.nbytes = self.missing_nbytes = nbytes
        self._data: io.BytesIO | None = io.BytesIO(bytes(min(nbytes, _RESERVED_NBYTES)))

    def add(self, piece: memoryview) -> bool:
        """Whether it is whole now. Raises: ProtocolError: the piece is more than was announced, or too small."""
        if len(piece) > self.missing_nbytes or len(piece) < min(LEAST_NBYTES, self.missing_nbytes):
            raise ProtocolError(f"a piece of {len(piece)} bytes of a body of which {self.missing_nbytes} are to come")
        if self._data is not None:
            self._data.write(piece)
        self.missing_nbytes -= len(piece)
        return not self.missing_nbytes

    def take(self) -> bytes:
        """All of it, once. The buffer itself, which `BytesIO` gives away without a copy."""
        return b"" if self._data is None else self._data.getvalue()

    def drop(self) -> None:
        """Nobody wants it: what still comes is counted and not kept."""
        self._data = None
