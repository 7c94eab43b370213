"""The calling half of an RPC connection: requests out, answers in, in any order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog

from tether.errors import DeadlineExceededError, InternalError, PayloadTooLargeError, ProtocolError, TetherError
from tether.swarm.rpc.bodies import AHEAD_NBYTES, Allowance, Incoming, Outgoing
from tether.swarm.rpc.messages import (
    MESSAGE_NBYTES,
    SMALL_NBYTES,
    CallMessage,
    Response,
    encode_call,
    encode_method,
    encode_request,
    read_response,
)
from tether.swarm.rpc.service import RpcLimits
from tether.swarm.wire.compact import MAX_UINT, read_uint, uint
from tether.swarm.wire.line import Line
from tether.swarm.wire.pieces import PIECE_NBYTES, Body
from tether.swarm.wire.protomux import Channel

__all__ = ["Calls"]

log = structlog.get_logger("tether.swarm")
_KEPT_METHODS = 256


class _Limit(NamedTuple):
    """How long an answer is waited for, from the moment of the call on."""

    seconds: float
    end: float
    """On the loop's clock."""


@dataclass(slots=True, eq=False)
class _Call:
    future: asyncio.Future[Any]
    """The answer: `bytes`, or `Incoming` where it is passed on."""
    is_passed_on: bool = False
    body: Body | Incoming | None = None
    """Of an answer that comes in pieces."""
    allowance: Allowance | None = None
    """Of a request that goes in pieces."""

    def fail(self, error: TetherError) -> None:
        """Nothing more comes of it."""
        if not self.future.done():
            self.future.set_exception(error)
        elif isinstance(self.body, Incoming):
            self.body.fail(error)


