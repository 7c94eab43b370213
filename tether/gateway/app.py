"""The gateway as a web application and a server: endpoints on Starlette, uvicorn with the fast lane, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from time import perf_counter, time
from typing import Any, Final, cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tether.errors import InternalError, MethodNotAllowedError, NotFoundError, PayloadTooLargeError, RequestError, TetherError
from tether.gateway.admission import Peer
from tether.gateway.admitting import ADMITTING
from tether.gateway.copying import COPYING
from tether.gateway.docs import openapi, page
from tether.gateway.door import Dispatcher, Door, Settings
from tether.gateway.lending import LENDING
from tether.gateway.management import MANAGEMENT
from tether.gateway.placement import PLACEMENT
from tether.gateway.protocol import FastProtocol, protocol_class
from tether.gateway.quarantine import QUARANTINE
from tether.gateway.replicating import REPLICATING
from tether.gateway.retry_after import RETRY, SOON, retry_after
from tether.gateway.rolling import ROLLING
from tether.gateway.routes import PROTOCOL, Answer, Call, Endpoint, as_json
from tether.gateway.streaming import STREAMING
from tether.gateway.watching import WATCHING
from tether.gateway.zarr_door import ZARR
from tether.telemetry.accesslog import Access
from tether.wire.oip import encode_error

__all__ = ["make_app", "serve"]

_log = logging.getLogger("tether.gateway")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_Peers = Callable[[bool], Peer]


def make_app(door: Door) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """All endpoints but the fast lane's, as an ASGI application. Served by another protocol it takes every caller for a remote one."""
    by_path: dict[str, dict[str, Endpoint]] = {}
    for endpoint in _endpoints():
        by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint
    routes = [Route(path, _handler(door, verbs), methods=list(verbs)) for path, verbs in by_path.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False  # a redirect is no answer of the protocol
    return _Rim(app, door)


def _endpoints() -> tuple[Endpoint, ...]:
    control = (*MANAGEMENT, *ROLLING, *PLACEMENT, *QUARANTINE)
    shown = (*PROTOCOL, *STREAMING, *control, *ADMITTING, *REPLICATING, *COPYING, *LENDING, *WATCHING, *ZARR)

    async def document(_call: Call) -> Answer:
        return as_json(openapi(shown))

    async def docs(_call: Call) -> Answer:
        return Answer(200, page(shown).encode(), "text/html; charset=utf-8")

    return (
        *shown,
        Endpoint("GET", "/openapi.json", "infer", document, "This document"),
        Endpoint("GET", "/docs", "infer", docs, "The endpoints, as a page"),
    )


def _handler(door: Door, verbs: dict[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        endpoint = verbs.get(request.method) or verbs["GET"]  # a HEAD that has none of its own
        try:
            return _response(await _called(door, endpoint, request))
        except TetherError as error:
            return _error_response(error)
        except ClientDisconnect:
            return _error_response(RequestError("the client went away"))
        except Exception:
            _log.exception("%s %.200r failed", request.method, request.url.path)
            return _error_response(InternalError("the gateway failed on this request; its log has the traceback"))

    return handle


async def _called(door: Door, endpoint: Endpoint, request: Request) -> Answer:
    headers = dict(request.scope["headers"])
    peers: _Peers = request.scope["state"]["peer"]
    peer = peers(b"authorization" not in headers)
    request.scope["state"]["caller"] = door.admission.caller(headers, peer, endpoint.need)
    body = await _body(request, endpoint.limit or door.settings.limits.body_nbytes)
    request.scope["state"]["received"] = len(body)
    return await endpoint.handle(Call(door, request.path_params, headers, body, lambda: _gone(request), dict(request.query_params)))


async def _body(request: Request, limit: int) -> bytes:
    parts, nbytes = [], 0
    async for part in request.stream():
        parts.append(part)
        nbytes += len(part)
        if nbytes > limit:
            raise PayloadTooLargeError(f"the body is over the limit of {limit} bytes for this path")
    return b"".join(parts)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(answer: Answer) -> Response:
    headers = {"content-type": answer.kind, **answer.headers}
    if answer.header_nbytes:
        headers["inference-header-content-length"] = str(answer.header_nbytes)
    if answer.status in RETRY:
        headers.setdefault("retry-after", str(SOON))
    if answer.rest is not None:
        return _Streaming(answer, answer.rest, headers)
    return Response(answer.body, answer.status, headers)


class _Streaming(StreamingResponse):
    """An answer that is made while it is sent. Its end is told, also where it was never begun."""

    def __init__(self, answer: Answer, rest: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(_parts(answer.body, rest), answer.status, headers)
        self._ended = answer.ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._ended is not None:
                self._ended()


async def _parts(body: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What fails in the middle of an answer can only cut it off: the client misses bytes that content-length promised."""
    yield body
    async for part in rest:
        yield part


def _error_response(error: TetherError) -> Response:
    headers = {"www-authenticate": "Bearer"} if error.http_status == 401 else {}  # noqa: PLR2004 (RFC 9110 §11.6.1 asks for it)
    if error.http_status in RETRY:
        headers["retry-after"] = str(retry_after(error))
    return _response(Answer(error.http_status, encode_error(error), headers=headers))


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, in our form."""
    failure = cast("HTTPException", error)
    where = f"{request.method} {request.url.path[:200]}"
    known: TetherError
    if failure.status_code == MethodNotAllowedError.http_status:
        known = MethodNotAllowedError(f"{where}: this path has other verbs; GET /docs lists them")
    elif failure.status_code == NotFoundError.http_status:
        known = NotFoundError(f"{where}: nothing is at this path; GET /docs lists what there is")
    else:
        known = RequestError(f"{where}: {failure.detail}")
    response = _error_response(known)
    response.headers.update(failure.headers or {})
    return response


class _Rim:
    """Around Starlette: Host and Origin, request ids, CORS, the access log."""

    def __init__(self, app: Starlette, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        door, started = self._door, perf_counter()
        headers = dict(scope["headers"])
        connection: FastProtocol | None = scope.setdefault("state", {}).pop("connection", None)
        state = scope["state"]
        state["peer"] = _peers(connection)
        request_id = door.request_id(headers.get(b"x-request-id"))
        extra = [(b"x-request-id", request_id), *door.cors(headers)]
        sent = [0, 0]

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent[0] = message["status"]
                message["headers"] = [*message["headers"], *extra]
            else:
                sent[1] += len(message.get("body", b""))
            await send(message)

        try:
            await self._checked(scope, headers)(scope, receive, noted)
        finally:
            seconds = perf_counter() - started
            client = scope["client"][0] if scope.get("client") else None
            url = scope.get("raw_path") or b""
            caller, received = state.get("caller"), state.get("received", 0)
            access = Access(time(), seconds, scope["method"], url, sent[0] or 499, received, sent[1], client, caller, request_id)
            door.note(access)

    def _checked(self, scope: Scope, headers: dict[bytes, bytes]) -> Callable[..., Awaitable[None]]:
        try:
            self._door.admission.check_site(headers, scope["state"]["peer"](False))
        except TetherError as error:
            return _error_response(error)
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers and self._door.cors(headers):
            return Response(b"", 204, _PREFLIGHT)
        return self._app


_PREFLIGHT: Final = {
    "access-control-allow-methods": "GET, POST, PUT, DELETE",
    "access-control-allow-headers": "authorization, content-type, if-none-match, inference-header-content-length, range, "
    "x-request-id, x-request-timeout",
    "access-control-max-age": "600",
}


def _peers(connection: FastProtocol | None) -> _Peers:
    if connection is None:
        return lambda _ask_user: Peer()
    return lambda ask_user: connection.peer(ask_user=ask_user)


_FAREWELL = 0.2
"""Seconds: whoever asks five times a second hears of the end in time."""


class _Server(uvicorn.Server):
    """uvicorn's server, ended by an event instead of signals, which are the service's own."""

    def __init__(self, config: uvicorn.Config, stop: asyncio.Event, started: Callable[[], None] | None, ending: Callable[[], None]) -> None:
        """`ending` is called before open requests are waited for."""
        super().__init__(config)
        self._stop, self._announce, self._ending = stop, started, ending

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        """One tick a second, for the Date header; uvicorn's own has ten."""
        await self.on_tick(0)
        if self._announce is not None:
            self._announce()
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 1.0)
            await self.on_tick(0)
        self._ending()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, after a moment in which answers tell their clients to hang up: a request that comes while its connection is closed
        is lost, and only its client could know that it may be sent again.
        """
        for server in self.servers:
            server.close()
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        end = asyncio.get_running_loop().time() + _FAREWELL
        while self.server_state.connections and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 (uvicorn tells nobody)
            await asyncio.sleep(_FAREWELL / 10)
        await super().shutdown(sockets)


async def serve(
    dispatcher: Dispatcher,
    sockets: Sequence[socket.socket],
    settings: Settings,
    stop: asyncio.Event,
    started: Callable[[], None] | None = None,
) -> None:
    """Answer on bound sockets, which it closes, until `stop` is set; open requests then have `settings.drain` seconds.

    `started` is called once the gateway answers. Raises: OSError: a socket or the access log can't be used.
    """
    door = Door(dispatcher, settings)
    certificate, key = settings.tls or (None, None)
    config = uvicorn.Config(
        make_app(door),
        http=protocol_class(door),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # uvicorn would believe X-Forwarded-For of any local process
        timeout_graceful_shutdown=settings.drain,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    server = _Server(config, stop, started, dispatcher.events.close)
    try:
        await server.serve(sockets=list(sockets))
    finally:
        for connection in list(server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        door.close()
