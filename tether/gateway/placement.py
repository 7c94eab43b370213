"""`/tether/v1/models/{name}/placement`: why each version of a model is where it is, and why not elsewhere."""

from __future__ import annotations

from typing import Final

from tether.gateway.routes import Answer, Call, Endpoint, as_json

__all__ = ["PLACEMENT"]


async def _placement(call: Call) -> Answer:
    """Raises: UnknownModelError."""
    dispatcher = call.door.dispatcher
    name = dispatcher.table.resolve(call.path["name"]).model.name
    return as_json({"model": name, "versions": await dispatcher.explain(name)})


PLACEMENT: Final = (
    Endpoint("GET", "/tether/v1/models/{name}/placement", "manage", _placement, "Why each version is where it is, and why not elsewhere"),
)
