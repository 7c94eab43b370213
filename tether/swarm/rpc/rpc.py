"""RPC with one peer, both ways, on one secure stream: the wire of @hyperswarm/rpc, and our own channel beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import assert_never

from tether.errors import ForbiddenError, ProtocolError, ServiceUnavailableError, TetherError
from tether.ports import MessageStream
from tether.swarm.rpc.answers import Answers
from tether.swarm.rpc.bodies import Chunk, Incoming, Outgoing, Piece
from tether.swarm.rpc.calls import Calls
from tether.swarm.rpc.messages import CALLS, PROTOCOL, REQUEST, RESPONSE, CallMessage
from tether.swarm.rpc.replies import Reply
from tether.swarm.rpc.service import Authorise, Call, Handler, RpcLimits, Service
from tether.swarm.wire.line import Line
from tether.swarm.wire.protomux import Asked, Channel, Closed, Event, Opened, Received

__all__ = ["Authorise", "Call", "Chunk", "Handler", "Incoming", "Outgoing", "Piece", "Reply", "RpcConnection", "RpcLimits", "Service"]


class RpcConnection:
    """Calls a peer and answers its calls. Belongs to the loop that it is made on; it owns the stream.

    Both sides open the channel under the key of the one that was connected to, as npm's package does; either may call.
    """

    def __init__(self, stream: MessageStream, own: str, service: Service | None = None, limits: RpcLimits | None = None) -> None:
        """`own`: this side's public key, hex. `service`: None answers nothing. Raises: ValueError: a key is no hex."""
        limits = limits or RpcLimits()
        self._line = line = Line(stream, limits.max_unread_nbytes)
        channel_id = bytes.fromhex(stream.peer if stream.is_initiator else own)
        self._channel, self._beside = line.mux.open(PROTOCOL, channel_id), line.mux.open(CALLS, channel_id)
        self._calls = Calls(line, self._channel, self._beside, limits)
        self._answers = Answers(line, self._channel, self._beside, service or Service(_nobody), limits)
        line.open(self._on_event, self._on_closed)

    @property
    def peer(self) -> str:
        """The other side's public key, hex."""
        return self._line.peer

    @property
    def is_closed(self) -> bool:
        return self._line.closed.is_set()

    @property
    def in_flight(self) -> int:
        """Calls made and not answered."""
        return len(self._calls)

    @property
    def working(self) -> int:
        """Calls of the peer that are being worked on."""
        return len(self._answers)

    async def request(self, method: str, value: bytes | Outgoing = b"", timeout: float | None = None) -> bytes:  # noqa: ASYNC109 (it also goes to the peer)
        """What the peer's method answers. Cancelled, or not answered within `timeout` seconds, the peer stops working on it.

        Raises: what the peer's handler raised of Tether's errors; UnknownMethodError; PeerFailedError: any other error of the peer;
        DeadlineExceededError; ServiceUnavailableError: the connection is gone; PayloadTooLargeError: the value, or the answer.
        """
        if self._line.closed.is_set():
            raise self._line.why()
        return await self._calls.request(method, value, timeout)

    @asynccontextmanager
    async def exchange(self, method: str, value: bytes | Outgoing, timeout: float | None = None) -> AsyncIterator[Incoming]:  # noqa: ASYNC109 (as above)
        """As `request`, with an answer that is taken as it comes; who leaves before its end takes the request back.

        Nothing of an `Outgoing` over 1 MiB is taken from its source before the peer has said that it may be sent. Raises: as `request`,
        from the first byte of the answer to the last.
        """
        await self._check_open()
        async with self._calls.exchange(method, value, timeout) as answer:
            yield answer

    async def event(self, method: str, value: bytes = b"") -> None:
        """Call without an answer; nobody hears whether it was taken. Raises: ServiceUnavailableError, PayloadTooLargeError."""
        await self._check_open()
        await self._calls.event(method, value)

    def allow(self, limits: RpcLimits) -> None:
        """Other limits from now on: what the peer may do has changed. How large an answer to us may be stays as it was."""
        self._answers.allow(limits)
        self._line.max_unread_nbytes = limits.max_unread_nbytes

    async def wait_closed(self) -> None:
        """Wait until the connection is gone, however it went."""
        await self._line.closed.wait()

    async def aclose(self) -> None:
        """Close it in order: what was sent goes out. A second call does nothing."""
        if self.is_closed:
            return
        self._line.mux.close(self._beside)
        self._line.mux.close(self._channel)
        self._line.finish(None)
        await self._line.gone.wait()

    def destroy(self) -> None:
        """Cut it at once."""
        self._line.destroy()

    async def _check_open(self) -> None:
        if self._line.closed.is_set():
            await self._line.clear()

    def _on_event(self, event: Event) -> None:
        match event:
            case Received():
                if event.channel is self._channel:
                    self._on_message(event)
                else:
                    self._on_call_message(event)
            case Opened() | Closed():
                self._on_channel(event.channel)
            case Asked():
                self._line.mux.reject(event)  # nothing is offered
            case _:
                assert_never(event)

    def _on_message(self, event: Received) -> None:
        if event.type == REQUEST:
            self._answers.on_request(event.body)
        elif event.type == RESPONSE:
            self._calls.on_response(event.body)

    def _on_call_message(self, event: Received) -> None:
        match event.type:
            case CallMessage.DEADLINE:
                self._answers.on_deadline(event.body)
            case CallMessage.CANCEL:
                self._answers.on_cancel(event.body)
            case CallMessage.REQUEST:
                self._answers.on_begin(event.body)
            case CallMessage.REQUEST_PIECE:
                self._answers.on_piece(event.body)
            case CallMessage.RESPONSE:
                self._calls.on_begin(event.body)
            case CallMessage.RESPONSE_PIECE:
                self._calls.on_piece(event.body)
            case CallMessage.REQUEST_ROOM:
                self._calls.on_room(event.body)
            case CallMessage.RESPONSE_ROOM:
                self._answers.on_room(event.body)
            case _:
                raise ProtocolError(f"a message of type {event.type} on the channel {CALLS}")

    def _on_channel(self, channel: Channel) -> None:
        if channel is self._beside:
            self._calls.on_settled()
        elif channel.closed:
            # As npm's package: who closes the channel is done with the connection.
            self._line.finish(ServiceUnavailableError(f"peer {self.peer} closed the connection: connect again"))

    def _on_closed(self, error: TetherError) -> None:
        self._calls.fail(error)
        self._answers.end()


def _nobody(peer: str, method: str) -> None:
    raise ForbiddenError(f"{peer} may not call {method}: nothing is answered here")
