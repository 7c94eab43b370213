"""Pure: what is known of one worker, the lab's own or lent by another lab: what it has in memory, and what it could not load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from msgspec import structs

from tether.errors import UnsupportedError
from tether.events import Holding, LentWorker
from tether.orchestrator.placement import Candidate
from tether.routing.table import Route, WorkerEntry
from tether.security.scopes import Scope
from tether.serving_settings import ServingSettings
from tether.types import ModelVersion, WorkerId, WorkerMemory, WorkerSite

__all__ = ["RETRY_AFTER", "KnownWorker", "Standing", "lent_worker"]

Standing = Literal["running", "silent", "draining", "drained"]

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

    @property
    def until(self) -> float:
        return self.at + min(RETRY_AFTER * (1 << self.tries - 1), RETRY_AT_MOST)


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
    site: WorkerSite = field(default_factory=WorkerSite)
    state: Standing = "running"
    """Routes lead only to one that is running; any other counts for placement as if it were not there."""
    loaded: dict[ModelVersion, str] = field(default_factory=dict)
    """Version → endpoint."""
    took: dict[ModelVersion, float] = field(default_factory=dict)
    """Seconds of each version's last load, where it told them; kept as long as the worker."""
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
    leaving: set[ModelVersion] = field(default_factory=set)
    """What it was told to free, since it is drained, and has not freed yet."""
    order: int = 0
    """When it came, among the others: routes are in this order."""
    _blank: tuple[Candidate, Candidate, float, float] | None = field(default=None, compare=False)
    """As placement sees it from a version that it does not know, without and with room for it; until when it is pressed; its room."""

    @property
    def known(self) -> Iterator[ModelVersion]:
        """The versions that it has something to do with, some more than once."""
        return chain(self.loaded, self.loading, self.failed, self.rested)

    def knows(self, model: ModelVersion) -> bool:
        """Whether it has something to do with the version: has it, loads it, failed to, or put it out."""
        return model in self.loaded or model in self.loading or model in self.failed or model in self.rested

    @property
    def pressed_until(self) -> float:
        """From when it gets further copies again, as far as the room is concerned."""
        return self.evicted_at + PRESSED

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

    def hold(self, holdings: Iterable[Holding]) -> None:
        """It has these in memory, from before it came."""
        self.loaded |= {each.model: each.endpoint for each in holdings}
        self.serving |= {each.model: each.serving for each in holdings}

    def has_loaded(self, model: ModelVersion, endpoint: str, seconds: float) -> None:
        """It answers there, if it has not put it out meanwhile."""
        self.loading.discard(model)
        self.failed.pop(model, None)
        if self.withdrawn.pop(model, None) != endpoint:
            self.loaded[model] = endpoint
            self.took[model] = seconds

    def forget(self, model: ModelVersion) -> None:
        """The version is published no more: what it did with it is of no interest, but for what it has or loads."""
        self.failed.pop(model, None)
        self.rested.discard(model)

    @property
    def room(self) -> float:
        """Bytes that are left for models; infinite where that is not bounded, or not known."""
        free = self.memory.free if self.memory is not None else None
        return math.inf if free is None else free

    def is_roomy(self, nbytes: int, now: float) -> bool:
        """Whether it has room for a model of that size, and put none out lately. 0: the size is not known."""
        return now >= self.pressed_until and self.room >= nbytes

    def may_be_asked(self, model: ModelVersion, now: float) -> bool:
        """Whether nothing that it did speaks against asking it for the version now."""
        failure = self.failed.get(model)
        return (failure is None or now >= failure.until) and model not in self.rested

    def candidate(self, model: ModelVersion, now: float, nbytes: int = 0) -> Candidate:
        """As placement sees it. `nbytes`: that the model takes elsewhere; 0: it is not known."""
        return self._seen(
            loaded=model in self.loaded,
            loading=model in self.loading,
            able=self.may_be_asked(model, now),
            roomy=self.is_roomy(nbytes, now),
        )

    def blank(self, now: float, nbytes: int = 0) -> Candidate:
        """As `candidate`, of a version that it does not know: made once, since of a thousand workers nearly all do not know it."""
        made = self._blank
        if made is None:
            cramped, roomy = (self._seen(loaded=False, loading=False, able=True, roomy=each) for each in (False, True))
            made = self._blank = cramped, roomy, self.pressed_until, self.room
        cramped, roomy, pressed_until, room = made
        return roomy if now >= pressed_until and room >= nbytes else cramped

    def _seen(self, *, loaded: bool, loading: bool, able: bool, roomy: bool) -> Candidate:
        return Candidate(
            self.address,
            loaded=loaded,
            loading=loading,
            able=able,
            models=len(self.loaded) + len(self.loading),
            lent=self.lent is not None,
            has_gpu=self.gpus > 0,
            roomy=roomy,
            host=self.address.rpartition(":")[0],
        )

    def changed(self) -> None:
        """What it has, loads, takes or is made of is another thing now: it is seen anew."""
        self._blank = None

    def route(self, model: ModelVersion) -> Route:
        """To a version that it has loaded."""
        slots = None if self.lent is None else self.lent.slots
        return Route(self.id, self.loaded[model], slots, self.took.get(model, 0.0))

    def entry(self) -> WorkerEntry:
        """As gateways and people see it."""
        entry = WorkerEntry(self.id, self.address, self.pid, self.state, self.since, self.gpus, tuple(sorted(map(str, self.loaded))))
        if self.lent is None:
            return structs.replace(entry, memory=self.memory, site=self.site)
        lab = self.lent.peer
        return structs.replace(entry, address=f"swarm://{lab}", transport="swarm", slots=self.lent.slots, peer=lab)


def lent_worker(lent: LentWorker, known: KnownWorker | None, now: float) -> KnownWorker:
    """What is known of it now; `known`: of its id, until now. Only the same registration has what was loaded, but for what is closed."""
    if known is None or known.pid != lent.number:
        known = KnownWorker(lent.id, lent.id, lent.number, lent.gpus, now)
    known.gpus, known.lent = lent.gpus, lent
    known.loaded = {model: endpoint for model, endpoint in known.loaded.items() if endpoint not in lent.closed}
    return known
