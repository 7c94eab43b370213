"""Pure: the only place where the control plane's state changes. `handle(event, now) -> instructions`; no loop, no clock, no I/O.

Each event marks the versions and workers that it touches (`workforce.py`); only those are looked at again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import assert_never

from tether.errors import MemoryFullError
from tether.events import (
    CatalogChanged,
    DrainAsked,
    Event,
    Evicting,
    GatewayLoad,
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
from tether.orchestrator.catalog import KnownCatalog
from tether.orchestrator.demand import Demand
from tether.orchestrator.draining import Draining
from tether.orchestrator.entries import TableMaker
from tether.orchestrator.instructions import Configure, EndRollout, Instruction, Isolate, Load, Push, Unload
from tether.orchestrator.isolation import Isolation
from tether.orchestrator.need import Need
from tether.orchestrator.overview import Overview
from tether.orchestrator.placing import Placing
from tether.orchestrator.registry import KnownWorker
from tether.orchestrator.rollout import Rollouts
from tether.orchestrator.workforce import FORGET_AFTER, Workforce
from tether.routing.table import Table, VersionEntry
from tether.types import ModelVersion

__all__ = ["FORGET_AFTER", "Configure", "ControlState", "EndRollout", "Instruction", "Isolate", "Load", "Push", "Unload"]


class ControlState:
    """Workers, catalog and what is wanted; makes the table."""

    def __init__(self, copies: int = 2, epoch: int = 0) -> None:
        """`epoch`: of the process, as of its tables."""
        self._workforce = Workforce()
        self._catalog = KnownCatalog()
        self._demand = Demand()
        self._need = Need()
        self._placing = Placing(self._workforce, self._catalog, self._demand, self._need, copies)
        self.overview = Overview(self._catalog, self._workforce, self._demand, self._need, copies)
        self._isolation = Isolation()
        self._draining = Draining(self._workforce, self._demand, self._placing.may_run)
        self._rollouts = Rollouts()
        self._tables = TableMaker(self._catalog, self._workforce, self._demand, self._isolation, self._rollouts, epoch)
        self._taken_back: set[ModelVersion] = set()
        """Those that were, and that a worker still loads."""
        self._renamed: set[str] = set()
        """Models whose catalog entry is another one now."""
        self._was_alone, self._kinds = True, self._workforce.kinds

    @property
    def table(self) -> Table:
        """As it is after the last event."""
        return self._tables.table

    @property
    def informed(self) -> bool:
        """Whether a manager has told of its catalog since the start."""
        return self._catalog.informed

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in; what is to be done about it, in order. `now` in seconds of one monotonic-per-run clock (Unix time)."""
        self._apply(event, now)
        self._workforce.pass_time(now)
        self._workforce.touched |= self._need.settle(now)
        if self._isolation:
            self._workforce.touched |= self._isolation.settle(self._catalog.published, now)
        ended = self._roll_out(now)
        self._draining.hold(now)
        touched = self._to_look_at(now)
        placing = [*self._placing.collect(touched, now), *self._placing.place(touched, now), *self._draining.moves(now)]
        instructions = [*ended, *placing, *self._placing.configure(touched), *self._isolate()]
        change = self._tables.update(self._workforce.touched, self._renamed, self._workforce.changed)
        if change is not None:
            instructions.append(Push(self.table, change))
        self._workforce.settled()
        self._renamed = set()
        return instructions

    @property
    def is_changing(self) -> bool:
        """Whether a rollout or a drain waits for time to pass: `Tick` is needed often."""
        return self._rollouts.is_waiting or self._draining.goes_on

    def is_due(self, ended: EndRollout) -> bool:
        """Whether that is still to be written."""
        return self._rollouts.is_due(ended)

    @property
    def unsettled(self) -> bool:
        """Whether time alone may change something: `Tick` is needed then only.

        A wanted version lacks copies that a worker might take later, or has copies that load may be seen to need no more.
        """
        return self._need.is_live or any(self._placing.lacks(model) for model in self._workforce.failing if model in self._demand.lacking)

    def _apply(self, event: Event, now: float) -> None:
        match event:
            case WorkerJoined() | WorkerLeft() | WorkerSilent() | WorkerBack():
                self._staff(event, now)
            case CatalogChanged():
                self._take_catalog(event, now)
            case LentChanged() | ManagerLeft():
                self._take_line(event, now)
            case ModelWanted(model):
                self._want(model, now)
            case Loaded() | LoadFailed() | LoadCut() | Unloaded() | Evicting():
                self._answered(event, now)
            case VersionIsolated() | InputCondemned() | QuarantineCleared():
                self._isolation.take(event, now)
            case DrainAsked():
                self._draining.take(event, now)
            case GatewayLoad():
                self._rollouts.take(event, now)
                self._take_load(event, now)
            case Tick():
                pass  # the time is looked at after each event
            case _:
                assert_never(event)

    def _staff(self, event: WorkerJoined | WorkerLeft | WorkerSilent | WorkerBack, now: float) -> None:
        match event:
            case WorkerJoined(worker, address, pid, gpus, memory, site, holdings):
                joined = KnownWorker(worker, address, pid, gpus, now, site=site, memory=memory)
                joined.hold(holdings)
                self._workforce.join(joined)
                self._adopt(joined.loaded, now)
            case WorkerLeft(address, for_good):
                self._workforce.leave(address, now, for_good=for_good)
            case WorkerSilent(address):
                self._workforce.stand(address, "silent", now)
            case WorkerBack(address):
                self._workforce.stand(address, "running", now)
            case _:
                assert_never(event)

    def _take_catalog(self, event: CatalogChanged, now: float) -> None:
        if self._catalog.is_late(event):
            return
        if event.stream > self._catalog.stream:  # the lines of the one before are not this one's
            self._lend((), now)
        is_back = self._catalog.manager is None
        self._renamed, touched = self._catalog.take(event)
        self._rollouts.follow(self._catalog.models, now)
        gone = touched - self._catalog.published
        self._demand.drop(gone)
        for model in gone:
            for worker in self._workforce.concerned(model):
                worker.forget(model)
                self._workforce.note(worker, model)
        self._workforce.touched |= touched
        self._follow_load(touched, now)
        if is_back:  # meanwhile nothing was collected
            self._adopt({model for worker in self._workforce for model in worker.loaded}, now)

    def _adopt(self, loaded: Collection[ModelVersion], now: float) -> None:
        """What workers have in memory that went on without an orchestrator, or without a catalog, is wanted; if it is published still."""
        self._workforce.touched.update(loaded)
        self._demand.wanted |= self._catalog.published.intersection(loaded)
        self._follow_load(loaded, now)
        for model in self._demand.wanted.intersection(loaded):
            if model in self._need:
                self._assume(model, now)

    def _follow_load(self, models: Iterable[ModelVersion], now: float) -> None:
        """What was said of these is another thing now: some are to have as many copies as load needs, of which nothing is told yet."""
        for model in models:
            if model not in self._catalog.published or not self._catalog.serving(model.name).follows_load:
                self._need.drop(model)
            elif model in self._demand.wanted and model not in self._need:
                self._assume(model, now)

    def _assume(self, model: ModelVersion, now: float) -> None:
        """As many are needed as have it, but for the spare one, until load is known: what serves is not freed for want of news."""
        self._need.assume(model, len(self._workforce.having(model)) - self._catalog.serving(model.name).spare, now)

    def _take_load(self, load: GatewayLoad, now: float) -> None:
        for model, seen in load.versions.items():
            follows = model in self._catalog.published and self._catalog.serving(model.name).follows_load
            if follows and self._need.take(model, seen, load.seconds, now):
                self._workforce.touched.add(model)

    def _roll_out(self, now: float) -> list[Instruction]:
        """Rollouts that ended. What they want loaded is as if it were asked for; what went back is freed, as if nobody did any more."""
        if not self._rollouts and not self._placing.on_trial and not self._taken_back:
            return []
        before = self._placing.on_trial
        new = self._rollouts.wanted - before
        ended = self._rollouts.proceed(lambda model: None if model in new else self._seen(model), now)
        self._placing.on_trial = self._rollouts.wanted
        self._try_anew(new)
        for model in self._placing.on_trial - self._demand.wanted | new:
            self._want(model, now)
        back = {model for model in before - self._placing.on_trial if not self._catalog.is_default(model)}
        self._demand.wanted -= back
        self._workforce.touched |= self._rollouts.versions
        return [*ended, *self._free_taken_back(back)]

    def _try_anew(self, models: Iterable[ModelVersion]) -> None:
        """That they could not be loaded before is no reason to take them back: perhaps it was mended since."""
        for model in models:
            self._demand.answered(model)
            for worker in self._workforce.concerned(model):
                worker.forget(model)
                self._workforce.note(worker, model)

    def _free_taken_back(self, models: set[ModelVersion]) -> list[Instruction]:
        """These, and earlier ones that a worker was still loading, unless somebody asked for them since."""
        due = (self._taken_back | models) - self._demand.wanted
        self._taken_back = {model for model in due if any(model in worker.loading for worker in self._workforce.concerned(model))}
        return [self._placing.free(worker, model) for model in sorted(due, key=str) for worker in self._workforce.having(model)]

    def _seen(self, model: ModelVersion) -> VersionEntry | None:
        """As the table has it."""
        entry = self.table.models.get(model.name)
        found = entry.versions.get(model.version) if entry is not None else None
        return found if found is not None and found.model == model else None

    def _take_line(self, event: LentChanged | ManagerLeft, now: float) -> None:
        """What an earlier manager's connection still says is of no interest."""
        if event.stream != self._catalog.stream:
            return
        match event:
            case LentChanged(_, lent):
                if self._catalog.manager is not None:
                    self._lend(lent, now)
            case ManagerLeft():
                self._catalog.end()
                self._lend((), now)
            case _:
                assert_never(event)

    def _lend(self, lent: Sequence[LentWorker], now: float) -> None:
        if lent or self._workforce.has_lent:
            self._workforce.lend(lent, now)
            self._workforce.touched |= self._demand.wanted

    def _want(self, model: ModelVersion, now: float) -> None:
        if model not in self._catalog.published:
            return
        self._demand.wanted.add(model)
        if self._catalog.serving(model.name).follows_load:
            self._need.ask(model, now)
        self._workforce.touched.add(model)
        for worker in self._workforce.concerned(model):
            worker.rested.discard(model)
            if failure := worker.failed.get(model):
                failure.tries = 1
            self._workforce.note(worker, model)

    def _answered(self, event: Loaded | LoadFailed | LoadCut | Unloaded | Evicting, now: float) -> None:
        worker, model = self._workforce.get(event.address), event.model
        if worker is None or worker.pid != event.pid:  # a late answer of the process that had this address before
            return
        match event:
            case Loaded():
                self._workforce.remember(worker, event.memory)
                worker.has_loaded(model, event.endpoint, event.seconds)
                self._demand.answered(model)
                self._forget_unheld(model)
            case LoadFailed() if event.code == MemoryFullError.code:
                worker.loading.discard(model)
                self._demand.short[model] = f"{event.code}: {event.message}"
                self._forget_unheld(model)
            case LoadFailed():
                reason = f"{event.code}: {event.message}"
                worker.fail(model, now, reason)
                if worker.lent is None:
                    self._demand.reasons[model] = reason
            case LoadCut():  # no reason to tell: those who wait get the worker that comes back
                worker.fail(model, now)
            case Unloaded():
                worker.loaded.pop(model, None)
                worker.leaving.discard(model)
                self._workforce.remember(worker, event.memory)
            case Evicting():
                self._workforce.remember(worker, event.memory)
                worker.evicts(model, event.endpoint, now, may_rest=self._catalog.serving(model.name).keep_alive is not None)
                self._workforce.press(worker)
                self._forget_unheld(model)
        if model not in self._catalog.published:
            self._demand.drop((model,))
            worker.forget(model)
        self._workforce.note(worker, model)

    def _forget_unheld(self, model: ModelVersion) -> None:
        """What is in no memory, for want of room, is wanted again when it is asked for and not before: else it would put others out."""
        if not any(model in worker.loaded or model in worker.loading for worker in self._workforce.concerned(model)):
            self._demand.wanted.discard(model)

    def _to_look_at(self, now: float) -> list[ModelVersion]:
        """What the event, the time, or a worker that came, went or got room may have made another thing."""
        workforce, lacking = self._workforce, self._demand.lacking
        if workforce.shrunk and workforce.has_lent:
            workforce.touched |= lacking
        self._follow_circumstances()
        workforce.touched.update(model for name in workforce.resized if (model := self._catalog.version(name)) in lacking)
        for worker in filter(None, map(workforce.get, workforce.freed)):
            workforce.touched.update(model for model in lacking - workforce.touched if self._placing.may_take(worker, model, now))
        return sorted(workforce.touched, key=str)

    def _follow_circumstances(self) -> None:
        """What all workers together are decides why a version is nowhere (`entries.py`)."""
        workforce = self._workforce
        kinds, is_alone = workforce.kinds, not workforce.has_own and not workforce.lost
        if is_alone != self._was_alone:
            workforce.touched |= self._demand.wanted
        if kinds != self._kinds:
            choosy = (entry for entry in self._catalog.models.values() if entry.serving.is_choosy)
            workforce.touched.update(model for entry in choosy for model, _ in entry.versions.values())
        self._was_alone, self._kinds = is_alone, kinds

    def _isolate(self) -> list[Instruction]:
        return [Isolate(worker.address, model) for worker, model in self._isolation.moves(self._workforce.having)]
