"""Room in a worker's memory for models that are to be loaded: waits for it, has those sent away that are in the way. Glue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import structlog

from tether.errors import MemoryFullError, ModelTooLargeError
from tether.types import ModelVersion
from tether.worker.residency import Decision, Residency, Size

__all__ = ["Rooms", "Use"]

log = structlog.get_logger("tether.worker")
WAIT: Final = 30.0
"""Seconds that a load waits for room. Then the lab is told why it takes so long; it asks again as long as requests wait for the model."""
_LOOK: Final = 0.02
"""Seconds between looks whether a model fell idle, while one waits for its place."""
_ADVICE: Final = (
    "give the worker more (--memory-budget or tether.worker.memory, tether.worker.gpu-memory), or run fewer workers on this machine"
)


class Use(NamedTuple):
    """Of a model in memory."""

    answers: int
    """Since it was loaded."""
    is_busy: bool
    is_streaming: bool = False


class Rooms:
    """Of one worker. Methods may be called from any thread; only `take` waits."""

    def __init__(
        self, budget: Size, evict: Callable[[ModelVersion], None], uses: Callable[[], Mapping[ModelVersion, Use]], wait: float = WAIT
    ) -> None:
        """`evict`: frees a model, blocks, and ends with `gone`; called on a thread of its own. `uses`: of what is in memory."""
        self._residency = Residency(budget)
        self._evict, self._uses, self._wait = evict, uses, wait
        self._changed = threading.Condition()
        self._admitted: set[ModelVersion] = set()
        self._refused: dict[ModelVersion, str] = {}
        self._answers: dict[ModelVersion, int] = {}
        self._closed = False

    def take(self, model: ModelVersion, size: Size, *, pinned: bool = False, keep_alive: float | None = None) -> None:
        """Return when there is room: `loaded` or `gone` is to follow.

        Raises: ModelTooLargeError: there never will be; MemoryFullError: none was made in time, or the worker ends.
        """
        end = time.monotonic() + self._wait
        with self._changed:
            self._residency.want(model, size, time.monotonic(), pinned=pinned, keep_alive=keep_alive)
            self._settle()
            try:
                while model not in self._admitted:
                    self._await(model, end)
            except BaseException:
                self._residency.gone(model)
                raise
            finally:
                self._admitted.discard(model)
                self._refused.pop(model, None)

    def _await(self, model: ModelVersion, end: float) -> None:
        if reason := self._refused.get(model):
            raise ModelTooLargeError(f"{reason}; {_ADVICE}")
        left = end - time.monotonic()
        if left <= 0 or self._closed:
            held = ", ".join(map(str, self._residency.sizes))
            raise MemoryFullError(
                f"{model}: no room in the worker's memory within {self._wait:g} s, it has {held}; try again, or {_ADVICE}"
            )
        # one looks for all; the others are told
        if not self._changed.wait(min(left, _LOOK if self._residency.first_in_line == model else 1.0)):
            self._settle()

    def loaded(self, model: ModelVersion, nbytes: Size, seconds: float) -> None:
        """It is in memory, takes so much, and took so long to load."""
        with self._changed:
            self._residency.loaded(model, nbytes, seconds, time.monotonic())
            self._answers[model] = 0
            self._settle()

    def measured(self, model: ModelVersion, size: Size) -> None:
        """It takes so much now."""
        with self._changed:
            self._residency.measured(model, size)

    def keep(self, model: ModelVersion, *, pinned: bool, keep_alive: float | None) -> None:
        """From now on as `take` says; does nothing where it is not in memory, nor about to be."""
        with self._changed:
            self._residency.keep(model, pinned=pinned, keep_alive=keep_alive)
            self._settle()

    def leaves(self, model: ModelVersion) -> None:
        """It is about to be freed, and not for room: `gone` is to follow."""
        with self._changed:
            self._residency.leaves(model)

    def gone(self, model: ModelVersion) -> None:
        """It takes no memory any more; does nothing where it took none."""
        with self._changed:
            self._residency.gone(model)
            self._answers.pop(model, None)
            self._settle()

    def look(self) -> None:
        """Now and then: what is over time goes, and who waits may get in."""
        with self._changed:
            self._settle()

    def limit(self, place: str, nbytes: int) -> None:
        """So much may be taken there, from now on."""
        with self._changed:
            self._residency.budget[place] = nbytes

    @property
    def budget(self) -> Size:
        return self._residency.budget

    @property
    def taken(self) -> Size:
        """Where → bytes in use or reserved."""
        with self._changed:
            return self._residency.taken

    @property
    def sizes(self) -> Mapping[ModelVersion, Size]:
        """Of what is in memory."""
        with self._changed:
            return self._residency.sizes

    def close(self) -> None:
        """Nobody is let in any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _settle(self) -> None:
        """Tell what happened, and have done what is decided."""
        now = time.monotonic()
        for model, use in self._uses().items():
            if model in self._answers:
                before, self._answers[model] = self._answers[model], use.answers
                self._residency.used(model, use.answers - before, now, is_busy=use.is_busy, is_streaming=use.is_streaming)
        if not self._closed:
            self._carry_out(self._residency.decide(now))

    def _carry_out(self, decision: Decision) -> None:
        for model in decision.evicted:
            threading.Thread(target=self._send_away, args=(model,), name=f"evict-{model}", daemon=True).start()
        self._admitted.update(decision.admitted)
        self._refused |= decision.refused
        if decision.admitted or decision.refused:
            self._changed.notify_all()

    def _send_away(self, model: ModelVersion) -> None:
        try:
            self._evict(model)
        except Exception:
            log.exception("a model could not be freed", model=str(model))
            self.gone(model)
