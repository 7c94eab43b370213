"""The answering half of an RPC connection: who may call what, how much at a time, and what becomes of a call that is taken back."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import CoroutineType
from typing import NamedTuple

import structlog

from tether.errors import (
    DeadlineExceededError,
    InternalError,
    PayloadTooLargeError,
    ProtocolError,
    QueueFullError,
    TetherError,
    UnknownMethodError,
)
from tether.swarm.rpc.messages import (
    MESSAGE_NBYTES,
    SMALL_NBYTES,
    CallMessage,
    encode_call,
    encode_error,
    encode_response,
    read_method,
    read_request,
    read_value,
)
from tether.swarm.wire.compact import read_uint, uint
from tether.swarm.wire.line import Line
from tether.swarm.wire.pieces import PIECE_NBYTES, Body, pieces
from tether.swarm.wire.protomux import Channel

__all__ = ["Answers", "Authorise", "Call", "Handler", "RpcLimits", "Service"]

log = structlog.get_logger("tether.swarm")
_SWEEP = 0.25


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """What one peer may make us keep or do."""

    max_request_nbytes: int = 16 << 20
    max_reply_nbytes: int = 1 << 30
    """Of an answer, to either side; and of all large ones together that wait for the peer to take them."""
    max_in_flight: int = 1024
    """Its requests that are worked on; further ones are answered with `queue_full`."""
    max_held_nbytes: int = 64 << 20
    """Bodies of its requests that are worked on, or that still come."""
    max_unread_nbytes: int = 32 << 20
    """Small answers that wait while it reads nothing; then it is cut. Larger ones wait where they are."""


class Call(NamedTuple):
    """What a handler is told of a call besides its value."""

    peer: str
    """The caller's public key, hex, which the stream has proven."""
    method: str
    deadline: float | None
    """On the loop's clock: nobody waits for the answer any longer. The handler is cancelled then."""


Handler = Callable[[Call, bytes], bytes | Awaitable[bytes]]
"""Answers a call. What it raises of Tether's errors is told to the caller, anything else as an internal error."""
Authorise = Callable[[str, str], None]
"""Called with the caller's key and the method before anything of the value is read. Raises: ForbiddenError: it may not."""


class Service:
    """What a lab answers, on any number of connections; it may change at any time."""

    def __init__(self, authorise: Authorise) -> None:
        self.authorise = authorise
        self.handlers: dict[str, Handler] = {}

    def respond(self, method: str, handler: Handler) -> None:
        """Answer calls of `method`. A handler that has its answer at once gives `bytes`: that costs no task."""
        self.handlers[method] = handler

    def unrespond(self, method: str) -> None:
        """Answer them no more."""
        self.handlers.pop(method, None)


@dataclass(slots=True, eq=False)
class _Work:
    """A handler that is not done."""

    answer: Awaitable[bytes]
    nbytes: int
    task: asyncio.Task[None]
    deadline: float | None
    unsent_nbytes: int = 0
    """Of its answer, if that is a large one."""
    is_overdue: bool = False


class _Coming(NamedTuple):
    """A request whose body comes in pieces."""

    method: str
    handler: Handler
    body: Body
    deadline: float | None


