"""Answers in parts over HTTP: `infer_stream`, and the generate extension (OIP §1).

The status is that of the first part. What fails later is told in the stream and ends it: `{"error", "code"}` as one more event. A client
that goes away, or does not read, stops the model's generator: nothing is queued for it but what its socket holds and a few parts.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from time import perf_counter
from typing import Final

from tether.errors import ServiceUnavailableError, UnsupportedError
from tether.gateway.admission import timeout_of
from tether.gateway.generate import generate_answer, generate_request
from tether.gateway.oip import Target
from tether.gateway.parts import Parts
from tether.gateway.routes import OFF_LOOP, TENSORS, Answer, Call, Endpoint, answer_of, forward, plain_body
from tether.ports import Hop, HopReply
from tether.wire.oip import encode_error
from tether.wire.parts import END, PARTS_KIND, encode_part

__all__ = ["STREAMING"]

_EVENTS: Final = "text/event-stream; charset=utf-8"
_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}
_LONGEST: Final = 30 * 86400.0
"""Seconds of a stream whose client set no deadline: it has one for each part, the lab's own for a request."""
_OK: Final = 200
_LEFT: Final = 499
"""Status, in metrics only, of a stream that its client left before its end."""
_Encode = Callable[[HopReply], bytes]


async def _infer_stream(call: Call) -> Answer:
    """The request as for `infer`. Events have the protocol's JSON; who accepts parts gets them as they are, tensors in binary or not."""
    target = call.path["model"], call.path.get("version")
    hop = call.door.hop(target, call.headers, await plain_body(call))
    if PARTS_KIND.encode() in call.headers.get(b"accept", b""):
        return await _streamed(call, target, hop, _framed)
    return await _streamed(call, target, hop, _event)


async def _generate(call: Call) -> Answer:
    """One answer; parts, if the model gives them, joined along their first axis."""
    target, hop = await _generating(call)
    reply = await forward(call, target, lambda: hop)
    return answer_of(reply) if reply.status != _OK else Answer(_OK, generate_answer(reply.body, reply.header_nbytes))


async def _generate_stream(call: Call) -> Answer:
    """Each part as an event; of a model that answers at once, its answer."""
    target, hop = await _generating(call)
    return await _streamed(call, target, hop, _generated)


async def _generating(call: Call) -> tuple[Target, Hop]:
    target = call.path["model"], call.path.get("version")
    info, sent = call.door.dispatcher.table.resolve(*target).info, await plain_body(call)
    if len(sent) > OFF_LOOP:
        body, header_nbytes = await asyncio.to_thread(generate_request, sent, info)
    else:
        body, header_nbytes = generate_request(sent, info)
    timeout = timeout_of(call.headers, body, header_nbytes, call.door.settings.limits.timeout)
    return target, Hop(body, header_nbytes, timeout)


async def _streamed(call: Call, target: Target, hop: Hop, encode: _Encode) -> Answer:
    stream = _Stream(call, target, hop)
    try:
        first = await stream.first()
        if first is not None and first.status != _OK:
            stream.end()
            return answer_of(first)
        if first is not None and first.header_nbytes and encode is _event:
            raise UnsupportedError(f"events carry no binary tensors: ask for JSON outputs, or send Accept: {PARTS_KIND}")
    except BaseException:
        stream.end()
        raise
    kind = PARTS_KIND if encode is _framed else _EVENTS
    return Answer(_OK, b"", kind, headers=_HEADERS, rest=_rest(stream, first, encode), ended=stream.end)


async def _rest(stream: _Stream, first: HopReply | None, encode: _Encode) -> AsyncIterator[bytes]:
    part = first
    while part is not None:
        yield encode(part)
        if part.status != _OK:
            return
        part = await stream.next()
    if encode is _framed:
        yield END


class _Stream:
    """One of them, from the request to its end, in whatever way that comes."""

    def __init__(self, call: Call, target: Target, hop: Hop) -> None:
        limit = call.door.settings.limits.timeout
        is_bounded = timeout_of(call.headers, hop.body, hop.header_nbytes, math.inf) < math.inf
        self._parts = Parts(None if is_bounded else limit)
        self._gone = call.gone
        self._series, self._begun, self._has_ended = call.door.series(target), perf_counter(), False
        self._status = _LEFT
        self._series.in_flight += 1
        hop = hop if is_bounded else replace(hop, timeout=_LONGEST)
        self._cancel = call.door.dispatcher.stream(*target, hop, self._parts, self._parts.end)

    async def next(self) -> HopReply | None:
        """As `Parts.next`."""
        part = await self._parts.next()
        if part is None:
            self._status = _OK
        elif part.status != _OK:
            self._status = part.status
        return part

    async def first(self) -> HopReply | None:
        """As `next`. Raises: ServiceUnavailableError: the client went away."""
        part, gone = asyncio.ensure_future(self.next()), asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait((part, gone), return_when=asyncio.FIRST_COMPLETED)
            if not part.done():
                raise ServiceUnavailableError("the client went away before the answer came")
            return part.result()
        finally:
            for task in (part, gone):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await gone

    def end(self) -> None:
        """Nobody reads it any more; a second call does nothing."""
        if self._has_ended:
            return
        self._has_ended = True
        self._cancel()
        self._series.in_flight -= 1
        self._series.observe(self._status, perf_counter() - self._begun)


def _framed(reply: HopReply) -> bytes:
    return encode_part(reply.status, reply.body, reply.header_nbytes)


def _event(reply: HopReply) -> bytes:
    if reply.header_nbytes:
        return b"data: %b\n\n" % encode_error(UnsupportedError(f"events carry no binary tensors; send Accept: {PARTS_KIND}"))
    return b"data: %b\n\n" % reply.body


def _generated(reply: HopReply) -> bytes:
    return b"data: %b\n\n" % (reply.body if reply.status != _OK else generate_answer(reply.body, reply.header_nbytes))


_VALUES: Final = {"type": "object", "properties": {"id": {"type": "string"}, "parameters": {"type": "object"}}}
_MODEL: Final = "/v2/models/{model}"
_VERSION: Final = "/v2/models/{model}/versions/{version}"

STREAMING: Final = (
    Endpoint("POST", f"{_MODEL}/infer_stream", "infer", _infer_stream, "Run the model, parts as they come", TENSORS),
    Endpoint("POST", f"{_VERSION}/infer_stream", "infer", _infer_stream, "Run this version, parts as they come", TENSORS),
    Endpoint("POST", f"{_MODEL}/generate", "infer", _generate, "Run the model: plain JSON in and out", _VALUES),
    Endpoint("POST", f"{_VERSION}/generate", "infer", _generate, "Run this version: plain JSON in and out", _VALUES),
    Endpoint("POST", f"{_MODEL}/generate_stream", "infer", _generate_stream, "The same, parts as they come (server-sent)", _VALUES),
    Endpoint("POST", f"{_VERSION}/generate_stream", "infer", _generate_stream, "The same, of a version", _VALUES),
)
