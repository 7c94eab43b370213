"""An answer that goes out as it is made: in pieces that others pass, and no faster than the peer takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tether.errors import InternalError, PayloadTooLargeError, RequestTimeoutError
from tether.swarm.rpc.bodies import AHEAD_NBYTES, Allowance, Chunk, Cutter, Piece
from tether.swarm.rpc.messages import MESSAGE_NBYTES, CallMessage, encode_call
from tether.swarm.wire.compact import uint
from tether.swarm.wire.line import Line
from tether.swarm.wire.pieces import PIECE_NBYTES
from tether.swarm.wire.protomux import Channel

__all__ = ["Reply"]


class Reply:
    """Of one request."""

    def __init__(self, line: Line, beside: Channel, request_id: int, keep: Callable[[int], None], patience: float) -> None:
        """`keep` is told of its size, and raises if it is too large. `patience`: seconds in which the peer has to take more of it."""
        self._line, self._beside, self._request_id = line, beside, request_id
        self._keep, self._patience = keep, patience
        self._allowance = Allowance(AHEAD_NBYTES)
        self._cutter = Cutter()
        self._whole: list[Chunk] = []
        self._nbytes = self._written = 0
        self._goes_in_pieces = False

    async def begin(self, nbytes: int) -> None:
        """It has so many bytes. Raises: PayloadTooLargeError, QueueFullError."""
        self._nbytes = nbytes
        self._keep(nbytes)
        if self._request_id and nbytes > PIECE_NBYTES and self._beside.opened and not self._beside.closed:
            self._goes_in_pieces = True
            self._line.post(self._beside, encode_call(CallMessage.RESPONSE, self._request_id, uint(nbytes)))
        elif nbytes > MESSAGE_NBYTES:
            raise PayloadTooLargeError(
                f"the answer has {nbytes} bytes, and a peer that takes no pieces, as npm's @hyperswarm/rpc alone, can have {MESSAGE_NBYTES}"
            )

    async def write(self, chunk: Chunk) -> None:
        """The next of it. Raises: RequestTimeoutError: the peer does not take it; TetherError: the connection ended."""
        self._written += len(chunk)
        if self._written > self._nbytes:
            raise InternalError(f"an answer of {self._nbytes} bytes goes on behind its end: please report it")
        if not self._goes_in_pieces:
            self._whole.append(chunk)
            return
        for piece in self._cutter.add(chunk):
            await self._post(piece)

    async def finish(self) -> bytes | None:
        """That was all of it. What is to be sent whole is returned. Raises: InternalError: there is more to come; as `write`."""
        if self._written != self._nbytes:
            raise InternalError(f"an answer of {self._nbytes} bytes ends after {self._written}: please report it")
        if not self._goes_in_pieces:
            return b"".join(self._whole)
        if last := self._cutter.rest():
            await self._post(last)
        return None

    def grant(self, nbytes: int) -> None:
        """The peer takes so much more."""
        self._allowance.grant(nbytes)

    async def _post(self, piece: Piece) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await self._allowance.spend(sum(map(len, piece)))
        except TimeoutError as error:
            raise RequestTimeoutError(f"nothing of the answer was taken for {self._patience:g} s: the rest is not sent") from error
        await self._line.post_large(self._beside, encode_call(CallMessage.RESPONSE_PIECE, self._request_id, *piece), self._patience)
