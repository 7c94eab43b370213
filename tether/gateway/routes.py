"""What the gateway answers on the normal way: the protocol's core, the short form, health and metrics. No web framework in here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final

import orjson

from tether.errors import MalformedRequestError, ServiceUnavailableError
from tether.gateway.admission import Headers, Need, timeout_of
from tether.gateway.door import Door
from tether.gateway.model_config import model_config
from tether.gateway.oip import (
    Target,
    decompressed,
    is_ready,
    lab_is_ready,
    model_metadata,
    repository_index,
    server_metadata,
    short_answer,
    short_request,
)
from tether.gateway.retry_after import RETRY
from tether.ports import Hop, HopReply
from tether.telemetry.metrics import render
from tether.telemetry.worker_metrics import worker_metrics

__all__ = ["OFF_LOOP", "PROTOCOL", "TENSORS", "Answer", "Call", "Endpoint", "answer_of", "as_json", "forward", "json_object", "plain_body"]

OFF_LOOP: Final = 256 << 10
"""Body bytes from which parsing moves to a thread: below, the move costs more than it saves other requests."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request, read whole."""

    door: Door
    path: Mapping[str, str]
    """The variable parts of the URL's path, decoded."""
    headers: Headers
    body: bytes
    gone: Callable[[], Awaitable[None]]
    """Returns when the client went away."""
    query: Mapping[str, str] = field(default_factory=dict)
    """What stands behind the URL's question mark, decoded."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and body."""

    status: int = 200
    body: bytes = b""
    kind: str = "application/json"
    header_nbytes: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    """More of them."""
    rest: AsyncIterator[bytes] | None = None
    """What follows `body`, made as the client takes it; `headers` then has the content-length of both, if it is known."""
    ended: Callable[[], None] | None = None
    """Called once, when the client has all of it or is gone."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One verb of one path."""

    method: str
    path: str
    need: Need
    handle: Callable[[Call], Awaitable[Answer]]
    summary: str
    body: Mapping[str, Any] | None = None
    """JSON schema of the request's body; None: it has none."""
    limit: int | None = None
    """Bytes of body; None: the gateway's own limit."""
    parameters: Mapping[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200) -> Answer:
    """The value as a JSON answer."""
    return Answer(status, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def json_object(call: Call) -> dict[str, Any]:
    """The body, a JSON object; an empty body is the empty one.

    Raises: MalformedRequestError: it is something else.
    """
    try:
        value = orjson.loads(call.body) if call.body else {}
    except orjson.JSONDecodeError as error:
        raise MalformedRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedRequestError("the body must be a JSON object")
    return value


async def _live(_call: Call) -> Answer:
    return as_json({"live": True})


async def _ready(call: Call) -> Answer:
    ready = lab_is_ready(call.door.dispatcher.table)
    return as_json({"ready": ready}, 200 if ready else ServiceUnavailableError.http_status)


async def _health(call: Call) -> Answer:
    """A status only (DESIGN §7): it is open to everybody."""
    return as_json({"status": "ok" if lab_is_ready(call.door.dispatcher.table) else "starting"})


async def _server(_call: Call) -> Answer:
    return as_json(server_metadata())


async def _model(call: Call) -> Answer:
    table, name, version = call.door.dispatcher.table, call.path["model"], call.path.get("version")
    return as_json(model_metadata(name, table, table.resolve(name, version), all_versions=version is None))


async def _model_config(call: Call) -> Answer:
    table = call.door.dispatcher.table
    entry = table.resolve(call.path["model"], call.path.get("version"))
    return as_json(model_config(entry, table.models[entry.model.name].serving))


async def _model_ready(call: Call) -> Answer:
    table = call.door.dispatcher.table
    entry = table.resolve(call.path["model"], call.path.get("version"))
    if not is_ready(table, entry):
        raise ServiceUnavailableError(f"{entry.model} is not ready: {entry.reason or 'no worker runs'}; `tether status` shows the workers")
    return as_json({"name": entry.model.name, "ready": True})


async def _index(call: Call) -> Answer:
    only_ready = json_object(call).get("ready", False)
    if not isinstance(only_ready, bool):
        raise MalformedRequestError("'ready' must be true or false")
    return as_json(repository_index(call.door.dispatcher.table, only_ready=only_ready))


async def _metrics(call: Call) -> Answer:
    """This gateway's own, and what workers told; without that while no orchestrator answers."""
    try:
        workers = await call.door.dispatcher.vitals()
    except ServiceUnavailableError:
        workers = {}
    return Answer(200, render(worker_metrics(workers)), "text/plain; version=1.0.0; charset=utf-8")


async def _feedback(call: Call) -> Answer:
    """Labels that came later: how many answers of a version were right."""
    told = json_object(call)
    unknown = told.keys() - {"right", "wrong"}
    right, wrong = told.get("right", 0), told.get("wrong", 0)
    if unknown or not all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count < _COUNT for count in (right, wrong)):
        raise MalformedRequestError('feedback is {"right": 93, "wrong": 7}: of answers whose labels are known, how many were right')
    target = call.path["model"], call.path.get("version")
    entry = call.door.dispatcher.table.resolve(*target)
    call.door.dispatcher.labelled(entry, right, wrong)
    series = call.door.series(target)
    series.right += right
    series.wrong += wrong
    return as_json({"model": series.model, "version": series.version, "right": series.right, "wrong": series.wrong})


