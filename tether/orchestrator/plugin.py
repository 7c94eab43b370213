"""Dask's side of the orchestrator; glue only: scheduler events in, instructions out.

The handlers that it adds to the scheduler are in the README. Messages carry msgpack bytes of our own types, never pickles of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import structlog
from distributed import Scheduler, SchedulerPlugin
from distributed.comm import Comm, CommClosedError
from distributed.core import Status, connect

from tether.errors import InternalError
from tether.events import (
    CatalogChanged,
    CatalogModel,
    Claim,
    Event,
    Evicting,
    GatewayLoad,
    Holding,
    InputCondemned,
    LentChanged,
    LentWorker,
    LoadCut,
    Loaded,
    LoadFailed,
    ManagerLeft,
    ModelWanted,
    QuarantineCleared,
    Tick,
    Unloaded,
    VersionIsolated,
    WorkerBack,
    WorkerJoined,
    WorkerLeft,
    WorkerSilent,
)
from tether.orchestrator.health import LIMIT
from tether.orchestrator.lease import Lease, Record
from tether.orchestrator.memory import Memory
from tether.orchestrator.news import News
from tether.orchestrator.pinging import Line, Pinger
from tether.orchestrator.resizing import Resizing
from tether.orchestrator.rolling import Rolling
from tether.orchestrator.scaling import Batch
from tether.orchestrator.state import Configure, ControlState, EndRollout, Instruction, Isolate, Load, Push, Unload
from tether.serving_settings import DEFAULTS
from tether.telemetry.clock import steady_time
from tether.types import ModelVersion, WorkerId, WorkerMemory, WorkerSite

__all__ = ["OrchestratorPlugin"]

log = structlog.get_logger("tether.orchestrator")
Catalog = dict[str, CatalogModel]
_TICK = 2.0
"""Seconds between looks for versions that may be tried again; only while there are some."""
_RETURN = 6.0
"""Seconds in which workers come back that went on without an orchestrator; mostly in less than one."""
_LOOK = 0.5
"""The same, for rollouts and drains that go on."""
_CLAIM = 5.0
"""Seconds to wait for a manager's claim, which it makes each second: one that is stopped would be asked as if it were there."""
_TRIES = 5
"""Connections that may fail before a worker that stays is left with settings of before."""


