"""Pure: who answers. Answers to pings and a monotonic time in; who has been silent for too long, and who is back, out.

One that is stopped, has its interpreter held, or is cut off answers no ping, though its connections stay open: Dask takes half a minute
or more to notice, and then forgets it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LIMIT", "PERIOD", "Health"]

PERIOD = 0.6
"""Seconds from an answer to the next ping, and between tries to reach one that is silent."""
LIMIT = 1.7
"""Seconds without an answer after which one is silent: two pings went by. With what it takes to tell everybody, two seconds."""
_STEADY = 2
"""Answers, each within the limit of the one before, after which a silent one is back: one that answers now and then would come and go."""
_SLACK = 0.1
"""Seconds that a look may come late before its lateness counts."""


@dataclass(slots=True)
class _Pulse:
    heard: float
    """When it answered last, or might have."""
    silent: bool = False
    steady: int = 0
    """Answers in a row since it fell silent."""


class Health:
    """Of all who are pinged."""

    def __init__(self) -> None:
        self._pulses: dict[str, _Pulse] = {}
        self._due = math.inf

    def add(self, who: str, now: float) -> None:
        """It has just spoken, for the first time."""
        self._pulses[who] = _Pulse(now)

    def remove(self, who: str) -> None:
        """It is gone. Does nothing if it was never there."""
        self._pulses.pop(who, None)

    def answered(self, who: str, now: float) -> bool:
        """It answered a ping; whether it is back by that."""
        pulse = self._pulses.get(who)
        if pulse is None:
            return False
        pulse.steady = pulse.steady + 1 if now - pulse.heard < LIMIT else 1
        pulse.heard = now
        is_back = pulse.silent and pulse.steady >= _STEADY
        pulse.silent = pulse.silent and not is_back
        return is_back

    def look(self, now: float) -> list[str]:
        """Those that are silent from now on. A look is due at `next_look`; if it comes late who looks could not hear either, and
        everybody gets time for one more ping.
        """
        late = now - self._due > _SLACK
        fresh: list[str] = []
        for who, pulse in self._pulses.items():
            if late:
                pulse.heard = max(pulse.heard, now - LIMIT + PERIOD)
            if not pulse.silent and pulse.heard + LIMIT <= now:
                pulse.silent, pulse.steady = True, 0
                fresh.append(who)
        return fresh

    def next_look(self, now: float) -> float:
        """When one of them may be silent, and `look` is to be called."""
        heard = min((pulse.heard for pulse in self._pulses.values() if not pulse.silent), default=now)
        self._due = heard + LIMIT
        return self._due
