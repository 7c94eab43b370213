"""Dask's side of a worker; glue only: handlers that call the engine, and two lines in the heartbeat."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
from distributed import Worker, WorkerPlugin

from tether.errors import TetherError
from tether.types import ModelVersion
from tether.worker.engine import Engine
from tether.worker.means import Busyness, Card, cards

__all__ = ["EnginePlugin"]


class EnginePlugin(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Adds `tether_load` and `tether_unload` to a Dask worker."""

    name = "tether-worker"
    idempotent = True

    def __init__(self, engine: Engine, sockets: Path) -> None:
        """`sockets`: the engine's folder, removed with it."""
        self._engine, self._sockets = engine, sockets
        self._busyness = Busyness()
        self._cards: tuple[Card, ...] = ()
        self._looking: asyncio.Task[None] | None = None

    def setup(self, worker: Worker) -> None:
        worker.handlers |= {"tether_load": self._load, "tether_unload": self._unload}
        worker.metrics["tether"] = lambda _worker: self._report()
        worker.metrics["tether_means"] = lambda _worker: self._means()
        self._looking = asyncio.ensure_future(self._look(int(worker.state.total_resources.get("GPU", 0))))

    async def teardown(self, worker: Worker) -> None:  # noqa: ARG002 (Dask's signature)
        if self._looking is not None:
            self._looking.cancel()
        await asyncio.to_thread(self._engine.close)
        shutil.rmtree(self._sockets, ignore_errors=True)

    async def _load(self, model: bytes) -> dict[str, Any]:
        """In a thread: loading reads files and builds sessions, and heartbeats must go on."""
        try:
            return {"endpoint": await asyncio.to_thread(self._engine.load, msgspec.msgpack.decode(model, type=ModelVersion))}
        except TetherError as error:
            return {"error": [error.code, str(error)]}

    async def _unload(self, model: bytes) -> dict[str, bool]:
        return {"unloaded": await asyncio.to_thread(self._engine.unload, msgspec.msgpack.decode(model, type=ModelVersion))}

    async def _look(self, gpus: int) -> None:
        self._cards = await asyncio.to_thread(cards, gpus)

    def _means(self) -> dict[str, Any]:
        totals = {str(model): stats.busy for model, stats in self._engine.models().items()}
        return {"busy": self._busyness.look(totals, time.monotonic()), "cards": [list(card) for card in self._cards]}

    def _report(self) -> dict[str, dict[str, float]]:
        return {
            str(model): {
                "requests": stats.requests,
                "failures": stats.failures,
                "batches": stats.batches,
                "rows": stats.rows,
                "busy": stats.busy,
                "waiting": stats.waiting,
            }
            for model, stats in self._engine.models().items()
        }
