"""Starting a lab from another process (a notebook, `tether up --detach`) and finding the one that runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tether.config import DataFolder
from tether.errors import StartFailedError, TetherError, from_code
from tether.lab.supervisor import LAB_FILE, LOCK_FILE, START_TIMEOUT, UpSettings, supervise
from tether.telemetry.service import LIFELINE_ENV, READY_ENV

__all__ = ["Running", "UpSettings", "launch", "running", "settled", "supervise"]

_LAUNCH_TIMEOUT = START_TIMEOUT + 30.0
"""The supervisor gives up first and knows which service is late; this is for one that hangs itself."""
_STOP_TIMEOUT = 45.0
"""Four roles of ten seconds each, and a little."""


@dataclass(frozen=True, slots=True)
class Running:
    """A lab that runs on this machine."""

    gateway: str | None
    """`http://127.0.0.1:8000`."""
    data: DataFolder
    pid: int
    """Of the supervisor."""
    api_key: str
    version: str
    notes: tuple[str, ...] = ()
    """What differs from the default, one line each."""
    lifeline: int | None = None
    """The descriptor whose closing ends a bound lab."""
    child: subprocess.Popen[bytes] | None = None
    """The supervisor, where this process started it."""

    def stop(self, timeout: float = 30.0) -> None:
        """End the lab and wait until its processes are gone.

        Raises: StartFailedError: it still runs after `timeout` seconds.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while self._alive():
            if time.monotonic() > deadline:
                advice = f"see {self.data.logs}, end it with `kill -9 {self.pid}`"
                raise StartFailedError(f"the lab (pid {self.pid}) has not ended after {timeout:g} s; {advice}")
            time.sleep(0.02)
        if self.lifeline is not None:
            os.close(self.lifeline)

    def _alive(self) -> bool:
        if self.child is not None:
            return self.child.poll() is None
        return _held(self.data)


def running(data: DataFolder) -> Running | None:
    """The lab on this data folder; None when no supervisor holds its lock or it is not up yet."""
    if not _held(data):
        return None
    try:
        facts = json.loads((data.run / LAB_FILE).read_text())
        return _running(data, facts) if facts.get("ready") else None
    except (OSError, ValueError):
        return None


def _held(data: DataFolder) -> bool:
    """Whether a supervisor holds the lock of the data folder."""
    try:
        with (data.run / LOCK_FILE).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def settled(data: DataFolder, timeout: float = START_TIMEOUT) -> bool:
    """Wait while a lab starts on the data folder: True when it is up or was given up, False when neither came in time."""
    deadline = time.monotonic() + timeout
    while _held(data) and running(data) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _running(data: DataFolder, facts: dict[str, Any], child: subprocess.Popen[bytes] | None = None, lifeline: int | None = None) -> Running:
    key = data.api_key.read_text().strip()
    return Running(facts["gateway"], data, facts["pid"], key, facts["version"], tuple(facts["notes"]), lifeline, child)


def launch(settings: UpSettings, *, bound: bool) -> Running:
    """Start a lab in a process of its own and wait until all of it answers. `bound`: it ends when this process does, however that ends.

    Raises: LabRunningError, PortBusyError, StartFailedError, ConfigError.
    """
    settings.data.create()
    log = settings.data.logs / "supervisor.log"
    ready_read, ready_write = os.pipe()
    lifeline_read, lifeline_write = os.pipe() if bound else (None, None)
    child = None
    try:
        child = _spawned(settings, log, {READY_ENV: ready_write, LIFELINE_ENV: lifeline_read})
        return _running(settings.data, _await_ready(ready_read, log), child, lifeline_write)
    except BaseException:  # Ctrl-C too: a start that nobody waits for any more leaves nothing
        if lifeline_write is not None:
            os.close(lifeline_write)
        if child is not None:
            _end(child)
        raise
    finally:
        os.close(ready_read)


def _spawned(settings: UpSettings, log_path: Path, ends: dict[str, int | None]) -> subprocess.Popen[bytes]:
    """The supervisor. `ends`: environment variable → the end of a pipe that it gets, and that is closed here."""
    passed = {name: end for name, end in ends.items() if end is not None}
    try:
        with log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tether.lab.launch", _encode(settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {name: str(end) for name, end in passed.items()} | {"PYTHONUNBUFFERED": "1"},
                pass_fds=tuple(passed.values()),
                start_new_session=True,
            )
    finally:
        for end in passed.values():
            os.close(end)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        child.kill()  # its services end with it
        child.wait()


def _await_ready(descriptor: int, log: Path) -> dict[str, Any]:
    if not select.select([descriptor], [], [], _LAUNCH_TIMEOUT)[0]:
        raise StartFailedError(f"the lab is not up after {_LAUNCH_TIMEOUT:g} s; see {log}")
    with os.fdopen(descriptor, "rb", closefd=False) as pipe:
        line = pipe.readline()
    facts: dict[str, Any] = json.loads(line) if line else {"error": ["start_failed", f"the lab's supervisor died; see {log}"]}
    if "error" in facts:
        raise from_code(*facts["error"])
    return facts


def _encode(settings: UpSettings) -> str:
    return json.dumps(asdict(settings) | {"data": str(settings.data.root)})


def _main() -> int:
    """The supervisor as a child: an error that stops it goes to whoever waits for the ready line."""
    facts = json.loads(sys.argv[1])
    settings = UpSettings(**facts | {"data": DataFolder(Path(facts["data"]))})
    descriptor = int(os.environ[READY_ENV])
    try:
        return supervise(settings)
    except TetherError as error:
        with contextlib.suppress(OSError):  # it was ready once and said so: the pipe is closed, the log has the rest
            os.write(descriptor, json.dumps({"error": [error.code, str(error)]}).encode() + b"\n")
        sys.stderr.write(f"error: {error} [{error.code}]\n")
        return 1


if __name__ == "__main__":
    sys.exit(_main())
