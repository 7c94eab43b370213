"""Dask's side of a worker; glue only: handlers that call the engine, and two lines in the heartbeat."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import msgspec
import structlog
from distributed import Worker, WorkerPlugin

from tether.errors import TetherError
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import ModelVersion
from tether.worker.engine import Engine
from tether.worker.means import Busyness, Card, cards
from tether.worker.vitals import PERIOD, vitals

__all__ = ["EnginePlugin"]

_UNSAID: Final = msgspec.msgpack.encode(DEFAULTS)

log = structlog.get_logger("tether.worker")
_LOADS: Final = 64
"""Versions that are loaded, or wait for room, or leave at a time; a thread that waits costs nothing."""
_TOLD: Final = 2.0
"""Seconds that a model which leaves waits for the orchestrator to take note of it; and before that is tried again."""
_CARD_SHARE: Final = 0.9
"""Of a card's memory, for models: what a run needs beside them is theirs, too, as the driver sees it."""
P = ParamSpec("P")
R = TypeVar("R")


class EnginePlugin(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Adds `tether_load` and `tether_unload` to a Dask worker."""

    name = "tether-worker"
    idempotent = True

    def __init__(self, engine: Engine, sockets: Path, card_nbytes: int | None = None) -> None:
        """`sockets`: the engine's folder, removed with it. `card_nbytes`: of its card, for models; None: nine tenths."""
        self._card_nbytes = card_nbytes
        self._engine, self._sockets = engine, sockets
        self._busyness = Busyness()
        self._cards: tuple[Card, ...] = ()
        self._vitals: dict[str, Any] = {}
        self._looking: asyncio.Task[None] | None = None
        self._untold: set[Future[None]] = set()
        """What the orchestrator is to hear and has not taken note of."""
        self._threads = ThreadPoolExecutor(_LOADS, "load")

    def setup(self, worker: Worker) -> None:
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._engine.withdraw = self._withdraw
        worker.handlers |= {
            "tether_load": self._load,
            "tether_unload": self._unload,
            "tether_configure": self._configure,
            "tether_isolate": self._isolate,
        }
        worker.metrics["tether"] = lambda _worker: self._report()
        worker.metrics["tether_means"] = lambda _worker: self._means()
        worker.metrics["tether_memory"] = lambda _worker: msgspec.to_builtins(self._engine.memory)
        worker.metrics["tether_vitals"] = lambda _worker: self._vitals
        self._looking = asyncio.ensure_future(self._look(int(worker.state.total_resources.get("GPU", 0))))

    async def teardown(self, worker: Worker) -> None:  # noqa: ARG002 (Dask's signature)
        if self._looking is not None:
            self._looking.cancel()
        for told in list(self._untold):
            told.cancel()
        await asyncio.to_thread(self._engine.close)
        self._threads.shutdown(wait=False)
        shutil.rmtree(self._sockets, ignore_errors=True)

    async def _load(self, model: bytes, serving: bytes = _UNSAID) -> dict[str, Any]:
        """In a thread: loading reads files and builds sessions, and heartbeats must go on."""
        version, settings = _told(model, serving)
        try:
            endpoint = await self._in_thread(self._engine.load, version, settings)
            return {"endpoint": endpoint, "memory": msgspec.msgpack.encode(self._engine.memory)}
        except TetherError as error:
            return {"error": [error.code, str(error)]}

    async def _isolate(self, model: bytes) -> dict[str, Any]:
        self._engine.isolate(msgspec.msgpack.decode(model, type=ModelVersion))
        return {}

    async def _configure(self, model: bytes, serving: bytes) -> dict[str, Any]:
        self._engine.configure(*_told(model, serving))
        return {}

    async def _unload(self, model: bytes) -> dict[str, Any]:
        gone = await self._in_thread(self._engine.unload, msgspec.msgpack.decode(model, type=ModelVersion))
        return {"unloaded": gone, "memory": msgspec.msgpack.encode(self._engine.memory)}

    async def _in_thread(self, work: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        return await self._loop.run_in_executor(self._threads, partial(work, *arguments, **options))

    def _withdraw(self, model: ModelVersion, endpoint: str) -> None:
        """As `Engine.withdraw`, from a thread of the engine's."""
        if self._loop.is_closed():
            return
        told = asyncio.run_coroutine_threadsafe(self._evicting(model, endpoint), self._loop)
        self._untold.add(told)
        told.add_done_callback(self._untold.discard)
        try:
            told.result(_TOLD)
        except Exception as error:  # it goes all the same: who asks there meanwhile finds nobody, and asks again
            log.warning("the orchestrator was not told yet what leaves", model=str(model), error=f"{type(error).__name__}: {error}")

    async def _evicting(self, model: ModelVersion, endpoint: str) -> None:
        """Until it is heard: a route that stayed would lead to nobody until the worker ends."""
        where = {"address": self._worker.address, "pid": os.getpid(), "model": msgspec.msgpack.encode(model), "endpoint": endpoint}
        while True:
            try:
                await self._worker.scheduler.tether_evicting(**where, memory=msgspec.msgpack.encode(self._engine.memory))
            except OSError as error:
                log.warning("the orchestrator can't be told what leaves", model=str(model), error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(_TOLD)
            else:
                return

    async def _look(self, gpus: int) -> None:
        """Which cards there are, once; how they and the rest of the machine are used, again and again."""
        self._cards = await asyncio.to_thread(cards, gpus)
        if self._cards:
            self._engine.limit_card(self._card_nbytes or int(self._cards[0].nbytes * _CARD_SHARE))
        while True:
            try:
                self._vitals = await asyncio.to_thread(vitals, bool(self._cards))
            except Exception:  # the next look may see it again
                log.exception("vitals not read")
            await asyncio.sleep(PERIOD)

    def _means(self) -> dict[str, Any]:
        totals = {str(model): stats.busy for model, stats in self._engine.models().items()}
        return {"busy": self._busyness.look(totals, time.monotonic()), "cards": [list(card) for card in self._cards]}

    def _report(self) -> dict[str, dict[str, float]]:
        nbytes = self._engine.memory.models
        return {
            str(model): {
                "requests": stats.requests,
                "failures": stats.failures,
                "batches": stats.batches,
                "rows": stats.rows,
                "busy": stats.busy,
                "waiting": stats.waiting,
                "load_seconds": stats.load_seconds,
                "nbytes": nbytes.get(str(model), 0),
            }
            for model, stats in self._engine.models().items()
        }


def _told(model: bytes, serving: bytes) -> tuple[ModelVersion, ServingSettings]:
    return msgspec.msgpack.decode(model, type=ModelVersion), msgspec.msgpack.decode(serving, type=ServingSettings)
