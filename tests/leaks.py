"""What a test leaves open: descriptors, threads, tasks. Told at its own end, for the collector would blame a later one."""

import asyncio
import gc
import os
import socket
import sys
import threading
import time
from concurrent.futures import thread as pools
from dataclasses import dataclass
from multiprocessing import resource_tracker
from operator import itemgetter

import uvloop

PATIENCE = 10.0
"""Seconds for what is ending: threads that were told to, connections whose other end was closed."""
LOOPS = {"tether-client", "zarr_io"}
"""Threads that serve the whole process, once something needed them."""
SPARES = "runner-spawner"
"""Another one: it keeps a process ready for the next model of code, and may start it, or let it go, at any time."""
TCP = {socket.AF_INET, socket.AF_INET6}
ALL = {*TCP, socket.AF_UNIX}
OURS = ("pipe:", "/memfd:tether")
TEMPORARY = "/pytest-"
"""In the path of a file that is the test's. Others are a library's own: Dask's locks, ONNX Runtime's database, what Rust waits on."""


def begin():
    """libuv opens a pipe for the whole process with its first loop: now, lest the test be blamed that happens to make it."""
    uvloop.new_event_loop().close()


@dataclass(frozen=True)
class Held:
    """What this process has open."""

    descriptors: frozenset[tuple[int, str]]
    threads: frozenset[threading.Thread]

    @classmethod
    def now(cls):
        """In 0.1 ms."""
        return cls(frozenset(_descriptors()), frozenset(threading.enumerate()))

    def lost_since(self, *, alone):
        """What was opened meanwhile and will be closed by nobody. The collector runs only where something was opened.

        `alone`: no fixture of a wider scope may have opened it; else only connections to other processes are looked at.
        """
        alone = alone and not any(each.name == SPARES for each in threading.enumerate())
        end, lost = time.monotonic() + PATIENCE, self._more(alone)
        while lost and time.monotonic() < end:
            gc.collect()
            time.sleep(0.01)
            lost = self._more(alone)
        return lost

    def _more(self, alone):
        opened = _descriptors() - self.descriptors
        if opened:
            opened = _without_owner(opened, alone)
        threads = [each for each in threading.enumerate() if each not in self.threads] if alone else []
        return [
            *(f"{name} (descriptor {number})" for number, name in sorted(opened, key=itemgetter(1))),
            *(f"thread {each.name}" for each in threads if each.name not in LOOPS and not _waits_for_work(each)),
        ]


def _waits_for_work(thread):
    """Whether it belongs to a pool that has none for it: it ends with the pool, at the latest when that is collected."""
    frame = sys._current_frames().get(thread.ident)
    return frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) == (pools.__file__, "_worker")


def _descriptors():
    found = set()
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 (twice for each test: no objects)
        try:
            found.add((int(number), os.readlink(f"/proc/self/fd/{number}")))  # noqa: PTH115 (as above)
        except FileNotFoundError:  # the one that lists them, or one that was closed just now
            continue
    return found


def _without_owner(opened, alone):
    families, owned = _sockets_and_loops()

    def is_ours(number, name):
        if name.startswith("socket:"):
            return families.get(number) in (ALL if alone else TCP)
        return alone and (name.startswith(OURS) or TEMPORARY in name)

    return {(number, name) for number, name in opened if number not in owned and is_ours(number, name)}


def _sockets_and_loops():
    """Families of Python's sockets (others are a library's own), and what belongs to event loops that run: connections, too."""
    families, owned = {}, {resource_tracker._resource_tracker._fd}  # multiprocessing's, for as long as this process lives
    for each in gc.get_objects():
        kind = type(each)  # not isinstance: it would wake what stands in for a module that is loaded late
        if issubclass(kind, socket.socket):
            families[each.fileno()] = each.family
        elif issubclass(kind, asyncio.SelectorEventLoop) and each.is_running():
            owned |= {each._selector.fileno(), each._csock.fileno(), *each._selector._fd_to_key}
    return families, owned


async def unfinished():
    """Tasks of this loop that nobody ended."""
    end = time.monotonic() + PATIENCE
    while (left := asyncio.all_tasks() - {asyncio.current_task()}) and time.monotonic() < end:
        await asyncio.wait(left, timeout=0.1)
    return [str(task.get_coro()) for task in left]
