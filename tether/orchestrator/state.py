"""Pure: the only place where the control plane's state changes. `handle(event, now) -> instructions`; no loop, no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from msgspec import structs

from tether.errors import MemoryFullError, NoDeviceError
from tether.events import (
    CatalogChanged,
    CatalogModel,
    Event,
    Evicting,
    GatewayLoad,
    InputCondemned,
    LentChanged,
    LoadCut,
    Loaded,
    LoadFailed,
    ManagerLeft,
    ModelWanted,
    QuarantineCleared,
    Tick,
    Unloaded,
    VersionIsolated,
    WorkerJoined,
    WorkerLeft,
)
from tether.orchestrator.isolation import Isolation
from tether.orchestrator.placement import Candidate, place
from tether.orchestrator.registry import KnownWorker, lent_worker
from tether.routing.table import ModelEntry, State, Table, VersionEntry, WorkerEntry
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import ModelInfo, ModelVersion, WorkerId

__all__ = ["Configure", "ControlState", "Instruction", "Isolate", "Load", "Push", "Unload"]

FORGET_AFTER = 3600.0
"""Seconds that a lost worker stays in the table, for people to see."""
_NOWHERE = {
    "gpu": "{0} is to run on a GPU and no worker has one: start one (`tether worker --gpus 1`), or `tether serving {0.name} --device any`",
    "cpu": "{0} is to run without a GPU and all workers have one: start one without, or `tether serving {0.name} --device any`",
}
"""Why what may run on some workers only runs nowhere."""


@dataclass(frozen=True, slots=True)
class Load:
    """Tell the worker to load the version; what comes of it is `Loaded`, `LoadFailed` or `LoadCut`, with the same `address` and `pid`."""

    address: str
    """Of a lent worker: its id."""
    pid: int
    model: ModelVersion
    manager: str | None = None
    """Of a lent worker: the address of the manager that has the line to it."""
    serving: ServingSettings = DEFAULTS
    """A lent worker is not told: how it serves is its lab's matter."""


@dataclass(frozen=True, slots=True)
class Unload:
    """Tell the worker to free the version; it answers with `Unloaded`. Fields as of `Load`."""

    address: str
    pid: int
    model: ModelVersion
    manager: str | None = None


@dataclass(frozen=True, slots=True)
class Isolate:
    """Tell a worker of the lab to run the version in a process of its own, from now until it is unloaded. Nothing comes of it."""

    address: str
    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Configure:
    """Tell a worker of the lab to serve a version that it has like this from now on. It is told in the order in which this is said."""

    address: str
    pid: int
    model: ModelVersion
    serving: ServingSettings


@dataclass(frozen=True, slots=True)
class Push:
    """Send the table to every gateway."""

    table: Table


Instruction = Load | Unload | Configure | Isolate | Push


