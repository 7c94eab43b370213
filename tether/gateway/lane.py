"""One message on the gateway's fast lane, from its headers to its answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from time import perf_counter, time
from typing import Final, Protocol

from tether.errors import InternalError, TetherError
from tether.gateway.admission import Headers
from tether.gateway.door import Door
from tether.gateway.oip import Target
from tether.gateway.retry_after import RETRY, retry_after
from tether.ports import HopReply
from tether.telemetry.accesslog import Access
from tether.telemetry.metrics import Series
from tether.wire.oip import encode_error

__all__ = ["Connection", "Lane", "head_of"]

_log = logging.getLogger("tether.gateway")
_PARTS: Final = 512
"""Pieces of a body that are kept apart; so many are joined, since the objects of tiny ones would outweigh their bytes."""
_STATUS: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_CLOSED_BY_CLIENT: Final = 499
"""Status of a request whose client went away, in metrics and log only (nginx's number)."""


class Connection(Protocol):
    """What a lane needs of its connection."""

    door: Door
    client_address: str | None

    def send_continue(self) -> None:
        """Tell a client that waits with its body to send it."""
        ...

    def write_answer(self, lane: Lane, reply: HopReply) -> None:
        """Write the answer, then go on with the next message, or close."""
        ...


class _NoEvent:
    """What uvicorn sets when a message moves on; nobody waits for a lane."""

    def set(self) -> None:
        pass


class Lane:
    """Stands where uvicorn keeps its RequestResponseCycle: the first six attributes are those that its bookkeeping uses."""

    __slots__ = (
        "answered", "caller", "cancel", "connection", "disconnected", "error", "expects", "headers", "id", "joined", "keep_alive", "method",
        "nbytes", "parts", "ready", "response_complete", "series", "started", "target", "turn", "url",
    )  # fmt: skip
    message_event = _NoEvent()
    waiting_for_100_continue = False

    def __init__(self, connection: Connection, target: Target | None, url: bytes, headers: Headers) -> None:
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = False
        self.started = perf_counter()
        self.connection, self.target, self.url, self.headers = connection, target, url, headers
        self.method = "POST"
        self.answered = self.ready = self.turn = self.expects = False
        self.id: bytes = b""
        self.error: TetherError | None = None
        self.caller: str | None = None
        self.cancel: Callable[[], None] | None = None
        self.series: Series | None = None
        self.parts: list[bytes] = []
        self.joined: list[bytes] | None = None
        """What stands before them."""
        self.nbytes = 0

    def feed(self, data: bytes) -> None:
        """A piece of the body."""
        self.nbytes += len(data)
        if self.error is not None:
            return
        self.parts.append(data)
        if len(self.parts) >= _PARTS:
            self.joined = self.joined or []
            self.joined.append(b"".join(self.parts))
            self.parts = []

    def complete(self) -> None:
        """The body is here."""
        self.ready = True
        if self.turn:
            self._dispatch()

    def refuse(self, error: TetherError) -> None:
        """Answer with an error and close: what follows on the connection can't be trusted, or is not worth reading."""
        self.error = error
        self.keep_alive = False
        self.complete()

    def begin(self) -> None:
        """All messages before this one are answered."""
        self.turn = True
        if self.ready:
            self._dispatch()
        elif self.expects:
            self.connection.send_continue()

    def abort(self) -> None:
        """The client went away."""
        self.disconnected = True
        if not self.answered and self.turn:
            self.answered = True
            if self.cancel is not None:
                self.cancel()
            self._account(_CLOSED_BY_CLIENT, 0)

    def _dispatch(self) -> None:
        error = self.error
        if error is not None or self.target is None:
            self._fail(error or InternalError("a message without a target; please report it"))
            return
        door = self.connection.door
        series = self.series = door.series(self.target)
        series.in_flight += 1
        try:
            hop = door.hop(self.target, self.headers, self._joined())
            self.cancel = door.dispatcher.infer(*self.target, hop, self.done)
        except TetherError as refusal:
            self._fail(refusal)
        except Exception:
            _log.exception("the dispatcher failed on a request for %.80r", self.target[0])
            self._fail(InternalError("the gateway failed on this request; its log has the traceback"))

    def _joined(self) -> bytes:
        parts, self.parts = self.parts, []
        if self.joined is not None:
            parts, self.joined = [*self.joined, *parts], None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fail(self, error: TetherError) -> None:
        self.done(HopReply(error.http_status, encode_error(error), retry_after=retry_after(error)))

    def done(self, reply: HopReply) -> None:
        """Answer. A second call does nothing."""
        if self.answered:
            return
        self.answered = True
        self.cancel = None  # it holds the call, which holds this: such rings wait for the garbage collector
        self._account(reply.status, len(reply.body))
        if not self.disconnected:
            self.connection.write_answer(self, reply)

    def _account(self, status: int, sent: int) -> None:
        seconds = perf_counter() - self.started
        if self.series is not None:
            self.series.in_flight -= 1
            self.series.observe(status, seconds)
        connection = self.connection
        door = connection.door
        self.id = door.request_id(self.headers.get(b"x-request-id"))
        if door.logs:
            client = connection.client_address
            door.note(Access(time(), seconds, self.method, self.url, status, self.nbytes, sent, client, self.caller, self.id))


def head_of(lane: Lane, reply: HopReply, standing: bytes) -> bytes:
    """Status line and headers; `standing` are those that every answer of the server has."""
    if reply.header_nbytes:
        kind = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n" % reply.header_nbytes
    else:
        kind = b"content-type: application/json\r\n"
    head = b"%b%b%bcontent-length: %d\r\nx-request-id: %b\r\n" % (_status_line(reply.status), standing, kind, len(reply.body), lane.id)
    if reply.status in RETRY:
        head += b"retry-after: %d\r\n" % reply.retry_after
    elif reply.status == HTTPStatus.UNAUTHORIZED:
        head += b"www-authenticate: Bearer\r\n"
    if b"origin" in lane.headers:
        head += b"".join(b"%b: %b\r\n" % pair for pair in lane.connection.door.cors(lane.headers))
    return head + (b"\r\n" if lane.keep_alive else b"connection: close\r\n\r\n")


def _status_line(status: int) -> bytes:
    return _STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status
