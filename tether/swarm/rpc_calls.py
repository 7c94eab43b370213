"""The calling half of an RPC connection: requests out, answers in, in any order."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from tether.errors import DeadlineExceededError, PayloadTooLargeError, ProtocolError, TetherError
from tether.swarm.compact import read_uint, uint
from tether.swarm.line import Line
from tether.swarm.pieces import PIECE_NBYTES, Body, pieces
from tether.swarm.protomux import Channel
from tether.swarm.rpc_messages import (
    MESSAGE_NBYTES,
    SMALL_NBYTES,
    CallMessage,
    Response,
    encode_call,
    encode_method,
    encode_request,
    read_response,
)

__all__ = ["Calls"]

_KEPT_METHODS = 256


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

    async def request(self, method: str, value: bytes, limit: float | None) -> bytes:
        """See `RpcConnection.request`; `limit` in seconds."""
        if not self._line.is_clear:
            await self._line.clear()
        encoded = self._method(method)
        if len(value) > PIECE_NBYTES:
            if await self._takes_pieces(limit):
                begin = uint(len(value)) + encoded
                return await self._in_pieces(begin, value, limit)
            _check_size(len(value))
        request_id, call = self._begin(limit)
        request = encode_request(request_id, encoded, value)
        if len(value) <= SMALL_NBYTES:
            self._line.post(self._channel, request)
        elif not self._line.post_now(self._channel, request):
            return await self._while(self._line.post_large(self._channel, request), request_id, call, limit)
        return await self._answer(request_id, call, limit)

    async def _takes_pieces(self, limit: float | None) -> bool:
        await asyncio.wait([self._settled], timeout=limit)
        if not self._settled.done():
            raise DeadlineExceededError(f"no answer within {limit:g} s: the peer has not opened the channel")
        await self._line.clear()
        return self._beside.opened and not self._beside.closed

    def on_response(self, message: memoryview) -> None:
        """An answer came. Raises: ProtocolError."""
        response = read_response(message, self._line.peer)
        call = self._open.pop(response.id, None)
        if call is None or call.future.done():
            return  # taken back meanwhile
        self._settle(call, response)

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

    def _settle(self, call: _Call, response: Response) -> None:
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

    def _begin(self, limit: float | None) -> tuple[int, _Call]:
        self._last_id = request_id = self._last_id + 1
        call = self._open[request_id] = _Call(self._loop.create_future())
        if limit is not None:
            self._line.post(self._beside, encode_call(CallMessage.DEADLINE, request_id, uint(max(round(limit * 1000), 0))))
        return request_id, call

    async def _answer(self, request_id: int, call: _Call, limit: float | None) -> bytes:
        alarm = None if limit is None else self._loop.call_later(limit, _expire, call.future, limit)
        try:
            return await call.future
        finally:
            if alarm is not None:
                alarm.cancel()
            if self._open.pop(request_id, None) is not None:  # nobody waits for it any more
                self._line.post(self._beside, encode_call(CallMessage.CANCEL, request_id))

    async def _in_pieces(self, begin: bytes, value: bytes, limit: float | None) -> bytes:
        request_id, call = self._begin(limit)
        self._line.post(self._beside, encode_call(CallMessage.REQUEST, request_id, begin))
        return await self._while(self._send(request_id, call, value), request_id, call, limit)

    async def _while(self, sending: Coroutine[Any, Any, None], request_id: int, call: _Call, limit: float | None) -> bytes:
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
