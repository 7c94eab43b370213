"""Pure: workers that are to take no more requests. What they have is placed elsewhere first, then it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tether.events import DrainAsked
from tether.orchestrator.demand import Demand
from tether.orchestrator.instructions import Unload
from tether.orchestrator.registry import KnownWorker
from tether.orchestrator.workforce import Workforce
from tether.types import ModelVersion

__all__ = ["Draining"]


class _Drain(NamedTuple):
    pid: int
    until: float
    """Unix time from when it waits for no other worker any more."""


class Draining:
    """A drain is of one process: the next one of its worker takes requests. `may_run`: whether a worker could be asked for a version."""

    def __init__(self, workforce: Workforce, demand: Demand, may_run: Callable[[KnownWorker, ModelVersion], bool]) -> None:
        self._workforce, self._demand, self._may_run = workforce, demand, may_run
        self._drains: dict[str, _Drain] = {}
        """By address."""

    def take(self, event: DrainAsked, now: float) -> None:
        """Asked again, it waits no longer than before."""
        worker = self._workforce.by_id(event.worker)
        if worker is None or worker.lent is not None:
            return
        known = self._drains.pop(worker.address, None)
        if event.patience is not None:
            until = now + event.patience
            until = min(until, known.until) if known is not None and known.pid == worker.pid else until
            self._drains[worker.address] = _Drain(worker.pid, until)
        elif worker.state in {"draining", "drained"}:
            self._workforce.stand(worker.address, "running", now)

    def hold(self, now: float) -> None:
        """Before anything is placed: who is to be drained gets nothing, also if it was silent meanwhile."""
        for address, drain in list(self._drains.items()):
            worker = self._workforce.get(address)
            if worker is None or worker.pid != drain.pid:
                del self._drains[address]
            elif worker.state == "running":
                self._workforce.stand(address, "draining", now)

    def moves(self, now: float) -> list[Unload]:
        """What leaves: no route leads there any more. Who has nothing is drained."""
        gone: list[Unload] = []
        for worker in self._going():
            is_late = now >= self._drains[worker.address].until
            for model in [model for model in worker.loaded if is_late or self._is_spared(model)]:
                del worker.loaded[model]
                worker.leaving.add(model)
                self._workforce.note(worker, model)
                gone.append(Unload(worker.address, worker.pid, model))
            if not (worker.loaded or worker.loading or worker.leaving):
                self._workforce.stand(worker.address, "drained", now)
        return gone

    def _is_spared(self, model: ModelVersion) -> bool:
        """Whether another worker has it, or none is to have it, or can."""
        is_elsewhere = any(worker.state == "running" for worker in self._workforce.having(model))
        return is_elsewhere or model not in self._demand.wanted or not any(self._may_run(worker, model) for worker in self._workforce)

    @property
    def goes_on(self) -> bool:
        """Whether time alone may take one further."""
        return bool(self._going())

    def _going(self) -> list[KnownWorker]:
        found = (self._workforce.get(address) for address in self._drains)
        return [worker for worker in found if worker is not None and worker.state == "draining"]