class Answers:
    """The calls of one peer."""

    def __init__(self, line: Line, channel: Channel, beside: Channel, service: Service, limits: RpcLimits) -> None:
        self._line, self._channel, self._beside = line, channel, beside
        self._service, self.limits = service, limits
        """May change at any time."""
        self._work: dict[int, _Work] = {}
        """By id; events, which have none, by numbers below 0."""
        self._coming: dict[int, _Coming] = {}
        self._deadlines: dict[int, float] = {}
        """Of requests that come next."""
        self._held_nbytes = self._unsent_nbytes = 0
        self._sweeping: asyncio.TimerHandle | None = None
        self._event_numbers = itertools.count(-1, -1)

    def __len__(self) -> int:
        return len(self._work) + len(self._coming)

    # --- what comes

    def on_request(self, message: memoryview) -> None:
        """A request in one message. Raises: ProtocolError."""
        request_id, method, value = read_request(message)
        self._check_id(request_id)
        deadline = self._deadlines.pop(request_id, None) if self._deadlines else None
        try:
            handler = self._admitted(method, len(value))
            data = bytes(read_value(value))
        except Exception as error:  # the hook's own bugs too: they let nobody in
            self._refuse(request_id, method, error)
            return
        self._run(request_id, method, handler, data, deadline)

    def on_deadline(self, body: memoryview) -> None:
        """Said before a request. Raises: ProtocolError."""
        request_id, at = read_uint(body, 0)
        milliseconds, _ = read_uint(body, at)
        if len(self._deadlines) >= self.limits.max_in_flight:
            raise ProtocolError("it says when requests end that it does not make")
        self._deadlines[request_id] = self._line.loop.time() + milliseconds / 1000

    def on_cancel(self, body: memoryview) -> None:
        """A request is taken back. Raises: ProtocolError."""
        request_id, _ = read_uint(body, 0)
        self._deadlines.pop(request_id, None)
        coming = self._coming.pop(request_id, None)
        if coming is not None:
            self._held_nbytes -= coming.body.nbytes
        work = self._work.get(request_id)
        if work is not None and request_id:
            work.task.cancel()

    def on_begin(self, body: memoryview) -> None:
        """A request whose body will come in pieces; whoever may not make it is told so before. Raises: ProtocolError."""
        request_id, at = read_uint(body, 0)
        nbytes, at = read_uint(body, at)
        method, _ = read_method(body, at)
        if not request_id or nbytes <= PIECE_NBYTES:
            raise ProtocolError("a request in pieces that needs none, or is an event")
        self._check_id(request_id)
        deadline = self._deadlines.pop(request_id, None)
        try:
            handler = self._admitted(method, nbytes)
        except Exception as error:  # as above
            self._refuse(request_id, method, error)
            return
        self._coming[request_id] = _Coming(method, handler, Body(nbytes), deadline)
        self._held_nbytes += nbytes

    def on_piece(self, body: memoryview) -> None:
        """A piece of a request's body; of one that was refused or taken back it is dropped. Raises: ProtocolError."""
        request_id, at = read_uint(body, 0)
        coming = self._coming.get(request_id)
        if coming is None or not coming.body.add(body[at:]):
            return
        del self._coming[request_id]
        self._held_nbytes -= coming.body.nbytes
        try:
            self._service.authorise(self._line.peer, coming.method)  # once more: a body takes as long as the peer likes
        except Exception as error:  # as above
            self._refuse(request_id, coming.method, error)
            return
        self._run(request_id, coming.method, coming.handler, coming.body.take(), coming.deadline)

    def end(self) -> None:
        """The connection is gone: nobody waits for anything."""
        self._coming.clear()
        self._deadlines.clear()
        if self._sweeping is not None:
            self._sweeping.cancel()
        for work in list(self._work.values()):
            work.task.cancel()

    # --- who may, and what comes of it

    def _admitted(self, method: str, nbytes: int) -> Handler:
        self._service.authorise(self._line.peer, method)
        handler, limits = self._service.handlers.get(method), self.limits
        if handler is None:
            raise UnknownMethodError(f"Unknown method '{method}'")  # the words of npm's package
        if nbytes > limits.max_request_nbytes:
            raise PayloadTooLargeError(f"a request of {nbytes} bytes; at most {limits.max_request_nbytes} are taken: send fewer at once")
        if len(self) >= limits.max_in_flight:
            raise QueueFullError(f"{limits.max_in_flight} of your requests are being worked on: wait for answers and try again")
        if self._held_nbytes + nbytes > limits.max_held_nbytes:
            raise QueueFullError(f"your requests hold {self._held_nbytes} bytes here: wait for answers and try again")
        return handler

    def _check_id(self, request_id: int) -> None:
        if request_id in self._work or request_id in self._coming:
            raise ProtocolError(f"request {request_id} is being worked on already")

    def _run(self, request_id: int, method: str, handler: Handler, data: bytes, deadline: float | None) -> None:
        try:
            if deadline is not None and deadline <= self._line.loop.time():
                raise DeadlineExceededError("the request came when nobody waited for it any more")
            answer = handler(Call(self._line.peer, method, deadline), data)
            if isinstance(answer, bytes) and len(answer) > SMALL_NBYTES:
                self._check_answer(len(answer))
        except Exception as error:  # whatever it is, it is this call's
            self._refuse(request_id, method, error)
            return
        if not isinstance(answer, bytes):
            self._start(request_id, method, answer, len(data), deadline)
        elif len(answer) > SMALL_NBYTES:
            self._keep(self._start(request_id, method, _given(answer), len(data), deadline), len(answer))
        elif request_id:
            self._line.post(self._channel, encode_response(request_id, answer))

    def _start(self, request_id: int, method: str, answer: Awaitable[bytes], nbytes: int, deadline: float | None) -> _Work:
        number = request_id or next(self._event_numbers)
        task = self._line.loop.create_task(self._answer(request_id, method, answer))
        work = self._work[number] = _Work(answer, nbytes, task, deadline)
        self._held_nbytes += nbytes
        if deadline is not None and self._sweeping is None:
            self._sweeping = self._line.loop.call_later(_SWEEP, self._sweep)
        task.add_done_callback(functools.partial(self._done, number))
        return work

    def _check_answer(self, nbytes: int) -> None:
        most = self.limits.max_reply_nbytes
        if nbytes > most:
            raise PayloadTooLargeError(f"the answer has {nbytes} bytes; at most {most} are sent: ask for less")
        if self._unsent_nbytes + nbytes > most:
            raise QueueFullError(f"{self._unsent_nbytes} bytes of answers wait for you: take them and try again")

    def _keep(self, work: _Work, nbytes: int) -> None:
        """The answer is here until the peer takes it."""
        work.unsent_nbytes = nbytes
        self._unsent_nbytes += nbytes

    def _sweep(self) -> None:
        """End what nobody waits for any more. The caller takes it back at its deadline; this is for one that can't be heard."""
        self._sweeping = None
        timed = [(work.deadline, work) for work in self._work.values() if work.deadline is not None]
        now = self._line.loop.time()
        for deadline, work in timed:
            if deadline <= now:
                work.is_overdue = True
                work.task.cancel()
        if timed:
            self._sweeping = self._line.loop.call_later(_SWEEP, self._sweep)

    def _done(self, number: int, _: asyncio.Task[None]) -> None:
        work = self._work.pop(number)
        self._held_nbytes -= work.nbytes
        self._unsent_nbytes -= work.unsent_nbytes
        if isinstance(work.answer, CoroutineType):
            work.answer.close()  # one that was cancelled before its first step would be missed
        if work.is_overdue and work.task.cancelled():
            self._refuse(number, "", DeadlineExceededError("the answer was not ready within the caller's deadline"))

    async def _answer(self, request_id: int, method: str, answer: Awaitable[bytes]) -> None:
        try:
            value = await answer
            if request_id:
                await self._send(request_id, value)
        except Exception as error:  # as above
            self._refuse(request_id, method, error)

    async def _send(self, request_id: int, value: bytes) -> None:
        if len(value) <= SMALL_NBYTES and self._line.is_clear:
            self._line.post(self._channel, encode_response(request_id, value))
            return
        work = self._work[request_id]
        if len(value) > SMALL_NBYTES and not work.unsent_nbytes:
            self._check_answer(len(value))
            self._keep(work, len(value))
        if len(value) > PIECE_NBYTES and self._beside.opened and not self._beside.closed:
            await self._send_pieces(request_id, value)
        elif len(value) > MESSAGE_NBYTES:
            raise PayloadTooLargeError(f"the answer has {len(value)} bytes, and a peer that takes no pieces can have {MESSAGE_NBYTES}")
        else:
            response = encode_response(request_id, value)
            if not self._line.post_now(self._channel, response):
                await self._line.post_large(self._channel, response)

    async def _send_pieces(self, request_id: int, value: bytes) -> None:
        self._line.post(self._beside, encode_call(CallMessage.RESPONSE, request_id, uint(len(value))))
        for piece in pieces(value):
            await self._line.post_large(self._beside, encode_call(CallMessage.RESPONSE_PIECE, request_id, piece))

    def _refuse(self, request_id: int, method: str, error: Exception) -> None:
        if not isinstance(error, TetherError):
            log.error("a call failed", peer=self._line.peer, method=method, exc_info=error)
            error = InternalError("the call failed inside the lab: its log has the traceback")
        if request_id > 0:
            self._line.post(self._channel, encode_error(request_id, error))
        else:
            log.info("an event was refused", peer=self._line.peer, method=method, code=error.code)


async def _given(answer: bytes) -> bytes:
    return answer
