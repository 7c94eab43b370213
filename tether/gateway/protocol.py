"""uvicorn's HTTP protocol with a fast lane: `POST /v2/models/…/infer` never becomes an ASGI scope; all else goes the normal way.

The lane saves ~35 µs of scope, task and events a request. It reads attributes that uvicorn does not document; `UVICORN_USES` names them
and a test fails if one goes. What uvicorn leaves open is bounded here for both lanes: sizes of headers and bodies, stalls, idleness.

Order of answers: uvicorn keeps the newest message in `cycle` and those that wait in `pipeline`; a `Lane` stands in both like its own
`RequestResponseCycle`. A message that is refused is a `Lane` too, so that its error comes in its turn.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tether.errors import (
    InternalError,
    MalformedRequestError,
    RequestTimeoutError,
    TetherError,
)
from tether.gateway.admission import PROXIED, Headers, Peer
from tether.gateway.door import Door
from tether.gateway.heads import Head, body_too_large, check_head, headers_too_large, prelude
from tether.gateway.known_heads import KnownHead, candidate
from tether.gateway.lane import Lane, head_of
from tether.gateway.peers import cut_off, peer_of, unsent
from tether.ports import HopReply

__all__ = ["UVICORN_USES", "FastProtocol", "protocol_class"]

UVICORN_USES: Final = frozenset(
    {"_start_asgi_task", "connections", "cycle", "expect_100_continue", "flow", "headers", "loop", "on_message_begin",
     "on_response_complete", "parser", "pipeline", "scope", "server_state", "transport"}
)  # fmt: skip
"""Attributes of HttpToolsProtocol that this module relies on."""

_log = logging.getLogger("tether.gateway")
_STEP: Final = 1 << 16
"""Bytes that count as progress of a client."""
_SMALL: Final = 1 << 16
"""Body that is read and thrown away to keep the connection of a refused request; a larger one is not worth it."""
_LINGER: Final = 2.0
"""Seconds that the rest of a refused body is read: closing at once would reset the connection and take the answer with it."""
_JOINED: Final = 1 << 16
"""Bytes up to which head and body are joined for one write; larger bodies are not copied."""


class FastProtocol(HttpToolsProtocol):
    """One connection. `door` is set by `protocol_class`."""

    door: Door

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        super().connection_made(transport)
        self.client_address: str | None = self.client[0] if self.client else None
        self._lane: Lane | None = None
        """The lane whose message is being read; None between messages and on the normal way."""
        self._reading: Any = None
        """uvicorn's cycle whose message is being read, on the normal way."""
        self._current: Any = None
        """The cycle or lane whose turn it is."""
        self._peer: Peer | None = None
        self._asked = False
        self._seen: tuple[object, ...] | None = None
        self._caller: str | None = None
        self._in_headers = self._in_body = self._deaf = self._advancing = self._replaying = False
        self._skipped = b""
        """The head that tells a new parser of a body which the old one skipped."""
        self._unsent: Lane | None = None
        """A lane whose answer waits for the client to read."""
        self._messages = self._received = self._chunk = self._head_nbytes = self._body_nbytes = 0
        self._known: KnownHead | None = None
        """The last head of a lane's message, if the next one may be the same."""
        self._candidate: KnownHead | None = None
        """The head that was just parsed, of which it is not known yet where it ends."""
        self._owed = 0
        """Bytes of body to come of a message whose head was known: they do not pass the parser."""
        self._progress: tuple[object, ...] | None = None
        self._strikes = 0
        self._period = self.door.settings.patience / 2
        self._watch = self.loop.call_later(self._period, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        self._deaf = True
        for cycle in (self._current, self.cycle, *(queued for queued, _app in self.pipeline)):
            if isinstance(cycle, Lane):
                cycle.abort()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        at, end = 0, len(data)
        self._received += end
        while at < end and not self._deaf:
            known = self._known
            if self._owed:
                piece = data[at : at + self._owed]
                at += len(piece)
                self._feed_known(piece)
            elif known is not None and data.startswith(known.head, at) and self._may_begin(known):
                at += len(known.head)
                self._begin_known(known)
            else:
                self._read(data[at:])
                return

    def _may_begin(self, known: KnownHead) -> bool:
        """Whether the next byte is the first of a message, and its caller may still do what he might."""
        return not (self._in_headers or self._in_body) and known.generation == self.door.admission.keys.generation

    def _begin_known(self, known: KnownHead) -> None:
        """As `on_headers_complete`, of a head that came before: the parser would say the same of it."""
        self._messages += 1
        self._in_body, self._owed = True, known.nbytes
        self.url = known.url
        lane = self._lane = Lane(self, known.target, known.url, known.sent)
        lane.keep_alive = True
        lane.caller = known.caller
        self._enqueue(lane)

    def _feed_known(self, piece: bytes) -> None:
        """A piece of that message's body."""
        self._owed -= len(piece)
        lane = self._lane
        if not self._owed:
            self._in_body, self._lane = False, None
        if lane is not None:
            lane.feed(piece)
            if not self._owed:
                lane.complete()

    def _read(self, data: bytes) -> None:
        self._chunk = len(data)
        message = self._messages if self._in_headers else -1
        known_after = -1 if self._in_headers or self._in_body else self._messages + 1
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._stop(_refusal(error))
            return
        if self._in_headers and message == self._messages:  # all of it was headers of one message
            self._head_nbytes += self._chunk
            if self._head_nbytes > self.door.settings.header_nbytes:
                self._stop(headers_too_large(self.door.settings))
        elif known_after == self._messages and self._candidate is not None:
            self._known = self._candidate.found_in(data, self._body_nbytes) or self._known

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._go_on_after_upgrade()
            else:
                return

    def _go_on_after_upgrade(self) -> None:
        """We offer no upgrade, which is to be ignored then (RFC 9110 §7.8); the parser stops at it and skips the body. So a new one
        goes on, which is told first what kind of body comes. Java's client asks for HTTP/2 this way in every request.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        if self._skipped:
            prelude, self._skipped, self._replaying, self.headers = self._skipped, b"", True, []
            self.parser.feed_data(prelude)
            self._replaying = False

    def on_message_begin(self) -> None:
        if self._replaying:
            return
        self.url = b""
        self.headers = []
        self._messages += 1
        self._head_nbytes = self._body_nbytes = 0
        self._candidate = None
        self._in_headers = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._replaying:
            return
        sent = dict(self.headers)
        fits = self._head_nbytes + self._chunk <= self.door.settings.header_nbytes  # else they must be added up
        check_head(Head(self.url, self.headers, self.parser.get_http_version(), fits), sent, self.door.settings)
        self._in_headers = False
        self._in_body = True
        if self.parser.should_upgrade():
            self._skipped = prelude(sent)
        post = self.parser.get_method() == b"POST"
        target = self.door.target(self.url) if post and b"content-encoding" not in sent else None
        if target is None:
            self._leave_to_asgi(sent)
            return
        lane = self._lane = Lane(self, target, self.url, sent)
        lane.keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        try:
            lane.caller = self._admit(sent)
        except TetherError as error:
            self._refuse_early(lane, error)
        lane.expects = lane.error is None and sent.get(b"expect", b"").lower() == b"100-continue"
        if lane.error is None and lane.keep_alive and not self._skipped and b"expect" not in sent:
            self._candidate = candidate(sent, self.url, target, lane.caller, self.door.admission.keys.generation)
        self._enqueue(lane)

    def _leave_to_asgi(self, sent: Headers) -> None:
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        self.headers = headers
        self.scope["headers"] = headers
        self.scope["state"]["connection"] = self
        self.expect_100_continue = sent.get(b"expect", b"").lower() == b"100-continue"
        super().on_headers_complete()
        self._reading = self.cycle

    def _admit(self, sent: Headers) -> str | None:
        """As the last message of this connection, where it said the same: clients rarely change their mind between two requests."""
        admission = self.door.admission
        proxied = not PROXIED.isdisjoint(sent)
        seen = (sent.get(b"authorization"), sent.get(b"host"), sent.get(b"origin"), proxied, admission.keys.generation)
        if seen != self._seen:
            self._seen = None
            peer = self.peer(ask_user=seen[0] is None)
            admission.check_site(sent, peer)
            self._caller = admission.caller(sent, peer, "infer")
            self._seen = seen
        return self._caller

    def peer(self, *, ask_user: bool) -> Peer:
        """Who is at the other end; the owner of the socket is looked up once, when it first matters."""
        if self._peer is None or (ask_user and not self._asked):
            self._peer = peer_of(self.transport, ask_user=ask_user)
            self._asked = ask_user
        return self._peer

    def _refuse_early(self, lane: Lane, error: TetherError) -> None:
        """Before the body came. A small one is read, so that the connection lives; a client that waits, or sends much, is cut off."""
        lane.error = error
        headers = lane.headers
        if int(headers.get(b"content-length", b"0")) > _SMALL or b"transfer-encoding" in headers or b"expect" in headers:
            lane.keep_alive = False
            lane.ready = True
            self._deaf = True

    def on_body(self, body: bytes) -> None:
        if self._deaf:
            return
        self._body_nbytes += len(body)
        if self._body_nbytes > self.door.settings.limits.body_nbytes:  # Content-Length was checked: this one is chunked
            raise body_too_large(self.door.settings)
        if self._lane is not None:
            self._lane.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._skipped:
            return
        self._in_body = False
        self._reading = None
        lane, self._lane = self._lane, None
        if lane is None:
            super().on_message_complete()
        elif not self._deaf:
            lane.complete()

    def _stop(self, error: TetherError) -> None:
        """Nothing more is read of this connection: answer with `error` in its turn, then close."""
        self._deaf = True
        lane, self._lane = self._lane, None
        if lane is None:
            if self._reading is not None:
                self._withdraw(self._reading)
            lane = Lane(self, None, self.url, dict(self.headers or ()))
            lane.method = "-"
            self._enqueue(lane)
        if not lane.answered:
            lane.refuse(error)

    def _withdraw(self, cycle: Any) -> None:
        """The message that is being read, on the normal way, gets no answer but the error."""
        if self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._current
        elif cycle.response_started:
            self.transport.close()
        else:
            cycle.disconnected = cycle.response_complete = True
            cycle.message_event.set()

    def _enqueue(self, lane: Lane) -> None:
        previous = self.cycle
        self.cycle: Any = lane
        if previous is None or previous.response_complete:
            self._start_asgi_task(lane, None)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((lane, None))  # type: ignore[arg-type]  # as the comment at the top says

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._current = cycle
        if isinstance(cycle, Lane):
            cycle.begin()
        else:
            super()._start_asgi_task(cycle, app)

    def send_continue(self) -> None:
        """`Expect: 100-continue` (RFC 9110 §10.1.1)."""
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def write_answer(self, lane: Lane, reply: HopReply) -> None:
        """Write it; the connection goes on when the client has taken it."""
        head = head_of(lane, reply, self.door.standing(self.server_state.default_headers))
        if len(reply.body) <= _JOINED:
            self.transport.write(head + reply.body)
        else:
            self.transport.writelines((head, reply.body))
        if not lane.keep_alive:
            lane.response_complete = True
            self._hang_up()
        elif self.flow.write_paused:
            self._unsent = lane
        else:
            lane.response_complete = True
            self.on_response_complete()

    def resume_writing(self) -> None:
        super().resume_writing()
        lane, self._unsent = self._unsent, None
        if lane is not None and not self.transport.is_closing():
            lane.response_complete = True
            if lane.keep_alive:
                self.on_response_complete()
            else:  # the server is ending
                self._hang_up()

    def on_response_complete(self) -> None:
        """Start what waits. A loop, not a recursion: ten thousand pipelined requests may be answered at once."""
        self.server_state.total_requests += 1
        if self._advancing or self.transport.is_closing():
            return
        self._advancing = True
        try:
            while self.pipeline and self._current.response_complete and not self.transport.is_closing():
                self._start_asgi_task(*self.pipeline.pop())
        finally:
            self._advancing = False
        if not self.pipeline:
            self.flow.resume_reading()

    def _hang_up(self) -> None:
        """Close; while the rest of a refused message is still coming, only our side, and read on for a moment."""
        if self._deaf and (self._in_body or self._in_headers) and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._watch.cancel()
            self._watch = self.loop.call_later(_LINGER, self.transport.close)
        else:
            self.transport.close()

    def _look(self) -> None:
        """Twice in `patience`: has the side whose turn it is got on?  One timer a connection, and no clock on the fast lane."""
        settings = self.door.settings
        waits = self._waits_for()
        self._strikes = self._strikes + 1 if waits is not None and waits == self._progress else 0
        self._progress = waits
        idle = waits is not None and waits[0] == "idle"
        if self._strikes and self._strikes * self._period >= (settings.keep_alive if idle else settings.patience):
            self._give_up(str(waits[0]) if waits else "")
        if not self.transport.is_closing():
            self._watch = self.loop.call_later(self._period, self._look)

    def _waits_for(self) -> tuple[object, ...] | None:
        """What the client owes, and how far it got; None while it is our turn."""
        if self.flow.write_paused:
            return "write", self._messages, unsent(self.transport) // _STEP
        if (self._in_headers or self._in_body) and not self.flow.read_paused and not self._deaf:
            return "read", self._messages, self._in_headers, self._received // _STEP
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        return "idle", self._messages

    def _give_up(self, waited_for: str) -> None:
        if waited_for == "read":
            self._stop(RequestTimeoutError(f"the request did not come within {self.door.settings.patience:g} s; send it without pauses"))
        elif waited_for == "write":
            cut_off(self.transport)
        else:
            self.transport.close()


def _refusal(error: httptools.HttpParserError) -> TetherError:
    """What a callback of ours raised, or what the parser found."""
    cause = error.__context__
    if isinstance(cause, TetherError):
        return cause
    if cause is None or isinstance(cause, httptools.HttpParserError | UnicodeError):
        return MalformedRequestError(f"the request is not valid HTTP/1.1: {error}")
    _log.error("a request could not be taken", exc_info=cause)
    return InternalError("the gateway failed on this request; its log has the traceback")


def protocol_class(door: Door) -> type[FastProtocol]:
    """The class to give to uvicorn (`http=`): a server makes one of it for each connection."""
    return type("FastProtocol", (FastProtocol,), {"door": door})
