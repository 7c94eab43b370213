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
from tether.lab.supervisor import LAB_FILE, LOCK_FILE, UpSettings, supervise
from tether.telemetry.service import LIFELINE_ENV, READY_ENV

__all__ = ["Running", "UpSettings", "launch", "running", "supervise"]

_START_TIMEOUT = 60.0


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
        return running(self.data) is not None


def running(data: DataFolder) -> Running | None:
    """The lab on this data folder; None when no supervisor holds its lock or it is not up yet."""
    try:
        with (data.run / LOCK_FILE).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except OSError:
        pass
    try:
        return _running(data, json.loads((data.run / LAB_FILE).read_text()))
    except (OSError, ValueError):
        return None


def _running(data: DataFolder, facts: dict[str, Any], child: subprocess.Popen[bytes] | None = None, lifeline: int | None = None) -> Running:
    key = data.api_key.read_text().strip()
    return Running(facts["gateway"], data, facts["pid"], key, facts["version"], tuple(facts["notes"]), lifeline, child)


def launch(settings: UpSettings, *, bound: bool) -> Running:
    """Start a lab in a process of its own and wait until all of it answers. `bound`: it ends when this process does, however that ends.

    Raises: LabRunningError, PortBusyError, StartFailedError, ConfigError.
    """
    settings.data.create()
    lifeline_read, lifeline_write = os.pipe() if bound else (None, None)
    ready_read, ready_write = os.pipe()
    with (settings.data.logs / "supervisor.log").open("ab") as log:
        passed = [ready_write] if lifeline_read is None else [ready_write, lifeline_read]
        environment = os.environ | {READY_ENV: str(ready_write), "PYTHONUNBUFFERED": "1"}
        if lifeline_read is not None:
            environment[LIFELINE_ENV] = str(lifeline_read)
        child = subprocess.Popen(
            [sys.executable, "-m", "tether.lab.launch", _encode(settings)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=passed,
            start_new_session=True,
        )
    for descriptor in passed:
        os.close(descriptor)
    facts = _await_ready(ready_read, child, settings.data.logs / "supervisor.log")
    return _running(settings.data, facts, child, lifeline_write)


def _await_ready(descriptor: int, child: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    with os.fdopen(descriptor, "rb") as pipe:
        if not select.select([pipe], [], [], _START_TIMEOUT)[0]:
            child.terminate()
            raise StartFailedError(f"the lab is not up after {_START_TIMEOUT:g} s; see {log}")
        line = pipe.readline()
    facts: dict[str, Any] = json.loads(line) if line else {"error": ["start_failed", f"the lab's supervisor died; see {log}"]}
    if "error" in facts:
        child.wait()
        code, message = facts["error"]
        raise from_code(code, message)
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
