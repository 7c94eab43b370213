"""Workers that are lent to other labs: asked of the lending lab's gateway."""

from __future__ import annotations

from typing import Any, Final

from tether.client.admitting import Ask
from tether.client.answers import lab_part, rows

__all__ = ["Lending"]

_LENDINGS: Final = "/tether/v1/lendings"


class Lending:
    """Of one gateway's lab: `ports.Lending`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def lend(self, publisher: str, models: str = "*", slots: int | None = None) -> dict[str, Any]:
        return await self._ask("PUT", f"{_LENDINGS}/{lab_part(publisher)}", {"models": models, "slots": slots})

    async def lendings(self) -> list[dict[str, Any]]:
        return rows(await self._ask("GET", _LENDINGS), "lendings")

    async def end_lending(self, publisher: str) -> dict[str, Any]:
        return await self._ask("DELETE", f"{_LENDINGS}/{lab_part(publisher)}")

    async def borrowings(self) -> list[dict[str, Any]]:
        return rows(await self._ask("GET", "/tether/v1/borrowings"), "borrowings")
