"""From this gateway to one model of one worker: frames over a Unix socket, large bodies in the ring (FASTPATH.md §2).

What goes to an endpoint in one tick of the loop leaves in one frame. A lent worker's endpoint is served by the manager, on the same host.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from typing import cast

from tether.ports import Endpoint, Hop, HopReply, OnReply, OpenStream, Undelivered
from tether.wire.frames import ALONE, INLINE, LEAVING, OK, PART, PARTS, UNDELIVERED, FrameReader, FrameWriter, Head
from tether.wire.ring import RING_FROM_NBYTES, Ring

__all__ = ["UnixTransport"]

_UNFELT_US = 1000
"""Microseconds that requests may take which are there already, so that one more does not feel them: it shares a batch with them, and costs
half of what it does alone. Where a worker that sleeps had to wake for it, it would be answered no sooner."""
_LATELY = 0.02
"""Seconds since the last answer in which that is believed: a worker that stands still is not to be given all that its pace allows."""
_Waiting = tuple[OnReply, int, int]
"""Whom to tell; ring offset and size of the body, or INLINE."""


class UnixTransport(asyncio.BufferedProtocol):
    """One endpoint. Connects at once in the background; what is sent before is kept until then."""

    def __init__(self, endpoint: Endpoint, ring: Ring | None) -> None:
        self._endpoint, self._ring = endpoint, ring
        self._reader, self._writer = FrameReader(), FrameWriter()
        self._waiting: dict[int, _Waiting] = {}
        self._on_part: dict[int, Callable[[HopReply], None]] = {}
        """Of the requests whose answers come in parts."""
        self._next_id = 0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._due = False
        self._connected = False
        self.closed = False
        self._pace_us = 0
        """Microseconds that a request takes there; 0: not known."""
        self._heard = -math.inf
        """When it answered last."""
        self._leaving = False
        """Whether the model is to be freed there: what was sent is answered, and then the connection is of no use."""
        self._connecting = self._loop.create_task(self._connect())

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet answered."""
        return len(self._waiting)

    @property
    def load(self) -> int:
        """`in_flight`, as far as one more would feel them: of a model that answers in microseconds a few are none."""
        in_flight = len(self._waiting)
        if not in_flight or not self._pace_us or in_flight * self._pace_us > _UNFELT_US:
            return in_flight
        return 0 if self._loop.time() - self._heard < _LATELY else in_flight

    async def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            await self._loop.sock_connect(sock, self._endpoint)
            if self._ring is None:
                sock.send(b"-")
            else:
                socket.send_fds(sock, [b"R"], [self._ring.fd])
            await self._loop.create_unix_connection(lambda: self, sock=sock)
        except OSError:
            sock.close()
            self._lost()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # of a stream; uvloop's transports are no subclasses of asyncio's
        self._connected = True
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        self._lost()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (asyncio's signature)
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        frame = self._reader.received(nbytes)
        for head, payload in frame:
            if head.status == PART:
                self._part(head, payload)
                continue
            waiting = self._waiting.pop(head.id, None)
            if waiting is None:
                self._leaving |= head.status == LEAVING
                continue
            on_reply, offset, size = waiting
            self._give_back(offset, size)
            reason = UNDELIVERED.get(head.status)
            on_reply(HopReply(head.status, bytes(payload), head.header_nbytes) if reason is None else reason)
        if frame and frame[-1][0].timeout_ms:
            self._pace_us, self._heard = frame[-1][0].timeout_ms, self._loop.time()
        frame.clear()
        self._reader.release()
        if self._leaving and not self._waiting:
            self.close()

    def send(self, hop: Hop, on_reply: OnReply) -> Callable[[], None]:
        """Send it; never blocks. The returned function abandons it: `on_reply` will not be called any more."""
        if self.closed or self._leaving:
            self._loop.call_soon(on_reply, Undelivered.NOT_SENT)
            return _nothing
        request_id = self._post(hop, on_reply)
        return lambda: self._abandon(request_id)

    def stream(self, hop: Hop, on_part: Callable[[HopReply], None], on_reply: OnReply) -> OpenStream:
        """As `Transport.stream`."""
        if self.closed or self._leaving:
            self._loop.call_soon(on_reply, Undelivered.NOT_SENT)
            return OpenStream(_nothing, _nothing)

        def ended(reply: HopReply | Undelivered) -> None:
            self._on_part.pop(request_id, None)
            on_reply(reply)

        request_id = self._post(hop, ended, PARTS)
        self._on_part[request_id] = on_part
        return OpenStream(lambda: self._abandon(request_id), lambda: self._taken(request_id))

    def _post(self, hop: Hop, on_reply: OnReply, flags: int = 0) -> int:
        """The id of the request, which leaves soon. A stream may hold a block of the ring for ever, so it gets none."""
        self._next_id = request_id = (self._next_id + 1) & 0xFFFFFFFF or 1
        body, offset = hop.body, INLINE
        if self._ring is not None and len(body) >= RING_FROM_NBYTES and not flags:
            block = self._ring.put(body)
            offset = INLINE if block is None else block
        self._waiting[request_id] = (on_reply, offset, len(body))
        timeout_ms, flags = min(int(hop.timeout * 1000), 0xFFFFFFFF), flags | (ALONE if hop.alone else 0)
        self._writer.request(request_id, body, hop.header_nbytes, timeout_ms, offset, flags)
        self._flush_soon()
        return request_id

    def _flush_soon(self) -> None:
        if self._writer.is_full:
            self._flush()
        elif not self._due:
            self._due = True
            self._loop.call_soon(self._flush)

    def _abandon(self, request_id: int) -> None:
        """The worker may still be reading the body: its block comes back with the reply."""
        waiting = self._waiting.get(request_id)
        if waiting is not None:
            self._waiting[request_id] = (_ignore, waiting[1], waiting[2])
            self._on_part.pop(request_id, None)
            self._writer.withdraw(request_id)
            self._flush_soon()

    def _part(self, head: Head, payload: memoryview) -> None:
        on_part = self._on_part.get(head.id)
        if on_part is not None:
            on_part(HopReply(OK, bytes(payload), head.header_nbytes))

    def _taken(self, request_id: int) -> None:
        if request_id in self._on_part:
            self._writer.taken(request_id)
            self._flush_soon()

    def _flush(self) -> None:
        if self._transport is None:
            return
        self._due = False
        if self._writer:
            for part in self._writer.take():
                self._transport.write(part)

    def _give_back(self, offset: int, nbytes: int) -> None:
        if offset != INLINE and self._ring is not None:
            self._ring.give_back(offset, nbytes)

    def _lost(self) -> None:
        """Blocks return at once: a dead worker does not read."""
        self.closed, self._transport = True, None
        reason = Undelivered.LOST if self._connected else Undelivered.NOT_SENT
        waiting, self._waiting = self._waiting, {}
        for on_reply, offset, nbytes in waiting.values():
            self._give_back(offset, nbytes)
            on_reply(reason)

    def close(self) -> None:
        """Drop the connection; open requests end as `Undelivered`."""
        self._connecting.cancel()
        if self._transport is not None:
            self._transport.abort()
        elif not self.closed:
            self._lost()


def _nothing() -> None:
    """Nothing to abandon."""


def _ignore(_: HopReply | Undelivered) -> None:
    """Nobody waits for this reply any more."""
