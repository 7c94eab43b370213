"""Two ends of a secure stream in memory, which can be slow, cut off, or have little room."""

# ruff: noqa: SLF001 (the two ends are one thing)

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from tether.errors import ServiceUnavailableError

__all__ = ["INITIATOR", "RESPONDER", "MemoryStream", "stream_pair"]

INITIATOR, RESPONDER = "11" * 32, "22" * 32
"""Public keys of the two ends, unless others are given."""
_QUEUE_NBYTES = 1 << 18
_NEXT_TURN = 1e-9
_TURN_NBYTES = 1 << 20
"""Delivered in one turn of the loop; the rest waits, as it would on a socket."""


class MemoryStream:
    """`ports.MessageStream` to another one in the same loop. Its switches, which act on what it sends, may be turned at any time."""

    def __init__(self, peer: str, *, is_initiator: bool) -> None:
        self._peer, self._is_initiator = peer, is_initiator
        self.other: MemoryStream
        self.nbytes_per_second = float("inf")
        self.queue_nbytes = _QUEUE_NBYTES
        """`send` answers False while more than this waits."""
        self.scrub = True
        """Whether a message is overwritten once its call returned: whoever kept it is found out."""
        self.queued_nbytes = 0
        """Sent and not delivered."""
        self.most_queued_nbytes = 0
        self.sent_messages = 0
        self.sent_nbytes = 0
        self.closed = False
        self.error: Exception | None = None
        self._queue = deque[bytes]()
        self._on_message: Callable[[memoryview], None] | None = None
        self._on_end: Callable[[], None] = _nothing
        self._on_close: Callable[[Exception | None], None] = _nothing
        self._paused = False
        self._ended = False
        self._end_told = False
        self._pumping = False
        self._arrives: float | None = None
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def peer(self) -> str:
        """The other end's key."""
        return self._peer

    @property
    def is_initiator(self) -> bool:
        """As `stream_pair` made it."""
        return self._is_initiator

    def start(
        self, on_message: Callable[[memoryview], None], on_end: Callable[[], None], on_close: Callable[[Exception | None], None]
    ) -> None:
        """Deliver, from the next turn of the loop on."""
        self._on_message, self._on_end, self._on_close = on_message, on_end, on_close
        self.other._pump_soon()
        if self.closed:
            asyncio.get_running_loop().call_soon(on_close, self.error)

    def send(self, message: bytes | bytearray | memoryview) -> bool:
        """Queue a copy."""
        if self.closed or self._ended:
            return True
        self._queue.append(bytes(message))
        self.sent_messages += 1
        self.sent_nbytes += len(message)
        self.queued_nbytes += len(message)
        self.most_queued_nbytes = max(self.most_queued_nbytes, self.queued_nbytes)
        self._pump_soon()
        return self.queued_nbytes <= self.queue_nbytes

    async def drained(self) -> None:
        """Wait until the queue is short. Raises: ServiceUnavailableError."""
        while self.queued_nbytes > self.queue_nbytes and not self.closed:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        if self.closed:
            raise ServiceUnavailableError(f"the stream to {self._peer[:8]}… closed")

    def pause(self) -> None:
        """Keep what comes with the other end."""
        self._paused = True

    def resume(self) -> None:
        """Deliver again."""
        self._paused = False
        self.other._pump_soon()

    def end(self) -> None:
        """Send no more."""
        self._ended = True
        self._pump_soon()

    def destroy(self) -> None:
        """Cut both directions; what is on its way is lost."""
        self.cut(None)

    def cut(self, error: Exception | None) -> None:
        """As `destroy`, or as when the network is gone: both ends are told of the error."""
        for stream in (self, self.other):
            stream._close(error)

    def _close(self, error: Exception | None) -> None:
        if self.closed:
            return
        self.closed, self.error, self.queued_nbytes = True, error, 0
        self._queue.clear()
        self._wake()
        if self._on_message is not None:
            asyncio.get_running_loop().call_soon(self._on_close, error)

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    def _pump_soon(self, delay: float = 0.0) -> None:
        if self._pumping or self.closed:
            return
        self._pumping = True
        loop = asyncio.get_running_loop()
        if delay:
            loop.call_later(delay, self._pump)
        else:
            loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        nbytes = 0
        while self._queue and self.other._on_message is not None and not self.other._paused:
            wait = 0.0 if nbytes < _TURN_NBYTES else _NEXT_TURN
            wait = self._wait() or wait
            if wait:
                self._pump_soon(wait)
                return
            message = self._queue.popleft()
            nbytes += len(message)
            self._arrives = None
            self._deliver(message)
        if self._ended and not self._queue and not self.closed:
            self._tell_end()

    def _wait(self) -> float:
        """Seconds until the line has carried the next message."""
        if self.nbytes_per_second == float("inf"):
            return 0.0
        now = asyncio.get_running_loop().time()
        if self._arrives is None:
            self._arrives = now + len(self._queue[0]) / self.nbytes_per_second
        return max(self._arrives - now, 0.0)

    def _deliver(self, message: bytes) -> None:
        self.queued_nbytes -= len(message)
        if self.queued_nbytes <= self.queue_nbytes:
            self._wake()
        assert self.other._on_message is not None
        if not self.scrub:
            self.other._on_message(memoryview(message))
            return
        buffer = bytearray(message)
        try:
            self.other._on_message(memoryview(buffer))
        finally:
            buffer[:] = b"\xee" * len(buffer)

    def _tell_end(self) -> None:
        if not self._end_told and self.other._on_message is not None:
            self._end_told = True
            self.other._on_end()
        if self._end_told and self.other._end_told:
            self.cut(None)


def _nothing(*_: object) -> None:
    pass


def stream_pair(initiator: str = INITIATOR, responder: str = RESPONDER) -> tuple[MemoryStream, MemoryStream]:
    """The two ends: the one that opened the stream, and the one that was asked. Keys are hex."""
    first, second = MemoryStream(responder, is_initiator=True), MemoryStream(initiator, is_initiator=False)
    first.other, second.other = second, first
    return first, second
