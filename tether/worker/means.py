"""What a worker has to work with, as its lab may tell others: its graphics cards, as their driver names them, and how busy it was."""

from __future__ import annotations

import csv
import os
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

__all__ = ["Busyness", "Card", "card_users", "cards", "chosen"]

_WINDOW: Final = 30.0
"""Seconds over which a worker's load is told: a heartbeat comes each half second to five."""
_DRIVER: Final = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_USERS: Final = ("nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
_PATIENCE: Final = 20.0
"""Seconds: without its persistence daemon the driver wakes each card first."""
_MIB: Final = 1 << 20


class Card(NamedTuple):
    """A graphics card."""

    name: str
    nbytes: int
    """Of its memory."""


def cards(count: int) -> tuple[Card, ...]:
    """The cards of a worker that has so many, as far as their driver tells which. Blocks, for some seconds where it sleeps."""
    if count < 1:
        return ()
    try:
        told = subprocess.run(_DRIVER, check=True, capture_output=True, text=True, timeout=_PATIENCE, errors="replace").stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return chosen(_parsed(told), count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def chosen(found: Sequence[Card], count: int, visible: str | None = None) -> tuple[Card, ...]:
    """Of this machine's cards those that a worker of so many has; none where that is a guess.

    `visible`: `CUDA_VISIBLE_DEVICES`, by their places.
    """
    if visible is not None and not visible.strip():
        return ()
    places = [part.strip() for part in visible.split(",")] if visible else []
    if places and all(place.isdecimal() and int(place) < len(found) for place in places):
        found = [found[int(place)] for place in places]
    if count >= len(found) or len(set(found)) == 1:
        return tuple(found[:count])
    return ()


def card_users() -> dict[int, int]:
    """Process → bytes that it takes of cards. Blocks; empty where the driver does not tell, as in most containers."""
    try:
        told = subprocess.run(_USERS, check=True, capture_output=True, text=True, timeout=_PATIENCE, errors="replace").stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    users: dict[int, int] = {}
    for row in csv.reader(told.splitlines(), skipinitialspace=True):
        if len(row) == 2 and all(cell.strip().isdecimal() for cell in row):  # noqa: PLR2004 (a pair)
            users[int(row[0])] = users.get(int(row[0]), 0) + int(row[1]) * _MIB
    return users


def _parsed(told: str) -> list[Card]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(told.splitlines())]
    return [Card(name, int(mib) * _MIB) for name, mib in (row for row in rows if len(row) == 2) if name.isprintable() and mib.isdecimal()]  # noqa: PLR2004


class Busyness:
    """Pure: the share of the last half minute that was spent inside runtimes."""

    def __init__(self) -> None:
        self._totals: Mapping[str, float] = {}
        self._seen: deque[tuple[float, float]] = deque()
        """When, and seconds spent since the look before."""

    def look(self, totals: Mapping[str, float], now: float) -> float:
        """0 to 1. `totals`: seconds that each model's runs took so far; a model that was unloaded is missing."""
        spent = sum(max(total - self._totals.get(name, 0.0), 0.0) for name, total in totals.items())
        self._totals = dict(totals)
        self._seen.append((now, spent))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW:  # noqa: PLR2004 (two make a span)
            self._seen.popleft()
        span = now - self._seen[0][0]
        return min(sum(each for _, each in list(self._seen)[1:]) / span, 1.0) if span > 0 else 0.0
