"""Pure: which versions a worker is told to load, to free, and how to serve them. `placement.py` chooses; this knows whom to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tether.orchestrator.catalog import KnownCatalog
from tether.orchestrator.demand import Demand
from tether.orchestrator.instructions import Configure, Instruction, Load, Unload
from tether.orchestrator.need import Need
from tether.orchestrator.placement import Candidate, mismatch, place, surplus
from tether.orchestrator.registry import KnownWorker
from tether.orchestrator.workforce import Workforce
from tether.serving_settings import DEFAULTS
from tether.types import ModelVersion

__all__ = ["Placing"]


class Placing:
    """Looks only at the versions that it is given: those that were touched. `copies`: of a version of which nothing else was said."""

    def __init__(self, workforce: Workforce, catalog: KnownCatalog, demand: Demand, need: Need, copies: int) -> None:
        self._workforce, self._catalog, self._demand, self._need, self._copies = workforce, catalog, demand, need, copies
        self.on_trial: set[ModelVersion] = set()
        """Versions that are being rolled out."""

    def collect(self, touched: Sequence[ModelVersion], now: float) -> list[Instruction]:
        """What is in memory and no longer published, or not where it is to run, or on more workers than are to have it."""
        if self._catalog.manager is None:
            return []
        gone: list[Instruction] = []
        for model in touched:
            is_published, too_many = model in self._catalog.published, self._too_many(model, now)
            for worker in self._workforce.having(model):
                if not is_published or not self._suits(worker, model) or worker.address in too_many:
                    gone.append(self.free(worker, model))  # noqa: PERF401 (one line a condition)
        return gone

    def free(self, worker: KnownWorker, model: ModelVersion) -> Unload:
        """No route leads there any more."""
        del worker.loaded[model]
        self._workforce.note(worker, model)
        return Unload(worker.address, worker.pid, model, self._line(worker))

    def _too_many(self, model: ModelVersion, now: float) -> list[str]:
        """Addresses of those that are to give the version back, where somebody said how many have it."""
        if not self._catalog.serving(model.name).rules_copies:
            return []
        nbytes, having = self._workforce.nbytes(model), self._workforce.having(model)
        return surplus([worker.candidate(model, now, nbytes) for worker in having if self.may_run(worker, model)], self.copies_of(model))

    def place(self, touched: Sequence[ModelVersion], now: float) -> list[Instruction]:
        """What is wanted and not where it is to be."""
        loads: list[Instruction] = []
        for model in touched:
            if model not in self._demand.wanted or self.is_held(model):
                self._demand.lacking.discard(model)
                continue
            self._demand.lacking.add(model)
            chosen = place(self._candidates(model, now), self.copies_of(model))
            loads += [self._load(self._workforce[address], model) for address in chosen]
        return loads

    def _load(self, worker: KnownWorker, model: ModelVersion) -> Load:
        worker.loading.add(model)
        worker.serving[model] = self._catalog.serving(model.name)
        self._workforce.note(worker, model)
        return Load(worker.address, worker.pid, model, self._line(worker), worker.serving[model])

    def configure(self, touched: Sequence[ModelVersion]) -> list[Instruction]:
        """What workers have in memory and serve as was said before. One that is loading is told when it has loaded.

        Of what is not in the catalog nothing was said: a new orchestrator has none before a manager is there.
        """
        told: list[Instruction] = []
        for model in touched:
            if model not in self._catalog.published:
                continue
            wanted = self._catalog.serving(model.name)
            for worker in self._workforce.having(model):
                if worker.lent is None and worker.serving.get(model, DEFAULTS) != wanted:
                    worker.serving[model] = wanted
                    told.append(Configure(worker.address, worker.pid, model, wanted))
        return told

    def is_held(self, model: ModelVersion) -> bool:
        """Whether the lab's own workers have all copies: nothing is to be placed then, which is mostly so."""
        own = (worker for worker in self._workforce.having(model) if worker.lent is None and worker.state == "running")
        return len(list(own)) >= self.copies_of(model)

    def copies_of(self, model: ModelVersion) -> int:
        """Workers that are to have the version; none, perhaps, of one that nobody asks for any more."""
        copies = self._catalog.serving(model.name).copies(self._need[model], self._copies)
        return max(copies, 1) if model in self.on_trial else copies

    def _line(self, worker: KnownWorker) -> str | None:
        return self._catalog.manager if worker.lent is not None else None

    def _candidates(self, model: ModelVersion, now: float) -> list[Candidate]:
        nbytes, knowing = self._workforce.nbytes(model), self._workforce.knowing(model)
        is_choosy = self._catalog.serving(model.name).is_choosy
        return [
            worker.candidate(model, now, nbytes) if worker.address in knowing else worker.blank(now, nbytes)
            for worker in self._workforce
            if worker.state == "running" and ((worker.lent is None and not is_choosy) or self._suits(worker, model))
        ]

    def may_run(self, worker: KnownWorker, model: ModelVersion) -> bool:
        """Whether it takes requests, and is one of those that may have the version."""
        return worker.state == "running" and self._suits(worker, model)

    def _suits(self, worker: KnownWorker, model: ModelVersion) -> bool:
        if not worker.runs(model):
            return False
        serving = self._catalog.serving(model.name)
        return not serving.is_choosy or not mismatch(serving, worker.gpus, worker.site)

    def may_take(self, worker: KnownWorker, model: ModelVersion, now: float) -> bool:
        """Whether a version that lacks copies could be placed there: what placement chooses is always among these."""
        if model in worker.loaded or model in worker.loading or not self.may_run(worker, model):
            return False
        having = (each for each in self._workforce.concerned(model) if model in each.loaded or model in each.loading)
        is_first = not any(self.may_run(each, model) for each in having)  # what a worker has that is drained, or silent, does not count
        return worker.may_be_asked(model, now) and (is_first or worker.is_roomy(self._workforce.nbytes(model), now))

    def lacks(self, model: ModelVersion) -> bool:
        """Whether it would be placed if every worker could be asked."""
        return bool(place([replace(each, able=True) for each in self._candidates(model, 0.0)], self.copies_of(model)))
