"""`/tether/v1`: who is let in from outside: invitations, peers and their scopes, mapped one to one to `ports.Management`."""

from __future__ import annotations

from typing import Any, Final

from tether.errors import MalformedRequestError
from tether.gateway.routes import Answer, Call, Endpoint, as_json, json_object

__all__ = ["ADMITTING"]


async def _address(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.address())


async def _invite(call: Call) -> Answer:
    body = json_object(call)
    scopes, uses, label = _scopes(body), body.get("uses", 1), _text(body, "label", "")
    expires = body.get("expires", "30d")
    if type(uses) is not int or type(expires) not in {int, float, str}:
        raise MalformedRequestError('"uses" must be a whole number, "expires" seconds or text such as "30d" or "never"')
    return as_json(await call.door.dispatcher.management.invite(scopes, expires, uses, label), 201)


async def _invitations(call: Call) -> Answer:
    return as_json({"invitations": await call.door.dispatcher.management.invitations()})


async def _revoke_invitation(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.revoke_invitation(call.path["id"]))


async def _peers(call: Call) -> Answer:
    return as_json({"peers": await call.door.dispatcher.management.peers()})


async def _allow(call: Call) -> Answer:
    body = json_object(call)
    label = None if body.get("label") is None else _text(body, "label", "")
    return as_json(await call.door.dispatcher.management.allow(call.path["peer"], _scopes(body), label))


async def _disallow(call: Call) -> Answer:
    """Everything is taken only where that is said, not where a name was mistyped."""
    body = json_object(call)
    scopes = None if "scopes" in body and body["scopes"] is None else _scopes(body)
    return as_json(await call.door.dispatcher.management.disallow(call.path["peer"], scopes))


async def _ban(call: Call) -> Answer:
    reason = _text(json_object(call), "reason", "by hand")
    return as_json(await call.door.dispatcher.management.ban(call.path["peer"], reason))


async def _unban(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.unban(call.path["peer"]))


async def _name_peer(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.name_peer(call.path["peer"], _text(json_object(call), "petname")))


async def _audit(call: Call) -> Answer:
    most = call.query.get("most", "100")
    if not (most.isascii() and most.isdecimal() and len(most) < 10):  # noqa: PLR2004 (more lines than there can be)
        raise MalformedRequestError("most: give a number of lines")
    return as_json({"lines": await call.door.dispatcher.management.audit(int(most))})


async def _accept(call: Call) -> Answer:
    envelope = json_object(call).get("envelope")
    if not isinstance(envelope, str):
        raise MalformedRequestError('the body must be {"envelope": "base64, as `tether allow` prints it"}')
    return as_json(await call.door.dispatcher.management.accept(envelope))


async def _rotate(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.rotate())


def _scopes(body: dict[str, Any]) -> list[str]:
    scopes = body.get("scopes")
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise MalformedRequestError('the body must have "scopes", a list such as ["infer:digits"]')
    return scopes


def _text(body: dict[str, Any], name: str, default: str | None = None) -> str:
    value = body.get(name, default)
    if not isinstance(value, str):
        raise MalformedRequestError(f'the body must have "{name}", a text')
    return value


_LIST: Final = {"type": "array", "items": {"type": "string"}}
_INVITATION: Final = {
    "type": "object",
    "required": ["scopes"],
    "properties": {
        "scopes": _LIST,
        "expires": {"type": ["string", "number"]},
        "uses": {"type": "integer", "minimum": 1},
        "label": {"type": "string"},
    },
}
_ALLOWED: Final = {"type": "object", "required": ["scopes"], "properties": {"scopes": _LIST, "label": {"type": ["string", "null"]}}}
_TAKEN: Final = {
    "type": "object",
    "required": ["scopes"],
    "properties": {"scopes": {"type": ["array", "null"], "items": {"type": "string"}}},
}
_REASON: Final = {"type": "object", "properties": {"reason": {"type": "string"}}}
_PETNAME: Final = {"type": "object", "required": ["petname"], "properties": {"petname": {"type": "string"}}}
_ENVELOPE: Final = {"type": "object", "required": ["envelope"], "properties": {"envelope": {"type": "string"}}}
_ENVELOPE_NBYTES: Final = 512 << 10
"""Of a body with an envelope of a thousand keys, in base64."""
_SMALL: Final = 64 << 10
_V1: Final = "/tether/v1"
_PEER: Final = f"{_V1}/peers/{{peer}}"

ADMITTING: Final = (
    Endpoint("GET", f"{_V1}/address", "manage", _address, "The address by which other labs find this one"),
    Endpoint("GET", f"{_V1}/invitations", "manage", _invitations, "All invitations, without their secrets"),
    Endpoint("POST", f"{_V1}/invitations", "manage", _invite, "Invite somebody: the answer has the link, once", _INVITATION, _SMALL),
    Endpoint("DELETE", f"{_V1}/invitations/{{id}}", "manage", _revoke_invitation, "Admit nobody by it any more"),
    Endpoint("GET", f"{_V1}/peers", "manage", _peers, "The keys that this lab knows, what they may do, how they are connected"),
    Endpoint("PUT", _PEER, "manage", _allow, "Let the holder of a key do more", _ALLOWED, _SMALL),
    Endpoint("POST", f"{_PEER}/disallow", "manage", _disallow, "Take some or all of it back", _TAKEN, _SMALL),
    Endpoint("PUT", f"{_PEER}/ban", "manage", _ban, "Speak with it no more", _REASON, _SMALL),
    Endpoint("DELETE", f"{_PEER}/ban", "manage", _unban, "Forgive it"),
    Endpoint("PUT", f"{_PEER}/petname", "manage", _name_peer, "Give it a name of one's own", _PETNAME, _SMALL),
    Endpoint("GET", f"{_V1}/audit", "manage", _audit, "Who was let in, allowed, sent away, and when"),
    Endpoint("POST", f"{_V1}/envelopes", "manage", _accept, "Keep the model keys that another lab granted", _ENVELOPE, _ENVELOPE_NBYTES),
    Endpoint("POST", f"{_V1}/cluster-key/rotate", "manage", _rotate, "Replace the key that wraps all model keys"),
)
