"""Reads all packs in the background, at a bounded rate, and goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tether.errors import TetherError
from tether.store.format.packs import Located
from tether.store.format.records import Problem
from tether.store.packing.blobs import Blobs
from tether.store.packing.pack_files import scan
from tether.store.verification import Line, lines_of, look
from tether.types import Digest

__all__ = ["Cursor", "Scrubbed", "scrub"]

_NAP = 0.1
"""Longest sleep, in seconds: so often it looks whether it should stop."""
_BURST = 0.25
"""Seconds' worth of reading that may be caught up on at once, after a disk that stalled."""


class Cursor(NamedTuple):
    """Where a scrub is: all up to here was read in this round."""

    pack: str
    offset: int


class Scrubbed(NamedTuple):
    """One blob, or one index, that was read."""

    cursor: Cursor
    """To go on behind it."""
    nbytes: int
    problem: Problem | None


class Pace:
    """Pure: how long to wait so that the rate stays under a limit."""

    def __init__(self, nbytes_per_second: float, now: float) -> None:
        self._rate = nbytes_per_second
        self._due = now
        """When what was read so far would have been read at the limit."""

    def wait(self, nbytes: int, now: float) -> float:
        """Seconds to wait after reading so many bytes.

        >>> pace = Pace(100.0, now=0.0)
        >>> pace.wait(50, now=0.1), pace.wait(50, now=0.5)
        (0.4, 0.5)
        """
        self._due = max(self._due, now - _BURST) + nbytes / self._rate
        return max(0.0, self._due - now)


def scrub(
    packs: Sequence[Path],
    blobs: Blobs,
    limit_nbytes_per_second: float,
    stop: Callable[[], bool],
    start_after: Cursor | None,
) -> Iterator[Scrubbed]:
    """Read every blob of the packs, by name and offset, on one thread; ends when all is read, or when `stop` says so.

    A cursor whose pack is gone meanwhile goes on with the next.
    """
    pace = Pace(limit_nbytes_per_second, time.monotonic())
    for pack in sorted(packs, key=lambda path: path.name):
        if start_after and pack.name < start_after.pack:
            continue
        begin = start_after.offset if start_after and pack.name == start_after.pack else -1
        for seen in _pack(pack, blobs, begin):
            yield seen
            _sleep(pace.wait(seen.nbytes, time.monotonic()), stop)
            if stop():
                return


def _pack(pack: Path, blobs: Blobs, begin: int) -> Iterator[Scrubbed]:
    index: Iterable[Located] = ()
    try:
        index = scan(pack)
    except TetherError as error:
        # One that is not there was collected meanwhile, and the catalog knows of no blob in it any more; or it was lost.
        if begin < 0 and pack.exists():
            yield Scrubbed(Cursor(pack.name, 0), 0, Problem(pack.name, Digest(pack.stem), error.code, str(error)))
    for line in sorted(lines_of(blobs, pack.name, index), key=_offset):
        if _offset(line) > begin:
            _, nbytes, wrong = look(blobs, line)
            problem = Problem(pack.name, line.digest, wrong.code, str(wrong)) if wrong else None
            yield Scrubbed(Cursor(pack.name, _offset(line)), nbytes, problem)


def _offset(line: Line) -> int:
    return line.location.offset if line.location else 0


def _sleep(seconds: float, stop: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not stop():
        time.sleep(min(left, _NAP))
