"""`/tether/v1`: the paths of models, blobs and the lab, mapped one to one to `ports.Management`."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from tether.errors import BadNameError, MalformedRequestError
from tether.gateway.routes import Answer, Call, Endpoint, as_json, json_object
from tether.routing.table import WorkerEntry
from tether.serving_settings import ServingSettings
from tether.types import ModelRef

__all__ = ["MANAGEMENT"]

_BLOB_NBYTES: Final = 4 << 20
"""Largest blob: the store cuts tensors into segments of this size (DESIGN §4)."""
_SMALL: Final = 64 << 10
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")


def _digest(call: Call) -> str:
    digest = call.path["digest"]
    if not _DIGEST.fullmatch(digest):
        raise BadNameError(f"{digest[:80]!r} is no digest: give 64 lower-case hex digits of BLAKE3")
    return digest


def _name(call: Call) -> str:
    """Checked as a reference, which has more forms, so that nothing odd travels further."""
    name = call.path["name"]
    ref = ModelRef.parse(name)
    if ref.version is not None or ref.alias is not None or ref.sha is not None:
        raise BadNameError(f"{name[:80]!r} names a version; give the model's name alone")
    return name


def _version(call: Call) -> int:
    return _number(call.path["version"])


def _number(text: str) -> int:
    if not _VERSION.fullmatch(text):
        raise BadNameError(f"version {text[:80]!r}: use a number from 1")
    return int(text)


def _is_version(value: Any) -> bool:
    return type(value) is int and value > 0


async def _put_blob(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.put_blob(_digest(call), call.body, call.query.get("encrypt")))


async def _get_blob(call: Call) -> Answer:
    data = await call.door.dispatcher.management.get_blob(_digest(call), call.query.get("version"))
    return Answer(200, data, "application/octet-stream")


async def _publish(call: Call) -> Answer:
    answer = await call.door.dispatcher.management.publish(_name(call), json_object(call))
    return as_json(answer, 201 if answer.get("created", True) else 200)


async def _models(call: Call) -> Answer:
    return as_json({"models": await call.door.dispatcher.management.models()})


async def _model(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.model(_name(call)))


async def _manifest(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.manifest(_name(call), _version(call)))


async def _signed_manifest(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.signed_manifest(_digest(call)))


async def _delete_version(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.delete_version(_name(call), _version(call)))


async def _set_alias(call: Call) -> Answer:
    version = json_object(call).get("version")
    if not _is_version(version):
        raise MalformedRequestError('the body must be {"version": n}, n a number from 1')
    return as_json(await call.door.dispatcher.management.set_alias(_name(call), call.path["alias"], int(version or 0)))


async def _delete_alias(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.delete_alias(_name(call), call.path["alias"]))


async def _rollback(call: Call) -> Answer:
    alias = json_object(call).get("alias")
    if alias is not None and not isinstance(alias, str):
        raise MalformedRequestError('the body must be {"alias": name or null}')
    return as_json(await call.door.dispatcher.management.rollback(_name(call), alias))


async def _amend_serving(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.set_serving(_name(call), json_object(call)))


async def _reset_serving(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.set_serving(_name(call), None))


async def _verify(call: Call) -> Answer:
    version = json_object(call).get("version")
    if version is not None and not _is_version(version):
        raise MalformedRequestError('the body must be {"version": n or null}')
    return as_json(await call.door.dispatcher.management.verify(_name(call), version))


async def _diff(call: Call) -> Answer:
    before, after = (_number(call.path[side]) for side in ("before", "after"))
    return as_json(await call.door.dispatcher.management.diff(_name(call), before, after))


async def _repair(call: Call) -> Answer:
    version = json_object(call).get("version")
    if version is not None and not _is_version(version):
        raise MalformedRequestError('the body must be {"version": n or null}')
    return as_json(await call.door.dispatcher.management.repair(_name(call), version))


async def _gc(call: Call) -> Answer:
    body = json_object(call)
    dry_run, grace = body.get("dry_run", False), body.get("grace")
    if type(dry_run) is not bool or not (grace is None or (type(grace) in {int, float} and grace >= 0)):
        raise MalformedRequestError('the body must be {"dry_run": true or false, "grace": seconds or null}')
    return as_json(await call.door.dispatcher.management.gc(dry_run=dry_run, grace=grace))


async def _rebuild_index(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.rebuild_index())


async def _forget_store(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.management.forget_store(call.path["store"]))


async def _workers(call: Call) -> Answer:
    return as_json({"workers": [_worker(worker) for worker in call.door.dispatcher.table.workers.values()]})


def _worker(worker: WorkerEntry) -> dict[str, Any]:
    return {
        "id": worker.id,
        "address": worker.address,
        "pid": worker.pid,
        "state": worker.state,
        "since": worker.since,
        "gpus": worker.gpus,
        "models": list(worker.models),
        "transport": worker.transport,
        "slots": worker.slots,
        "peer": worker.peer,
        "memory": msgspec.to_builtins(worker.memory),
    }


async def _status(call: Call) -> Answer:
    return as_json(await call.door.dispatcher.status())


async def _trust(call: Call) -> Answer:
    scopes = json_object(call).get("scopes")
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise MalformedRequestError('the body must be {"scopes": ["code"]}')
    return as_json(await call.door.dispatcher.management.trust(call.path["publisher"], scopes))


_BYTES: Final = {"type": "string", "format": "binary"}
_OBJECT: Final = {"type": "object"}
_ALIAS: Final = {"type": "object", "required": ["version"], "properties": {"version": {"type": "integer", "minimum": 1}}}
_WHICH: Final = {"type": "object", "properties": {"alias": {"type": ["string", "null"]}}}
_CHECKED: Final = {"type": "object", "properties": {"version": {"type": ["integer", "null"]}}}
_SCOPES: Final = {"type": "object", "required": ["scopes"], "properties": {"scopes": {"type": "array", "items": {"enum": ["code"]}}}}
_COLLECT: Final = {"type": "object", "properties": {"dry_run": {"type": "boolean"}, "grace": {"type": ["number", "null"], "minimum": 0}}}
_SERVING: Final = msgspec.json.schema(ServingSettings)["$defs"]["ServingSettings"]
_SERVING["properties"].pop("rollout", None)  # it has paths of its own (`rolling.py`)
_V1: Final = "/tether/v1"
_MODEL: Final = f"{_V1}/models/{{name}}"

MANAGEMENT: Final = (
    Endpoint("PUT", f"{_V1}/blobs/{{digest}}", "manage", _put_blob, "Stage a blob", _BYTES, _BLOB_NBYTES),
    Endpoint("GET", f"{_V1}/blobs/{{digest}}", "manage", _get_blob, "The bytes of a blob"),
    Endpoint("GET", f"{_V1}/manifests/{{digest}}", "manage", _signed_manifest, "A version as its publisher signed it"),
    Endpoint("GET", f"{_V1}/models", "manage", _models, "All models"),
    Endpoint("GET", _MODEL, "manage", _model, "A model's versions and aliases"),
    Endpoint("POST", f"{_MODEL}/versions", "manage", _publish, "Publish a version whose blobs are staged", _OBJECT),
    Endpoint("GET", f"{_MODEL}/versions/{{version}}", "manage", _manifest, "The manifest of a version"),
    Endpoint("DELETE", f"{_MODEL}/versions/{{version}}", "manage", _delete_version, "Remove a version"),
    Endpoint("PUT", f"{_MODEL}/aliases/{{alias}}", "manage", _set_alias, "Point an alias at a version", _ALIAS, _SMALL),
    Endpoint("DELETE", f"{_MODEL}/aliases/{{alias}}", "manage", _delete_alias, "Remove an alias"),
    Endpoint("POST", f"{_MODEL}/rollback", "manage", _rollback, "Move an alias back", _WHICH, _SMALL),
    Endpoint("PUT", f"{_MODEL}/serving", "manage", _amend_serving, "Say how a model is served; null: by default", _SERVING, _SMALL),
    Endpoint("DELETE", f"{_MODEL}/serving", "manage", _reset_serving, "Serve a model as if nothing had been said"),
    Endpoint("POST", f"{_MODEL}/verify", "manage", _verify, "Read every byte and check it", _CHECKED, _SMALL),
    Endpoint("GET", f"{_MODEL}/diff/{{before}}/{{after}}", "manage", _diff, "Which tensors changed, and by how much"),
    Endpoint("POST", f"{_MODEL}/repair", "manage", _repair, "Mend what is damaged with blobs that were uploaded again", _CHECKED, _SMALL),
    Endpoint("POST", f"{_V1}/gc", "manage", _gc, "Delete what no version names", _COLLECT, _SMALL),
    Endpoint("POST", f"{_V1}/index/rebuild", "manage", _rebuild_index, "Read from the packs again where each blob lies"),
    Endpoint("DELETE", f"{_V1}/stores/{{store}}", "manage", _forget_store, "Forget a host that shares the packs and is gone for good"),
    Endpoint("GET", f"{_V1}/workers", "manage", _workers, "All workers"),
    Endpoint("GET", f"{_V1}/status", "manage", _status, "The services of the lab"),
    Endpoint("PUT", f"{_V1}/trust/{{publisher}}", "manage", _trust, "Trust a publisher's code", _SCOPES, _SMALL),
)
