"""Copies of models in several labs: asked of a lab's gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from tether.client.admitting import Ask
from tether.client.answers import lab_part, rows
from tether.errors import RemoteError

__all__ = ["Copying"]

_V1: Final = "/tether/v1"


class Copying:
    """Of one gateway's lab: `ports.Copying`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def set_policy(self, model: str, policy: Mapping[str, Any] | None) -> dict[str, Any]:
        path = f"{_V1}/policies/{quote(model, safe='')}"
        return await self._ask("DELETE", path) if policy is None else await self._ask("PUT", path, dict(policy))

    async def policies(self) -> dict[str, Any]:
        found = (await self._ask("GET", f"{_V1}/policies")).get("policies")
        if not isinstance(found, dict):
            raise RemoteError("the gateway's answer has no policies; do its version and this one differ?")
        return found

    async def hold(self, publisher: str, region: str = "", room: int | None = None) -> dict[str, Any]:
        return await self._ask("PUT", f"{_V1}/holdings/{lab_part(publisher)}", {"region": region, "room": room})

    async def holdings(self) -> list[dict[str, Any]]:
        return rows(await self._ask("GET", f"{_V1}/holdings"), "holdings")

    async def end_holding(self, publisher: str) -> dict[str, Any]:
        return await self._ask("DELETE", f"{_V1}/holdings/{lab_part(publisher)}")

    async def copies(self, model: str) -> dict[str, Any]:
        return await self._ask("GET", f"{_V1}/models/{quote(model, safe='')}/copies")
