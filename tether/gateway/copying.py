"""`/tether/v1`: how many copies of a model there are to be, and where they are, mapped one to one to `ports.Copying`."""

from __future__ import annotations

from typing import Final

from tether.gateway.passing import SMALL_NBYTES, passed_on, text_and_number
from tether.gateway.routes import Answer, Call, Endpoint, as_json, json_object

__all__ = ["COPYING"]


async def _set_policy(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.set_policy(call.path["model"], json_object(call)))


async def _hold(call: Call) -> Answer:
    region, room = text_and_number(call, "region", "", "room")
    return as_json(await call.door.dispatcher.management.hold(call.path["publisher"], region, room))


_policies = passed_on(lambda management, _: management.policies(), "policies")
_drop_policy = passed_on(lambda management, path: management.set_policy(path["model"], None))
_copies = passed_on(lambda management, path: management.copies(path["name"]))
_holdings = passed_on(lambda management, _: management.holdings(), "holdings")
_end_holding = passed_on(lambda management, path: management.end_holding(path["publisher"]))

_TEXTS: Final = {"type": "array", "items": {"type": "string"}}
_POLICY: Final = {
    "type": "object",
    "properties": {
        "copies": {"type": "integer", "minimum": 1},
        "regions": _TEXTS,
        "pin": _TEXTS,
        "budget": {"type": ["integer", "null"], "minimum": 0},
    },
}
_HOLDING: Final = {
    "type": "object",
    "properties": {"region": {"type": "string"}, "room": {"type": ["integer", "null"], "minimum": 0}},
}
_V1: Final = "/tether/v1"
_ONE: Final = f"{_V1}/policies/{{model}}"
_FOR: Final = f"{_V1}/holdings/{{publisher}}"

COPYING: Final = (
    Endpoint("GET", f"{_V1}/policies", "manage", _policies, "How many copies there are to be of which models"),
    Endpoint("PUT", _ONE, "manage", _set_policy, "Say how many copies of a model there are to be, and where", _POLICY, SMALL_NBYTES),
    Endpoint("DELETE", _ONE, "manage", _drop_policy, "Agree on no copies of a model any more"),
    Endpoint("GET", f"{_V1}/models/{{name}}/copies", "manage", _copies, "Which labs have a model"),
    Endpoint("GET", f"{_V1}/holdings", "manage", _holdings, "The labs for which this one holds copies"),
    Endpoint("PUT", _FOR, "manage", _hold, "Hold copies for another lab, as its policies say", _HOLDING, SMALL_NBYTES),
    Endpoint("DELETE", _FOR, "manage", _end_holding, "Hold no copies for it any more; what is here stays"),
)
