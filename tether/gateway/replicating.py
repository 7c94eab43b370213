"""`/tether/v1`: what this lab keeps of others, mapped one to one to `ports.Replicating`."""

from __future__ import annotations

from typing import Any, Final

from tether.errors import MalformedRequestError
from tether.gateway.routes import Answer, Call, Endpoint, as_json, json_object

__all__ = ["REPLICATING"]

_MOST_WAIT: Final = 30.0
"""Seconds: an answer has to come before clients and proxies lose patience."""


async def _join(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.join(_text(json_object(call), "url")))


async def _replicate(call: Call) -> Answer:
    body = json_object(call)
    wait, via = body.get("wait", 20.0), None if body.get("via") is None else _text(body, "via")
    if type(wait) not in {int, float} or wait < 0:
        raise MalformedRequestError('"wait" must be a number of seconds')
    publisher, model = _text(body, "publisher"), _text(body, "model")
    return as_json(await call.door.dispatcher.management.replicate(publisher, model, via, min(float(wait), _MOST_WAIT)))


async def _replications(call: Call) -> Answer:
    return as_json({"replications": await call.door.dispatcher.management.replications()})


async def _release(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.release(call.path["publisher"], call.path["model"]))


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise MalformedRequestError(f'the body must have "{name}", a text')
    return value


_URL: Final = {"type": "object", "required": ["url"], "properties": {"url": {"type": "string"}}}
_WISH: Final = {
    "type": "object",
    "required": ["publisher", "model"],
    "properties": {
        "publisher": {"type": "string"},
        "model": {"type": "string"},
        "via": {"type": ["string", "null"]},
        "wait": {"type": "number", "minimum": 0},
    },
}
_SMALL: Final = 64 << 10
_V1: Final = "/tether/v1"
_KEPT: Final = f"{_V1}/replications/{{publisher}}/{{model}}"

REPLICATING: Final = (
    Endpoint("POST", f"{_V1}/labs", "manage", _join, "Find another lab, and use its invitation", _URL, _SMALL),
    Endpoint("POST", f"{_V1}/replications", "manage", _replicate, "Keep a model of another lab here", _WISH, _SMALL),
    Endpoint("GET", f"{_V1}/replications", "manage", _replications, "What is kept of other labs, and how far it has come"),
    Endpoint("DELETE", _KEPT, "manage", _release, "Keep it no longer up to date"),
)
