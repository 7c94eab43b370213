"""Bodies that are passed on as they come: no side holds more of one than a window, however large it is."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from typing import Self

from tether.errors import InternalError, MalformedRequestError, ProtocolError, TetherError
from tether.swarm.wire.pieces import LEAST_NBYTES, PIECE_NBYTES

__all__ = ["AHEAD_NBYTES", "WINDOW_NBYTES", "Allowance", "Chunk", "Cutter", "Incoming", "Outgoing", "Piece", "Room"]

AHEAD_NBYTES = 1 << 20
"""A request over it is asked for first, and so much of an answer goes unasked: below, a round trip costs more than the memory."""
WINDOW_NBYTES = 8 << 20
"""Of a body, that may be here and not taken: 80 MB/s where a round trip takes 100 ms."""
_STEP_NBYTES = WINDOW_NBYTES // 8
"""Taken before the other side is told: a message for each piece would be one for nothing."""

Chunk = bytes | memoryview
Piece = tuple[Chunk, ...]
"""Of a body, as it goes out: parts that are one behind the other."""


class Incoming:
    """A body that comes, for one reader, once. Belongs to a loop."""

    def __init__(self, nbytes: int, grant: Callable[[int], None], ahead: int = 0) -> None:
        """`nbytes`: of all of it. `grant`: tells who sends it of room for so much more; `ahead`: may come before it was told of any."""
        self.nbytes = nbytes
        self._grant = grant
        self._allowed, self._came, self._taken = min(ahead, nbytes), 0, 0
        self._chunks = deque[bytes]()
        self._error: TetherError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_closed = False

    @classmethod
    def whole(cls, data: bytes) -> Self:
        """One that came whole."""
        body = cls(len(data), lambda _: None, len(data))
        body._came = len(data)
        body._chunks.extend([data] if data else [])
        return body

    @property
    def left_nbytes(self) -> int:
        """That were not taken yet, come or not."""
        return self.nbytes - self._taken

    @property
    def is_awaited(self) -> bool:
        """Whether who sends it may send more of it, and has not yet."""
        return self._came < self._allowed and not self._is_closed

    # --- what comes

    def open(self) -> None:
        """Let it come."""
        self._give()

    def feed(self, piece: memoryview) -> bool:
        """A piece, which is copied; whether it was the last. Raises: ProtocolError: more than there was room for, or too small."""
        nbytes = len(piece)
        if nbytes > self._allowed - self._came or nbytes < min(LEAST_NBYTES, self.nbytes - self._came):
            raise ProtocolError(f"a piece of {nbytes} bytes of a body of which {self._allowed - self._came} may come")
        self._came += nbytes
        if not self._is_closed:
            self._chunks.append(bytes(piece))
            self._wake()
        return self._came == self.nbytes

    def fail(self, error: TetherError) -> None:
        """No more of it comes: whoever takes it is told why."""
        self._error = self._error or error
        self._wake()

    def close(self) -> None:
        """Nobody takes it any more: what still comes is counted and not kept."""
        self._is_closed = True
        self._chunks.clear()

    # --- who takes it

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """What there is of it next. Raises: TetherError: why the rest does not come."""
        while not self._chunks:
            if self._taken == self.nbytes:
                raise StopAsyncIteration
            if self._error is not None:
                raise type(self._error)(*self._error.args)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._take(self._chunks.popleft())

    async def read(self, nbytes: int) -> bytes:
        """Exactly so many. Raises: MalformedRequestError: there are not so many; as `__anext__`."""
        if nbytes > self.left_nbytes:
            raise MalformedRequestError(f"the body ends {nbytes - self.left_nbytes} bytes before what it announces does")
        parts = []
        while nbytes:
            chunk = await anext(self)
            if len(chunk) > nbytes:
                self._taken -= len(chunk) - nbytes
                self._chunks.appendleft(chunk[nbytes:])
                chunk = chunk[:nbytes]
            parts.append(chunk)
            nbytes -= len(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def rest(self) -> bytes:
        """All that is left of it. Raises: as `__anext__`."""
        return await self.read(self.left_nbytes)

    def _take(self, chunk: bytes) -> bytes:
        self._taken += len(chunk)
        self._give()
        return chunk

    def _give(self) -> None:
        """Room for what was taken, and at first for a window."""
        allowed = min(self._taken + WINDOW_NBYTES, self.nbytes)
        more = allowed - self._allowed
        if more >= _STEP_NBYTES or (more > 0 and allowed == self.nbytes):
            self._allowed = allowed
            self._grant(more)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Outgoing:
    """A body to send, of so many bytes: out of memory as often as one likes, as it comes from elsewhere once."""

    def __init__(self, nbytes: int, chunks: AsyncIterable[Chunk] | Piece) -> None:
        self.nbytes = nbytes
        self._chunks = chunks
        self._is_begun = False

    @classmethod
    def of(cls, *chunks: Chunk) -> Self:
        """One that lies in memory, in parts."""
        return cls(sum(map(len, chunks)), chunks)

    @property
    def can_be_sent(self) -> bool:
        """Whether nothing of it was given away that can't be had again."""
        return isinstance(self._chunks, tuple) or not self._is_begun

    async def pieces(self) -> AsyncGenerator[Piece]:
        """It, cut. Raises: what its source does; InternalError: that ends before, or goes on behind its end."""
        self._is_begun = True
        came, chunks = 0, _each(self._chunks) if isinstance(self._chunks, tuple) else self._chunks
        async for piece in _cut(chunks):
            came += sum(map(len, piece))
            if came > self.nbytes:
                break
            yield piece
        if came != self.nbytes:
            raise InternalError(f"a body of {self.nbytes} bytes was announced, and {came} came: please report it")


