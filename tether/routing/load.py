"""Pure: what one gateway saw of a version since it told the orchestrator last. Kept in plain numbers: it is counted at every request."""

from __future__ import annotations

from typing import Final

from tether.errors import MemoryFullError, ModelFailedError, NotANumberError, NoWorkerError, QueueFullError
from tether.events import VersionLoad

__all__ = ["LoadCounter", "found_no_room"]

_CROWDED: Final = tuple(f'"code":"{error.code}"'.encode() for error in (QueueFullError, NoWorkerError, MemoryFullError))
_FAILED: Final = tuple(f'"code":"{error.code}"'.encode() for error in (ModelFailedError, NotANumberError))
"""In a body of ours no text can hold these: quotes in it are escaped."""
_OK: Final = 200
_AWAY: Final = 503
_CANCELLED: Final = 499
"""Status of a request that nobody waits for any more."""
_FULL: Final = frozenset({429, 507})
"""Statuses of what found no room."""


def found_no_room(status: int, body: bytes) -> bool:
    """Whether an answer says that there was no room: nothing against the version, nor against who asked."""
    return status in _FULL or (status == _AWAY and any(code in body for code in _CROWDED))


class LoadCounter:
    """Of one version."""

    __slots__ = ("_answered", "_failed", "_refused", "_seconds", "_slowest", "open", "right", "worse", "wrong")

    def __init__(self) -> None:
        self.open = 0
        """Requests without an answer; add to it when one comes."""
        self._reset()

    def _reset(self) -> None:
        self._answered = self._failed = self._refused = self.worse = 0
        self.right = self.wrong = 0
        self._seconds = self._slowest = 0.0

    def ended(self, status: int, body: bytes, seconds: float) -> None:
        """A request was answered, `seconds` after it came."""
        self.open -= 1
        if status == _OK or (status < 500 and not self._is_excuse(status, body)):  # noqa: PLR2004 (the caller's own fault)
            self._answered += 1
            self._seconds += seconds
            self._slowest = max(self._slowest, seconds)
        elif found_no_room(status, body):
            self._refused += 1
        elif status != _CANCELLED:
            self._failed += 1

    def _is_excuse(self, status: int, body: bytes) -> bool:
        """Whether a status of the caller's faults says something else."""
        return status == _CANCELLED or status in _FULL or (status == ModelFailedError.http_status and any(code in body for code in _FAILED))

    def take(self) -> VersionLoad | None:
        """What was seen since the last time; None: nothing, and nothing is under way."""
        if not (self._answered or self._failed or self._refused or self.open or self.worse or self.right or self.wrong):
            return None
        counts = (self._answered, self._failed, self._refused, self._seconds, self._slowest, self.open, self.worse)
        load = VersionLoad(*counts, self.right, self.wrong)
        self._reset()
        return load