class Calls:
    """Requests that wait for their answers."""

    def __init__(self, line: Line, channel: Channel, beside: Channel, limits: RpcLimits) -> None:
        """`beside`: our own channel, which a plain peer rejects."""
        self._line, self._channel, self._beside, self._limits = line, channel, beside, limits
        self._open: dict[int, _Call] = {}
        self._last_id = 0
        self._methods: dict[str, bytes] = {}
        self._loop = line.loop
        self._settled = self._loop.create_future()
        """Done when the peer has said whether it takes our own channel."""

    def __len__(self) -> int:
        return len(self._open)

    async def event(self, method: str, value: bytes) -> None:
        """Send without an answer, when there is room. Raises: PayloadTooLargeError, MalformedRequestError, ServiceUnavailableError."""
        _check_size(len(value))
        if not self._line.is_clear:
            await self._line.clear()
        request = encode_request(0, self._method(method), value)
        if len(value) <= SMALL_NBYTES:
            self._line.post(self._channel, request)
        elif not self._line.post_now(self._channel, request):
            await self._line.post_large(self._channel, request)

    async def request(self, method: str, value: bytes | Outgoing, timeout: float | None) -> bytes:  # noqa: ASYNC109 (it also goes to the peer)
        """See `RpcConnection.request`; `timeout` in seconds."""
        limit = self._limit(timeout)
        encoded = await self._ready(method, limit)
        sent = await self._sendable(value, limit)
        request_id, call = self._begin()
        sending = self._send(request_id, call, encoded, sent, limit)
        if sending is None:
            return await self._answer(request_id, call, limit)
        async with self._beside_it(sending, call):
            return await self._answer(request_id, call, limit)

    @asynccontextmanager
    async def exchange(self, method: str, value: bytes | Outgoing, timeout: float | None) -> AsyncIterator[Incoming]:  # noqa: ASYNC109 (as above)
        """See `RpcConnection.exchange`; `timeout` in seconds."""
        limit = self._limit(timeout)
        encoded = await self._ready(method, limit)
        sent = await self._sendable(value, limit)
        request_id, call = self._begin(is_passed_on=True)
        alarm = self._alarm(call, limit)
        try:
            async with self._beside_it(self._send(request_id, call, encoded, sent, limit), call):
                yield await call.future
        finally:
            self._end(request_id, alarm)

    def _limit(self, timeout: float | None) -> _Limit | None:
        return None if timeout is None else _Limit(timeout, self._loop.time() + timeout)

    async def _ready(self, method: str, limit: _Limit | None) -> bytes:
        """The method's name as it is sent, once there is room to send."""
        if not self._line.is_clear:
            await self._within(limit, self._line.clear(), "the peer does not read")
        return self._method(method)

    async def _sendable(self, value: bytes | Outgoing, limit: _Limit | None) -> bytes | Outgoing:
        """What goes whole as `bytes`; a large body as one that goes in pieces, if the peer takes any. Raises: PayloadTooLargeError."""
        nbytes = len(value) if isinstance(value, bytes) else value.nbytes
        if nbytes > PIECE_NBYTES:
            await self._within(limit, self._settle(), "the peer has not opened the channel, or does not read")
            if self._beside.opened and not self._beside.closed:
                return Outgoing.of(value) if isinstance(value, bytes) else value
            _check_size(nbytes)
        return value if isinstance(value, bytes) else await _joined(value)

    def _send(
        self, request_id: int, call: _Call, method: bytes, value: bytes | Outgoing, limit: _Limit | None
    ) -> Coroutine[Any, Any, None] | None:
        """Send a request; what has to be done beside waiting for the answer, if not all of it goes out now."""
        if isinstance(value, Outgoing):
            return self._in_pieces(request_id, call, method, value, limit)
        request = encode_request(request_id, method, value)
        if len(value) > SMALL_NBYTES and not self._line.is_free:
            return self._in_turn(request_id, request, limit)
        self._tell_limit(request_id, limit)
        if len(value) <= SMALL_NBYTES:
            self._line.post(self._channel, request)
        else:
            self._line.post_now(self._channel, request)
        return None

    async def _within(self, limit: _Limit | None, waiting: Coroutine[Any, Any, None], why: str) -> None:
        try:
            async with asyncio.timeout_at(None if limit is None else limit.end):
                await waiting
        except TimeoutError as error:
            raise DeadlineExceededError(f"no answer within {0 if limit is None else limit.seconds:g} s: {why}") from error

    async def _settle(self) -> None:
        await asyncio.wait([self._settled])
        await self._line.clear()

    def on_response(self, message: memoryview) -> None:
        """An answer came, or why the rest of one does not. Raises: ProtocolError."""
        response = read_response(message, self._line.peer)
        call = self._open.get(response.id)
        if call is None:
            return  # it was taken back meanwhile
        if call.body is not None and response.error is None:
            raise ProtocolError("an answer that comes in pieces comes whole, too")
        del self._open[response.id]
        self._finish(call, response)

    def on_settled(self) -> None:
        """The peer took our own channel, or rejected it."""
        if not self._settled.done():
            self._settled.set_result(None)

    def on_begin(self, body: memoryview) -> None:
        """An answer comes in pieces. Raises: ProtocolError."""
        request_id, at = read_uint(body, 0)
        nbytes, _ = read_uint(body, at)
        call = self._open.get(request_id)
        if call is None or (call.future.done() and call.body is None):
            return
        if call.body is not None:
            raise ProtocolError("an answer that comes in pieces begins twice")
        if nbytes > self._most(call):
            call.fail(self._too_large(call, nbytes))  # and whoever waits for it takes the request back
        elif call.is_passed_on:
            call.body = Incoming(nbytes, lambda more: self._grant(request_id, more), AHEAD_NBYTES)
            call.body.open()
            call.future.set_result(call.body)
        else:
            call.body = Body(nbytes)
            if nbytes > AHEAD_NBYTES:
                self._grant(request_id, nbytes - AHEAD_NBYTES)

    def on_piece(self, body: memoryview) -> None:
        """A piece of an answer. Raises: ProtocolError."""
        request_id, at = read_uint(body, 0)
        call = self._open.get(request_id)
        if call is None or (call.future.done() and not isinstance(call.body, Incoming)):
            return
        match call.body:
            case Incoming():
                if call.body.feed(body[at:]):
                    del self._open[request_id]
            case Body():
                if call.body.add(body[at:]):
                    del self._open[request_id]
                    call.future.set_result(call.body.take())
            case None:
                raise ProtocolError("a piece of an answer that did not begin")

    def on_room(self, body: memoryview) -> None:
        """The peer takes more of a request's body. Raises: ProtocolError."""
        request_id, at = read_uint(body, 0)
        nbytes, _ = read_uint(body, at)
        call = self._open.get(request_id)
        if call is not None and call.allowance is not None:
            call.allowance.grant(nbytes)

    def fail(self, error: TetherError) -> None:
        """The connection is gone."""
        self.on_settled()
        calls, self._open = self._open, {}
        for call in calls.values():
            call.fail(type(error)(*error.args))

    def _finish(self, call: _Call, response: Response) -> None:
        if response.error is not None:
            call.fail(response.error)
        elif response.value is None or len(response.value) > self._most(call):
            call.fail(self._too_large(call, len(response.value or b"")))
        elif not call.future.done():
            value = bytes(response.value)
            call.future.set_result(Incoming.whole(value) if call.is_passed_on else value)

    def _most(self, call: _Call) -> int:
        return self._limits.max_reply_nbytes if call.is_passed_on else min(self._limits.max_whole_nbytes, self._limits.max_reply_nbytes)

    def _too_large(self, call: _Call, nbytes: int) -> TetherError:
        return PayloadTooLargeError(f"peer {self._line.peer} answers with {nbytes} bytes; at most {self._most(call)} are taken")

    def _method(self, method: str) -> bytes:
        encoded = self._methods.get(method)
        if encoded is None:
            encoded = encode_method(method)
            if len(self._methods) < _KEPT_METHODS:
                self._methods[method] = encoded
        return encoded

    def _begin(self, *, is_passed_on: bool = False) -> tuple[int, _Call]:
        self._last_id = request_id = self._last_id + 1
        call = self._open[request_id] = _Call(self._loop.create_future(), is_passed_on)
        return request_id, call

    def _grant(self, request_id: int, nbytes: int) -> None:
        """There is room for more of an answer."""
        self._line.post(self._beside, encode_call(CallMessage.RESPONSE_ROOM, request_id, uint(nbytes)))

    def _tell_limit(self, request_id: int, limit: _Limit | None) -> None:
        """Right before the request itself: the peer cuts who tells it of the limits of requests that don't come."""
        if limit is not None:
            milliseconds = min(max(0.0, limit.end - self._loop.time()) * 1000, MAX_UINT)
            self._line.post(self._beside, encode_call(CallMessage.DEADLINE, request_id, uint(round(milliseconds))))

    async def _in_turn(self, request_id: int, request: bytes, limit: _Limit | None) -> None:
        async with self._line.turn():
            self._tell_limit(request_id, limit)
            self._line.post(self._channel, request)

    async def _answer(self, request_id: int, call: _Call, limit: _Limit | None) -> bytes:
        alarm = self._alarm(call, limit)
        try:
            answer: bytes = await call.future
            return answer
        finally:
            self._end(request_id, alarm)

    def _alarm(self, call: _Call, limit: _Limit | None) -> asyncio.TimerHandle | None:
        return None if limit is None else self._loop.call_at(limit.end, _expire, call, limit.seconds)

    def _end(self, request_id: int, alarm: asyncio.TimerHandle | None) -> None:
        if alarm is not None:
            alarm.cancel()
        if self._open.pop(request_id, None) is not None:  # nobody waits for it any more
            self._line.post(self._beside, encode_call(CallMessage.CANCEL, request_id))

    @asynccontextmanager
    async def _beside_it(self, sending: Coroutine[Any, Any, None] | None, call: _Call) -> AsyncIterator[None]:
        """Send, as long as somebody waits for the answer: what ends the call before all of it was sent ends that too."""
        if sending is None:
            yield
            return
        task = self._loop.create_task(sending)
        task.add_done_callback(lambda done: self._tell_failure(done, call))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _tell_failure(self, sending: asyncio.Task[None], call: _Call) -> None:
        """Where the connection fails, the call knows; where the source of the body does, this is how."""
        error = None if sending.cancelled() else sending.exception()
        if error is None:
            return
        if not isinstance(error, TetherError):
            log.error("the body of a request broke off", peer=self._line.peer, exc_info=error)
            error = InternalError("the body of a request broke off: the log has the traceback")
        call.fail(error)

    async def _in_pieces(self, request_id: int, call: _Call, method: bytes, value: Outgoing, limit: _Limit | None) -> None:
        allowance = call.allowance = Allowance(value.nbytes if value.nbytes <= AHEAD_NBYTES else 0)
        self._tell_limit(request_id, limit)
        self._line.post(self._beside, encode_call(CallMessage.REQUEST, request_id, uint(value.nbytes), method))
        await allowance.wait(1)  # nothing is taken of its source before that
        async with aclosing(value.pieces()) as pieces:
            async for piece in pieces:
                if call.future.done() and not call.is_passed_on:
                    return  # refused before all of it was sent
                await allowance.spend(sum(map(len, piece)))
                await self._line.post_large(self._beside, encode_call(CallMessage.REQUEST_PIECE, request_id, *piece))


async def _joined(value: Outgoing) -> bytes:
    async with aclosing(value.pieces()) as pieces:
        return b"".join([part async for piece in pieces for part in piece])


def _check_size(nbytes: int) -> None:
    if nbytes > MESSAGE_NBYTES:
        raise PayloadTooLargeError(
            f"{nbytes} bytes can't be sent to a peer that takes no pieces, as npm's @hyperswarm/rpc alone; at most {MESSAGE_NBYTES} can"
        )


def _expire(call: _Call, limit: float) -> None:
    call.fail(DeadlineExceededError(f"no answer within {limit:g} s"))
