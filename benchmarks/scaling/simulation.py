"""A lab whose workers come and go, in simulated time: requests queue for them, the lab's own `Scaler` says how many there are to be."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tether.orchestrator.forecasting import Forecast
from tether.orchestrator.scaling import Pressure, Scaler

COST = 0.1
"""Seconds of a worker that a request takes."""
START = 30.0
"""Seconds from asking for a worker to its first answer: a job of a cluster that has room, and a model to load."""
TARGET = 1.0
"""Seconds that a request may wait."""
MOST = 64
"""Workers."""
DAY = 6 * 3600
"""Seconds of a simulated day."""


def rates(kind: str) -> np.ndarray:
    """Requests a second, at each second. *daily*: five days of six hours, quiet at night, two peaks by day.

    *flash crowd*: steady, and four times, when nobody thinks of it, twelve times as many within twenty seconds, for ten minutes.
    *sawtooth*: each quarter of an hour six times as many at once, falling from there; a job that others run by the clock.
    """
    seconds = np.arange(5 * DAY if kind == "daily" else 8 * 3600, dtype=float)
    if kind == "daily":
        phase = 2 * math.pi * seconds / DAY
        return 10 + 60 * np.clip(-np.cos(phase) + 0.5 * -np.cos(2 * phase), 0, None)
    if kind == "sawtooth":
        return 20 + 100 * (1 - (seconds % 900) / 900) * (seconds % 900 < 600)
    crowd = np.zeros_like(seconds)
    for begun in (5200, 11_700, 18_100, 25_900):
        crowd = np.maximum(crowd, np.clip((seconds - begun) / 20, 0, 1) * (seconds < begun + 600))
    return 15 + 165 * crowd


@dataclass
class Outcome:
    over: int = 0
    """Seconds in which a request that came had to wait for more than the target."""
    worker_seconds: float = 0.0
    longest: float = 0.0
    """Wait, in seconds."""


def run(arrivals: Sequence[int], *, foretells: bool) -> Outcome:
    """One lab through one trace, from one worker."""
    scaler, forecast, outcome = Scaler(), Forecast() if foretells else None, Outcome()
    up, coming, waiting, seen = 1, deque[float](), 0, Pressure(1.0)
    for second, arrived in enumerate(map(int, arrivals)):
        now = float(second)
        while coming and coming[0] <= now:
            coming.popleft()
            up += 1
        expected = 0.0
        if forecast is not None:
            forecast.take(seen.arrived, now)
            expected = forecast.expected(START + 5)
        wanted = min(max(scaler.look(seen, up + len(coming), now, expected), 1), MOST)
        coming.extend([now + START] * (wanted - up - len(coming)))
        while up + len(coming) > wanted and coming:
            coming.pop()
        up = min(up, wanted)
        answered = min(waiting + arrived, int(up / COST))
        waiting += arrived - answered
        wait = waiting * COST / up
        seen = Pressure(1.0, arrived, answered, waiting, answered * COST, wait + COST)
        outcome.over += wait > TARGET
        outcome.longest = max(outcome.longest, wait)
        outcome.worker_seconds += up + len(coming)
    return outcome
