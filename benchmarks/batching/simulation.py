"""Requests that arrive by a trace at one model's thread, in simulated time: what waited, what ran together, what took how long."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tether.worker.batch_sizes import BatchSizes
from tether.worker.batching import Rows, Waiting

KEY = (("x", "<f4", ()),)
GIVEN_UP = 1.0
"""Seconds after which nobody waits for an answer any more."""


class Setting(Protocol):
    """How batches are made."""

    name: str

    def begin_at(self, now: float, oldest: float, waiting: int) -> float:
        """When the next batch is to begin: now, or later if no more come."""
        ...

    def most_rows(self) -> int: ...

    def ran(self, rows: int, seconds: float, *, is_full: bool) -> None: ...


@dataclass
class Fixed:
    """As other servers are tuned: at most so many rows, and a wait for more."""

    rows: int
    delay: float

    @property
    def name(self) -> str:
        return f"{self.rows} rows, {1e3 * self.delay:g} ms"

    def begin_at(self, now: float, oldest: float, waiting: int) -> float:
        return now if waiting >= self.rows else max(now, oldest + self.delay)

    def most_rows(self) -> int:
        return self.rows

    def ran(self, rows: int, seconds: float, *, is_full: bool) -> None:
        pass


class Learned:
    """As a worker of ours does it, by the worker's own objects."""

    name = "learned"

    def __init__(self, latency: float) -> None:
        self._sizes = BatchSizes(latency)

    def begin_at(self, now: float, oldest: float, waiting: int) -> float:  # noqa: ARG002 (others wait)
        return now

    def most_rows(self) -> int:
        return self._sizes.most_rows(KEY)

    def ran(self, rows: int, seconds: float, *, is_full: bool) -> None:
        self._sizes.ran(KEY, rows, seconds, is_full=is_full)


@dataclass
class Outcome:
    """Of one run: times of arrival and seconds until the answer (infinity: given up), and rows of each batch."""

    arrived: np.ndarray
    took: np.ndarray
    batches: Sequence[int]

    def good_windows(self, latency: float) -> float:
        """The share of windows of 1 s in whose arrivals at least 99 of 100 were answered within the latency."""
        windows = self.arrived.astype(int)
        late = np.bincount(windows, self.took > latency)
        count = np.bincount(windows)
        return float(np.mean((late / np.maximum(count, 1))[count > 0] <= 0.01))

    def rate(self) -> float:
        """Answers a second."""
        return float(np.isfinite(self.took).sum() / (self.arrived[-1] + 1e-9))


def simulate(arrivals: Sequence[float], cost: Callable[[int], float], setting: Setting, seed: str) -> Outcome:
    """`cost`: rows → seconds of a batch; each takes up to a tenth more, one in two hundred three times as long."""
    chance, waiting, coming = random.Random(f"batching {seed}"), Waiting[int](), deque(enumerate(arrivals))
    took, batches, now = np.full(len(arrivals), np.inf), [], 0.0
    while coming or waiting:
        if not waiting:
            now = max(now, coming[0][1])
        _arrive(coming, waiting, now)
        oldest = arrivals[next(iter(waiting))]
        begin = setting.begin_at(now, oldest, len(waiting))
        if begin > now and coming and coming[0][1] < begin:
            now = coming[0][1]
            continue
        now = max(now, begin)
        taken = waiting.take(setting.most_rows())
        jobs = [number for number in taken if now - arrivals[number] < GIVEN_UP]
        if jobs:
            seconds = cost(len(jobs)) * (1 + chance.random() / 10) * (3 if chance.random() < 1 / 200 else 1)
            now += seconds
            setting.ran(len(jobs), seconds, is_full=waiting.has(KEY))
            batches.append(len(jobs))
            took[jobs] = [now - arrivals[number] for number in jobs]
    return Outcome(np.asarray(arrivals), took, batches)


def _arrive(coming: deque[tuple[int, float]], waiting: Waiting[int], now: float) -> None:
    while coming and coming[0][1] <= now:
        number, _ = coming.popleft()
        waiting.add(Rows(1, KEY), number)


def trace(kind: str, capacity: float, seconds: float, seed: str) -> list[float]:
    """Times of arrivals. `capacity`: what the model can do at best, answers a second.

    `steady`: 70 % of it; `step`: 10 %, from the middle on 80 %; `bursts`: 20 %, and each 2 s a tenth of a second's capacity at once;
    `overload`: twice what it can do.
    """
    chance, times, now = random.Random(f"trace {kind} {seed}"), [], 0.0
    while now < seconds:
        load = {"steady": 0.7, "step": 0.1 if now < seconds / 2 else 0.8, "bursts": 0.2, "overload": 2.0}[kind]
        now += chance.expovariate(load * capacity)
        times.append(now)
    if kind == "bursts":
        for burst in range(1, int(seconds / 2)):
            times += [2.0 * burst] * max(int(capacity / 10 * 0.6), 2)
    return sorted(times)
