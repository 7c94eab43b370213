"""Workers that are lent to other labs: asked of the lending lab's gateway."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from tether.client.admitting import Ask
from tether.errors import RemoteError
from tether.security.addresses import SCHEME

__all__ = ["Lending"]

_LENDINGS: Final = "/tether/v1/lendings"


class Lending:
    """Of one gateway's lab: `ports.Lending`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def lend(self, publisher: str, models: str = "*", slots: int | None = None) -> dict[str, Any]:
        return await self._ask("PUT", _to(publisher), {"models": models, "slots": slots})

    async def lendings(self) -> list[dict[str, Any]]:
        rows = (await self._ask("GET", _LENDINGS)).get("lendings")
        if not isinstance(rows, list):
            raise RemoteError("the gateway's answer has no list of lendings; do its version and this one differ?")
        return rows

    async def end_lending(self, publisher: str) -> dict[str, Any]:
        return await self._ask("DELETE", _to(publisher))

    async def borrowings(self) -> list[dict[str, Any]]:
        rows = (await self._ask("GET", "/tether/v1/borrowings")).get("borrowings")
        if not isinstance(rows, list):
            raise RemoteError("the gateway's answer has no list of borrowings; do its version and this one differ?")
        return rows


def _to(publisher: str) -> str:
    return f"{_LENDINGS}/{quote(publisher.removeprefix(SCHEME), safe='')}"
