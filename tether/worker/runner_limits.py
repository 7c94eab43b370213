"""What the process of a model may use: what it takes on itself (`sandbox.confinement`), and what is looked at from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import psutil
from dask.utils import parse_bytes

from tether.config import has_cards
from tether.errors import ConfigError
from tether.sandbox.confinement import Confinement
from tether.sandbox.tree import Tree
from tether.security.volatile import SETTING
from tether.worker.footprint import runner_nbytes

__all__ = ["RunnerLimits", "Scratch", "end_strays", "runner_watch"]

_log = logging.getLogger("tether.worker.runner")
_LOOK: Final = 0.25
"""Seconds between looks at a run that lasts longer than that: at 1 GB/s it passes its limit by 250 MB before it is seen."""
_SHARE: Final = 0.8
"""Of the machine's memory for one model's process, where nothing is said: with more the kernel chooses whom to end."""
_THREADS: Final = 16_384
"""That may come beside a runner's own: the kernel's bound (RLIMIT_NPROC) counts all threads of the user, other models' later ones too."""
_PROCESSES: Final = 256
"""That one model may start: compilers, loaders of data. A fork bomb has more within a tenth of a second."""
_MARK: Final = "TETHER_RUNNER"
_PREFIX: Final = "tether-runner-"
_PASSES: Final = 5


@dataclasses.dataclass(frozen=True, slots=True)
class RunnerLimits:
    """Of each process."""

    memory_nbytes: int
    """Resident memory of all together, and private memory of each (not where there are graphics cards: drivers reserve what they don't
    use)."""
    processes: int = _PROCESSES
    network: bool = False
    """Whether a model may open sockets that lead elsewhere."""
    writable: tuple[str, ...] = ()
    """Folders in which it may write, beside a scratch folder of its own and what lies in memory."""

    @classmethod
    def default(cls) -> RunnerLimits:
        """Where nothing is said."""
        return cls(int(psutil.virtual_memory().total * _SHARE))

    @classmethod
    def configured(cls, settings: Mapping[str, Any], machine_nbytes: int) -> RunnerLimits:
        """`settings`: `tether.runner` of Dask's configuration: memory, processes, network, writable. Raises: ConfigError."""
        unknown = settings.keys() - {"memory", "processes", "network", "writable"}
        memory, processes = settings.get("memory"), settings.get("processes", _PROCESSES)
        network, writable = settings.get("network", False), settings.get("writable", [])
        try:
            nbytes = int(machine_nbytes * _SHARE) if memory is None else int(parse_bytes(memory))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"tether.runner.memory is {memory!r}: give a number of bytes, as 8GiB ({error})") from None
        if unknown or type(processes) is not int or processes < 1 or type(network) is not bool or not isinstance(writable, list):
            raise ConfigError(
                f"tether.runner is {dict(settings)!r}: give memory (8GiB), processes (256), network (true or false), writable (folders)"
            )
        return cls(nbytes, processes, network, tuple(str(Path(folder).expanduser()) for folder in writable))

    def argument(self, scratch: str) -> str:
        """What the process takes on itself, as `runner_start` reads it."""
        memory = None if has_cards() else self.memory_nbytes
        in_memory = os.environ.get(SETTING)
        writable = [scratch, "/dev", *([in_memory] if in_memory else []), *self.writable]
        present = [folder for folder in writable if Path(folder).is_dir()]
        taken = Confinement(memory, self.memory_nbytes, None, _THREADS + 4 * self.processes, present, self.network, signals=False)
        return json.dumps(dataclasses.asdict(taken))

    def exceeded_by(self, pid: int) -> str | None:
        """How the process and what came of it do now, if they do."""
        tree = Tree.of(pid)
        if tree.processes > self.processes:
            return f"started more than {self.processes} processes (tether.runner.processes)"
        if tree.nbytes > self.memory_nbytes and (tree.processes == 1 or runner_nbytes(pid) > self.memory_nbytes):
            return f"needed more than {self.memory_nbytes / (1 << 20):g} MiB of memory (tether.runner.memory)"
        return None


class Scratch:
    """A folder that is removed with its process, and the mark by which all that came of the process is known."""

    def __init__(self) -> None:
        _sweep()
        self.path = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")

    @property
    def environment(self) -> dict[str, str]:
        """Of the process."""
        return {"TMPDIR": self.path, _MARK: self.path}

    def remove(self) -> None:
        """A second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)


@functools.cache
def _sweep() -> None:
    """Once: remove what workers left that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def end_strays(scratch: Scratch) -> None:
    """Kill what came of a process that has ended, wherever it went: by the mark in its environment, which children inherit."""
    for _ in range(_PASSES):
        strays = [process for process in psutil.process_iter() if _is_of(process, scratch)]
        for stray in strays:
            with contextlib.suppress(psutil.Error):
                stray.kill()
        if not strays:
            return


def _is_of(process: psutil.Process, scratch: Scratch) -> bool:
    try:
        return process.environ().get(_MARK) == scratch.path and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


class Watched(Protocol):
    """A process that runs a model."""

    limits: RunnerLimits
    busy_since: float | None
    """Since when it does what it was asked; None: nothing."""

    @property
    def pid(self) -> int: ...

    def exceed(self, how: str) -> None:
        """It is over a limit: end it."""
        ...


class RunnerWatch:
    """One thread looks at all processes whose run lasts; while none runs it sleeps."""

    def __init__(self) -> None:
        self._all: set[Watched] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        threading.Thread(target=self._serve, name="runner-watch", daemon=True).start()

    def add(self, process: Watched) -> None:
        with self._lock:
            self._all.add(process)

    def remove(self, process: Watched) -> None:
        with self._lock:
            self._all.discard(process)

    def wake(self) -> None:
        """Some process was asked something."""
        if not self._wake.is_set():
            self._wake.set()

    def _serve(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while busy := self._busy():
                time.sleep(_LOOK)
                for process in busy:
                    since = process.busy_since
                    if since is not None and time.monotonic() - since >= _LOOK:
                        self._look(process)

    def _busy(self) -> list[Watched]:
        with self._lock:
            return [process for process in self._all if process.busy_since is not None]

    def _look(self, process: Watched) -> None:
        try:
            how = process.limits.exceeded_by(process.pid)
        except Exception:  # no descriptor is left to look with, say; whoever looks is needed again
            _log.exception("a runner's use could not be looked at", extra={"pid": process.pid})
            return
        if how is not None:
            process.exceed(how)


@functools.cache
def runner_watch() -> RunnerWatch:
    """Of this process."""
    return RunnerWatch()
