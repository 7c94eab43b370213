"""How many bytes of memory a model takes: measured when it is loaded and, of one in a process of its own, while it is used.

A code-format model has its runner: the proportional set size of that process and of what it started, so that libraries which several share
are counted once. A data-format model lives in the worker: what the worker grew by while it was loaded and ran its example, anonymous memory
and mapped files. One of them is loaded at a time for that, and those that would have to wait longer than a second for their turn are not
measured. Since the allocator may fill old holes, and the worker answers others meanwhile, it counts as no less than its files and no more
than three times these and 64 MiB.

On a graphics card a model is expected to take what its files do, and counts as what the driver says of its process from the first look on.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from tether.ports import LoadedModel
from tether.runtimes.tensors import trim_heap

__all__ = ["Files", "Footprints", "card_nbytes", "default_budget", "runner_nbytes"]

_TURN: Final = 1.0
"""Seconds that a load waits so that it can be measured."""
_SHARE: Final = 0.6
"""Of the machine's memory, for models: the other services, buffers, and what a run itself takes need the rest."""
_MOST_TIMES, _MOST_MORE = 3, 64 << 20


class Files(NamedTuple):
    """Of a model."""

    nbytes: int
    in_memory: bool
    """Whether they lie in memory themselves, as those of an encrypted model do."""


class _Resident(NamedTuple):
    anonymous: int
    mapped: int


class Footprints:
    """Of one worker's process."""

    def __init__(self) -> None:
        self._alone = threading.Lock()

    def brought(self, files: Files, bring: Callable[[], LoadedModel]) -> tuple[LoadedModel, int]:
        """The model that `bring` loads, and what it takes."""
        if not self._alone.acquire(timeout=_TURN):
            loaded = bring()
            return loaded, files.nbytes
        try:
            with contextlib.suppress(ImportError):  # a part of the worker, whichever model comes first; the load tells what is missing
                importlib.import_module("onnxruntime")
            before = _resident()
            loaded = bring()
            after = _resident()
        finally:
            self._alone.release()
        return loaded, _grown_by(files, _Resident(after.anonymous - before.anonymous, after.mapped - before.mapped))


def _grown_by(files: Files, grown: _Resident) -> int:
    if files.in_memory:  # what it maps of them is counted with them
        return files.nbytes + min(max(grown.anonymous, 0), 2 * files.nbytes + _MOST_MORE)
    return min(max(grown.anonymous + grown.mapped, files.nbytes), _MOST_TIMES * files.nbytes + _MOST_MORE)


def runner_nbytes(pid: int) -> int:
    """Of a process and those that it started; 0: it has ended."""
    total = 0
    for each in _family(pid):
        with contextlib.suppress(psutil.Error):
            memory = each.memory_full_info()
            total += getattr(memory, "pss", memory.uss)
    return total


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def card_nbytes(pid: int, users: Mapping[int, int]) -> int:
    """Of a process and those that it started. `users`: as `means.card_users`."""
    return sum(users.get(each.pid, 0) for each in _family(pid))


def default_budget(machine_nbytes: int, workers: int) -> int:
    """Bytes for the models of one of so many workers. `machine_nbytes`: of the machine, or of what its container may use."""
    return int(machine_nbytes * _SHARE) // max(workers, 1)


def _resident() -> _Resident:
    """Of this process, without what the allocator only keeps: a load leaves as much behind as the model takes, or fills what was left."""
    trim_heap()
    if not sys.platform.startswith("linux"):
        return _Resident(psutil.Process().memory_info().rss, 0)
    kib = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in {"RssAnon", "RssFile"}:
            kib[name] = int(value.split()[0])
    return _Resident(kib.get("RssAnon", 0) << 10, kib.get("RssFile", 0) << 10)
