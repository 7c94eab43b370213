"""Pure: how many workers a lab is to have, from what comes in, what waits and what workers spend on it; and which of them may go."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from msgspec import Meta

from tether.events import GatewayLoad
from tether.types import WorkerId

__all__ = ["Batch", "Gauge", "Goal", "Pressure", "Scaler", "Staff", "leaving"]

FULL: Final = 0.7
"""Of a worker's time, inside runtimes: beyond it what comes at random waits longer than it runs."""
_CATCH_UP: Final = 10.0
"""Seconds in which what waits is to be worked off; a worker takes about as long to start."""
_RATE: Final = 5.0
"""Seconds over which arrivals are averaged."""
_LEARN: Final = 30.0
"""Seconds over which it is learned what a request costs: answers are told each second, and time in runtimes with each heartbeat."""
_RETURN: Final = 6.0
"""Seconds in which workers come back that went on without an orchestrator."""
_BATCH: Final = 5.0
"""Seconds: `distributed.adaptive.target-duration`."""
_SILENT: Final = 3.0
"""Seconds after which a gateway that tells nothing has no open requests, or is gone: it tells each second while it has any."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What who scales a lab wants of it. All in seconds."""

    latency: Annotated[float, Meta(ge=0)] = 1.0
    """Beyond its cost, that an answer may take before another worker comes, whatever the rest says."""
    keep: Annotated[float, Meta(ge=0)] = 60.0
    """Over which the most counts: so long a worker stays that is needed no more."""
    idle: Annotated[float, Meta(ge=0)] = 300.0
    """Without a request, after which the last worker goes: the next request then pays its start."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """What was asked of the workers since the look before."""

    seconds: float
    """Since then."""
    arrived: int = 0
    """Requests."""
    answered: int = 0
    waiting: int = 0
    """Requests without an answer now."""
    spent: float = 0.0
    """Seconds of all workers inside runtimes."""
    latency: float = 0.0
    """Seconds of an answer, on average."""


class Gauge:
    """Sums up what gateways and heartbeats tell."""

    def __init__(self) -> None:
        self._looked_at: float | None = None
        self._spent: Mapping[str, float] = {}
        self._open: dict[str, tuple[float, int]] = {}
        """By gateway, when it told so."""
        self._arrived = self._answered = 0
        self._seconds = 0.0

    def take(self, load: GatewayLoad, now: float) -> None:
        """What one gateway saw."""
        seen = load.versions.values()
        open_now, (_, before) = sum(each.open for each in seen), self._open.get(load.gateway, (now, 0))
        answered = sum(each.answered for each in seen)
        self._arrived += max(answered + sum(each.failed + each.refused for each in seen) + open_now - before, 0)
        self._answered += answered
        self._seconds += sum(each.seconds for each in seen)
        self._open[load.gateway] = now, open_now

    def look(self, spent: Mapping[str, float], now: float) -> Pressure:
        """All since the last look; of the time before the first one nothing but who waits.

        `spent`: by process of a worker, seconds inside runtimes since its start.
        """
        self._open = {gateway: told for gateway, told in self._open.items() if now - told[0] < _SILENT}
        seconds = now - self._looked_at if self._looked_at is not None else 0.0
        worked = sum(self._worked(worker, total, seconds) for worker, total in spent.items())
        latency = self._seconds / self._answered if self._answered else 0.0
        waiting = sum(count for _, count in self._open.values())
        pressure = Pressure(0.0, waiting=waiting)
        if seconds > 0:
            pressure = Pressure(seconds, self._arrived, self._answered, waiting, worked, latency)
        self._looked_at, self._spent = now, dict(spent)
        self._arrived, self._answered, self._seconds = 0, 0, 0.0
        return pressure

    def _worked(self, worker: str, total: float, seconds: float) -> float:
        """Since the last look. One that was not there then, and can't have worked so long since, was cut off: what it did meanwhile is not
        known.
        """
        before = self._spent.get(worker)
        if before is None:
            return total if total <= seconds else 0.0
        return max(total - before, 0.0)


class Scaler:
    """Of one lab. Work that arrives and work that waits, in seconds of a worker; one worker does `FULL` of a second in each."""

    def __init__(self) -> None:
        self.goal = Goal()
        """May be set at any time."""
        self._spent = self._answered = 0.0
        """Seconds of workers and requests, the older the less."""
        self._came: deque[tuple[float, int, float]] = deque()
        """When it was looked at, requests since the look before, seconds since."""
        self._wanted: deque[tuple[float, int]] = deque()
        self._asked_at = self._begun = -math.inf
        """When there were requests last, and when it was looked first."""

    def look(self, seen: Pressure, workers: int, now: float, expected: float = 0.0) -> int:
        """Workers that are wanted. `workers`: that there are; `expected`: requests a second, as foretold for when one more would be up."""
        if self._begun == -math.inf:
            self._begun = self._asked_at = now
        if now - self._begun < _RETURN:  # nothing is known: those that there are, and those that come back, stay for a while
            self._wanted.appendleft((self._begun, workers))
        self._learn(seen, now)
        wanted = self._for_work(seen, max(self.rate, expected))
        if seen.waiting and seen.latency > self.goal.latency + (self.cost or 0.0):
            wanted = max(wanted, workers + 1)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - self.goal.keep:
            self._wanted.popleft()
        most = max(count for _, count in self._wanted)
        return max(most, 1) if now - self._asked_at < self.goal.idle else most

    @property
    def cost(self) -> float | None:
        """Seconds of a worker that a request takes, as learned; None: not yet."""
        return self._spent / self._answered if self._spent > 0 and self._answered > 0 else None

    @property
    def rate(self) -> float:
        """Requests a second, of the last seconds."""
        seconds = sum(each for _, _, each in self._came)
        return sum(arrived for _, arrived, _ in self._came) / seconds if seconds > 0 else 0.0

    def _learn(self, seen: Pressure, now: float) -> None:
        if seen.arrived or seen.waiting:
            self._asked_at = now
        kept = math.exp(-seen.seconds / _LEARN)
        self._spent, self._answered = self._spent * kept + seen.spent, self._answered * kept + seen.answered
        self._came.append((now, seen.arrived, seen.seconds))
        while self._came[0][0] <= now - _RATE:
            self._came.popleft()

    def _for_work(self, seen: Pressure, rate: float) -> int:
        cost = self.cost
        if cost is None:
            return int(seen.waiting > 0 or seen.arrived > 0)
        backlog = max(seen.waiting - rate * cost, 0.0)
        return math.ceil((rate + backlog / _CATCH_UP) * cost / FULL - 1e-9)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tasks of Dask's, as `lab.map` makes them."""

    busy: Collection[str] = ()
    """Workers that run some."""
    running: int = 0
    waiting: int = 0
    """That have no worker."""
    seconds: float = 0.0
    """That all of them are expected to take."""

    @property
    def workers(self) -> int:
        """That they need, by the rule of Dask's own `Adaptive`: done within five seconds, and no more than there are tasks."""
        wanted = min(math.ceil(self.seconds / _BATCH), self.running + self.waiting)
        return max(wanted, len(self.busy), int(self.waiting > 0))


@dataclass(frozen=True, slots=True)
class Staff:
    """One worker of the lab, seen by who looks for some that may go."""

    worker: WorkerId
    address: str
    is_leaving: bool
    """Whether it is being drained, or is drained: it is chosen again, so that no other is begun with."""
    is_drained: bool
    """Whether it has nothing any more."""
    only: int
    """Versions that it alone has: they have to be loaded elsewhere before it goes."""
    models: int


def leaving(staff: Sequence[Staff], target: int, busy: Collection[str] = ()) -> list[WorkerId]:
    """Those that are to go so that `target` stay, the cheapest to lose first. They are drained before: none goes while it is in use.

    `busy`: those that run tasks of Dask's, which no drain waits for: they stay.
    """
    free = [each for each in staff if each.worker not in busy]
    by_loss = sorted(free, key=lambda each: (not each.is_leaving, each.only, each.models, each.worker))
    return [each.worker for each in by_loss[: max(len(staff) - target, 0)]]
