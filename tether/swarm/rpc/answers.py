"""The answering half of an RPC connection: who may call what, how much at a time, and what becomes of a call that is taken back."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable
from types import CoroutineType

import structlog

from tether.errors import (
    DeadlineExceededError,
    InternalError,
    PayloadTooLargeError,
    ProtocolError,
    QueueFullError,
    RequestTimeoutError,
    TetherError,
    UnknownMethodError,
)
from tether.swarm.rpc.bodies import AHEAD_NBYTES, WINDOW_NBYTES, Incoming, Room
from tether.swarm.rpc.expiry import NEVER, Expiry
from tether.swarm.rpc.messages import (
    SMALL_NBYTES,
    CallMessage,
    encode_call,
    encode_error,
    encode_response,
    read_deadline,
    read_method,
    read_request,
    read_value,
)
from tether.swarm.rpc.replies import Reply
from tether.swarm.rpc.service import Call, Handler, PassingHandler, RpcLimits, Service
from tether.swarm.rpc.stalls import Stalls
from tether.swarm.rpc.work import Coming, Passing, Work, passed, passed_in_turn
from tether.swarm.wire.compact import read_uint, uint
from tether.swarm.wire.line import Line
from tether.swarm.wire.pieces import PIECE_NBYTES, Body
from tether.swarm.wire.protomux import Channel

__all__ = ["Answers"]

log = structlog.get_logger("tether.swarm")
_SWEEP = 0.25
"""Seconds between two looks for calls that are over."""


class Answers:
    """The calls of one peer."""

    def __init__(self, line: Line, channel: Channel, beside: Channel, service: Service, limits: RpcLimits) -> None:
        self._line, self._channel, self._beside = line, channel, beside
        self._service, self._limits = service, limits
        self._work: dict[int, Work] = {}
        """By id; events, which have none, by numbers below 0."""
        self._coming: dict[int, Coming] = {}
        self._limit: float | None = None
        """Seconds for which the peer waits for answers to requests that come next."""
        self._room = Room(limits.max_passing_nbytes)
        self._held_nbytes = self._unsent_nbytes = self._arrived_nbytes = 0
        self._stalls = Stalls()
        self._expiry = Expiry(line.loop, self._sweep, _SWEEP)
        self._watching: asyncio.TimerHandle | None = None
        self._event_numbers = itertools.count(-1, -1)

    def __len__(self) -> int:
        return len(self._work) + len(self._coming)

    def allow(self, limits: RpcLimits) -> None:
        """Other limits from now on."""
        self._limits = limits
        self._room.resize(limits.max_passing_nbytes)

    # --- what comes

    def on_request(self, message: memoryview) -> None:
        """A request in one message. Raises: ProtocolError."""
        request_id, method, value = read_request(message)
        self._check_id(request_id)
        try:
            handler = self._admitted(method, len(value))
            data = bytes(read_value(value))
        except Exception as error:  # the hook's own bugs too: they let nobody in
            self._refuse(request_id, method, error)
            return
        self._run(request_id, method, handler, data, self._deadline() if request_id else None)

    def on_deadline(self, body: memoryview) -> None:
        """Said before requests. Raises: ProtocolError."""
        self._limit = read_deadline(body)

    def on_cancel(self, body: memoryview) -> None:
        """A request is taken back. Raises: ProtocolError."""
        request_id, _ = read_uint(body, 0)
        self._drop(request_id)
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
        deadline = self._deadline()
        try:
            handler = self._admitted(method, nbytes)
        except Exception as error:  # as above
            self._refuse(request_id, method, error)
            return
        if isinstance(handler, Passing) and nbytes > AHEAD_NBYTES:
            self._pass_on(request_id, method, handler.handler, nbytes, deadline)
        else:
            self._collect(request_id, Coming(method, handler, Body(nbytes), deadline))

    def on_piece(self, body: memoryview) -> None:
        """A piece of a request's body; of one that was refused or taken back it is dropped. Raises: ProtocolError."""
        request_id, at = read_uint(body, 0)
        self._arrived_nbytes += len(body) - at
        work, coming = self._work.get(request_id), self._coming.get(request_id)
        if work is not None and work.body is not None:
            if work.body.feed(body[at:]):
                self._ask_again(request_id, work.method)
        elif coming is not None and coming.body.add(body[at:]):
            self._drop(request_id)
            if self._ask_again(request_id, coming.method):
                self._run(request_id, coming.method, coming.handler, coming.body.take(), coming.deadline)

    def on_room(self, body: memoryview) -> None:
        """The peer takes more of an answer. Raises: ProtocolError."""
        request_id, at = read_uint(body, 0)
        nbytes, _ = read_uint(body, at)
        work = self._work.get(request_id)
        if work is not None and work.reply is not None:
            work.reply.grant(nbytes)

    def end(self) -> None:
        """The connection is gone: nobody waits for anything."""
        self._coming.clear()
        self._expiry.stop()
        if self._watching is not None:
            self._watching.cancel()
        for work in list(self._work.values()):
            work.task.cancel()

    # --- who may, and what comes of it

    def _admitted(self, method: str, nbytes: int) -> Handler | Passing:
        self._service.authorise(self._line.peer, method)
        passing, limits = self._service.passing.get(method), self._limits
        handler = self._service.handlers.get(method) if passing is None else Passing(passing[0])
        if handler is None:
            raise UnknownMethodError(f"Unknown method '{method}'")  # the words of npm's package
        most = limits.max_request_nbytes if passing is None else min(passing[1], limits.max_passing_nbytes)
        if nbytes > most:
            raise PayloadTooLargeError(f"a request of {nbytes} bytes; at most {most} are taken: send fewer at once")
        if len(self) >= limits.max_in_flight:
            raise QueueFullError(f"{limits.max_in_flight} of your requests are being worked on: wait for answers and try again")
        held = 0 if passing is not None and nbytes > AHEAD_NBYTES else nbytes
        if self._held_nbytes + held > limits.max_held_nbytes:
            raise QueueFullError(f"your requests hold {self._held_nbytes} bytes here: wait for answers and try again")
        return handler

    def _check_id(self, request_id: int) -> None:
        if request_id in self._work or request_id in self._coming:
            raise ProtocolError(f"request {request_id} is being worked on already")

    def _ask_again(self, request_id: int, method: str) -> bool:
        """Whether the peer may still make this call, now that its body is here, which took as long as it liked."""
        try:
            self._service.authorise(self._line.peer, method)
        except Exception as error:  # as above
            work = self._work.get(request_id)
            if work is None:
                self._refuse(request_id, method, error)
            else:
                work.stop(error)
            return False
        return True

    def _collect(self, request_id: int, coming: Coming) -> None:
        """Wait for all of a body."""
        self._coming[request_id] = coming
        self._held_nbytes += coming.body.nbytes
        if coming.body.nbytes > AHEAD_NBYTES:
            self._grant(request_id, coming.body.nbytes)
        self._look_at(coming.deadline)
        self._watch_soon()

    def _grant(self, request_id: int, nbytes: int) -> None:
        """There is room for more of a request."""
        self._line.post(self._beside, encode_call(CallMessage.REQUEST_ROOM, request_id, uint(nbytes)))
        self._watch_soon()

    def _drop(self, request_id: int) -> None:
        """A body that was collected comes no more, or is whole."""
        coming = self._coming.pop(request_id, None)
        if coming is not None:
            self._held_nbytes -= coming.body.nbytes

    def _run(self, request_id: int, method: str, handler: Handler | Passing, data: bytes, deadline: float | None) -> None:
        call = Call(self._line.peer, method, deadline)
        try:
            if deadline is not None and deadline <= self._line.loop.time():
                raise DeadlineExceededError("the request came when nobody waited for it any more")
            if isinstance(handler, Passing):
                self._pass_whole(request_id, handler.handler, call, data)
                return
            answer = handler(call, data)
            if isinstance(answer, bytes) and len(answer) > SMALL_NBYTES:
                self._check_answer(len(answer))
        except Exception as error:  # whatever it is, it is this call's
            self._refuse(request_id, method, error)
            return
        if not isinstance(answer, bytes):
            self._start(request_id, call, answer, len(data))
        elif len(answer) > SMALL_NBYTES:
            self._keep(self._start(request_id, call, _given(answer), len(data)), len(answer))
        elif request_id:
            self._line.post(self._channel, encode_response(request_id, answer))

    # --- bodies that are passed on

    def _pass_whole(self, request_id: int, handler: PassingHandler, call: Call, data: bytes) -> None:
        reply = self._reply(request_id, self._pass_answer)
        work = self._start(request_id, call, passed(handler, call, Incoming.whole(data), reply), len(data))
        work.reply = reply

    def _pass_on(self, request_id: int, method: str, handler: PassingHandler, nbytes: int, deadline: float | None) -> None:
        body, reply = Incoming(nbytes, functools.partial(self._grant, request_id)), self._reply(request_id, self._pass_answer)
        call = Call(self._line.peer, method, deadline)
        rooms = self._room, self._service.room
        work = self._start(request_id, call, passed_in_turn(handler, call, body, reply, rooms), 0)
        work.body, work.reply = body, reply

    def _reply(self, request_id: int, keep: Callable[[int, int], None]) -> Reply:
        return Reply(self._line, self._beside, request_id, functools.partial(keep, request_id), self._limits.patience)

    def _keep_answer(self, request_id: int, nbytes: int) -> None:
        """An answer of this size is here, and goes out. Raises: PayloadTooLargeError, QueueFullError."""
        work = self._work.get(request_id)
        if work is not None and nbytes > SMALL_NBYTES and not work.unsent_nbytes:
            self._check_answer(nbytes)
            self._keep(work, nbytes)

    def _pass_answer(self, request_id: int, nbytes: int) -> None:
        """An answer of this size goes out as it comes: a window of it is here at a time. Raises: PayloadTooLargeError, QueueFullError."""
        self._check_size(nbytes)
        goes_in_pieces = self._beside.opened and not self._beside.closed
        self._keep_answer(request_id, min(nbytes, WINDOW_NBYTES) if goes_in_pieces else nbytes)

    # --- work

    def _start(self, request_id: int, call: Call, answer: Awaitable[bytes | None], nbytes: int) -> Work:
        number = request_id or next(self._event_numbers)
        task = self._line.loop.create_task(self._answer(request_id, call.method, answer))
        work = self._work[number] = Work(call.method, answer, nbytes, task, call.deadline)
        self._held_nbytes += nbytes
        self._look_at(call.deadline)
        task.add_done_callback(functools.partial(self._done, number))
        return work

    def _check_size(self, nbytes: int) -> None:
        most = self._limits.max_reply_nbytes
        if nbytes > most:
            raise PayloadTooLargeError(f"the answer has {nbytes} bytes; at most {most} are sent: ask for less")

    def _check_answer(self, nbytes: int) -> None:
        self._check_size(nbytes)
        if self._unsent_nbytes + nbytes > self._limits.max_reply_nbytes:
            raise QueueFullError(f"{self._unsent_nbytes} bytes of answers wait for you: take them and try again")

    def _keep(self, work: Work, nbytes: int) -> None:
        """The answer is here until the peer takes it."""
        work.unsent_nbytes = nbytes
        self._unsent_nbytes += nbytes

    def _done(self, number: int, _: asyncio.Task[None]) -> None:
        work = self._work.pop(number)
        self._held_nbytes -= work.nbytes
        self._unsent_nbytes -= work.unsent_nbytes
        if isinstance(work.answer, CoroutineType):
            work.answer.close()  # one that was cancelled before its first step would be missed
        if work.error is not None and work.task.cancelled():
            self._refuse(number, work.method, work.error)

    async def _answer(self, request_id: int, method: str, answer: Awaitable[bytes | None]) -> None:
        try:
            value = await answer
            if request_id and value is not None:
                await self._send(request_id, value)
        except Exception as error:  # as above
            self._refuse(request_id, method, error)

    async def _send(self, request_id: int, value: bytes) -> None:
        if len(value) <= SMALL_NBYTES and self._line.is_clear:
            self._line.post(self._channel, encode_response(request_id, value))
            return
        reply = self._work[request_id].reply = self._reply(request_id, self._keep_answer)
        await reply.begin(len(value))
        await reply.write(value)
        whole = await reply.finish()
        if whole is not None:
            response = encode_response(request_id, whole)
            if not self._line.post_now(self._channel, response):
                await self._line.post_large(self._channel, response, self._limits.patience)

    def _refuse(self, request_id: int, method: str, error: Exception) -> None:
        if not isinstance(error, TetherError):
            log.error("a call failed", peer=self._line.peer, method=method, exc_info=error)
            error = InternalError("the call failed inside the lab: its log has the traceback")
        if request_id > 0:
            self._line.post(self._channel, encode_error(request_id, error))
        else:
            log.info("an event was refused", peer=self._line.peer, method=method, code=error.code)

    # --- time

    def _deadline(self) -> float | None:
        """Of a request that comes now."""
        return None if self._limit is None else self._line.loop.time() + self._limit

    def _look_at(self, deadline: float | None) -> None:
        if deadline is not None:
            self._expiry.expect(deadline)

    def _sweep(self, now: float) -> float:
        """End what nobody waits for any more. The caller takes it back at its deadline; this is for one that can't be heard."""
        deadlines = {number: work.deadline for number, work in self._work.items() if work.deadline is not None}
        deadlines |= {number: coming.deadline for number, coming in self._coming.items() if coming.deadline is not None}
        for number, deadline in deadlines.items():
            if deadline <= now:
                self._stop(number, DeadlineExceededError("the answer was not ready within the caller's deadline"))
        return min(deadlines.values(), default=NEVER)

    def _watch_soon(self) -> None:
        if self._watching is None:
            self._watching = self._line.loop.call_later(self._limits.patience, self._watch)

    def _watch(self) -> None:
        """End calls of which nothing comes: they keep others from their room."""
        self._watching = None
        awaited = self._coming.keys() | {number for number, work in self._work.items() if work.body is not None and work.body.is_awaited}
        for number in self._stalls.look(awaited, self._arrived_nbytes):
            self._stop(number, RequestTimeoutError(f"the body did not come within {self._limits.patience:g} s: send it without pauses"))
        if awaited:
            self._watch_soon()

    def _stop(self, number: int, error: TetherError) -> None:
        """A call is ended from here, and its caller told why."""
        work = self._work.get(number)
        if work is not None:
            work.stop(error)
        elif number in self._coming:
            method = self._coming[number].method
            self._drop(number)
            self._refuse(number, method, error)


async def _given(answer: bytes) -> bytes:
    return answer
