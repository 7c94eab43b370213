"""Pure: the routing table, made anew where something changed and nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tether.errors import NoDeviceError
from tether.events import CatalogModel
from tether.orchestrator.catalog import KnownCatalog
from tether.orchestrator.demand import Demand
from tether.orchestrator.isolation import Isolation
from tether.orchestrator.placement import nowhere
from tether.orchestrator.rollout import Rollouts
from tether.orchestrator.workforce import Workforce
from tether.routing.table import ModelEntry, Table, TableChange, VersionEntry
from tether.types import ModelInfo, ModelVersion, WorkerId

__all__ = ["TableMaker"]


class TableMaker:
    """Reads what the others decided; keeps nothing but the table that it made last."""

    def __init__(
        self, catalog: KnownCatalog, workforce: Workforce, demand: Demand, isolation: Isolation, rollouts: Rollouts, epoch: int = 0
    ) -> None:
        self._catalog, self._workforce, self._demand, self._isolation, self._rollouts = catalog, workforce, demand, isolation, rollouts
        self.table = Table(epoch=epoch)

    def update(self, models: Collection[ModelVersion], names: Iterable[str], workers: Iterable[WorkerId]) -> TableChange | None:
        """Take in what may be another thing now: versions, names of models, workers. None: nothing of it is."""
        before = self.table
        made = {name: self._entry(name, models) for name in {model.name for model in models}.union(names)}
        seen = {worker: self._workforce.entry(worker) for worker in workers}
        change = TableChange(
            before.seq + 1,
            self._catalog.count,
            self._catalog.manager,
            {name: entry for name, entry in made.items() if entry != before.models.get(name)},
            {worker: entry for worker, entry in seen.items() if entry != before.workers.get(worker)},
        )
        if not change.models and not change.workers and (change.catalog, change.manager) == (before.catalog, before.manager):
            return None
        self.table = before.amended(change)
        return change

    def _entry(self, name: str, models: Collection[ModelVersion]) -> ModelEntry | None:
        known, before = self._catalog.models.get(name), self.table.models.get(name)
        if known is None:
            return None
        kept = {number: each for number, each in before.versions.items() if each.model not in models} if before is not None else {}
        versions = {number: kept.get(number) or self._version(known, number) for number in known.versions}
        return ModelEntry(known.name, known.default, versions, known.aliases, known.serving)

    def _version(self, known: CatalogModel, number: int) -> VersionEntry:
        model, info = known.versions[number]
        return self._rollouts.entry(self._isolation.entry(self._placed(model, info)))

    def _placed(self, model: ModelVersion, info: ModelInfo) -> VersionEntry:
        routes = tuple(worker.route(model) for worker in self._workforce.reached(model))
        if routes:
            return VersionEntry(model, info, "ready", routes)
        if any(model in worker.loading for worker in self._workforce.concerned(model)):
            return VersionEntry(model, info, "loading", (), self._demand.short.get(model, ""))
        if reason := self._reason(model):
            return VersionEntry(model, info, "failed", (), reason)
        return VersionEntry(model, info, "unloaded", (), self._demand.short.get(model, ""))

    def _reason(self, model: ModelVersion) -> str:
        """Why requests are refused. What lent workers say counts where the lab has no worker of its own, nor one that may come back."""
        serving, workforce, demand = self._catalog.serving(model.name), self._workforce, self._demand
        if serving.is_choosy and (lacking := nowhere(str(model), serving, workforce.kinds)):  # else one can, or may come back
            return f"{NoDeviceError.code}: {lacking}"
        if model in demand.reasons or model not in demand.wanted or workforce.lost or workforce.has_own:
            return demand.reasons.get(model, "")
        asked = [worker for worker in workforce if worker.runs(model)] or workforce
        return next(filter(None, (worker.refusal(model) for worker in asked)), "")
