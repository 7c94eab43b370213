"""Pure: whether a process with the swarm's JavaScript in it has grown too heavy: it leaks a little, however little crosses."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Scales", "Weight"]

_TIMES = 3
"""Weighings in a row: blobs on their way to peers are tens of MiB for a moment."""


@dataclass(frozen=True, slots=True)
class Weight:
    """What was found."""

    nbytes: int
    """Of memory that is the process's own: pages of files that it maps are the system's to take back."""
    is_heavy: bool
    """Whether it should be replaced by a new one."""


class Scales:
    """Weighs one process again and again."""

    def __init__(self, max_nbytes: int) -> None:
        """`max_nbytes`: what it may have."""
        self._max_nbytes = max_nbytes
        self._times = 0

    def weigh(self, nbytes: int) -> Weight:
        """What this weighing says, with those before it."""
        self._times = self._times + 1 if nbytes > self._max_nbytes else 0
        return Weight(nbytes, is_heavy=self._times >= _TIMES)
