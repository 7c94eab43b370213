"""Pure: the only place where the control plane's state changes. `handle(event, now) -> instructions`; no loop, no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

from msgspec import structs

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
from tether.orchestrator.placement import Candidate, place
from tether.routing.table import ModelEntry, Route, State, Table, VersionEntry, WorkerEntry
from tether.types import ModelInfo, ModelVersion, WorkerId

__all__ = ["ControlState", "Instruction", "Load", "Push", "Unload"]

RETRY_AFTER = 5.0
"""Seconds before a worker that failed to load a version is asked again: a wrong file stays wrong, a full memory may empty."""


@dataclass(frozen=True, slots=True)
class Load:
    """Tell the worker to load the version; it answers with `Loaded` or `LoadFailed`."""

    address: str
    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Unload:
    """Tell the worker to free the version; it answers with `Unloaded`."""

    address: str
    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Push:
    """Send the table to every gateway."""

    table: Table


Instruction = Load | Unload | Push


@dataclass(slots=True)
class _Failure:
    code: str
    message: str
    at: float


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
        self._wanted: set[ModelVersion] = set()
        self._reasons: dict[ModelVersion, str] = {}
        self._seq = 0
        self.table = Table()

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in; what is to be done about it, in order. `now` in seconds of one monotonic-per-run clock (Unix time)."""
        self._apply(event, now)
        instructions = [*self._collect(), *self._place(now)]
        table = self._make_table()
        if table is not None:
            instructions.append(Push(table))
        return instructions

    def _apply(self, event: Event, now: float) -> None:  # noqa: C901 (one arm an event, each one call)
        match event:
            case WorkerJoined(worker, address, pid, gpus):
                self._workers[address] = _Worker(worker, address, pid, gpus, now)
                self._lost.pop(worker, None)
            case WorkerLeft(address):
                self._remove(address, now)
            case CatalogChanged(manager, count, models):
                self._manager, self._count, self._catalog, self.informed = manager, count, models, True
                self._wanted &= self._published()
            case ManagerLeft(manager):
                if self._manager == manager:
                    self._manager = None
            case ModelWanted(model):
                self._want(model)
            case Loaded(address, model, endpoint):
                self._loaded(address, model, endpoint)
            case LoadFailed(address, model, code, message):
                self._failed(address, model, _Failure(code, message, now))
            case Unloaded(address, model):
                if holder := self._workers.get(address):
                    holder.loaded.pop(model, None)
            case _:
                assert_never(event)

    def _published(self) -> set[ModelVersion]:
        return {model for entry in self._catalog.values() for model, _ in entry.versions.values()}

    def _want(self, model: ModelVersion) -> None:
        if model in self._published():
            self._wanted.add(model)

    def _remove(self, address: str, now: float) -> None:
        worker = self._workers.pop(address, None)
        if worker is not None:
            self._lost[worker.id] = WorkerEntry(worker.id, address, worker.pid, "lost", now, worker.gpus)

    def _loaded(self, address: str, model: ModelVersion, endpoint: str) -> None:
        worker = self._workers.get(address)
        if worker is not None:
            worker.loading.discard(model)
            worker.failed.pop(model, None)
            worker.loaded[model] = endpoint
            self._reasons.pop(model, None)

    def _failed(self, address: str, model: ModelVersion, failure: _Failure) -> None:
        worker = self._workers.get(address)
        if worker is not None:
            worker.loading.discard(model)
            worker.failed[model] = failure
            self._reasons[model] = f"{failure.code}: {failure.message}"

    def _collect(self) -> list[Instruction]:
        """What is in memory and no longer published."""
        published = self._published() if self._manager is not None else None
        if published is None:
            return []
        gone: list[Instruction] = []
        for worker in self._workers.values():
            for model in [model for model in worker.loaded if model not in published]:
                del worker.loaded[model]
                gone.append(Unload(worker.address, model))
        return gone

    def _place(self, now: float) -> list[Instruction]:
        loads: list[Instruction] = []
        for model in sorted(self._wanted, key=str):
            candidates = [self._candidate(worker, model, now) for worker in self._workers.values()]
            for address in place(candidates, self._copies):
                self._workers[address].loading.add(model)
                loads.append(Load(address, model))
        return loads

    def _candidate(self, worker: _Worker, model: ModelVersion, now: float) -> Candidate:
        failure = worker.failed.get(model)
        return Candidate(
            worker.address,
            loaded=model in worker.loaded,
            loading=model in worker.loading,
            able=failure is None or now - failure.at >= RETRY_AFTER,
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
