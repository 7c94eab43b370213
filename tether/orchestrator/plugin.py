"""Dask's side of the orchestrator; glue only: scheduler events in, instructions out.

Handlers it adds to the scheduler: `tether_watch` (a gateway's stream of tables), `tether_want`, `tether_manager` (the manager's stream of
catalogs), `tether_table`.  Messages carry msgpack bytes of our own types, never pickles of them.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import msgspec
import structlog
from distributed import Scheduler, SchedulerPlugin
from distributed.comm import Comm, CommClosedError
from distributed.core import Status

from tether.errors import InternalError
from tether.events import (
    CatalogChanged,
    CatalogModel,
    Event,
    LoadCut,
    Loaded,
    LoadFailed,
    ManagerLeft,
    ModelWanted,
    Tick,
    Unloaded,
    WorkerJoined,
    WorkerLeft,
)
from tether.orchestrator.state import ControlState, Instruction, Load, Push, Unload
from tether.types import ModelVersion, WorkerId

__all__ = ["OrchestratorPlugin"]

log = structlog.get_logger("tether.orchestrator")
Catalog = dict[str, CatalogModel]
_TICK = 2.0
"""Seconds between looks for versions that may be tried again; only while there are some."""


class OrchestratorPlugin(SchedulerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Feeds the scheduler's events to `ControlState` and carries out what it says."""

    name = "tether-orchestrator"
    idempotent = True

    def __init__(self, copies: int = 2) -> None:
        self._state = ControlState(copies)
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticking = False
        self._streams = itertools.count(1)

    async def start(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        scheduler.handlers |= {
            "tether_watch": self._watch,
            "tether_want": self._want,
            "tether_manager": self._follow_manager,
            "tether_table": self._table,
        }

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Not a coroutine: the scheduler awaits those before it answers the worker, which serves nothing until then."""
        state = scheduler.workers[worker]
        gpus = int(state.resources.get("GPU", 0))
        self._handle(WorkerJoined(WorkerId(str(state.name)), worker, state.pid, gpus))

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:  # noqa: ARG002 (Dask's signature)
        self._handle(WorkerLeft(worker))

    async def before_close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _handle(self, event: Event) -> None:
        for instruction in self._state.handle(event, time.time()):
            self._carry_out(instruction)
        if self._state.unsettled and not self._ticking:
            self._ticking = True
            self._spawn(self._tick())

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Load():
                self._spawn(self._load(instruction))
            case Unload():
                self._spawn(self._unload(instruction))
            case Push():
                self._spawn(self._notify())

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tick(self) -> None:
        try:
            while self._state.unsettled:
                await asyncio.sleep(_TICK)
                self._handle(Tick())
        finally:
            self._ticking = False

    async def _load(self, load: Load) -> None:
        self._handle(await self._outcome(load))

    async def _outcome(self, load: Load) -> Event:
        address, pid, model = load.address, load.pid, load.model
        try:
            answer = await self._scheduler.rpc(address).tether_load(model=msgspec.msgpack.encode(model))
            if "endpoint" in answer:
                return Loaded(address, pid, model, answer["endpoint"])
            code, message = answer["error"]
        except OSError as error:
            log.warning("load cut off", worker=address, model=str(model), error=str(error))
            return LoadCut(address, pid, model)
        except Exception as error:
            log.exception("load failed", worker=address, model=str(model))
            reason = f"{type(error).__name__}: {error}; the orchestrator's log has the traceback"
            return LoadFailed(address, pid, model, InternalError.code, reason)
        log.warning("load failed", worker=address, model=str(model), code=code, error=message)
        return LoadFailed(address, pid, model, code, message)

    async def _unload(self, unload: Unload) -> None:
        try:
            await self._scheduler.rpc(unload.address).tether_unload(model=msgspec.msgpack.encode(unload.model))
        except OSError:  # the worker went away; Dask says so by itself
            return
        except Exception:
            log.exception("unload failed", worker=unload.address, model=str(unload.model))
            return
        self._handle(Unloaded(unload.address, unload.pid, unload.model))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _table(self) -> dict[str, bytes]:
        return {"table": msgspec.msgpack.encode(self._state.table)}

    async def _watch(self, comm: Comm) -> Status:
        """Send the table now and after every change until the gateway goes away.

        Not before a manager has told of its catalog: a gateway's last table is better than an empty one of a new orchestrator.
        """
        sent = -1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._state.informed)
            while True:
                table = self._state.table
                if table.seq != sent:
                    sent = table.seq
                    await comm.write({"table": msgspec.msgpack.encode(table)})
                async with self._changed:
                    if self._state.table.seq == sent:
                        await self._changed.wait()
        except CommClosedError:
            return Status.dont_reply

    async def _want(self, model: bytes) -> dict[str, Any]:
        """A gateway needs a version; the answer is its state after placement."""
        wanted = msgspec.msgpack.decode(model, type=ModelVersion)
        self._handle(ModelWanted(wanted))
        entry = self._state.table.models.get(wanted.name)
        found = entry.versions.get(wanted.version) if entry else None
        return {"state": found.state if found else "unloaded", "reason": found.reason if found else ""}

    async def _follow_manager(self, comm: Comm, address: str, count: int, catalog: bytes) -> Status:
        """Take in the manager's catalog, now and after every change, until it goes away."""
        stream = next(self._streams)
        try:
            while True:
                self._handle(CatalogChanged(address, count, msgspec.msgpack.decode(catalog, type=Catalog), stream))
                message = await comm.read()
                count, catalog = message["count"], message["catalog"]
        except CommClosedError:
            return Status.dont_reply
        finally:
            self._handle(ManagerLeft(stream))
            comm.abort()  # after a message that made no sense the manager connects again
