"""Pure: how far something has come, for people: a bar that never goes backwards and is full only at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = ["Progress"]

_MEMORY = 5.0
"""Seconds over which the rate is smoothed."""
_ALMOST = 0.999
"""What is not finished is not full, whatever the sums say."""
_MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """What to show. Bytes that turn out to be damaged, more of them than was thought, a restart: none of it takes anything back."""

    done: int = 0
    """Bytes."""
    total: int = 0
    """Bytes, as far as is known."""
    fraction: float = 0.0
    """0 to 1."""
    rate: float = 0.0
    """Bytes a second, of late."""
    at: float | None = None
    """When it was last updated."""
    peers: int = 0
    """That give something."""
    is_finished: bool = False

    def updated(self, done: int, total: int, now: float, peers: int = 0) -> Progress:
        """`done` of `total` bytes are there at the monotonic time `now`."""
        if self.is_finished:
            return self
        new_done, new_total = max(self.done, done), max(self.total, total, done, self.done)
        fraction = min(new_done / new_total, _ALMOST) if new_total else 0.0
        rate = self._rate(done, now)
        at = now if self.at is None else max(self.at, now)
        return Progress(new_done, new_total, max(self.fraction, fraction), rate, at, peers)

    def _rate(self, done: int, now: float) -> float:
        """What was there at the first look did not come now."""
        if self.at is None or now <= self.at:
            return self.rate
        seconds = now - self.at
        weight = 1 - math.exp(-seconds / _MEMORY)
        return self.rate + weight * (max(0, done - self.done) / seconds - self.rate)

    def finished(self, now: float) -> Progress:
        """All of it is there, verified and durable."""
        return replace(self, done=self.total, fraction=1.0, at=now, is_finished=True)

    def beside(self, other: Progress) -> Progress:
        """Both together."""
        done, total = self.done + other.done, self.total + other.total
        fraction = min(done / total, _ALMOST) if total else 0.0
        return Progress(done, total, fraction, self.rate + other.rate, self.at, max(self.peers, other.peers))

    @property
    def remaining(self) -> float | None:
        """Seconds, if it goes on so; None: nothing comes."""
        if self.is_finished:
            return 0.0
        return (self.total - self.done) / self.rate if self.rate >= 1.0 else None

    def __str__(self) -> str:
        text = f"{math.floor(self.fraction * 100):3d} %, {self.done / _MEBIBYTE:.1f} of {self.total / _MEBIBYTE:.1f} MiB"
        if self.is_finished:
            return text
        left = "" if self.remaining is None else f", {self.remaining:.0f} s left"
        return f"{text}, {self.rate / 1e6:.1f} MB/s from {self.peers} peers{left}"