async def plain_body(call: Call) -> bytes:
    """The body as it was before `Content-Encoding`. Raises: PayloadTooLargeError, MalformedRequestError."""
    encoding = call.headers.get(b"content-encoding")
    if encoding is None or encoding.strip().lower() == b"identity":
        return call.body
    return await asyncio.to_thread(decompressed, call.body, encoding.decode("latin-1"), call.door.settings.limits.body_nbytes)


async def _infer(call: Call) -> Answer:
    """What the fast lane leaves: compressed bodies, and URLs in another spelling."""
    body = await plain_body(call)
    target = call.path["model"], call.path.get("version")
    return answer_of(await forward(call, target, lambda: call.door.hop(target, call.headers, body)))


async def _short(call: Call) -> Answer:
    table = call.door.dispatcher.table
    if len(call.body) > OFF_LOOP:
        target, body, header_nbytes = await asyncio.to_thread(short_request, call.body, table)
    else:
        target, body, header_nbytes = short_request(call.body, table)
    timeout = timeout_of(call.headers, call.body, 0, call.door.settings.limits.timeout)
    reply = await forward(call, target, lambda: Hop(body, header_nbytes, timeout))
    if reply.status != 200:  # noqa: PLR2004 (an error's body is the same in both forms)
        return answer_of(reply)
    return Answer(200, await asyncio.to_thread(short_answer, reply.body, reply.header_nbytes))


def answer_of(reply: HopReply) -> Answer:
    """What the client is told of it, whole."""
    kind = "application/octet-stream" if reply.header_nbytes else "application/json"
    headers = {"retry-after": str(reply.retry_after)} if reply.status in RETRY else {}
    return Answer(reply.status, reply.body, kind, reply.header_nbytes, headers)


async def forward(call: Call, target: Target, make: Callable[[], Hop]) -> HopReply:
    """To a worker and back, counted; a client that goes away cancels it."""
    door, started = call.door, perf_counter()
    series = door.series(target)
    series.in_flight += 1
    status = 499
    try:
        reply = await _exchange(call, target, make())
        status = reply.status
        return reply
    finally:
        series.in_flight -= 1
        series.observe(status, perf_counter() - started)


async def _exchange(call: Call, target: Target, hop: Hop) -> HopReply:
    answered: asyncio.Future[HopReply] = asyncio.get_running_loop().create_future()
    cancel = call.door.dispatcher.infer(*target, hop, lambda reply: None if answered.done() else answered.set_result(reply))
    gone = asyncio.ensure_future(call.gone())
    try:
        await asyncio.wait((answered, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not answered.done():
            cancel()
    if not answered.done():
        raise ServiceUnavailableError("the client went away before the answer came")
    return answered.result()


TENSORS: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "datatype": {"type": "string"},
                    "parameters": {"type": "object"},
                    "data": {"type": "array"},
                },
            },
        },
        "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
    },
}
_SHORT: Final = {
    "type": "object",
    "required": ["model", "inputs"],
    "properties": {
        "model": {"type": "string"},
        "version": {"type": ["string", "integer", "null"]},
        "inputs": {"type": ["object", "array"]},
    },
}
_FILTER: Final = {"type": "object", "properties": {"ready": {"type": "boolean"}}}
_FEEDBACK: Final = {"type": "object", "properties": {name: {"type": "integer", "minimum": 0} for name in ("right", "wrong")}}
_COUNT: Final = 1 << 53
"""Beyond it a float, which Prometheus' values are, can't count."""
_OF_MODEL: Final = "/tether/v1/models/{model}"
_SMALL: Final = 64 << 10
"""Bytes of a body that holds a word or two."""

PROTOCOL: Final = (
    Endpoint("GET", "/v2/health/live", "open", _live, "The gateway runs"),
    Endpoint("GET", "/v2/health/ready", "open", _ready, "A request could be answered (else 503)"),
    Endpoint("GET", "/healthz", "open", _health, "Status of the gateway"),
    Endpoint("GET", "/metrics", "metrics", _metrics, "Metrics, in Prometheus' text format"),
    Endpoint("GET", "/v2", "infer", _server, "Name, version and extensions of the server"),
    Endpoint("GET", "/v2/models/{model}", "infer", _model, "A model's inputs and outputs"),
    Endpoint("GET", "/v2/models/{model}/config", "infer", _model_config, "How the model is batched, as Triton's ModelConfig"),
    Endpoint("GET", "/v2/models/{model}/ready", "infer", _model_ready, "The model can answer (else 503)"),
    Endpoint("POST", "/v2/models/{model}/infer", "infer", _infer, "Run the model", TENSORS),
    Endpoint("GET", "/v2/models/{model}/versions/{version}", "infer", _model, "A version's inputs and outputs"),
    Endpoint("GET", "/v2/models/{model}/versions/{version}/config", "infer", _model_config, "The same, of a version"),
    Endpoint("GET", "/v2/models/{model}/versions/{version}/ready", "infer", _model_ready, "The version can answer (else 503)"),
    Endpoint("POST", "/v2/models/{model}/versions/{version}/infer", "infer", _infer, "Run this version", TENSORS),
    Endpoint("POST", f"{_OF_MODEL}/feedback", "infer", _feedback, "Labels fed back: accuracy", _FEEDBACK, _SMALL),
    Endpoint("POST", f"{_OF_MODEL}/versions/{{version}}/feedback", "infer", _feedback, "The same, of a version", _FEEDBACK, _SMALL),
    Endpoint("POST", "/v2/repository/index", "infer", _index, "All models and their states", _FILTER, _SMALL),
    Endpoint("POST", "/inference", "infer", _short, "Run a model: nested lists in, nested lists out", _SHORT),
)
"""In the order of the documentation."""
