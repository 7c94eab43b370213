"""Dask's side of a worker; glue only: handlers that call the engine, what the heartbeat says of it, and answers to pings.

A Dask worker ends with its scheduler. The engine need not: `LastingPlugin` gives it to the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from distributed.comm import Comm, CommClosedError
from distributed.core import Status

from tether.errors import TetherError
from tether.routing.table import WorkerEntry
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import ModelVersion, WorkerSite
from tether.worker.engine import Engine
from tether.worker.means import Busyness, Card, cards
from tether.worker.vitals import PERIOD, vitals

__all__ = ["EnginePlugin", "LastingPlugin"]

_UNSAID: Final = msgspec.msgpack.encode(DEFAULTS)

log = structlog.get_logger("tether.worker")
_LOADS: Final = 64
"""Versions that are loaded, or wait for room, or leave at a time; a thread that waits costs nothing."""
_TOLD: Final = 2.0
"""Seconds that a model which leaves waits for the orchestrator to take note of it; and before that is tried again."""
_CARD_SHARE: Final = 0.9
"""Of a card's memory, for models: what a run needs beside them is theirs, too, as the driver sees it."""
_TOLD_TO: Final = "tether-restart"
"""Why Dask's worker is closed then."""
P = ParamSpec("P")
R = TypeVar("R")


class EnginePlugin(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Adds the handlers of the README to a Dask worker, and ends the engine with it."""

    name = "tether-worker"
    idempotent = True

    def __init__(self, engine: Engine, sockets: Path, card_nbytes: int | None = None, site: WorkerSite | None = None) -> None:
        """`sockets`: the engine's folder, removed with it. `card_nbytes`: of its card, for models; None: nine tenths."""
        self._site = site or WorkerSite()
        self._card_nbytes = card_nbytes
        self._engine, self._sockets = engine, sockets
        self._busyness = Busyness()
        self._cards: tuple[Card, ...] = ()
        self._vitals: dict[str, Any] = {}
        self._looking: asyncio.Task[None] | None = None
        self._untold: set[Future[None]] = set()
        """What the orchestrator is to hear and has not taken note of."""
        self._leaving: set[str] = set()
        """Endpoints of what is about to leave, or has left: an orchestrator that comes is not told of them."""
        self._threads = ThreadPoolExecutor(_LOADS, "load")

    def setup(self, worker: Worker) -> None:
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._engine.withdraw = self._withdraw
        worker.handlers |= {
            "tether_load": self._load,
            "tether_unload": self._unload,
            "tether_configure": self._configure,
            "tether_isolate": self._isolate,
            "tether_pings": self._answer_pings,
            "tether_end": self._end,
        }
        worker.startup_information["tether_site"] = lambda _worker: msgspec.to_builtins(self._site)
        worker.startup_information["tether_holdings"] = lambda _worker: self._holdings()
        worker.metrics["tether"] = lambda _worker: self._report()
        worker.metrics["tether_means"] = lambda _worker: self._means()
        worker.metrics["tether_memory"] = lambda _worker: msgspec.to_builtins(self._engine.memory)
        worker.metrics["tether_vitals"] = lambda _worker: self._vitals
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._look(int(worker.state.total_resources.get("GPU", 0))))

    async def teardown(self, worker: Worker) -> None:  # noqa: ARG002 (Dask's signature)
        await self.aclose()

    async def aclose(self) -> None:
        """Free the models, and end all that goes on."""
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
            stats = self._engine.models().get(version)
            seconds = 0.0 if stats is None else stats.load_seconds
            return {"endpoint": endpoint, "memory": msgspec.msgpack.encode(self._engine.memory), "seconds": seconds}
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

    async def _answer_pings(self, comm: Comm) -> Status:
        """On the event loop: one that does nothing else answers, too."""
        try:
            while True:
                await comm.read()
                await comm.write({"waiting": sum(stats.waiting for stats in self._engine.models().values())})
        except CommClosedError:
            return Status.dont_reply

    def _holdings(self) -> bytes:
        holdings = self._engine.holdings()
        self._leaving &= {each.endpoint for each in holdings}
        return msgspec.msgpack.encode([each for each in holdings if each.endpoint not in self._leaving])

    async def drain(self, patience: float) -> None:
        """Have requests go elsewhere before this ends. Returns when none comes any more, or nobody is there who could see to that."""
        end = asyncio.get_running_loop().time() + patience
        with contextlib.suppress(OSError, TimeoutError, RuntimeError, AttributeError):  # AttributeError: it has joined no lab yet
            asked = {"worker": str(self._worker.name), "within": patience / 2, "wait": 1.0, "ends": True}
            while asyncio.get_running_loop().time() < end:
                async with asyncio.timeout(_TOLD):
                    told = await self._worker.scheduler.tether_drain(**asked)
                if "error" in told or msgspec.msgpack.decode(told["worker"], type=WorkerEntry).state != "draining":
                    return

    async def _end(self) -> dict[str, Any]:
        """Whoever looks after the process starts another one."""
        self._ending = asyncio.ensure_future(self._worker.close(reason=_TOLD_TO, nanny=False))
        return {}

    async def _in_thread(self, work: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        return await self._loop.run_in_executor(self._threads, partial(work, *arguments, **options))

    def _withdraw(self, model: ModelVersion, endpoint: str) -> None:
        """As `Engine.withdraw`, from a thread of the engine's."""
        if self._loop.is_closed():
            return
        self._leaving.add(endpoint)
        told = asyncio.run_coroutine_threadsafe(self._evicting(model, endpoint), self._loop)
        self._untold.add(told)
        told.add_done_callback(self._untold.discard)
        try:
            told.result(_TOLD)
        except Exception as error:  # it goes all the same: who asks there meanwhile finds nobody, and asks again
            log.warning("the orchestrator was not told yet what leaves", model=str(model), error=f"{type(error).__name__}: {error}")

    async def _evicting(self, model: ModelVersion, endpoint: str) -> None:
        """Until it is heard: a route that stayed would lead to nobody until the worker ends."""
        what = {"pid": os.getpid(), "model": msgspec.msgpack.encode(model), "endpoint": endpoint}
        while True:
            try:
                memory = msgspec.msgpack.encode(self._engine.memory)
                await self._worker.scheduler.tether_evicting(**what, address=self._worker.contact_address, memory=memory)
            except (OSError, RuntimeError) as error:  # RuntimeError: Dask's worker has ended, and the next one is not there yet
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


class LastingPlugin(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Another plugin's set-up, in one Dask worker after the other; its end is not theirs."""

    name = EnginePlugin.name

    def __init__(self, plugin: EnginePlugin) -> None:
        self._plugin = plugin

    def setup(self, worker: Worker) -> None:
        self._plugin.setup(worker)


def _told(model: bytes, serving: bytes) -> tuple[ModelVersion, ServingSettings]:
    return msgspec.msgpack.decode(model, type=ModelVersion), msgspec.msgpack.decode(serving, type=ServingSettings)
