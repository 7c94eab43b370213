"""What a process and all that came of it use."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import psutil

__all__ = ["Tree"]


class Tree(NamedTuple):
    """A process and those below it."""

    nbytes: int
    """Resident memory of all together; what two share counts twice."""
    processes: int

    @classmethod
    def of(cls, pid: int) -> Tree:
        """Now; nothing when it is gone."""
        try:
            process = psutil.Process(pid)
            members = [process, *process.children(recursive=True)]
        except psutil.Error:
            return cls(0, 0)
        nbytes = 0
        for member in members:
            with contextlib.suppress(psutil.Error):
                nbytes += member.memory_info().rss
        return cls(nbytes, len(members))
