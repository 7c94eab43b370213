"""The calling half of an RPC connection: requests out, answers in, in any order."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple

from tether.errors import DeadlineExceededError, PayloadTooLargeError, ProtocolError, TetherError
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
from tether.swarm.wire.compact import MAX_UINT, read_uint, uint
from tether.swarm.wire.line import Line
from tether.swarm.wire.pieces import PIECE_NBYTES, Body, pieces
from tether.swarm.wire.protomux import Channel

__all__ = ["Calls"]

_KEPT_METHODS = 256


class _Limit(NamedTuple):
    """How long an answer is waited for, from the moment of the call on."""

    seconds: float
    end: float
    """On the loop's clock."""


@dataclass(slots=True, eq=False)
class _Call:
    future: asyncio.Future[bytes]
    body: Body | None = None
    """Of an answer that comes in pieces."""


class Calls:
    """Requests that wait for their answers."""

    def __init__(self, line: Line, channel: Channel, beside: Channel, max_reply_nbytes: int) -> None:
        """`beside`: our own channel, which a plain peer rejects."""
        self._line, self._channel, self._beside = line, channel, beside
        self._max_reply_nbytes = max_reply_nbytes
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

    async def request(self, method: str, value: bytes, timeout: float | None) -> bytes:  # noqa: ASYNC109 (it also goes to the peer)
        """See `RpcConnection.request`; `timeout` in seconds."""
        limit = None if timeout is None else _Limit(timeout, self._loop.time() + timeout)
        if not self._line.is_clear:
            await self._within(limit, self._line.clear(), "the peer does not read")
        encoded = self._method(method)
        if len(value) > PIECE_NBYTES:
            await self._within(limit, self._settle(), "the peer has not opened the channel, or does not read")
            if self._beside.opened and not self._beside.closed:
                return await self._in_pieces(uint(len(value)) + encoded, value, limit)
            _check_size(len(value))
        return await self._whole(encoded, value, limit)

    async def _whole(self, method: bytes, value: bytes, limit: _Limit | None) -> bytes:
        request_id, call = self._begin()
        request = encode_request(request_id, method, value)
        if len(value) > SMALL_NBYTES and not self._line.is_free:
            return await self._while(self._in_turn(request_id, request, limit), request_id, call, limit)
        self._tell_limit(request_id, limit)
        if len(value) <= SMALL_NBYTES:
            self._line.post(self._channel, request)
        else:
            self._line.post_now(self._channel, request)
        return await self._answer(request_id, call, limit)

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
        """An answer came. Raises: ProtocolError."""
        response = read_response(message, self._line.peer)
        call = self._open.pop(response.id, None)
        if call is None or call.future.done():
            return  # taken back meanwhile
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
        if call is None or call.future.done():
            return
        if call.body is not None:
            raise ProtocolError("an answer that comes in pieces begins twice")
        if nbytes > self._max_reply_nbytes:
            call.future.set_exception(self._too_large(nbytes))  # and `_answer` takes the request back
        else:
            call.body = Body(nbytes)

    def on_piece(self, body: memoryview) -> None:
        """A piece of an answer. Raises: ProtocolError."""
        request_id, at = read_uint(body, 0)
        call = self._open.get(request_id)
        if call is None or call.future.done():
            return
        if call.body is None:
            raise ProtocolError("a piece of an answer that did not begin")
        if call.body.add(body[at:]):
            del self._open[request_id]
            call.future.set_result(call.body.take())

    def fail(self, error: TetherError) -> None:
        """The connection is gone."""
        self.on_settled()
        calls, self._open = self._open, {}
        for call in calls.values():
            if not call.future.done():
                call.future.set_exception(type(error)(*error.args))

    def _finish(self, call: _Call, response: Response) -> None:
        if response.error is not None:
            call.future.set_exception(response.error)
        elif response.value is None or len(response.value) > self._max_reply_nbytes:
            call.future.set_exception(self._too_large(len(response.value or b"")))
        else:
            call.future.set_result(bytes(response.value))

    def _too_large(self, nbytes: int) -> TetherError:
        return PayloadTooLargeError(f"peer {self._line.peer} answers with {nbytes} bytes; at most {self._max_reply_nbytes} are taken")

    def _method(self, method: str) -> bytes:
        encoded = self._methods.get(method)
        if encoded is None:
            encoded = encode_method(method)
            if len(self._methods) < _KEPT_METHODS:
                self._methods[method] = encoded
        return encoded

    def _begin(self) -> tuple[int, _Call]:
        self._last_id = request_id = self._last_id + 1
        call = self._open[request_id] = _Call(self._loop.create_future())
        return request_id, call

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
        alarm = None if limit is None else self._loop.call_at(limit.end, _expire, call.future, limit.seconds)
        try:
            return await call.future
        finally:
            if alarm is not None:
                alarm.cancel()
            if self._open.pop(request_id, None) is not None:  # nobody waits for it any more
                self._line.post(self._beside, encode_call(CallMessage.CANCEL, request_id))

    async def _in_pieces(self, begin: bytes, value: bytes, limit: _Limit | None) -> bytes:
        request_id, call = self._begin()
        self._tell_limit(request_id, limit)
        self._line.post(self._beside, encode_call(CallMessage.REQUEST, request_id, begin))
        return await self._while(self._send(request_id, call, value), request_id, call, limit)

    async def _while(self, sending: Coroutine[Any, Any, None], request_id: int, call: _Call, limit: _Limit | None) -> bytes:
        """The answer, or what ends the call before all of it was sent: then no more is."""
        task = self._loop.create_task(sending)
        try:
            return await self._answer(request_id, call, limit)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # it fails where the connection does, which the call tells of

    async def _send(self, request_id: int, call: _Call, value: bytes) -> None:
        for piece in pieces(value):
            if call.future.done():
                return  # refused before all of it was sent
            await self._line.post_large(self._beside, encode_call(CallMessage.REQUEST_PIECE, request_id, piece))


def _check_size(nbytes: int) -> None:
    if nbytes > MESSAGE_NBYTES:
        raise PayloadTooLargeError(f"{nbytes} bytes can't be sent to a peer that takes no pieces; at most {MESSAGE_NBYTES} can")


def _expire(future: asyncio.Future[bytes], limit: float) -> None:
    if not future.done():
        future.set_exception(DeadlineExceededError(f"no answer within {limit:g} s"))
