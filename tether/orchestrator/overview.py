"""Pure: what is told of the control plane's state to people who ask why, and to who makes workers come and go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from tether.orchestrator.catalog import KnownCatalog
from tether.orchestrator.demand import Demand
from tether.orchestrator.explaining import Line, explain, seat, why_so_many
from tether.orchestrator.need import Need
from tether.orchestrator.scaling import Staff
from tether.orchestrator.workforce import Workforce
from tether.routing.table import Table, VersionEntry
from tether.types import ModelVersion, WorkerId

__all__ = ["Overview"]


class Overview:
    """Reads what the others know; keeps nothing."""

    def __init__(self, catalog: KnownCatalog, workforce: Workforce, demand: Demand, need: Need, usual: int) -> None:
        """`usual`: copies of what nothing was said of."""
        self._catalog, self._workforce, self._demand, self._need, self._usual = catalog, workforce, demand, need, usual

    def staff(self) -> list[Staff]:
        """The lab's own workers that answer."""
        return [
            Staff(
                worker.id,
                worker.address,
                is_leaving=worker.state != "running",
                is_drained=worker.state == "drained",
                only=sum(len(self._workforce.having(model)) == 1 for model in worker.loaded),
                models=len(worker.loaded),
            )
            for worker in self._workforce
            if worker.lent is None and worker.state != "silent"
        ]

    def dispensable(self, workers: Iterable[str]) -> set[str]:
        """Of these, in this order, as many as may go together: what they have stays with others, and they owe no answer."""
        going: set[str] = set()
        for name in workers:
            worker = self._workforce.by_id(WorkerId(name))
            if worker is None or worker.state == "silent" or worker.leaving:
                continue
            if all(self._stays(model, going | {name}) for model in worker.loaded):
                going.add(name)
        return going

    def _stays(self, model: ModelVersion, without: set[str]) -> bool:
        return any(worker.state == "running" and worker.id not in without for worker in self._workforce.having(model))

    def explain(self, table: Table, name: str, now: float) -> list[dict[str, Any]]:
        """Why each version of a model is where it is, and why not elsewhere, as `tether explain` shows it."""
        entry = table.models.get(name)
        return [] if entry is None else [self._explained(version, now) for _, version in sorted(entry.versions.items())]

    def _explained(self, version: VersionEntry, now: float) -> dict[str, Any]:
        model, serving = version.model, self._catalog.serving(version.model.name)
        need, nbytes = self._need[model], self._workforce.nbytes(model)
        copies = serving.copies(need, self._usual) if version.routes or model in self._demand.wanted else 0
        seats = [seat(worker, model, serving, now, nbytes) for worker in self._workforce]
        lines = [*explain(seats, copies, gives_back=serving.rules_copies), *(Line(lost, "", "it is lost") for lost in self._workforce.lost)]
        why = version.reason or why_so_many(serving, need, copies, self._usual)
        return {"version": model.version, "state": version.state, "copies": copies, "why": why, "workers": [asdict(line) for line in lines]}
