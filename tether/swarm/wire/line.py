"""Protomux on a stream: sends together what one turn of the loop brings, and cuts a peer that asks and does not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tether.errors import ServiceUnavailableError, TetherError
from tether.ports import MessageStream
from tether.swarm.wire.link import Link
from tether.swarm.wire.protomux import Channel, Event, MuxLimits, Protomux

__all__ = ["Line"]

_MOST_NBYTES = 1 << 18
"""Queued in one turn of the loop; then it is sent, and the stream says whether it takes more."""


class Line(Link):
    """A connection and the channels on it."""

    def __init__(self, stream: MessageStream, max_unread_nbytes: int, limits: MuxLimits | None = None) -> None:
        """`max_unread_nbytes`: as of `Link`."""
        super().__init__(stream, max_unread_nbytes)
        self.mux = Protomux(limits)
        self._is_flush_due = False
        self._turn = asyncio.Lock()
        self._on_event: Callable[[Event], None]

    def open(self, on_event: Callable[[Event], None], on_closed: Callable[[TetherError], None]) -> None:
        """Begin, and send what the mux has to say. As `start`, for what the frames hold."""
        self._on_event = on_event
        self.start(self._on_message, on_closed)
        self._flush()

    def post(self, channel: Channel, message: bytes) -> None:
        """Queue a message; it leaves in this turn of the loop, with the others. Only for small ones: nothing holds them back."""
        self.mux.send(channel, message)
        if self.mux.queued_nbytes > _MOST_NBYTES:
            self._flush()  # so that who sends many sees when to wait
        elif not self._is_flush_due:
            self._is_flush_due = True
            self.loop.call_soon(self._flush)

    @property
    def is_free(self) -> bool:
        """Whether there is room and nobody waits for some."""
        return self._room.is_set() and not self._turn.locked()

    def post_now(self, channel: Channel, message: bytes) -> bool:
        """Send a large message if the line is free; False: `post_large` it."""
        if not self.is_free:
            return False
        self.mux.send(channel, message)
        self._flush()  # so that the next one sees whether there is room left
        return True

    @asynccontextmanager
    async def turn(self, patience: float | None = None) -> AsyncIterator[None]:
        """Wait until the stream takes more: those who wait for that do so in turn. What is sent within goes out after it.

        `patience`: seconds, once it is one's turn, after which the peer is cut. Raises: TetherError: the connection ended.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(patience):
                    await self.clear()
            except TimeoutError:
                self.cut(ServiceUnavailableError(f"it asks and took nothing for {patience:g} s"))
                raise self.why() from None
            yield
            self._flush()
        await asyncio.sleep(0)  # whoever found no room meanwhile waits again before us: else one large body would go before all small ones

    async def post_large(self, channel: Channel, message: bytes, patience: float | None = None) -> None:
        """Send it in turn; `patience` as of `turn`. Raises: TetherError: the connection ended."""
        async with self.turn(patience):
            self.mux.send(channel, message)

    def _on_message(self, frame: memoryview) -> None:
        self._is_flush_due = True  # below, with all answers that were ready at once
        try:
            for event in self.mux.receive(frame):
                self._on_event(event)
                if self.closed.is_set():
                    return
        finally:
            self._flush()

    def _flush(self) -> None:
        self._is_flush_due = False
        for frame in self.mux.take():
            self.send(frame)

    def _before_end(self) -> None:
        self._flush()
