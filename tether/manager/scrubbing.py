"""The background scrub: reads the whole store again, slowly, a round a week, so that damage is found while a good copy still exists."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from tether.errors import TetherError
from tether.security.files import written_aside
from tether.store import Repository
from tether.store.scrubbing import Cursor

__all__ = ["Scrubber"]

log = structlog.get_logger("tether.manager")
RATE = 16e6
"""Bytes a second: 0.4 % of a core for hashing, a tenth of what a hard disk reads; a terabyte takes 17 hours."""
EVERY = 7 * 86400.0
"""Seconds from the start of one round to the next, as Ceph's deep scrub."""
_SAVE = 30.0
"""Seconds between notes of where it is: so much is read twice after a crash."""
_NICEST = 19


class _State(msgspec.Struct):
    began: float = 0.0
    """Unix time of the start of the round."""
    cursor: tuple[str, int] | None = None
    """None: the round is done."""


class Scrubber:
    """One thread of the manager, at the lowest priority."""

    def __init__(
        self, repository: Repository, notes: Path, *, rate: float = RATE, every: float = EVERY, clock: Callable[[], float] = time.time
    ) -> None:
        """`notes`: the file that keeps where the round is, over restarts."""
        self._repository, self._notes = repository, notes
        self._rate, self._every, self._clock = rate, every, clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)
        self.rounds = self.problems = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Note where it is, and end; within a blob's time."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a thread of its own niceness: Linux only
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)
        while not self._stopping.is_set():
            state = self._remembered()
            wait = 0.0 if state.cursor else state.began + self._every - self._clock()
            if wait > 0:
                self._stopping.wait(min(wait, 3600.0))
                continue
            try:
                self._round(state)
            except TetherError as error:  # the disk refuses: the next look may find it back
                log.warning("scrub stopped", error=str(error))
                self._stopping.wait(60.0)

    def _round(self, state: _State) -> None:
        if state.cursor is None:
            state = _State(self._clock(), ("", 0))
        saved = time.monotonic()
        for found in self._repository.scrub(self._rate, self._stopping.is_set, Cursor(*state.cursor) if state.cursor else None):
            state.cursor = (found.cursor.pack, found.cursor.offset)
            if found.problem is not None:
                self.problems += 1
                log.error("damaged", path=found.problem.path, digest=found.problem.digest, error=found.problem.message)
            if time.monotonic() - saved > _SAVE:
                self._note(state)
                saved = time.monotonic()
        if not self._stopping.is_set():
            state.cursor = None
            self.rounds += 1
        self._note(state)

    def _remembered(self) -> _State:
        try:
            return msgspec.json.decode(self._notes.read_bytes(), type=_State)
        except (OSError, msgspec.MsgspecError):  # none yet, or cut off: begin again
            return _State()

    def _note(self, state: _State) -> None:
        try:
            with written_aside(self._notes, msgspec.json.encode(state)) as partial:
                partial.replace(self._notes)
        except OSError as error:
            log.warning("scrub not noted", error=str(error))
