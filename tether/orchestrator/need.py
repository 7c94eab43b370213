"""Pure: how many workers each version keeps busy, from what gateways see of it; up within seconds, down after a minute."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from tether.events import VersionLoad
from tether.types import ModelVersion

__all__ = ["KEEP", "Need"]

KEEP: Final = 60.0
"""Seconds over which the most counts: a copy that goes costs a load, and what comes in waves comes again."""
_STEP: Final = 3.0
"""Seconds that are taken together: one burst of a gateway's second is no load yet."""


class Need:
    """Of versions whose copies follow load. Requests under way, on average, are rate × seconds of each (Little's law), the wait included.

    One under way is what keeps a worker busy half of the time, if requests come at random. So as many workers are needed as requests
    are under way. What piles up makes it more, at once.
    """

    def __init__(self) -> None:
        self._seen: dict[ModelVersion, deque[tuple[float, float]]] = {}
        """Beginnings of steps, and the seconds in each that requests were under way."""
        self._workers: dict[ModelVersion, int] = {}
        self._settle_at = -math.inf

    def __contains__(self, model: ModelVersion) -> bool:
        return model in self._seen

    def __getitem__(self, model: ModelVersion) -> int:
        """Workers that it needs; 0: nobody asked for it in the last minute."""
        return self._workers.get(model, 0)

    @property
    def is_live(self) -> bool:
        """Whether time alone will change something."""
        return bool(self._seen)

    def take(self, model: ModelVersion, seen: VersionLoad, seconds: float, now: float) -> bool:
        """What one gateway saw in so many seconds: what was answered, or was open in the end, since what takes long is to be seen, too.

        Whether it needs another number of workers now.
        """
        return self._add(model, max(seen.seconds, seen.open * seconds), now)

    def ask(self, model: ModelVersion, now: float) -> None:
        """A request needs it, or it is in use, of which nothing is told yet."""
        self._add(model, 0.0, now)

    def assume(self, model: ModelVersion, workers: int, now: float) -> None:
        """So many have it, and what load needs was never told, as after a new start: all of them may be needed.

        It goes to the step before, so that what is told from now on does not come on top.
        """
        steps, begun, seconds = self._seen.setdefault(model, deque()), now - now % _STEP - _STEP, 0.0
        if steps and steps[0][0] <= begun:
            begun, seconds = steps.popleft()
        steps.appendleft((begun, max(seconds, workers * _STEP)))
        self._count(model, now)

    def settle(self, now: float) -> set[ModelVersion]:
        """Forget what is too old to count; the versions that need fewer workers now. Mostly there is nothing to do."""
        if now < self._settle_at:
            return set()
        self._settle_at = now + _STEP
        return {model for model in list(self._seen) if self._count(model, now)}

    def drop(self, model: ModelVersion) -> None:
        """It is published no more, or is to have as many whatever comes."""
        self._seen.pop(model, None)
        self._workers.pop(model, None)

    def _add(self, model: ModelVersion, seconds: float, now: float) -> bool:
        steps = self._seen.setdefault(model, deque())
        begun = now - now % _STEP
        if steps and steps[-1][0] == begun:
            seconds += steps.pop()[1]
        steps.append((begun, seconds))
        return self._count(model, now)

    def _count(self, model: ModelVersion, now: float) -> bool:
        """Whether it is another number now."""
        steps, before = self._seen[model], self._workers.get(model, 0)
        while steps and steps[0][0] <= now - KEEP:
            steps.popleft()
        if not steps:
            self.drop(model)
            return True
        self._workers[model] = max(1, math.ceil(max(seconds for _, seconds in steps) / _STEP - 1e-9))
        return self._workers[model] != before