async def _each(chunks: Piece) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk


async def _cut(chunks: AsyncIterable[Chunk]) -> AsyncIterator[Piece]:
    """Chunks of any size as pieces."""
    cutter = Cutter()
    async for chunk in chunks:
        for piece in cutter.add(chunk):
            yield piece
    if last := cutter.rest():
        yield last


class Cutter:
    """Pure: chunks of any size in, pieces of `PIECE_NBYTES` out. Nothing is copied."""

    def __init__(self) -> None:
        self._waiting: list[Chunk] = []
        self._missing = PIECE_NBYTES

    def add(self, chunk: Chunk) -> Iterator[Piece]:
        """The pieces that it fills."""
        view = memoryview(chunk)
        while len(view) >= self._missing:
            piece = (*self._waiting, view[: self._missing])
            view, self._waiting, self._missing = view[self._missing :], [], PIECE_NBYTES
            yield piece
        if len(view):
            self._waiting.append(view)
            self._missing -= len(view)

    def rest(self) -> Piece:
        """The last one; empty if there is none."""
        return tuple(self._waiting)


class Allowance:
    """How much of a body its other side takes now."""

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes
        self._waiter: asyncio.Future[None] | None = None

    def grant(self, nbytes: int) -> None:
        """It takes so much more."""
        self._left += nbytes
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, nbytes: int) -> None:
        """Wait until it takes so much."""
        while self._left < nbytes:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def spend(self, nbytes: int) -> None:
        """As `wait`, and send it."""
        await self.wait(nbytes)
        self._left -= nbytes


class Room:
    """So many bytes, given to those who ask for some of them, in turn."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = self.free_nbytes = nbytes
        self._waiting = deque[tuple[int, asyncio.Future[None]]]()

    async def take(self, nbytes: int) -> None:
        """Wait for them; at most all that there is."""
        if not self._waiting and nbytes <= self.free_nbytes:
            self.free_nbytes -= nbytes
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.give_back(nbytes)
            self._serve()  # without this one
            raise

    def give_back(self, nbytes: int) -> None:
        """They are free again."""
        self.free_nbytes += nbytes
        self._serve()

    def resize(self, nbytes: int) -> None:
        """Another number of bytes from now on; what was taken stays so."""
        more, self.nbytes = nbytes - self.nbytes, nbytes
        self.give_back(more)

    def _serve(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self._waiting[0][0] <= self.free_nbytes):
            nbytes, turn = self._waiting.popleft()
            if not turn.cancelled():
                self.free_nbytes -= nbytes
                turn.set_result(None)
