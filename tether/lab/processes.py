"""One service process under supervision: start, wait until it answers, start again when it dies, stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tether.errors import StartFailedError
from tether.lab.nursery import Birth, Child, Nursery
from tether.telemetry.service import LIFELINE_ENV, READY_ENV

__all__ = ["Process", "ServiceSpec"]

_LOG_NBYTES = 10 << 20
"""A log is put aside at start when it is larger."""
_BACKOFF = (0.0, 0.2, 0.5, 1.0)
"""Seconds before the next start after n deaths in a row; from the start again once it has lived `_STEADY` seconds.

No longer than a second: what is killed again and again must be back at once each time; what never answered is given up before that.
"""
_STEADY = 30.0
_FIRST_TRIES = 3
"""Deaths before the first ready line that end the whole start."""
_WORDS = 300
"""Characters of the last line that a service said."""
_REAP = 5.0
"""Seconds for a killed process to be gone."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """What to run."""

    name: str
    role: Literal["gateway", "orchestrator", "manager", "worker"]
    arguments: Sequence[str]
    """After `python -m tether`."""
    inherit: Sequence[int] = ()
    """Descriptors that the process gets under the same numbers."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Besides this process' own."""


class Process:
    """Keeps one service running until `stop`."""

    def __init__(self, spec: ServiceSpec, log_path: Path, lifeline: int, on_change: Callable[[], None], nursery: Nursery) -> None:
        self.spec, self.log_path, self._nursery = spec, log_path, nursery
        self.state: Literal["starting", "running", "restarting", "stopped"] = "starting"
        self.since = time.time()
        self.restarts = 0
        self.error = ""
        """How the process before this one ended; "": there was none."""
        self.facts: dict[str, Any] = {}
        """What the service said of itself: its address."""
        self._lifeline, self._on_change = lifeline, on_change
        self._child: asyncio.subprocess.Process | Child | None = None
        self._ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    @property
    def answered(self) -> bool:
        """Whether it was ready once."""
        return self._ready.is_set()

    def start(self) -> None:
        """Begin to keep it running."""
        self._keeper = asyncio.create_task(self._keep())

    async def ready(self) -> None:
        """Wait until it has answered once.

        Raises: StartFailedError: it dies again and again; the message ends with its log.
        """
        keeper = self._keeper
        if keeper is None:
            raise StartFailedError(f"{self.spec.name} was not started")
        answered = asyncio.ensure_future(self._ready.wait())
        try:
            await asyncio.wait([answered, keeper], return_when=asyncio.FIRST_COMPLETED)
        finally:
            answered.cancel()
        if not self._ready.is_set():
            raise self.failure("does not start")

    def failure(self, what: str) -> StartFailedError:
        """The error that says what it does not do, with the end of its log."""
        return StartFailedError(f"{self.spec.name} {what}; the end of {self.log_path}:\n{self._log_tail()}")

    async def _keep(self) -> None:
        deaths = 0
        while not self._stopping.is_set():
            begun = time.monotonic()
            await self._attempt()
            if self._stopping.is_set():
                break
            deaths = 0 if time.monotonic() - begun > _STEADY else deaths + 1
            if not self._ready.is_set() and deaths >= _FIRST_TRIES:
                break
            self.restarts += 1
            self.error = self._end()
            self._change("restarting")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _BACKOFF[min(deaths, len(_BACKOFF) - 1)])
        self._change("stopped")

    async def _attempt(self) -> None:
        """One life of the service. What keeps it from starting (no descriptors, no memory left) may pass: it counts as a death, no more."""
        try:
            await self._run_once()
        except Exception:
            _log.exception("%s could not be started", self.spec.name)

    async def _run_once(self) -> None:
        with _pipe() as (ready_read, ready_write):
            child = self._child = await self._spawned(ready_write.fileno())
            ready_write.close()  # the child's end is the last: its death ends the line
            listening = asyncio.create_task(self._listen(ready_read))
            try:
                if self._stopping.is_set():  # `stop` came during the start and had nobody to tell
                    self._signal(signal.SIGTERM)
                await child.wait()
            finally:
                self._signal(signal.SIGKILL)  # cancelled: nothing runs on without its keeper
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)

    async def _spawned(self, ready: int) -> asyncio.subprocess.Process | Child:
        environ = {**self.spec.environ, READY_ENV: str(ready), LIFELINE_ENV: str(self._lifeline), "PYTHONUNBUFFERED": "1"}
        descriptors = (ready, self._lifeline, *self.spec.inherit)
        with _opened(self.log_path) as log_file:
            targets = {1: log_file.fileno(), 2: log_file.fileno()} | {number: number for number in descriptors}
            if (child := await self._nursery.born(Birth(self.spec.arguments, environ, targets))) is not None:
                return child
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tether",
                *self.spec.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env=os.environ | environ,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C in a terminal goes to the supervisor alone, which ends them in order
            )

    async def _listen(self, pipe: Any) -> None:
        """The ready line, or the end of the pipe."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            line = await reader.readline()
            if line:
                self.facts = json.loads(line)
                self._change("running")
                self._ready.set()
        finally:
            transport.close()

    def _change(self, state: Literal["starting", "running", "restarting", "stopped"]) -> None:
        self.state, self.since = state, time.time()
        self._on_change()

    async def stop(self, grace: float) -> None:
        """SIGTERM, and SIGKILL when it has not ended after `grace` seconds."""
        self._stopping.set()
        keeper = self._keeper
        if keeper is None:
            return
        self._signal(signal.SIGTERM)
        if not (await asyncio.wait([keeper], timeout=grace))[0]:
            self._signal(signal.SIGKILL)
            await asyncio.wait([keeper], timeout=_REAP)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)

    def _signal(self, number: signal.Signals) -> None:
        """To the process that runs now, if one does."""
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)

    def _end(self) -> str:
        """How the process ended that nobody told to; of one that was forked only its log can tell."""
        code = self._child.returncode if self._child is not None else None
        if code is not None and code < 0:
            known = {each.value: each.name for each in signal.Signals}
            return f"ended by {known.get(-code, f'signal {-code}')}"  # most real-time ones have no name
        return f"{'could not be started' if code is None else 'ended'}; its last words: {self._last_words()}"

    def _last_words(self) -> str:
        last = "".join(self._log_tail().splitlines()[-1:])
        with contextlib.suppress(ValueError, KeyError, TypeError):  # no line of ours
            last = json.loads(last)["message"]
        return last[:_WORDS] or "none"

    def _log_tail(self) -> str:
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:])
        except OSError:
            return "(no log)"


def _opened(path: Path) -> BinaryIO:
    """The log, or nothing's: a service runs on where its log can't be written."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > _LOG_NBYTES:
            path.replace(path.with_name(path.name + ".1"))
    try:
        return path.open("ab")
    except OSError as error:
        _log.warning("the log %s can't be written (%s): this run has none", path, error.strerror)
        return Path(os.devnull).open("ab")


@contextmanager
def _pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """Read end and write end, both closed at the end whatever happens."""
    reader, writer = os.pipe()
    with FileIO(reader, "rb") as read_end, FileIO(writer, "wb") as write_end:
        yield read_end, write_end
