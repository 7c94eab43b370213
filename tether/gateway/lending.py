"""`/tether/v1`: workers that are lent to other labs, and by them, mapped one to one to `ports.Lending`."""

from __future__ import annotations

from typing import Final

from tether.gateway.passing import SMALL_NBYTES, passed_on, text_and_number
from tether.gateway.routes import Answer, Call, Endpoint, as_json

__all__ = ["LENDING"]


async def _lend(call: Call) -> Answer:
    models, slots = text_and_number(call, "models", "*", "slots")
    return as_json(await call.door.dispatcher.management.lend(call.path["publisher"], models, slots))


_lendings = passed_on(lambda management, _: management.lendings(), "lendings")
_end_lending = passed_on(lambda management, path: management.end_lending(path["publisher"]))
_borrowings = passed_on(lambda management, _: management.borrowings(), "borrowings")

_TERMS: Final = {
    "type": "object",
    "properties": {"models": {"type": "string"}, "slots": {"type": ["integer", "null"], "minimum": 1}},
}
_LENDINGS: Final = "/tether/v1/lendings"
_ONE: Final = f"{_LENDINGS}/{{publisher}}"

LENDING: Final = (
    Endpoint("GET", _LENDINGS, "manage", _lendings, "The labs to which this one lends workers"),
    Endpoint("PUT", _ONE, "manage", _lend, "Lend this lab's workers to another one, for its own models", _TERMS, SMALL_NBYTES),
    Endpoint("DELETE", _ONE, "manage", _end_lending, "Lend it none any more"),
    Endpoint("GET", "/tether/v1/borrowings", "manage", _borrowings, "Workers that other labs lend to this one, and how busy they are"),
)