class ControlState:
    """Workers, catalog and what is wanted; makes the table."""

    def __init__(self, copies: int = 2) -> None:
        self._copies = copies
        self._workers: dict[str, KnownWorker] = {}
        """By address, lent ones last, as in routes."""
        self._lost: dict[WorkerId, WorkerEntry] = {}
        self._catalog: dict[str, CatalogModel] = {}
        self._count = 0
        self.informed = False
        """Whether a manager has told of its catalog since the start."""
        self._manager: str | None = None
        self._stream = 0
        self._term = 0
        self._wanted: set[ModelVersion] = set()
        self._reasons: dict[ModelVersion, str] = {}
        self._short: dict[ModelVersion, str] = {}
        """What no room was found for when it was asked for last, and why."""
        self._isolation = Isolation()
        self._seq = 0
        self.table = Table()

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in; what is to be done about it, in order. `now` in seconds of one monotonic-per-run clock (Unix time)."""
        self._apply(event, now)
        self._lost = {name: entry for name, entry in self._lost.items() if now - entry.since < FORGET_AFTER}
        if self._isolation:
            self._isolation.settle(self._published(), now)
        instructions = [*self._collect(), *self._place(now), *self._configure(), *self._isolate()]
        table = self._make_table()
        if table is not None:
            instructions.append(Push(table))
        return instructions

    @property
    def unsettled(self) -> bool:
        """Whether a wanted version lacks copies that a worker might take once some time has passed: `Tick` is needed then only."""
        failed = {model for worker in self._workers.values() for model in worker.failed}
        return any(self._lacks(model) for model in failed & self._wanted)

    def _lacks(self, model: ModelVersion) -> bool:
        """Whether it would be placed if every worker could be asked."""
        return bool(place([replace(each, able=True) for each in self._candidates(model, 0.0)], self._copies))

    def _apply(self, event: Event, now: float) -> None:
        match event:
            case WorkerJoined(worker, address, pid, gpus, memory):
                self._join(KnownWorker(worker, address, pid, gpus, now, memory=memory))
            case WorkerLeft(address):
                self._remove(address, now)
            case CatalogChanged():
                self._take_catalog(event)
            case LentChanged():
                self._take_lent(event, now)
            case ManagerLeft(stream):
                self._end_stream(stream)
            case ModelWanted(model):
                self._want(model)
            case Loaded() | LoadFailed() | LoadCut() | Unloaded() | Evicting():
                self._answered(event, now)
            case VersionIsolated() | InputCondemned() | QuarantineCleared():
                self._isolation.take(event, now)
            case Tick() | GatewayLoad():
                pass  # placing, which follows each event, looks at the time
            case _:
                assert_never(event)

    def _take_catalog(self, event: CatalogChanged) -> None:
        if event.stream < self._stream or event.term < self._term:  # what was still under way from a manager that was replaced
            return
        if event.stream > self._stream:  # the lines of the one before are not this one's
            self._forget_lent()
        self._term, self._stream, self._manager, self._count = event.term, event.stream, event.manager, event.count
        self._catalog, self.informed = event.models, True
        published = self._published()
        self._wanted &= published
        self._reasons = {model: reason for model, reason in self._reasons.items() if model in published}
        self._short = {model: reason for model, reason in self._short.items() if model in published}
        for worker in self._workers.values():
            worker.failed = {model: failure for model, failure in worker.failed.items() if model in published}

    def _join(self, worker: KnownWorker) -> None:
        lent = self._forget_lent()
        self._workers |= {worker.address: worker} | lent
        self._lost.pop(worker.id, None)

    def _end_stream(self, stream: int) -> None:
        if self._stream == stream:
            self._manager = None
            self._forget_lent()

    def _take_lent(self, event: LentChanged, now: float) -> None:
        if event.stream != self._stream or self._manager is None:
            return
        before = self._forget_lent()
        self._workers |= {each.id: lent_worker(each, before.get(each.id), now) for each in event.workers}

    def _forget_lent(self) -> dict[str, KnownWorker]:
        """People don't see them as lost, as they see the lab's own: it may be that the lending ended. The manager says what it is."""
        lent = {key: worker for key, worker in self._workers.items() if worker.lent is not None}
        self._workers = {key: worker for key, worker in self._workers.items() if key not in lent}
        return lent

    def _published(self) -> set[ModelVersion]:
        return {model for entry in self._catalog.values() for model, _ in entry.versions.values()}

    def _want(self, model: ModelVersion) -> None:
        if model not in self._published():
            return
        self._wanted.add(model)
        for worker in self._workers.values():
            worker.rested.discard(model)
            if failure := worker.failed.get(model):
                failure.tries = 1

    def _remove(self, address: str, now: float) -> None:
        worker = self._workers.pop(address, None)
        if worker is not None:
            self._lost[worker.id] = WorkerEntry(worker.id, address, worker.pid, "lost", now, worker.gpus)

    def _answered(self, event: Loaded | LoadFailed | LoadCut | Unloaded | Evicting, now: float) -> None:
        worker, model = self._workers.get(event.address), event.model
        if worker is None or worker.pid != event.pid:  # a late answer of the process that had this address before
            return
        match event:
            case Loaded():
                worker.memory = event.memory or worker.memory
                worker.has_loaded(model, event.endpoint)
                self._reasons.pop(model, None)
                self._short.pop(model, None)
                self._forget_unheld(model)
            case LoadFailed() if event.code == MemoryFullError.code:
                worker.loading.discard(model)
                self._short[model] = f"{event.code}: {event.message}"
                self._forget_unheld(model)
            case LoadFailed():
                reason = f"{event.code}: {event.message}"
                worker.fail(model, now, reason)
                if worker.lent is None and model in self._published():
                    self._reasons[model] = reason
            case LoadCut():  # no reason to tell: those who wait get the worker that comes back
                worker.fail(model, now)
            case Unloaded():
                worker.loaded.pop(model, None)
                worker.memory = event.memory or worker.memory
            case Evicting():
                worker.memory = event.memory
                worker.evicts(model, event.endpoint, now, may_rest=self._serving(model).keep_alive is not None)
                self._forget_unheld(model)

    def _forget_unheld(self, model: ModelVersion) -> None:
        """What is in no memory, for want of room, is wanted again when it is asked for and not before: else it would put others out."""
        if not any(model in worker.loaded or model in worker.loading for worker in self._workers.values()):
            self._wanted.discard(model)

    def _collect(self) -> list[Instruction]:
        """What is in memory and no longer published, or not where it is to run."""
        published = self._published() if self._manager is not None else None
        if published is None:
            return []
        gone: list[Instruction] = []
        for worker in self._workers.values():
            for model in [model for model in worker.loaded if model not in published or not self._may_run(worker, model)]:
                del worker.loaded[model]
                gone.append(Unload(worker.address, worker.pid, model, self._line(worker)))
        return gone

    def _place(self, now: float) -> list[Instruction]:
        loads: list[Instruction] = []
        for model in sorted((model for model in self._wanted if not self._is_held(model)), key=str):
            for address in place(self._candidates(model, now), self._copies):
                worker = self._workers[address]
                worker.loading.add(model)
                worker.serving[model] = self._serving(model)
                loads.append(Load(address, worker.pid, model, self._line(worker), worker.serving[model]))
        return loads

    def _configure(self) -> list[Instruction]:
        """What workers have in memory and serve as was said before. One that is loading is told when it has loaded."""
        told: list[Instruction] = []
        for worker in self._workers.values():
            for model in worker.loaded if worker.lent is None else ():
                wanted = self._serving(model)
                if worker.serving.get(model, DEFAULTS) != wanted:
                    worker.serving[model] = wanted
                    told.append(Configure(worker.address, worker.pid, model, wanted))
        return told

    def _serving(self, model: ModelVersion) -> ServingSettings:
        entry = self._catalog.get(model.name)
        return DEFAULTS if entry is None else entry.serving

    def _isolate(self) -> list[Instruction]:
        return [Isolate(worker.address, model) for worker, model in self._isolation.moves(self._workers.values())]

    def _is_held(self, model: ModelVersion) -> bool:
        """Whether the lab's own workers have all copies: nothing is to be placed then, which is mostly so."""
        return sum(model in worker.loaded for worker in self._workers.values() if worker.lent is None) >= self._copies

    def _line(self, worker: KnownWorker) -> str | None:
        return self._manager if worker.lent is not None else None

    def _candidates(self, model: ModelVersion, now: float) -> list[Candidate]:
        nbytes = max((worker.nbytes(model) for worker in self._workers.values()), default=0)
        return [worker.candidate(model, now, nbytes) for worker in self._workers.values() if self._may_run(worker, model)]

    def _may_run(self, worker: KnownWorker, model: ModelVersion) -> bool:
        return worker.runs(model) and self._serving(model).may_run_with(worker.gpus)

    def _make_table(self) -> Table | None:
        """The new table, or None when nothing in it changed."""
        table = Table(
            self._seq + 1,
            {name: self._entry(entry) for name, entry in self._catalog.items()},
            {**self._lost, **{worker.id: worker.entry() for worker in self._workers.values()}},
            self._count,
            self._manager,
        )
        if structs.replace(table, seq=self._seq) == self.table:
            return None
        self._seq, self.table = table.seq, table
        return table

    def _entry(self, entry: CatalogModel) -> ModelEntry:
        versions = {number: self._version(model, info) for number, (model, info) in entry.versions.items()}
        versions = {number: self._isolation.entry(version) for number, version in versions.items()}
        return ModelEntry(entry.name, entry.default, versions, entry.aliases, entry.serving)

    def _version(self, model: ModelVersion, info: ModelInfo) -> VersionEntry:
        workers = self._workers.values()
        routes = tuple(worker.route(model) for worker in workers if model in worker.loaded)
        state: State = "unloaded"
        if routes:
            state = "ready"
        elif any(model in worker.loading for worker in workers):
            state = "loading"
        elif reason := self._reason(model):
            return VersionEntry(model, info, "failed", (), reason)
        return VersionEntry(model, info, state, routes, "" if routes else self._short.get(model, ""))

    def _reason(self, model: ModelVersion) -> str:
        """Why requests are refused. What lent workers say counts where the lab has no worker of its own, nor one that may come back."""
        workers = self._workers.values()
        serving, gpus = self._serving(model), [*(worker.gpus for worker in workers), *(lost.gpus for lost in self._lost.values())]
        if gpus and not any(map(serving.may_run_with, gpus)):  # else one can, or may come back
            return f"{NoDeviceError.code}: {_NOWHERE[serving.device].format(model)}"
        if model in self._reasons or model not in self._wanted or self._lost or any(worker.lent is None for worker in workers):
            return self._reasons.get(model, "")
        asked = [worker for worker in workers if worker.runs(model)] or workers
        return next(filter(None, (worker.refusal(model) for worker in asked)), "")
