"""A follower's garbage: what the writer forgot is collected here too, once a day. Nobody asks for it: `tether gc` goes to the writer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from tether.errors import TetherError
from tether.store import Repository

__all__ = ["FollowerCollection"]

log = structlog.get_logger("tether.manager")
EVERY = 86400.0
"""Seconds between collections: what is deleted stays for a day anyway, so nothing lies here for longer than two."""
FIRST = 600.0
"""Seconds after the start until the first: a follower that begins has all to fetch."""
_LOOK = 60.0
"""Seconds between looks whether this is a follower at rest."""
_LEAVE = 10.0
"""Seconds that an end waits for a collection. One that is cut off is finished by the next."""


class FollowerCollection:
    """One thread of the manager."""

    def __init__(self, repository: Repository, rests: Callable[[], bool], *, every: float = EVERY, first: float = FIRST) -> None:
        """`rests`: whether this manager follows and is not fetching.

        What was fetched and is not mirrored yet is named by no version. It is young, and stays for the grace period; a fetching of all of
        a large store over a slow line may take longer than that.
        """
        self._repository, self._rests = repository, rests
        self._every, self._first = every, first
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gc", daemon=True)
        self.rounds = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End, after the collection that goes on."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_LEAVE)

    def _run(self) -> None:
        wait = self._first
        while not self._stopping.wait(wait):
            wait = min(_LOOK, self._every)
            if self._rests():
                self._collect()
                wait = self._every

    def _collect(self) -> None:
        try:
            report = self._repository.gc()
        except TetherError as error:  # the disk refuses, or somebody collects already: tomorrow, then
            log.warning("garbage not collected", error=str(error))
            return
        self.rounds += 1
        if report.freed_nbytes or report.skipped or report.problems:
            problems = [problem.message for problem in report.problems]
            log.info("garbage collected", freed_nbytes=report.freed_nbytes, skipped=report.skipped, problems=problems)
