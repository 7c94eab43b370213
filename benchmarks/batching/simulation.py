"""Requests that arrive by a trace at one model's thread, in simulated time: what waited, what ran together, what took how long."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from tether.serving_settings import ServingSettings
from tether.worker.batching import Rows
from tether.worker.request_queue import RequestQueue

LATENCY = 0.1
"""Seconds within which answers are wanted."""
KEY = (("x", "<f4", ()),)
GIVEN_UP = 1.0
"""Seconds after which nobody waits for an answer any more."""


@dataclass(frozen=True)
class Request:
    """What the worker's queue asks of one."""

    number: int
    arrived: float
    priority: int = 0

    @property
    def deadline(self) -> float:
        return self.arrived + GIVEN_UP


def by_hand(rows: int, delay: float) -> ServingSettings:
    """As other servers are tuned: batches of so many rows, or of what is there after a wait for more."""
    return ServingSettings(max_batch_size=rows, preferred_batch_sizes=(rows,), max_delay=delay)


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


def simulate(arrivals: Sequence[float], cost: Callable[[int], float], settings: ServingSettings, seed: str) -> Outcome:
    """`cost`: rows → seconds of a batch; each takes up to a tenth more, one in two hundred three times as long."""
    chance, queue = random.Random(f"batching {seed}"), RequestQueue[Request](LATENCY, settings)
    coming = deque(Request(number, at) for number, at in enumerate(arrivals))
    took, batches, now = np.full(len(arrivals), np.inf), [], 0.0
    while coming or queue:
        pause = queue.pause(now)
        if pause != 0.0:
            now = max(now, min([each.arrived for each in islice(coming, 1)] + ([] if pause is None else [now + pause])))
        _arrive(coming, queue, now)
        taken = queue.take(now)
        jobs = [each for each in taken if now < each.deadline]
        if jobs:
            seconds = cost(len(jobs)) * (1 + chance.random() / 10) * (3 if chance.random() < 1 / 200 else 1)
            now += seconds
            queue.ran(KEY, len(jobs), seconds)
            batches.append(len(jobs))
            took[[each.number for each in jobs]] = [now - each.arrived for each in jobs]
    return Outcome(np.asarray(arrivals), took, batches)


def _arrive(coming: deque[Request], queue: RequestQueue[Request], now: float) -> None:
    while coming and coming[0].arrived <= now:
        queue.add(Rows(1, KEY), coming.popleft())


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
