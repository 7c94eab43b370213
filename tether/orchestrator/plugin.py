"""Dask's side of the orchestrator; glue only: scheduler events in, instructions out.

Handlers it adds to the scheduler: `tether_watch` (a gateway's stream of tables), `tether_want`, `tether_manager` (the manager's stream of
catalogs), `tether_table`.  Messages carry msgpack bytes of our own types, never pickles of them.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import structlog
from distributed import Scheduler, SchedulerPlugin
from distributed.comm import Comm, CommClosedError
from distributed.core import Status

from tether.events import (
    CatalogChanged,
    CatalogModel,
    Event,
    Loaded,
    LoadFailed,
    ManagerLeft,
    ModelWanted,
    Unloaded,
    WorkerJoined,
    WorkerLeft,
)
from tether.orchestrator.state import ControlState, Instruction, Load, Push, Unload
from tether.types import ModelVersion, WorkerId

__all__ = ["OrchestratorPlugin"]

log = structlog.get_logger("tether.orchestrator")
Catalog = dict[str, CatalogModel]


class OrchestratorPlugin(SchedulerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Feeds the scheduler's events to `ControlState` and carries out what it says."""

    name = "tether-orchestrator"
    idempotent = True

    def __init__(self, copies: int = 2) -> None:
        self._state = ControlState(copies)
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

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

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Load(address, model):
                self._spawn(self._load(address, model))
            case Unload(address, model):
                self._spawn(self._unload(address, model))
            case Push():
                self._spawn(self._notify())

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, address: str, model: ModelVersion) -> None:
        try:
            answer = await self._scheduler.rpc(address).tether_load(model=msgspec.msgpack.encode(model))
        except OSError as error:  # the worker went away; Dask says so by itself
            answer = {"error": ["worker_lost", str(error)]}
        if "endpoint" in answer:
            self._handle(Loaded(address, model, answer["endpoint"]))
        else:
            code, message = answer["error"]
            log.warning("load failed", worker=address, model=str(model), code=code, error=message)
            self._handle(LoadFailed(address, model, code, message))

    async def _unload(self, address: str, model: ModelVersion) -> None:
        try:
            await self._scheduler.rpc(address).tether_unload(model=msgspec.msgpack.encode(model))
        except OSError:
            return
        self._handle(Unloaded(address, model))

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
        try:
            while True:
                self._handle(CatalogChanged(address, count, msgspec.msgpack.decode(catalog, type=Catalog)))
                message = await comm.read()
                count, catalog = message["count"], message["catalog"]
        except CommClosedError:
            self._handle(ManagerLeft(address))
            return Status.dont_reply
