"""Pure: the only place where the control plane's state changes. `handle(event, now) -> instructions`; no loop, no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

from msgspec import structs

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
from tether.orchestrator.placement import Candidate, place
from tether.routing.table import ModelEntry, Route, State, Table, VersionEntry, WorkerEntry
from tether.types import ModelInfo, ModelVersion, WorkerId

__all__ = ["ControlState", "Instruction", "Load", "Push", "Unload"]

RETRY_AFTER = 5.0
"""Seconds before a worker that failed to load a version is asked again: a wrong file stays wrong, a full memory may empty."""
RETRY_AT_MOST = 60.0
"""Each further failure doubles the wait up to this, so that a file that stays wrong costs an idle cluster little; a request begins anew."""
FORGET_AFTER = 3600.0
"""Seconds that a lost worker stays in the table, for people to see."""


@dataclass(frozen=True, slots=True)
class Load:
    """Tell the worker to load the version; what comes of it is `Loaded`, `LoadFailed` or `LoadCut`, with the same `pid`."""

    address: str
    pid: int
    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Unload:
    """Tell the worker to free the version; it answers with `Unloaded`, with the same `pid`."""

    address: str
    pid: int
    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Push:
    """Send the table to every gateway."""

    table: Table


Instruction = Load | Unload | Push


@dataclass(slots=True)
class _Failure:
    at: float
    tries: int
    """In a row, since it was last asked for by a request."""

    def over(self, now: float) -> bool:
        return now - self.at >= min(RETRY_AFTER * (1 << self.tries - 1), RETRY_AT_MOST)


@dataclass(slots=True)
class _Worker:
    id: WorkerId
    address: str
    pid: int
    gpus: int
    since: float
    loaded: dict[ModelVersion, str] = field(default_factory=dict)
    """Version → endpoint."""
    loading: set[ModelVersion] = field(default_factory=set)
    failed: dict[ModelVersion, _Failure] = field(default_factory=dict)
    """Not to be asked again at once."""

    def fail(self, model: ModelVersion, now: float) -> None:
        before = self.failed.get(model)
        self.loading.discard(model)
        self.failed[model] = _Failure(now, min(before.tries + 1, 10) if before else 1)


class ControlState:
    """Workers, catalog and what is wanted; makes the table."""

    def __init__(self, copies: int = 2) -> None:
        self._copies = copies
        self._workers: dict[str, _Worker] = {}
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
        self._seq = 0
        self.table = Table()

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in; what is to be done about it, in order. `now` in seconds of one monotonic-per-run clock (Unix time)."""
        self._apply(event, now)
        self._lost = {name: entry for name, entry in self._lost.items() if now - entry.since < FORGET_AFTER}
        instructions = [*self._collect(), *self._place(now)]
        table = self._make_table()
        if table is not None:
            instructions.append(Push(table))
        return instructions

    @property
    def unsettled(self) -> bool:
        """Whether a wanted version lacks copies that a worker might take once some time has passed: `Tick` is needed then only."""
        lacking = [model for model in self._wanted if sum(model in worker.loaded for worker in self._workers.values()) < self._copies]
        return any(model in worker.failed for model in lacking for worker in self._workers.values())

    def _apply(self, event: Event, now: float) -> None:
        match event:
            case WorkerJoined(worker, address, pid, gpus):
                self._workers[address] = _Worker(worker, address, pid, gpus, now)
                self._lost.pop(worker, None)
            case WorkerLeft(address):
                self._remove(address, now)
            case CatalogChanged():
                self._take_catalog(event)
            case ManagerLeft(stream):
                if self._stream == stream:
                    self._manager = None
            case ModelWanted(model):
                self._want(model)
            case Loaded() | LoadFailed() | LoadCut() | Unloaded():
                self._answered(event, now)
            case Tick():
                pass  # placing, which follows each event, looks at the time
            case _:
                assert_never(event)

    def _take_catalog(self, event: CatalogChanged) -> None:
        if event.stream < self._stream or event.term < self._term:  # what was still under way from a manager that was replaced
            return
        self._term, self._stream, self._manager, self._count = event.term, event.stream, event.manager, event.count
        self._catalog, self.informed = event.models, True
        published = self._published()
        self._wanted &= published
        self._reasons = {model: reason for model, reason in self._reasons.items() if model in published}
        for worker in self._workers.values():
            worker.failed = {model: failure for model, failure in worker.failed.items() if model in published}

    def _published(self) -> set[ModelVersion]:
        return {model for entry in self._catalog.values() for model, _ in entry.versions.values()}

    def _want(self, model: ModelVersion) -> None:
        if model not in self._published():
            return
        self._wanted.add(model)
        for worker in self._workers.values():
            if failure := worker.failed.get(model):
                failure.tries = 1

    def _remove(self, address: str, now: float) -> None:
        worker = self._workers.pop(address, None)
        if worker is not None:
            self._lost[worker.id] = WorkerEntry(worker.id, address, worker.pid, "lost", now, worker.gpus)

    def _answered(self, event: Loaded | LoadFailed | LoadCut | Unloaded, now: float) -> None:
        worker, model = self._workers.get(event.address), event.model
        if worker is None or worker.pid != event.pid:  # a late answer of the process that had this address before
            return
        match event:
            case Loaded():
                worker.loading.discard(model)
                worker.failed.pop(model, None)
                worker.loaded[model] = event.endpoint
                self._reasons.pop(model, None)
            case LoadFailed():
                worker.fail(model, now)
                if model in self._published():
                    self._reasons[model] = f"{event.code}: {event.message}"
            case LoadCut():  # no reason to tell: those who wait get the worker that comes back
                worker.fail(model, now)
            case Unloaded():
                worker.loaded.pop(model, None)

    def _collect(self) -> list[Instruction]:
        """What is in memory and no longer published."""
        published = self._published() if self._manager is not None else None
        if published is None:
            return []
        gone: list[Instruction] = []
        for worker in self._workers.values():
            for model in [model for model in worker.loaded if model not in published]:
                del worker.loaded[model]
                gone.append(Unload(worker.address, worker.pid, model))
        return gone

    def _place(self, now: float) -> list[Instruction]:
        loads: list[Instruction] = []
        for model in sorted(self._wanted, key=str):
            candidates = [self._candidate(worker, model, now) for worker in self._workers.values()]
            for address in place(candidates, self._copies):
                worker = self._workers[address]
                worker.loading.add(model)
                loads.append(Load(address, worker.pid, model))
        return loads

    def _candidate(self, worker: _Worker, model: ModelVersion, now: float) -> Candidate:
        failure = worker.failed.get(model)
        return Candidate(
            worker.address,
            loaded=model in worker.loaded,
            loading=model in worker.loading,
            able=failure is None or failure.over(now),
            models=len(worker.loaded) + len(worker.loading),
        )

    def _make_table(self) -> Table | None:
        """The new table, or None when nothing in it changed."""
        table = Table(
            self._seq + 1,
            {name: self._entry(entry) for name, entry in self._catalog.items()},
            {**self._lost, **{worker.id: _worker_entry(worker) for worker in self._workers.values()}},
            self._count,
            self._manager,
        )
        if structs.replace(table, seq=self._seq) == self.table:
            return None
        self._seq, self.table = table.seq, table
        return table

    def _entry(self, entry: CatalogModel) -> ModelEntry:
        versions = {number: self._version(model, info) for number, (model, info) in entry.versions.items()}
        return ModelEntry(entry.name, entry.default, versions, entry.aliases)

    def _version(self, model: ModelVersion, info: ModelInfo) -> VersionEntry:
        workers = self._workers.values()
        routes = tuple(Route(worker.id, worker.loaded[model]) for worker in workers if model in worker.loaded)
        state: State = "unloaded"
        if routes:
            state = "ready"
        elif any(model in worker.loading for worker in workers):
            state = "loading"
        elif model in self._reasons:
            state = "failed"
        return VersionEntry(model, info, state, routes, self._reasons.get(model, "") if state == "failed" else "")


def _worker_entry(worker: _Worker) -> WorkerEntry:
    models = tuple(sorted(map(str, worker.loaded)))
    return WorkerEntry(worker.id, worker.address, worker.pid, "running", worker.since, worker.gpus, models)
