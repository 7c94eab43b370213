"""Requests that arrive by a trace at a worker with many more models than fit, in simulated time: who waits for what."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tether.types import Digest, ModelVersion
from tether.worker.residency import RAM, Residency, Size
from tether.worker.residency import _Resident as Resident

RUN = 0.005
"""Seconds of a request."""
LEAVE = 0.01
"""Seconds until the room of a model that has to go is free."""


@dataclass(frozen=True)
class Model:
    """What a request is for."""

    version: ModelVersion
    nbytes: int
    seconds: float
    """To load it."""


def library(count: int, seed: str) -> list[Model]:
    """Sizes from 20 MB to some GB; one in four is of a kind that takes long to load whatever its size."""
    chosen = random.Random(seed)
    models = []
    for number in range(count):
        nbytes = int(min(20e6 * math.exp(chosen.gauss(1.5, 1.2)), 5e9))
        slow = 2.0 if chosen.random() < 0.25 else 0.05
        models.append(Model(ModelVersion(f"m{number}", 1, Digest(f"{number:064x}")), nbytes, slow + nbytes / 1.5e9))
    return models


def trace(kind: str, models: Sequence[Model], requests: int, rate: float, seed: str) -> list[tuple[float, Model]]:
    """When → which. *zipf*: some are asked for much more than others. *scan*: besides, one in five goes through all in turn, on and on.

    *shift*: in the middle others become the ones that are asked for much. *burst*: beside zipf's, thousands of requests for one model.
    """
    chosen, now, turn = random.Random(f"{kind} {seed}"), 0.0, itertools.cycle(models)
    weights = [1 / (rank + 1) ** 0.9 for rank in range(len(models))]
    order = list(models)
    chosen.shuffle(order)
    arrivals = []
    for number in range(requests):
        now += chosen.expovariate(rate)
        if kind == "shift" and number == requests // 2:
            chosen.shuffle(order)
        model = next(turn) if kind == "scan" and chosen.random() < 0.2 else chosen.choices(order, weights)[0]
        arrivals.append((now, model))
        if kind == "burst" and number % (requests // 20) == 0:
            noisy = chosen.choice(order[len(order) // 2 :])
            arrivals += [(now, noisy)] * 500
    return arrivals


class Lru(Residency):
    """What was used longest ago goes first."""

    def _value(self, resident: Resident) -> None:
        resident.worth = 0.0


class GreedyDualSize(Residency):
    """As ours, without counting uses."""

    def _value(self, resident: Resident) -> None:
        resident.worth = self._age + resident.seconds / resident.size[RAM]


class Frequency(Residency):
    """As published: each request counts as much as the first, and who went is forgotten."""

    def loaded(self, model: ModelVersion, size: Size, seconds: float, now: float) -> None:
        self._residents[model].uses = 0
        super().loaded(model, size, seconds, now)

    def used(self, model: ModelVersion, uses: int, now: float, *, is_busy: bool) -> None:
        before = self._residents[model].uses
        super().used(model, uses, now, is_busy=is_busy)
        self._residents[model].uses = before + uses
        self._value(self._residents[model])

    def _value(self, resident: Resident) -> None:
        resident.worth = self._age + max(resident.uses, 1) * resident.seconds / resident.size[RAM]


POLICIES = {"LRU": Lru, "GreedyDual-Size": GreedyDualSize, "GDSF": Frequency, "ours": Residency}


@dataclass
class Outcome:
    """Of one run."""

    hits: int = 0
    loads: int = 0
    loaded_nbytes: int = 0
    loading: float = 0.0
    """Seconds of all loads."""
    waits: list[float] = field(default_factory=list)
    refused: int = 0


class Simulation:
    """One worker: its residency and what happens to it."""

    def __init__(self, residency: Residency) -> None:
        self.residency, self.outcome = residency, Outcome()
        self._events: list[tuple[float, int, str, Model | None]] = []
        self._numbers = itertools.count()
        self._waiting: dict[ModelVersion, list[float]] = defaultdict(list)
        self._open: Counter[ModelVersion] = Counter()
        self._models: dict[ModelVersion, Model] = {}

    def run(self, arrivals: Sequence[tuple[float, Model]]) -> Outcome:
        for at, model in arrivals:
            self._models[model.version] = model
            self._later(at, "asked", model)
        while self._events:
            now, _, what, model = heapq.heappop(self._events)
            getattr(self, f"_{what}")(model, now)
            if what != "asked" or self.residency.first_in_line is not None:
                self._decide(now)
        return self.outcome

    def _later(self, at: float, what: str, model: Model | None) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), what, model))

    def _asked(self, model: Model, now: float) -> None:
        phase = self.residency.phase(model.version)
        if phase is not None and phase.name in {"IDLE", "BUSY"}:
            self.outcome.hits += 1
            self.outcome.waits.append(0.0)
            self._use(model, 1, now)
            return
        if not self._waiting[model.version] and phase is None:
            self._want(model, now)
        self._waiting[model.version].append(now)

    def _want(self, model: Model, now: float) -> None:
        self.residency.want(model.version, {RAM: model.nbytes}, now)
        self._later(now + 0.5, "looked", None)
        self._decide(now)

    def _use(self, model: Model, uses: int, now: float) -> None:
        self._open[model.version] += 1
        self.residency.used(model.version, uses, now, is_busy=True)
        self._later(now + RUN, "answered", model)

    def _answered(self, model: Model, now: float) -> None:
        self._open[model.version] -= 1
        self.residency.used(model.version, 0, now, is_busy=self._open[model.version] > 0)

    def _loaded(self, model: Model, now: float) -> None:
        self.residency.loaded(model.version, {RAM: model.nbytes}, model.seconds, now)
        waited = self._waiting.pop(model.version, [])
        self.outcome.waits += [now - since for since in waited]
        self._use(model, len(waited), now)

    def _gone(self, model: Model, now: float) -> None:
        self.residency.gone(model.version)
        if self._waiting[model.version]:  # asked for again while it left
            self._want(model, now)

    def _looked(self, _: None, now: float) -> None:
        if self.residency.first_in_line is not None:
            self._later(now + 0.5, "looked", None)

    def _decide(self, now: float) -> None:
        decision = self.residency.decide(now)
        self.outcome.refused += len(decision.refused)
        for version in decision.evicted:
            self._later(now + LEAVE, "gone", self._models[version])
        for version in decision.admitted:
            model = self._models[version]
            self.outcome.loads += 1
            self.outcome.loaded_nbytes += model.nbytes
            self.outcome.loading += model.seconds
            self._later(now + model.seconds, "loaded", model)


def bound(arrivals: Sequence[tuple[float, Model]], budget: int) -> tuple[float, float]:
    """More than which nobody can do who knows the future: share of hits, and seconds of loads at least.

    Each time between two requests for a model takes its bytes for so long, of the budget for as long as the trace takes; what gives most
    for that is taken first, and fractions of it (PFOO-L: Berger, Beckmann, Harchol-Balter 2018).
    """
    last: dict[ModelVersion, float] = {}
    kept: list[tuple[float, float]] = []
    at_all = 0.0
    for at, model in arrivals:
        at_all += model.seconds
        if model.version in last:
            kept.append((model.nbytes * (at - last[model.version]), model.seconds))
        last[model.version] = at
    room = budget * (arrivals[-1][0] - arrivals[0][0])
    hits = _taken(sorted((use, 1.0) for use, _ in kept), room)
    saved = _taken(sorted(kept, key=lambda each: each[0] / each[1]), room)
    return hits / len(arrivals), at_all - saved


def _taken(kept: Sequence[tuple[float, float]], room: float) -> float:
    gained = 0.0
    for use, gain in kept:
        if use > room:
            return gained + gain * room / use
        room, gained = room - use, gained + gain
    return gained
