"""The calling half of an RPC connection: requests out, answers in, in any order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import structlog

from tether.errors import DeadlineExceededError, InternalError, PayloadTooLargeError, ProtocolError, TetherError
from tether.swarm.rpc.bodies import AHEAD_NBYTES, Allowance, Incoming, Outgoing
from tether.swarm.rpc.expiry import NEVER, Expiry
from tether.swarm.rpc.messages import (
    MESSAGE_NBYTES,
    SMALL_NBYTES,
    CallMessage,
    Response,
    encode_call,
    encode_deadline,
    encode_method,
    encode_request,
    read_response,
)
from tether.swarm.rpc.service import RpcLimits
from tether.swarm.wire.compact import read_uint, uint
from tether.swarm.wire.line import Line
from tether.swarm.wire.pieces import PIECE_NBYTES, Body
from tether.swarm.wire.protomux import Channel

__all__ = ["Calls"]

log = structlog.get_logger("tether.swarm")
T = TypeVar("T")
_KEPT_METHODS = 256
_GRAIN = 0.005
"""Seconds that a call may end late where many end."""


class _Limit(NamedTuple):
    """How long an answer is waited for, from the moment of the call on."""

    seconds: float
    end: float
    """On the loop's clock."""


@dataclass(slots=True, eq=False)
class _Call:
    future: asyncio.Future[Any]
    """The answer: `bytes`, or `Incoming` where it is passed on."""
    limit: _Limit | None = None
    """Of an answer that is waited for as a whole."""
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
        self._expiry = Expiry(self._loop, self._look, _GRAIN)
        self._told = encode_deadline(None)
        """What the peer was told last of how long answers are waited for."""
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
        encoded = self._method(method) if self._line.is_clear else await self._ready(method, limit)
        sent = value if isinstance(value, bytes) and len(value) <= PIECE_NBYTES else await self._sendable(value, limit)
        call = _Call(self._loop.create_future(), limit)
        request_id = self._begin(call)
        sending = self._send(request_id, call, encoded, sent, limit)
        if sending is None:
            return await self._answer(request_id, call)
        async with self._beside_it(sending, call):
            return await self._answer(request_id, call)

    @asynccontextmanager
    async def exchange(self, method: str, value: bytes | Outgoing, timeout: float | None) -> AsyncIterator[Incoming]:  # noqa: ASYNC109 (as above)
        """See `RpcConnection.exchange`; `timeout` in seconds."""
        limit = self._limit(timeout)
        encoded = await self._ready(method, limit)
        sent = await self._sendable(value, limit)
        call = _Call(self._loop.create_future(), is_passed_on=True)
        request_id = self._begin(call)
        alarm = None if limit is None else self._loop.call_at(limit.end, _expire, call, limit)  # it holds until the answer was taken
        try:
            async with self._beside_it(self._send(request_id, call, encoded, sent, limit), call):
                yield await call.future
        finally:
            if alarm is not None:
                alarm.cancel()
            self._end(request_id)

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
        if isinstance(value, bytes):
            return value
        joined = await self._within(limit, _joined(value), "the body did not come")
        if self._line.closed.is_set():  # meanwhile: nobody would end the call
            raise self._line.why()
        return joined

    def _send(
        self, request_id: int, call: _Call, method: bytes, value: bytes | Outgoing, limit: _Limit | None
    ) -> Coroutine[Any, Any, None] | None:
        """Send a request; what has to be done beside waiting for the answer, if not all of it goes out now."""
        if isinstance(value, Outgoing):
            return self._in_pieces(request_id, call, method, value, limit)
        request = encode_request(request_id, method, value)
        if len(value) > SMALL_NBYTES and not self._line.is_free:
            return self._in_turn(request, limit)
        self._tell_limit(limit)
        if len(value) <= SMALL_NBYTES:
            self._line.post(self._channel, request)
        else:
            self._line.post_now(self._channel, request)
        return None

    async def _within(self, limit: _Limit | None, waiting: Coroutine[Any, Any, T], why: str) -> T:
        try:
            async with asyncio.timeout_at(None if limit is None else limit.end):
                return await waiting
        except TimeoutError as error:
            if isinstance(error, TetherError):  # of the body's source
                raise
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
        self._expiry.stop()
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

    def _begin(self, call: _Call) -> int:
        self._last_id = request_id = self._last_id + 1
        self._open[request_id] = call
        if call.limit is not None:
            self._expiry.expect(call.limit.end)
        return request_id

    def _grant(self, request_id: int, nbytes: int) -> None:
        """There is room for more of an answer."""
        self._line.post(self._beside, encode_call(CallMessage.RESPONSE_ROOM, request_id, uint(nbytes)))

    def _tell_limit(self, limit: _Limit | None) -> None:
        """Right before a request, if the peer has to know another one than for the last."""
        told = encode_deadline(None if limit is None else limit.end - self._loop.time())
        if told != self._told:
            self._told = told
            self._line.post(self._beside, told)

    async def _in_turn(self, request: bytes, limit: _Limit | None) -> None:
        async with self._line.turn():
            self._tell_limit(limit)
            self._line.post(self._channel, request)

    async def _answer(self, request_id: int, call: _Call) -> bytes:
        try:
            answer: bytes = await call.future
            return answer
        finally:
            self._end(request_id)

    def _look(self, now: float) -> float:
        """Fail calls that are answered too late; when the next one is."""
        following = NEVER
        for call in self._open.values():
            if call.limit is None or call.future.done():
                continue
            if call.limit.end > now:
                following = min(following, call.limit.end)
            else:
                _expire(call, call.limit)
        return following

    def _end(self, request_id: int) -> None:
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
        self._tell_limit(limit)
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


def _expire(call: _Call, limit: _Limit) -> None:
    call.fail(DeadlineExceededError(f"no answer within {limit.seconds:g} s"))
