"""What a model runs now, and for whom: lets another thread end a run for which nobody waits any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from tether.ports import LoadedModel
from tether.types import ModelVersion

__all__ = ["Awaited", "RunGuard"]

log = structlog.get_logger("tether.worker")
_LATE = 0.25
"""Seconds past a deadline at which a request is one that nobody waits for: its gateway says so at the deadline, if it lives."""
_STUCK_TIMES, _STUCK = 4, 1.0
"""A run of several requests is stuck that takes so many times as long as the longest that ended, and at least so many seconds."""


class Awaited(Protocol):
    """A request that is run."""

    @property
    def deadline(self) -> float: ...

    @property
    def is_withdrawn(self) -> bool: ...


class RunGuard:
    """`begin` and `end` are called around each run by the model's thread, `look` now and then by another one."""

    __slots__ = ("_asked", "_begun", "_jobs", "_loaded", "_lock", "_longest", "_model")

    def __init__(self, model: ModelVersion, loaded: LoadedModel) -> None:
        self._model, self._loaded = model, loaded
        self._lock = threading.Lock()
        """Held while somebody looks: the run can't end meanwhile, so the next one is never hit."""
        self._jobs: Sequence[Awaited] | None = None
        self._asked = 0
        """How often this run was interrupted."""
        self._begun = self._longest = 0.0
        """When this run began; seconds of the longest one that ended by itself."""

    def begin(self, jobs: Sequence[Awaited]) -> None:
        """These are run from now on."""
        with self._lock:
            self._jobs, self._asked, self._begun = jobs, 0, time.monotonic()

    def end(self) -> None:
        """The run is over; waits for somebody who looks."""
        with self._lock:
            self._jobs = None
            if not self._asked:
                self._longest = max(self._longest, time.monotonic() - self._begun)

    def look(self, now: float, listen: Callable[[], None]) -> None:
        """During a run: `listen` for what gateways take back, then interrupt the run if all of it was, or is past its deadline.

        Interrupted again a model may lose its process, and what it keeps. One that is not pure only does past the deadline: a client
        that goes away is no reason to take from the others what it knows. Where somebody still waits for it, a run that is stuck is
        interrupted if it is of several requests and can be repeated: they then run one by one, without those for whom it is too late.
        """
        with self._lock:
            if self._jobs is None:
                return
            listen()
            late = [now > job.deadline + _LATE for job in self._jobs]
            unwanted = [is_late or job.is_withdrawn for is_late, job in zip(late, self._jobs, strict=True)]
            if not all(unwanted) and not (any(unwanted) and self._is_stuck(now)):
                return
            if not self._asked or self._loaded.info.pure or all(late):
                log.warning("run interrupted", model=str(self._model), times=self._asked + 1)
                self._asked += 1
                self._loaded.interrupt()

    def _is_stuck(self, now: float) -> bool:
        return self._loaded.info.pure and now - self._begun > max(_STUCK, _STUCK_TIMES * self._longest)
