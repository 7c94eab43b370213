"""Starts the user's own manager where none runs: without a lab, one for each data folder, gone a minute after its last client."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tether.config import DataFolder
from tether.errors import ServiceUnavailableError, StartFailedError
from tether.manager.locks import TAKEN, is_locked
from tether.telemetry.service import READY_ENV

__all__ = ["start_manager"]

_POLL: Final = 0.02
_LOG_LINES: Final = 15


def start_manager(folder: DataFolder, timeout: float, bootstrap: str | None = None) -> bool:
    """Start one, and wait until it answers. Blocks. `bootstrap`: nodes by which it enters the swarm, where not those of the environment.

    False: nothing was started: by now one listens, or somebody has the folder: a lab, whose manager will answer, or a program that writes
    its store.
    Raises: StartFailedError: it ended, or does not answer after `timeout` seconds; with the end of its log.
    """
    deadline = time.monotonic() + timeout
    with _turn(folder.run / "manager.start", deadline):
        if _listens(folder.door) or is_locked(folder.lab_lock) or is_locked(folder.store / "writer.lock"):
            return False
        return _started(folder, deadline, bootstrap)


@contextmanager
def _turn(path: Path, deadline: float) -> Iterator[None]:
    """One start at a time: who waited finds what the other one started."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServiceUnavailableError(f"another process is still starting the manager ({path}): call again") from None
                time.sleep(_POLL)
        yield


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _started(folder: DataFolder, deadline: float, bootstrap: str | None) -> bool:
    log = folder.logs / "manager.log"
    begin = log.stat().st_size if log.exists() else 0
    reader, writer = os.pipe()
    try:
        try:
            child = _spawned(folder, log, writer, bootstrap)
        finally:
            os.close(writer)
        threading.Thread(target=child.wait, name="tether-manager", daemon=True).start()  # who waits for no child leaves a zombie
        seconds = max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], seconds)[0]:
            child.terminate()
            raise StartFailedError(f"the manager of {folder.root} does not answer; the end of {log}:\n{_tail(log, begin)}")
        if os.read(reader, 1):
            return True
    finally:
        os.close(reader)
    if child.wait() == TAKEN:
        return False
    raise StartFailedError(f"the manager of {folder.root} does not start; the end of {log}:\n{_tail(log, begin)}")


def _spawned(folder: DataFolder, log_path: Path, ready: int, bootstrap: str | None) -> subprocess.Popen[bytes]:
    nodes = ["--bootstrap", bootstrap] if bootstrap else []
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tether", "manager", "--alone", "--data", str(folder.root), *nodes],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {READY_ENV: str(ready), "PYTHONUNBUFFERED": "1"},
            pass_fds=(ready,),
            start_new_session=True,  # an interrupt of the notebook is not for it: others may use it
        )


def _tail(log: Path, begin: int) -> str:
    try:
        with log.open("rb") as file:
            file.seek(begin)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return f"(it can't be read: {error.strerror})"
    return "\n".join(lines[-_LOG_LINES:]) or "(nothing)"
