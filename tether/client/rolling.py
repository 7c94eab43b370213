"""New versions step by step, workers one by one: asked of the lab's gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from tether.client.admitting import Ask

__all__ = ["Rolling"]


class Rolling:
    """Of one gateway's lab: `ports.Rolling`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def begin_rollout(self, name: str, terms: Mapping[str, Any]) -> dict[str, Any]:
        return await self._ask("PUT", _rollout(name), dict(terms))

    async def rollout(self, name: str) -> dict[str, Any]:
        return await self._ask("GET", _rollout(name))

    async def end_rollout(self, name: str) -> dict[str, Any]:
        return await self._ask("DELETE", _rollout(name))

    async def drain(self, worker: str, patience: float, wait: float) -> dict[str, Any]:
        return await self._ask("POST", _worker(worker, "drain"), {"patience": patience, "wait": wait})

    async def undrain(self, worker: str) -> dict[str, Any]:
        return await self._ask("DELETE", _worker(worker, "drain"))

    async def restart_worker(self, worker: str) -> dict[str, Any]:
        return await self._ask("POST", _worker(worker, "restart"), {}, repeatable=False)


def _rollout(name: str) -> str:
    return f"/tether/v1/models/{quote(name, safe='~')}/rollout"


def _worker(worker: str, what: str) -> str:
    return f"/tether/v1/workers/{quote(worker, safe='')}/{what}"