class OrchestratorPlugin(SchedulerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Feeds the scheduler's events to `ControlState` and carries out what it says."""

    name = "tether-orchestrator"
    idempotent = True

    def __init__(self, copies: int = 2, memory: Memory | None = None) -> None:
        """`memory`: where the lease is remembered; None: there never was one."""
        self._state = ControlState(copies, time.time_ns())
        self._memory = memory
        self._kept = memory.read() if memory else None
        self._lease = Lease(self._kept, _boot_clock())
        self._told: tuple[int, int, int] = (0, 0, 0)
        """Connection, term and stream of who told the catalog last."""
        self._news = News()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticking = False
        self._watching = 0
        """Gateways that follow the table."""
        self._configuring: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By worker's address: held while it is told of settings."""
        self._streams = itertools.count(1)
        self._pinger = Pinger(
            self._line, lambda address: self._handle(WorkerSilent(address)), lambda address: self._handle(WorkerBack(address))
        )

    async def start(self, scheduler: Scheduler) -> None:
        self._scheduler, self._begun = scheduler, asyncio.get_running_loop().time()
        self._resizing = Resizing(self._state.overview.staff, self._spent, self._batch, self._handle)
        scheduler.handlers |= {
            "tether_watch": self._watch,
            "tether_want": self._want,
            "tether_evicting": self._evicting,
            "tether_quarantine": self._quarantine,
            "tether_forgive": self._forgive,
            "tether_load": self._take_load,
            "tether_explain": self._explain,
            "tether_workers_wanted": self._resizing.wanted,
            "tether_workers_leaving": self._resizing.leaving,
            "tether_manager": self._follow_manager,
            "tether_table": self._table,
            "tether_means": self._means,
            "tether_vitals": self._vitals,
        }
        self._rolling = Rolling(self._state, self._handle, scheduler.rpc, self._changed, lambda: self._watching > 0)
        scheduler.handlers |= self._rolling.handlers()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Not a coroutine: the scheduler awaits those before it answers the worker, which serves nothing until then."""
        state = scheduler.workers[worker]
        gpus = int(state.resources.get("GPU", 0))
        memory, holdings = _memory(state.metrics.get("tether_memory")), _holdings(state.extra)
        site = msgspec.convert(state.extra.get("tether_site", {}), WorkerSite)
        self._handle(WorkerJoined(WorkerId(str(state.name)), worker, state.pid, gpus, memory, site, holdings))
        self._pinger.add(worker)

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:  # noqa: ARG002 (Dask's signature)
        self._pinger.remove(worker)
        self._handle(WorkerLeft(worker, for_good=self._resizing.sent_away(worker)))

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[Any]) -> list[Any]:  # noqa: ARG002 (Dask's signature)
        """Those that Dask's own `Adaptive` may end: nothing would be missed, and nothing ran there lately."""
        quiet = [str(worker.name) for worker in workers if not worker.metrics.get("tether_means", {}).get("busy")]
        may_go = self._state.overview.dispensable(quiet)
        return [worker for worker in workers if str(worker.name) in may_go]

    async def before_close(self) -> None:
        await self._pinger.aclose()
        for task in self._tasks:
            task.cancel()

    def _handle(self, event: Event) -> None:
        for instruction in self._state.handle(event, steady_time()):
            self._carry_out(instruction)
        if not self._ticking and (self._state.unsettled or self._state.is_changing):
            self._ticking = True
            self._spawn(self._tick())

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Load():
                self._spawn(self._load(instruction))
            case Unload():
                self._spawn(self._unload(instruction))
            case Isolate():
                self._spawn(self._isolate(instruction))
            case Configure():
                self._spawn(self._configure(instruction))
            case EndRollout():
                self._spawn(self._rolling.end(instruction))
            case Push(_, change):
                self._news.add(change)
                self._spawn(self._notify())

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _line(self, address: str) -> Line:
        line: Line = await connect(address, timeout=LIMIT, **self._scheduler.connection_args)
        return line

    async def _tick(self) -> None:
        try:
            while self._state.unsettled or self._state.is_changing:
                await asyncio.sleep(_LOOK if self._state.is_changing else _TICK)
                self._handle(Tick())
        finally:
            self._ticking = False

    async def _load(self, load: Load) -> None:
        self._handle(await self._outcome(load))

    async def _outcome(self, load: Load) -> Event:
        address, pid, model = load.address, load.pid, load.model
        try:
            answer = await self._asked(load)
            if "endpoint" in answer:
                return Loaded(address, pid, model, answer["endpoint"], _memory(answer.get("memory")), answer.get("seconds", 0.0))
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

    async def _asked(self, what: Load | Unload) -> dict[str, Any]:
        """What a worker answers to it; of a lent one, what the manager does that has the line to it."""
        verb, model = "load" if isinstance(what, Load) else "unload", msgspec.msgpack.encode(what.model)
        if what.manager is None:
            more = {"serving": msgspec.msgpack.encode(what.serving)} if isinstance(what, Load) and what.serving != DEFAULTS else {}
            answer = getattr(self._scheduler.rpc(what.address), f"tether_{verb}")(model=model, **more)
        else:
            asked = getattr(self._scheduler.rpc(what.manager), f"tether_lent_{verb}")
            answer = asked(worker=what.address, number=what.pid, model=model)
        return dict(await answer)

    async def _unload(self, unload: Unload) -> None:
        try:
            answer = await self._asked(unload)
        except OSError:  # the worker, or the line to a lent one, went away; that is told by itself
            return
        except Exception:
            log.exception("unload failed", worker=unload.address, model=str(unload.model))
            return
        self._handle(Unloaded(unload.address, unload.pid, unload.model, _memory(answer.get("memory"))))

    async def _isolate(self, isolate: Isolate) -> None:
        try:
            await self._scheduler.rpc(isolate.address).tether_isolate(model=msgspec.msgpack.encode(isolate.model))
        except OSError:  # the worker went away; that is told by itself
            return
        except Exception:
            log.exception("isolating failed", worker=isolate.address, model=str(isolate.model))

    async def _configure(self, told: Configure) -> None:
        """One after the other for each worker: what was said last is to be in force. A process that is gone needs to know nothing."""
        async with self._configuring[told.address]:
            for _ in range(_TRIES):
                worker = self._scheduler.workers.get(told.address)
                if worker is None or worker.pid != told.pid:
                    return
                try:
                    model, serving = msgspec.msgpack.encode(told.model), msgspec.msgpack.encode(told.serving)
                    await self._scheduler.rpc(told.address).tether_configure(model=model, serving=serving)
                    return
                except OSError as error:
                    log.warning("serving settings did not arrive", worker=told.address, model=str(told.model), error=str(error))
                    await asyncio.sleep(_TICK)
                except Exception:
                    log.exception("serving settings were not taken", worker=told.address, model=str(told.model))
                    return

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _table(self) -> dict[str, bytes]:
        return {"table": msgspec.msgpack.encode(self._state.table)}

    async def _means(self) -> dict[str, Any]:
        """What this lab has to work with, for what it tells other labs: workers' cards and load, digests of what they have in memory."""
        workers = [worker.metrics.get("tether_means", {}) for worker in self._scheduler.workers.values()]
        versions = (version for model in self._state.table.models.values() for version in model.versions.values())
        loaded = {version.model.digest for version in versions if any(route.slots is None for route in version.routes)}
        return {"workers": workers, "loaded": sorted(loaded)}

    def _batch(self) -> Batch:
        """Tasks that the scheduler has."""
        scheduler = self._scheduler
        busy = [worker for worker in scheduler.workers.values() if worker.processing]
        waiting = len(scheduler.queued) + len(scheduler.unrunnable)
        return Batch(
            {str(worker.name) for worker in busy}, sum(len(worker.processing) for worker in busy), waiting, scheduler.total_occupancy
        )

    def _spent(self) -> dict[str, float]:
        """By process of a worker, seconds inside runtimes, as its last heartbeat told."""
        return {
            f"{worker.name} {worker.pid}": sum(model["busy"] for model in worker.metrics.get("tether", {}).values())
            for worker in self._scheduler.workers.values()
        }

    async def _vitals(self) -> dict[str, Any]:
        """By worker, what it uses of its machine and what its models did, as its last heartbeat told."""
        return {str(worker.name): _vitals_of(worker.metrics) for worker in self._scheduler.workers.values()}

    async def _watch(self, comm: Comm, workers: Sequence[str] = ()) -> Status:
        """Send the table, and then what changes, until the gateway goes away; after each message it says what it has (None: nothing).

        `workers`: that were there by its last table, which is better than one of a new orchestrator to which they, or a manager with its
        catalog, have not come back yet.
        """
        has: int | None = None
        self._watching += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._state.informed)
            await self._gathered(workers)
            while True:
                await comm.write(self._news.since(has, self._state.table))
                has = (await comm.read())["has"]
                async with self._changed:
                    while self._state.table.seq == has:
                        await self._changed.wait()
        except CommClosedError:
            return Status.dont_reply
        finally:
            self._watching -= 1

    async def _gathered(self, workers: Sequence[str]) -> None:
        """Wait until all of them are there; not longer than `_RETURN` after the start."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._begun + _RETURN), self._changed:
                await self._changed.wait_for(lambda: all(worker in self._scheduler.aliases for worker in workers))

    async def _want(self, model: bytes) -> dict[str, Any]:
        """A gateway needs a version; the answer is its state after placement."""
        wanted = msgspec.msgpack.decode(model, type=ModelVersion)
        self._handle(ModelWanted(wanted))
        entry = self._state.table.models.get(wanted.name)
        found = entry.versions.get(wanted.version) if entry else None
        return {"state": found.state if found else "unloaded", "reason": found.reason if found else ""}

    async def _evicting(self, address: str, pid: int, model: bytes, endpoint: str, memory: bytes) -> dict[str, Any]:
        """A worker is about to free a version: when this is answered gateways are being told."""
        version, left = msgspec.msgpack.decode(model, type=ModelVersion), msgspec.msgpack.decode(memory, type=WorkerMemory)
        self._handle(Evicting(address, pid, version, endpoint, left))
        return {}

    async def _quarantine(self, model: bytes, mark: str | None) -> dict[str, Any]:
        """A gateway found out that an input ends whatever runs it, or (None) that one of the version's may."""
        found = msgspec.msgpack.decode(model, type=ModelVersion)
        log.warning("version isolated" if mark is None else "input condemned", model=str(found), mark=mark)
        self._handle(VersionIsolated(found) if mark is None else InputCondemned(found, mark))
        return {}

    async def _forgive(self, model: str) -> dict[str, Any]:
        log.info("quarantine cleared", model=model)
        self._handle(QuarantineCleared(model))
        return {}

    async def _take_load(self, load: bytes) -> dict[str, Any]:
        """What a gateway saw of each version in the last second."""
        seen = msgspec.msgpack.decode(load, type=GatewayLoad)
        self._resizing.hear(seen, steady_time())
        self._handle(seen)
        return {}

    async def _explain(self, model: str) -> dict[str, Any]:
        return {"versions": self._state.overview.explain(self._state.table, model, steady_time())}

    async def _follow_manager(self, comm: Comm, claim: bytes, **first: Any) -> Status:
        """Answer a manager's claims, and take in the catalog and the lent workers of the one that writes, until it goes away."""
        connection, told = next(self._streams), Claim("", "")
        message: dict[str, Any] = {"claim": claim} | first
        try:
            while True:
                told = msgspec.msgpack.decode(message["claim"], type=Claim)
                if told.released:
                    return Status.dont_reply
                self._take_claim(told, connection)
                if "catalog" in message:
                    self._take_catalog(told, connection, message["count"], message["catalog"])
                if "lent" in message:
                    self._take_lent(connection, message["lent"])
                await comm.write({"standing": msgspec.msgpack.encode(self._lease.standing())})
                async with asyncio.timeout(_CLAIM):
                    message = await comm.read()
        except TimeoutError:
            log.warning("manager silent", manager=told.address)
            return Status.dont_reply
        except CommClosedError:
            return Status.dont_reply
        finally:
            self._leave(told, connection)
            comm.abort()  # after a silence, or a message that made no sense, the manager connects again

    def _take_claim(self, claim: Claim, connection: int) -> None:
        before = self._lease.record
        self._lease.claim(claim, connection, _boot_clock())
        self._note_lease(before)

    def _note_lease(self, before: Record) -> None:
        """What was decided is remembered before anybody is told of it; who lost the lease is the manager no more."""
        now = self._lease.record
        if now != self._kept and self._memory is not None:
            self._memory.write(now)
            self._kept = now
        if now.term != before.term:
            log.info("a manager has the writer's lease", member=now.holder, term=now.term)
            self._handle(ManagerLeft(self._told[2]))

    def _take_catalog(self, claim: Claim, connection: int, count: int, catalog: bytes) -> None:
        record = self._lease.record
        if claim.member != record.holder or claim.holds != record.term:
            return
        if self._told[:2] != (connection, record.term):
            self._told = connection, record.term, next(self._streams)
        models = msgspec.msgpack.decode(catalog, type=Catalog)
        self._handle(CatalogChanged(claim.address, count, models, self._told[2], record.term))

    def _take_lent(self, connection: int, lent: bytes) -> None:
        """Of who told the catalog before, in this term."""
        if self._told[:2] == (connection, self._lease.record.term):
            self._handle(LentChanged(self._told[2], msgspec.msgpack.decode(lent, type=tuple[LentWorker, ...])))

    def _leave(self, claim: Claim, connection: int) -> None:
        before = self._lease.record
        self._lease.left(claim.member, connection, released=claim.released, now=_boot_clock())
        self._note_lease(before)
        if self._told[0] == connection:
            self._handle(ManagerLeft(self._told[2]))


def _memory(told: Any) -> WorkerMemory | None:
    """Of an answer, or of a heartbeat; None: it does not say."""
    if told is None:
        return None
    return msgspec.msgpack.decode(told, type=WorkerMemory) if isinstance(told, bytes) else msgspec.convert(told, WorkerMemory)


def _holdings(told: Mapping[str, Any]) -> tuple[Holding, ...]:
    """What a worker said at its registration that it has in memory."""
    holdings = told.get("tether_holdings")
    return () if holdings is None else msgspec.msgpack.decode(holdings, type=tuple[Holding, ...])


def _vitals_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {**metrics.get("tether_vitals", {}), **metrics.get("tether_memory", {}), "models": metrics.get("tether", {})}


def _boot_clock() -> float:
    """Seconds that go on while the host sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
