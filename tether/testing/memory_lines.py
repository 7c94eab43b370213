"""Streams of a swarm in memory: what passes between two nodes, as slow as their line is, and not at all while one of them is away."""

# ruff: noqa: SLF001 (the two ends are one thing)

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tether.errors import ProtocolError, StreamLostError
from tether.swarm.engine.secure import MAX_MESSAGE, Route
from tether.testing.streams import MemoryStream

__all__ = ["Line", "LineStream", "line_pair"]

_NO_RATE = float("inf")


@dataclass(eq=False)
class Line:
    """What all streams between two nodes share. Its switches may be turned at any time."""

    latency: float = 0.0
    """Seconds that a message needs, one way."""
    nbytes_per_second: float = _NO_RATE
    """Of all streams together, each way."""
    is_down: Callable[[], bool] = field(default=lambda: False)
    """Whether nothing passes."""
    streams: dict[LineStream, None] = field(default_factory=dict)
    """Both ends of each that is open at one of them at least."""
    free_at: dict[str, float] = field(default_factory=dict)
    """By the key that it goes to: when all that was begun has been sent."""

    def changed(self) -> None:
        """It went down, or is up again."""
        for stream in list(self.streams):
            stream.look()


class LineStream(MemoryStream):
    """`swarm.held.PeerStream`: one end of a stream, as a `Node` has it of the real network."""

    other: LineStream

    def __init__(self, peer: str, line: Line, idle: float, *, is_initiator: bool) -> None:
        """`idle`: seconds for which nothing may come, while the line is down, until this end gives up."""
        super().__init__(peer, is_initiator=is_initiator)
        self.route: Route = "direct"
        self.remote_address: tuple[str, int] | None = None
        self.carrier: object = None
        """No UDX stream: nothing can be relayed here."""
        self.max_message_nbytes = MAX_MESSAGE
        self._line, self._idle = line, idle
        self._sent_at = deque[float]()
        self._came = 0
        self._giving_up: asyncio.TimerHandle | None = None
        line.streams[self] = None

    @property
    def rtt(self) -> float:
        """Of the line."""
        return 2 * self._line.latency

    @property
    def pulse(self) -> tuple[int, bool]:
        """What came so far, and whether the peer owes a sign of life: any keep-alive makes it do so within seconds."""
        return self._came, self.is_stalled

    @property
    def is_stalled(self) -> bool:
        """Whether nothing passes: the line is down, or the other end has gone without a word that came."""
        return self._line.is_down() or self.other.closed

    def poke(self) -> None:
        """Answered at once, where the line is up."""
        self._came += not self.is_stalled

    def look(self) -> None:
        """Whether something passes may have changed."""
        if self.closed:
            return
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        if self.is_stalled:
            self._giving_up = asyncio.get_running_loop().call_later(self._idle, self._give_up)
        else:
            self._came += 1
            self._pump_soon()

    def send(self, message: bytes | bytearray | memoryview) -> bool:
        """Queue a copy."""
        if not (self.closed or self._ended):
            self._sent_at.append(asyncio.get_running_loop().time())
        return super().send(message)

    def destroy(self) -> None:
        """Cut it: the other end is told, if the line is up."""
        self._close(StreamLostError("The stream was cut on this side.", "ECANCELED"))
        if not self._line.is_down():
            self.other._close(StreamLostError(f"The stream to {self.other.peer[:12]}… broke (ECONNRESET); connect again.", "ECONNRESET"))
        self.other.look()

    def _close(self, error: Exception | None) -> None:
        super()._close(error)
        self._line.streams.pop(self, None)
        if self._giving_up is not None:
            self._giving_up.cancel()

    def _give_up(self) -> None:
        code = "ETIMEDOUT"
        self._close(StreamLostError(f"Nothing came from {self.peer[:12]}… for {self._idle:g} s; connect again.", code))
        self.other.look()

    def _pump(self) -> None:
        if self.is_stalled:
            self._pumping = False
            return
        super()._pump()

    def _wait(self) -> float:
        """As the line is: messages follow each other on it, so that latency costs the first of many alone."""
        line = self._line
        if line.latency == 0.0 and line.nbytes_per_second == _NO_RATE:
            return 0.0
        if self._arrives is None:
            begins = max(self._sent_at[0], line.free_at.get(self.peer, 0.0))
            self._arrives = line.free_at[self.peer] = begins + len(self._queue[0]) / line.nbytes_per_second
        return max(self._arrives + line.latency - asyncio.get_running_loop().time(), 0.0)

    def _deliver(self, message: bytes) -> None:
        self._sent_at.popleft()
        self._came += 1
        self.other._came += 1
        if len(message) > self.other.max_message_nbytes:
            self.other._violated(len(message))
        else:
            super()._deliver(message)

    def _violated(self, nbytes: int) -> None:
        self._close(ProtocolError(f"a message of {nbytes} bytes is over the {self.max_message_nbytes} that {self.peer} may send"))
        self.destroy()


def line_pair(initiator: str, responder: str, line: Line, idle: tuple[float, float]) -> tuple[LineStream, LineStream]:
    """The two ends of a stream on a line, as `stream_pair`; `idle` of each."""
    first = LineStream(responder, line, idle[0], is_initiator=True)
    second = LineStream(initiator, line, idle[1], is_initiator=False)
    first.other, second.other = second, first
    return first, second
