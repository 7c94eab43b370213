"""Pure: what is known of one worker, the lab's own or lent by another lab: what it has in memory, and what it could not load."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from msgspec import structs

from tether.errors import UnsupportedError
from tether.events import LentWorker
from tether.orchestrator.placement import Candidate
from tether.routing.table import Route, WorkerEntry
from tether.security.scopes import Scope
from tether.serving_settings import ServingSettings
from tether.types import ModelVersion, WorkerId, WorkerMemory

__all__ = ["RETRY_AFTER", "KnownWorker", "lent_worker"]

RETRY_AFTER = 5.0
"""Seconds before a worker that failed to load a version is asked again: a wrong file stays wrong, a full memory may empty."""
RETRY_AT_MOST = 60.0
"""Each further failure doubles the wait up to this, so that a file that stays wrong costs an idle cluster little; a request begins anew."""


PRESSED = 60.0
"""Seconds after an eviction in which a worker gets no further copies: what is free there is needed, and they would be the next to go."""


@dataclass(slots=True)
class _Failure:
    at: float
    tries: int
    """In a row, since it was last asked for by a request."""
    reason: str

    def over(self, now: float) -> bool:
        return now - self.at >= min(RETRY_AFTER * (1 << self.tries - 1), RETRY_AT_MOST)


@dataclass(slots=True)
class KnownWorker:
    """One process of a worker, or one registration of a lent one."""

    id: WorkerId
    address: str
    """Of a lent worker: its id."""
    pid: int
    """Of a lent worker: the number of its registration."""
    gpus: int
    since: float
    lent: LentWorker | None = None
    loaded: dict[ModelVersion, str] = field(default_factory=dict)
    """Version → endpoint."""
    loading: set[ModelVersion] = field(default_factory=set)
    serving: dict[ModelVersion, ServingSettings] = field(default_factory=dict)
    """How it was told to serve what it has, or loads."""
    failed: dict[ModelVersion, _Failure] = field(default_factory=dict)
    """Not to be asked again at once."""
    memory: WorkerMemory | None = None
    evicted_at: float = -math.inf
    """When it put a model out last."""
    rested: set[ModelVersion] = field(default_factory=set)
    """What it put out since nobody had asked for it: it gets that again when it is asked for, not as a further copy."""
    withdrawn: dict[ModelVersion, str] = field(default_factory=dict)
    """Endpoints of loads that it put out before their answer came."""

    def runs(self, model: ModelVersion) -> bool:
        """Whether it may be asked for the version at all: a lab lends its workers for the models that it says, and of this lab's own."""
        return self.lent is None or Scope("infer", self.lent.models).covers(model.name)

    def refusal(self, model: ModelVersion) -> str:
        """Why it has not loaded a version that was asked for; "": nothing is known against it."""
        if self.lent is not None and not self.runs(model):
            return f"{UnsupportedError.code}: {self.id} runs {self.lent.models} of this lab's own models, not {model.name}"
        return self.failed[model].reason if model in self.failed else ""

    def fail(self, model: ModelVersion, now: float, reason: str = "") -> None:
        """It could not load the version; without a reason, it was cut off."""
        self.withdrawn.pop(model, None)
        before = self.failed.get(model)
        self.loading.discard(model)
        self.failed[model] = _Failure(now, min(before.tries + 1, 10) if before else 1, reason)

    def evicts(self, model: ModelVersion, endpoint: str, now: float, *, may_rest: bool) -> None:
        """It frees what it loaded there: for room, or (`may_rest`) perhaps since nobody asked for it so long."""
        if may_rest:
            self.rested.add(model)
        else:
            self.evicted_at = now
        if self.loaded.get(model) == endpoint:
            del self.loaded[model]
        elif model in self.loading:
            self.withdrawn[model] = endpoint

    def has_loaded(self, model: ModelVersion, endpoint: str) -> None:
        """It answers there, if it has not put it out meanwhile."""
        self.loading.discard(model)
        self.failed.pop(model, None)
        if self.withdrawn.pop(model, None) != endpoint:
            self.loaded[model] = endpoint

    def nbytes(self, model: ModelVersion) -> int:
        """That it takes there; 0: it is not known."""
        return self.memory.models.get(str(model), 0) if self.memory is not None else 0

    def _is_roomy(self, nbytes: int, now: float) -> bool:
        free = self.memory.free if self.memory is not None else None
        return now - self.evicted_at >= PRESSED and (free is None or free >= nbytes)

    def candidate(self, model: ModelVersion, now: float, nbytes: int = 0) -> Candidate:
        """As placement sees it. `nbytes`: that the model takes elsewhere; 0: it is not known."""
        failure = self.failed.get(model)
        return Candidate(
            self.address,
            loaded=model in self.loaded,
            loading=model in self.loading,
            able=(failure is None or failure.over(now)) and model not in self.rested,
            models=len(self.loaded) + len(self.loading),
            lent=self.lent is not None,
            has_gpu=self.gpus > 0,
            roomy=self._is_roomy(nbytes, now),
        )

    def route(self, model: ModelVersion) -> Route:
        """To a version that it has loaded."""
        return Route(self.id, self.loaded[model], None if self.lent is None else self.lent.slots)

    def entry(self) -> WorkerEntry:
        """As gateways and people see it."""
        entry = WorkerEntry(self.id, self.address, self.pid, "running", self.since, self.gpus, tuple(sorted(map(str, self.loaded))))
        if self.lent is None:
            return structs.replace(entry, memory=self.memory)
        lab = self.lent.peer
        return structs.replace(entry, address=f"swarm://{lab}", transport="swarm", slots=self.lent.slots, peer=lab)


def lent_worker(lent: LentWorker, known: KnownWorker | None, now: float) -> KnownWorker:
    """What is known of it now; `known`: of its id, until now. Only the same registration has what was loaded, but for what is closed."""
    if known is None or known.pid != lent.number:
        known = KnownWorker(lent.id, lent.id, lent.number, lent.gpus, now)
    known.gpus, known.lent = lent.gpus, lent
    known.loaded = {model: endpoint for model, endpoint in known.loaded.items() if endpoint not in lent.closed}
    return known
