"""`/tether/v1`: workers that are lent to other labs, and by them, mapped one to one to `ports.Lending`."""

from __future__ import annotations

from typing import Final

from tether.errors import MalformedRequestError
from tether.gateway.routes import Answer, Call, Endpoint, as_json, json_object

__all__ = ["LENDING"]


async def _lendings(call: Call) -> Answer:
    return as_json({"lendings": await call.door.dispatcher.management.lendings()})


async def _lend(call: Call) -> Answer:
    body = json_object(call)
    models, slots = body.get("models", "*"), body.get("slots")
    if not isinstance(models, str) or not (slots is None or type(slots) is int):
        raise MalformedRequestError('"models" must be a text, "slots" a number or null')
    return as_json(await call.door.dispatcher.management.lend(call.path["publisher"], models, slots))


async def _end_lending(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.end_lending(call.path["publisher"]))


async def _borrowings(call: Call) -> Answer:
    return as_json({"borrowings": await call.door.dispatcher.management.borrowings()})


_TERMS: Final = {
    "type": "object",
    "properties": {"models": {"type": "string"}, "slots": {"type": ["integer", "null"], "minimum": 1}},
}
_SMALL: Final = 64 << 10
_LENDINGS: Final = "/tether/v1/lendings"
_ONE: Final = f"{_LENDINGS}/{{publisher}}"

LENDING: Final = (
    Endpoint("GET", _LENDINGS, "manage", _lendings, "The labs to which this one lends workers"),
    Endpoint("PUT", _ONE, "manage", _lend, "Lend this lab's workers to another one, for its own models", _TERMS, _SMALL),
    Endpoint("DELETE", _ONE, "manage", _end_lending, "Lend it none any more"),
    Endpoint("GET", "/tether/v1/borrowings", "manage", _borrowings, "Workers that other labs lend to this one, and how busy they are"),
)
