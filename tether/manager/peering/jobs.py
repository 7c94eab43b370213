"""A model that comes in, and all who wait for it: each is told how far it is, and to none of them does it ever go back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from tether.manager.peering.progress import Progress
from tether.types import Digest

__all__ = ["Job", "OnProgress", "Told"]

OnProgress = Callable[[str, Progress], None]
"""The model's name at its publisher, and how far it is. Called on the loop: to be quick."""


class Told:
    """One who waits for a model, and what it was told."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress, self._progress = on_progress, Progress()

    def update(self, name: str, done: int, total: int, peers: int) -> None:
        """`done` of `total` bytes are here; `peers` take part."""
        self._progress = self._progress.updated(done, total, asyncio.get_running_loop().time(), peers)
        self._tell(name)

    def finish(self, name: str) -> None:
        """All that it asked for is here."""
        self._progress = self._progress.finished(asyncio.get_running_loop().time())
        self._tell(name)

    def _tell(self, name: str) -> None:
        if self._on_progress is not None:
            self._on_progress(name, self._progress)


class Job:
    """One model."""

    def __init__(self, name: str) -> None:
        self.turn = asyncio.Lock()
        """Held by whoever brings it."""
        self.told: list[Told] = []
        self.liars: set[str] = set()
        """Peers that are asked for nothing more of it."""
        self._name = name
        self._totals: dict[Digest, int] = {}
        self._done: dict[Digest, int] = {}

    def begin(self, totals: Mapping[Digest, int]) -> None:
        """These versions come, one after the other, of about so many bytes."""
        self._totals, self._done = dict(totals), dict.fromkeys(totals, 0)

    def sized(self, digest: Digest, nbytes: int) -> None:
        """Now it is known of how many."""
        self._totals[digest] = nbytes

    def came(self, digest: Digest, nbytes: int) -> None:
        """So many more of a version are here."""
        self._done[digest] += nbytes

    def tell(self, peers: int) -> None:
        """Tell all who wait."""
        done, total = sum(self._done.values()), sum(self._totals.values())
        for told in self.told:
            told.update(self._name, done, total, peers)
