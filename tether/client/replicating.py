"""What a lab keeps of others: asked of its gateway, or of the user's own manager."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

import orjson

from tether.client.admitting import Ask
from tether.client.answers import lab_part, rows
from tether.client.own_manager import OwnManager

__all__ = ["OwnReplicating", "Replicating"]

_V1: Final = "/tether/v1"
_JOIN: Final = 60.0
"""Seconds: a manager may have to be started, enter the DHT, and punch a hole."""


class Replicating:
    """Of one gateway's lab: `ports.Replicating`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def join(self, url: str) -> dict[str, Any]:
        """As the port says; repeated, it is answered as the first time."""
        return await self._ask("POST", f"{_V1}/labs", {"url": url})

    async def replicate(self, publisher: str, model: str, via: str | None = None, wait: float = 20.0) -> dict[str, Any]:
        return await self._ask("POST", f"{_V1}/replications", {"publisher": publisher, "model": model, "via": via, "wait": wait})

    async def replications(self) -> list[dict[str, Any]]:
        return rows(await self._ask("GET", f"{_V1}/replications"), "replications")

    async def release(self, publisher: str, model: str) -> dict[str, Any]:
        return await self._ask("DELETE", f"{_V1}/replications/{lab_part(publisher)}/{quote(model, safe='')}")


class OwnReplicating:
    """Of the user's own manager, for what she sees of a lab elsewhere: `ports.Replicating`."""

    def __init__(self, own: OwnManager) -> None:
        self._own = own

    async def join(self, url: str) -> dict[str, Any]:
        return dict(orjson.loads(await self._own.request("peer/connect", orjson.dumps({"url": url}), _JOIN)))

    async def replicate(self, publisher: str, model: str, via: str | None = None, wait: float = 20.0) -> dict[str, Any]:
        return dict(await self._own.ask("replicate", publisher=publisher, model=model, via=via, wait=wait))

    async def replications(self) -> list[dict[str, Any]]:
        return list(await self._own.ask("replications"))

    async def release(self, publisher: str, model: str) -> dict[str, Any]:
        return dict(await self._own.ask("release", publisher=publisher, model=model))
