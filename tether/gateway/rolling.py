"""`/tether/v1`: rollouts of versions, drain and restart of workers. What `ports.Rolling` says, made of the table and the orchestrator."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec
from msgspec import structs

from tether.errors import BadInputError, ConflictError, MalformedRequestError, NotFoundError
from tether.gateway.routes import Answer, Call, Endpoint, as_json, json_object
from tether.routing.table import ModelEntry, Table, WorkerEntry
from tether.serving_settings import Rollout

__all__ = ["ROLLING", "begun", "described"]

_TERMS: Final = {"version", "steps", "every", "requests", "shadow", "errors", "slower", "allow_nan"}
"""Fields of a rollout that may be said."""
_PATIENCE: Final = 30.0
_LONGEST: Final = 3600.0
_WAIT: Final = 20.0
"""Seconds that a call waits at most for a worker to be drained: under what clients and proxies wait for an answer."""


def begun(entry: ModelEntry, terms: dict[str, Any], now: float) -> Rollout:
    """The rollout that is asked for. Raises: BadInputError, ConflictError."""
    if unknown := sorted(set(terms) - _TERMS):
        raise BadInputError(f"a rollout has no {unknown[0][:80]!r}; there are {', '.join(sorted(_TERMS))}")
    version = terms.get("version")
    if version == entry.default:
        named = "is what the name means already"
        advice = f"; without an alias prod the newest is: `tether alias {entry.name} prod N` first" if "prod" not in entry.aliases else ""
        raise ConflictError(f"version {version} of {entry.name} {named}{advice}")
    try:
        asked = msgspec.convert({**terms, "before": entry.default, "begun": now}, Rollout)
    except msgspec.ValidationError as error:
        raise BadInputError(f"rollout of {entry.name}: {error}") from None
    known = entry.serving.rollout
    if known is None or known.state != "running":
        return asked
    if structs.replace(known, begun=now) == asked:
        return known
    raise ConflictError(
        f"version {known.version} of {entry.name} is being rolled out: `tether rollout {entry.name} --abort` first, or wait"
    )


def described(entry: ModelEntry) -> dict[str, Any]:
    """The latest rollout, as people see it. Raises: NotFoundError."""
    rollout = entry.serving.rollout
    if rollout is None:
        raise NotFoundError(f"no version of {entry.name} was rolled out: `tether rollout {entry.name} VERSION` begins")
    before = entry.versions.get(rollout.before)
    canary = before.canary if before is not None and rollout.state == "running" else None
    weight, shadow = (canary.weight, canary.shadow) if canary is not None else (0.0, 0.0)
    going = "canary" if weight else "shadow" if shadow else "loading"
    return {
        "model": entry.name,
        "version": rollout.version,
        "before": rollout.before,
        "state": going if rollout.state == "running" else rollout.state,
        "weight": weight,
        "shadow": shadow,
        "steps": list(rollout.steps),
        "every": rollout.every,
        "begun": rollout.begun,
        "reason": rollout.reason,
    }


def _entry(call: Call) -> ModelEntry:
    """Raises: UnknownModelError."""
    table: Table = call.door.dispatcher.table
    return table.models[table.resolve(call.path["name"]).model.name]


async def _written(call: Call, entry: ModelEntry, rollout: Rollout) -> Answer:
    """Returns when the table has it, or it is durable and the orchestrator is away: then it is described as it was written."""
    await call.door.dispatcher.management.set_serving(entry.name, {"rollout": msgspec.to_builtins(rollout)})
    seen = _entry(call)
    if seen.serving.rollout == entry.serving.rollout:
        seen = structs.replace(seen, serving=structs.replace(seen.serving, rollout=rollout))
    return as_json(described(seen))


async def _begin(call: Call) -> Answer:
    entry, terms = _entry(call), json_object(call)
    version = terms.get("version")
    if type(version) is not int or version < 1:
        raise MalformedRequestError('the body must have {"version": n}, n a number from 1')
    call.door.dispatcher.table.resolve(entry.name, str(version))
    rollout = begun(entry, terms, time.time())
    return as_json(described(entry)) if rollout == entry.serving.rollout else await _written(call, entry, rollout)


async def _look(call: Call) -> Answer:
    return as_json(described(_entry(call)))


async def _end(call: Call) -> Answer:
    entry = _entry(call)
    rollout = entry.serving.rollout
    if rollout is not None and rollout.state == "running":
        return await _written(call, entry, structs.replace(rollout, state="aborted", reason="somebody ended it"))
    return as_json(described(entry))


async def _drain(call: Call) -> Answer:
    said = json_object(call)
    patience, wait = (_seconds(said, name, usual) for name, usual in (("patience", _PATIENCE), ("wait", 0.0)))
    return as_json(_row(await call.door.dispatcher.drain(call.path["worker"], patience, min(wait, _WAIT))))


async def _undrain(call: Call) -> Answer:
    return as_json(_row(await call.door.dispatcher.drain(call.path["worker"], None, 0.0)))


async def _restart(call: Call) -> Answer:
    return as_json(_row(await call.door.dispatcher.restart_worker(call.path["worker"])))


def _seconds(said: dict[str, Any], name: str, usual: float) -> float:
    value = said.get(name, usual)
    if type(value) not in {int, float} or not 0 <= value <= _LONGEST:
        raise MalformedRequestError(f'the body must be {{"patience": seconds, "wait": seconds}}, from 0 to {_LONGEST:g}')
    return float(value)


def _row(worker: WorkerEntry) -> dict[str, Any]:
    return {"worker": worker.id, "state": worker.state, "models": list(worker.models), "pid": worker.pid}


_SHARE: Final = {"type": "number", "minimum": 0, "maximum": 1}
_ROLLOUT: Final = {
    "type": "object",
    "required": ["version"],
    "properties": {
        "version": {"type": "integer", "minimum": 1},
        "steps": {"type": "array", "items": _SHARE, "minItems": 1},
        "every": {"type": "number", "minimum": 0},
        "requests": {"type": "integer", "minimum": 0},
        "shadow": _SHARE,
        "errors": _SHARE,
        "slower": {"type": "number", "exclusiveMinimum": 1},
        "allow_nan": {"type": "boolean"},
    },
}
_TIME: Final = {"type": "number", "minimum": 0, "maximum": _LONGEST}
_WAITING: Final = {"type": "object", "properties": {"patience": _TIME, "wait": _TIME}}
_SMALL: Final = 64 << 10
_OF_MODEL: Final = "/tether/v1/models/{name}/rollout"
_OF_WORKER: Final = "/tether/v1/workers/{worker}"

ROLLING: Final = (
    Endpoint("PUT", _OF_MODEL, "manage", _begin, "Put a version in the place of what the name means, step by step", _ROLLOUT, _SMALL),
    Endpoint("GET", _OF_MODEL, "manage", _look, "How the latest rollout stands"),
    Endpoint("DELETE", _OF_MODEL, "manage", _end, "End the rollout: the name means what it meant"),
    Endpoint("POST", f"{_OF_WORKER}/drain", "manage", _drain, "Have a worker take no more requests", _WAITING, _SMALL),
    Endpoint("DELETE", f"{_OF_WORKER}/drain", "manage", _undrain, "Have it go on"),
    Endpoint("POST", f"{_OF_WORKER}/restart", "manage", _restart, "End a worker's process: who looks after it starts another one"),
)
