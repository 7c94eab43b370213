"""`/tether/v1/quarantine`: versions that run in processes of their own, and inputs that are not run, since they ended what ran them."""

from __future__ import annotations

from typing import Any, Final

from tether.errors import UnknownModelError
from tether.gateway.routes import Answer, Call, Endpoint, as_json
from tether.routing.table import VersionEntry

__all__ = ["QUARANTINE"]


async def _quarantine(call: Call) -> Answer:
    versions = (version for model in call.door.dispatcher.table.models.values() for version in model.versions.values())
    held = [_row(version) for version in versions if version.poison or version.is_isolated]
    return as_json({"quarantine": sorted(held, key=lambda row: (row["model"], row["version"]))})


def _row(version: VersionEntry) -> dict[str, Any]:
    poison = [{"mark": mark, "until": until} for mark, until in version.poison.items()]
    return {"model": version.model.name, "version": version.model.version, "isolated": version.is_isolated, "poison": poison}


async def _forgive(call: Call) -> Answer:
    """Raises: UnknownModelError."""
    name = call.path["name"]
    if name not in call.door.dispatcher.table.models:
        raise UnknownModelError(f"model {name[:80]!r} is not found; GET /tether/v1/models or `tether models` lists what there is")
    await call.door.dispatcher.forgive(name)
    return as_json({"model": name})


QUARANTINE: Final = (
    Endpoint("GET", "/tether/v1/quarantine", "manage", _quarantine, "Isolated versions, and inputs that are not run any more"),
    Endpoint("DELETE", "/tether/v1/quarantine/{name}", "manage", _forgive, "Hold nothing any more against inputs of a model"),
)
