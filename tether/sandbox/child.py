"""What runs inside the sandbox: a keeper (first process) that watches one worker (second process), which calls one function.

Started by file name under `python -I`, so that neither the environment nor the current folder chooses what is imported.  It may import
nothing but the standard library before the limits hold.  The keeper is there because a model may fork and `setsid` away from its process
group: as the subreaper it inherits what is left behind and ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class _StopError(Exception):
    """The parent wants the sandbox gone (SIGTERM)."""


def main() -> NoReturn:
    """Read the request from stdin, let a worker answer it on the descriptor it names, leave no process behind."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, _stop)
    request = json.loads(sys.stdin.buffer.read())
    if os.getppid() != request["parent"]:  # it died before the line above could ask to be told
        os._exit(1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    worker = os.fork()
    if worker == 0:
        _work(request)
    try:
        status = os.waitpid(worker, 0)[1]
    except _StopError:
        status = signal.SIGKILL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_descendants()
    os._exit(os.waitstatus_to_exitcode(status) % 256)


def _stop(_signum: int, _frame: object) -> NoReturn:
    raise _StopError


def _work(request: dict[str, Any]) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _confine(request["limits"])
    sys.path[:] = request["path"]
    answer = _answer(request["function"], request["argument"])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(request["answer"], "wb") as pipe:
            pipe.write(json.dumps(answer, allow_nan=False).encode())
    os._exit(0)  # not the interpreter's exit: libraries' threads and atexit hooks have been seen to hang there


def _confine(limits: dict[str, Any]) -> None:
    """By what lies beside this file, since nothing can be imported by name yet."""
    specification = importlib.util.spec_from_file_location("confinement", Path(__file__).with_name("confinement.py"))
    if specification is None or specification.loader is None:
        raise ImportError("the sandbox is not whole: install Tether again")
    confinement = importlib.util.module_from_spec(specification)
    sys.modules["confinement"] = confinement  # dataclasses look there
    specification.loader.exec_module(confinement)
    confinement.confine(confinement.Confinement(**limits))


def _answer(function: str, argument: Any) -> dict[str, Any]:
    try:
        module, _, name = function.partition(":")
        return {"value": getattr(importlib.import_module(module), name)(argument)}
    except MemoryError:
        return {"memory": True}
    except BaseException as error:  # whatever a model raises, SystemExit too, is an answer
        return _failure(error)


def _failure(error: BaseException) -> dict[str, Any]:
    code = getattr(error, "code", None)
    if any(base.__module__ == "tether.errors" for base in type(error).__mro__) and isinstance(code, str):
        return {"error": [code, *(_plain(value) for value in error.args)]}
    return {"raised": f"{type(error).__name__}: {str(error)[:2000]}"}


def _plain(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def _end_descendants() -> None:
    """Kill and reap until none is left; each one killed hands its own children to us, the subreaper."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            os.waitpid(-1, 0)


def _children() -> list[int]:
    """Pids whose parent is this process (`/proc/PID/stat`: the name, which may hold spaces, ends at the last bracket)."""
    me, found = str(os.getpid()), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1] == me:
                found.append(int(folder.name))
    return found


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the parent's own kill of the process group has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
