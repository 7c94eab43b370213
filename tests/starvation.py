"""How long something took, less what a busy machine added: the time for which its processes were ready to run and had no processor."""

import contextlib
import time
from pathlib import Path

import psutil


def family():
    """This process and all that it started."""
    mine = psutil.Process()
    return [mine.pid, *(each.pid for each in mine.children(recursive=True))]


class Watch:
    """A stopwatch. The kernel says of each thread how long it waited in the queue of its processor (`schedstat`, second figure).

    What is made in steps is late by the sum of these at most: so a promise that is kept on a quiet machine is kept here, too, however
    busy it is, and one that is broken there is broken here.
    """

    def __init__(self, pids=family):
        """`pids`: gives the processes that have a part in it; asked again at the end."""
        self._pids, self._queued = pids, _queued(pids())
        self._began = time.monotonic()

    def waited(self):
        """Seconds in which they had no processor, added up over their threads."""
        return sum(seconds - self._queued.get(thread, 0.0) for thread, seconds in _queued(self._pids()).items())

    def seconds(self):
        """Since it was made, without those."""
        elapsed = time.monotonic() - self._began
        return max(elapsed - self.waited(), 0.0)


def _queued(pids):
    """By thread."""
    found = {}
    for task in (task for pid in pids for task in _tasks(pid)):
        with contextlib.suppress(OSError, IndexError):  # it ended just now
            found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return found


def _tasks(pid):
    with contextlib.suppress(OSError):  # as above, or there is no such file on this system: nothing is taken off
        return list(Path(f"/proc/{pid}/task").iterdir())
    return []
