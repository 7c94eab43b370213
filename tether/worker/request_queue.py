"""Pure: the requests of one model that wait: who gets in, who runs when with whom, by what was learned and by what the lab says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from tether.errors import QueueFullError
from tether.serving_settings import DEFAULTS, MOST_ROWS, ServingSettings
from tether.worker.batch_sizes import BatchSizes
from tether.worker.batching import BatchKey, Rows, Waiting

__all__ = ["Queued", "RequestQueue"]


class Queued(Protocol):
    """A request. Times are of one monotonic clock."""

    @property
    def arrived(self) -> float: ...

    @property
    def deadline(self) -> float: ...

    @property
    def priority(self) -> object:
        """As the caller wrote it; 0: nothing."""
        ...


Job = TypeVar("Job", bound=Queued)


class _Forming:
    """What waits of one shape; kept while it is held, so that each request that comes is looked at once."""

    __slots__ = ("held_until", "sums")

    def __init__(self) -> None:
        self.sums: list[int] = []
        """Rows of the first one, of the first two …"""
        self.held_until = math.inf

    def add(self, rows: int, held_until: float) -> None:
        self.sums.append(rows + (self.sums[-1] if self.sums else 0))
        self.held_until = min(self.held_until, held_until)


class RequestQueue(Generic[Job]):
    """Of one model version; belongs to its thread.

    Where nothing was said there is no timer: a batch is of what waits, as many rows as `BatchSizes` learned to be good. What is said
    changes that: see `ServingSettings`. Levels of priority are strict, as Triton's: while urgent requests fill the model, others wait
    until their deadlines. Room that urgent ones leave in a batch is filled with others of their shape.
    """

    def __init__(self, latency: float, settings: ServingSettings = DEFAULTS, *, joins: bool = True) -> None:
        """`latency`: seconds within which answers are wanted where the settings don't say. `joins`: whether requests may run together."""
        self._latency, self._joins = latency, joins
        self._waiting: Waiting[Job] = Waiting()
        self._settings = DEFAULTS
        self._limits: ServingSettings | None = None
        """The settings, where they say anything of batches."""
        self._held = 0.0
        """Until when all that waits is held; in the past: a batch may begin."""
        self._none_expires_until = -math.inf
        """Nobody who waits will have waited too long before; who comes later will later."""
        self._forming: dict[BatchKey | None, _Forming] = {}
        self._sizes = self._learning(settings)
        self.configure(settings)

    def configure(self, settings: ServingSettings) -> None:
        """From now on; who waits already waits on, in the place that is now due to it."""
        before, self._settings = self._settings, settings
        if (before.latency, before.max_batch_size) != (settings.latency, settings.max_batch_size):
            self._sizes = self._learning(settings)
        self._limits, self._held = settings if settings.rules_batches else None, 0.0
        self._none_expires_until = -math.inf
        self._waiting.sort(lambda job: settings.level(job.priority))
        self._forming.clear()

    def _learning(self, settings: ServingSettings) -> BatchSizes:
        return BatchSizes(settings.latency or self._latency, most=settings.max_batch_size or MOST_ROWS)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, rows: Rows, job: Job) -> None:
        """Raises: QueueFullError: as many wait as may."""
        limits = self._limits
        if limits is None:
            self._waiting.add(rows, job)
            return
        level = limits.level(job.priority)
        if limits.max_queue_size is not None and self._waiting.count_at(level) >= limits.max_queue_size:
            which = f" of priority {level}" if level else ""
            raise QueueFullError(f"{limits.max_queue_size} requests{which} wait for this model already (max_queue_size): try again later")
        self._waiting.add(rows, job, level)
        forming = self._forming.get(rows.key)
        if forming is not None and level:  # it may stand before others
            del self._forming[rows.key]
        elif forming is not None:
            forming.add(rows.count, _held_until(job, limits))

    def take(self, now: float, *, hurry: bool = False) -> list[Job]:
        """The next batch, if one is to begin now; with `hurry` none waits for others."""
        if not self._waiting:
            return []
        if self._limits is None:
            key = self._waiting.next_key()
            return self._waiting.take_of(key, self._sizes.most_rows(key) if self._joins and key is not None else 1)
        self._held = 0.0
        for key in self._waiting.shapes():
            rows = self._rows(key, self._limits, now, hurry=hurry)
            if rows:
                self._forming.pop(key, None)
                return self._waiting.take_of(key, rows)
        self._held = min(forming.held_until for forming in self._forming.values())
        return []

    def pause(self, now: float) -> float | None:
        """Seconds until `take` is to be called again if nothing comes; None: nothing waits."""
        return max(self._held - now, 0.0) if self._waiting else None

    def _rows(self, key: BatchKey | None, limits: ServingSettings, now: float, *, hurry: bool) -> int:
        """How many rows of this shape are to run now, at most; 0: they wait for more."""
        if key is None or not self._joins:
            return 1
        sizes, most = limits.preferred_batch_sizes, self._most_rows(key, limits)
        if not sizes and not limits.max_delay:
            return most
        goal = sizes[-1] if sizes else most
        forming = self._forming_of(key, limits, goal)
        formed = max(set(sizes).intersection(forming.sums), default=0)
        if formed:
            return formed
        return most if forming.sums[-1] >= goal or hurry or now >= forming.held_until else 0

    def _forming_of(self, key: BatchKey, limits: ServingSettings, goal: int) -> _Forming:
        """All of it, or as much as makes `goal` rows: then it is taken at once."""
        if key in self._forming:
            return self._forming[key]
        made = self._forming[key] = _Forming()
        for rows, job in self._waiting.of(key):
            made.add(rows, _held_until(job, limits))
            if made.sums[-1] >= goal:
                break
        return made

    def _most_rows(self, key: BatchKey, limits: ServingSettings) -> int:
        """Who says sizes, or says how many and how long to wait for them, gets them; else they are bounds of what is learned."""
        if limits.preferred_batch_sizes:
            return limits.max_batch_size or limits.preferred_batch_sizes[-1]
        learned = self._sizes.most_rows(key)
        if limits.max_batch_size is None:
            return learned
        return limits.max_batch_size if limits.max_delay else min(learned, limits.max_batch_size)

    def expired(self, now: float) -> list[Job]:
        """Take out those that waited too long."""
        limits = self._limits
        if limits is None or limits.queue_timeout is None:
            return []
        if now < self._none_expires_until:
            return []
        oldest = now - limits.queue_timeout
        expired = self.drop(lambda job: job.arrived < oldest)
        self._none_expires_until = min((job.arrived for job in self._waiting), default=now) + limits.queue_timeout
        return expired

    def drop(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Take out those that are not wanted any more."""
        dropped = self._waiting.drop(unwanted)
        if dropped:
            self._forming.clear()
        return dropped

    def ran(self, key: BatchKey | None, rows: int, seconds: float) -> None:
        """A batch is done: what it took with everything that is done for a row (decoded, run, encoded)."""
        if self._joins and key is not None:
            self._sizes.ran(key, rows, seconds, is_full=self._waiting.has(key))

    def failed(self, key: BatchKey | None, rows: int) -> None:
        """A batch failed, and its requests ran one by one: the model can't run so many rows at once."""
        if self._joins and key is not None:
            self._sizes.failed(key, rows)


def _held_until(job: Queued, limits: ServingSettings) -> float:
    """No longer than `max_delay`, nor for more than half of the time that its deadline leaves."""
    return job.arrived + min(limits.max_delay, (job.deadline - job.arrived) / 2)
