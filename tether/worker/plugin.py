"""Dask's side of a worker; glue only: handlers that call the engine, and a line in the heartbeat."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import msgspec
from distributed import Worker, WorkerPlugin

from tether.errors import TetherError
from tether.types import ModelVersion
from tether.worker.engine import Engine

__all__ = ["EnginePlugin"]


class EnginePlugin(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Adds `tether_load` and `tether_unload` to a Dask worker."""

    name = "tether-worker"
    idempotent = True

    def __init__(self, engine: Engine, sockets: Path) -> None:
        """`sockets`: the engine's folder, removed with it."""
        self._engine, self._sockets = engine, sockets

    def setup(self, worker: Worker) -> None:
        worker.handlers |= {"tether_load": self._load, "tether_unload": self._unload}
        worker.metrics["tether"] = lambda _worker: self._report()

    async def teardown(self, worker: Worker) -> None:  # noqa: ARG002 (Dask's signature)
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
