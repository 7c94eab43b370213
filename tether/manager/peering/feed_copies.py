"""Copies of one publisher's cores, a folder each: open ones are kept, those of earlier eras go when they are needed no more."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from tether.errors import TetherError
from tether.swarm.engine.engine import Engine
from tether.swarm.feeds.log import FeedCopy

__all__ = ["FeedCopies"]

_BESIDE = ".beside"


class FeedCopies:
    """Belongs to the engine's loop."""

    def __init__(self, engine_of: Callable[[], Awaitable[Engine]], folder: Path, told: Callable[[], None]) -> None:
        self._engine_of, self._folder, self._told = engine_of, folder, told
        self._open: dict[str, FeedCopy] = {}

    async def of(self, core: str) -> FeedCopy:
        """The copy of this core (key, hex), which may be empty. Raises: EngineError: the folder can't be used; as `engine_of`."""
        return await self._copy(core, core)

    async def beside(self, core: str) -> FeedCopy:
        """An empty second copy of the core, while it is not known which of two is right. Raises: as `of`."""
        await self._close(core + _BESIDE)
        await asyncio.to_thread(shutil.rmtree, self._folder / (core + _BESIDE), ignore_errors=True)
        return await self._copy(core, core + _BESIDE)

    async def replace(self, core: str) -> None:
        """The second copy is the right one. Who follows it connects again. Raises: EngineError."""
        await self._close(core)
        await self._close(core + _BESIDE)
        await asyncio.to_thread(self._moved, core)

    async def keep(self, cores: Collection[str]) -> None:
        """These, and those that are open; others are removed."""
        await asyncio.to_thread(self._clear, {*cores, *self._open})

    async def close_others(self, core: str) -> None:
        """Give back the files of all but this one."""
        for name in [name for name in self._open if name != core]:
            await self._close(name)

    async def aclose(self) -> None:
        """Give the files back; they are opened again when they are asked for."""
        await self.close_others("")

    async def _copy(self, core: str, name: str) -> FeedCopy:
        if name not in self._open:
            self._open[name] = await FeedCopy.open(await self._engine_of(), self._folder / name, core, self._told)
        return self._open[name]

    async def _close(self, name: str) -> None:
        copy = self._open.pop(name, None)
        if copy is not None:
            with contextlib.suppress(TetherError):  # closed with its engine, or by a conflict
                await copy.aclose()

    def _moved(self, core: str) -> None:
        shutil.rmtree(self._folder / core, ignore_errors=True)
        (self._folder / (core + _BESIDE)).rename(self._folder / core)

    def _clear(self, names: Collection[str]) -> None:
        for folder in self._folder.glob("*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)
