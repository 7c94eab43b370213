"""The parent's side of the sandbox: start it, feed it, watch time and memory, read its answer, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Self

from tether.errors import BadModelError, TetherError, from_code
from tether.sandbox import child
from tether.sandbox.tree import Tree

__all__ = ["Limits", "arun", "run"]

_TICK = 0.1
"""Seconds between looks at memory: at 1 GB/s a model passes its limit by 100 MB before it is seen."""
_GRACE = 5.0
"""Seconds the keeper has to end what a model left behind before it is killed itself."""
_TAIL_NBYTES = 8192
"""How much of the model's own output is kept for the error; the rest is read and dropped, so that a flood neither blocks nor fills us."""
_ANSWER_NBYTES = 64 << 20
"""A longer answer is a model that tells stories; the metadata of a model with 100,000 inputs takes 10 MB."""
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ", "KERAS_BACKEND")
"""All else of the environment stays out: API keys and tokens live there."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use."""

    seconds: float = 60.0
    """Wall clock, start of the process included (TensorFlow's import alone takes 4–10 s)."""
    memory_nbytes: int = 4 << 30
    """Private memory of each process, and resident memory of all of them together."""
    file_nbytes: int = 256 << 20
    """Largest file that may be written."""
    cpu_seconds: float | None = None
    """Processor time of each process; None: two cores' worth of `seconds`."""
    network: bool = False
    """Whether it may open sockets that lead elsewhere."""
    scratch: str | None = None
    """The folder that its own scratch folder is made in; None: the system's for temporary files. In memory, for what no disk may see."""


def run(function: str, argument: Any, *, limits: Limits | None = None) -> Any:
    """Call `function` (`"package.module:name"`) with one JSON value in a process of its own; its JSON answer.

    Blocks. An error of our tree that the function raises is raised here as itself.

    Raises:
        BadModelError: it took too long, ran out of memory, crashed, raised something foreign, or answered nothing that is JSON.
    """
    return _run(function, argument, limits or Limits(), threading.Event())


async def arun(function: str, argument: Any, *, limits: Limits | None = None) -> Any:
    """`run` without blocking the loop; cancelling it ends the process."""
    stop = threading.Event()
    work = asyncio.ensure_future(asyncio.to_thread(_run, function, argument, limits or Limits(), stop))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(TetherError):
            await work
        raise


def _run(function: str, argument: Any, limits: Limits, stop: threading.Event) -> Any:
    scratch = tempfile.mkdtemp(prefix="tether-sandbox-", dir=limits.scratch)
    try:
        with _Sandbox.start(function, argument, limits, scratch) as sandbox:
            ending = sandbox.watch(stop)
        return _outcome(sandbox, ending)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(slots=True)
class _Sandbox:
    process: subprocess.Popen[bytes]
    answer_fd: int
    limits: Limits
    deadline: float
    answer: bytearray = field(default_factory=bytearray)
    tail: bytes = b""
    looked: float = 0.0
    """When memory was last measured."""

    @classmethod
    def start(cls, function: str, argument: Any, limits: Limits, scratch: str) -> _Sandbox:
        answer_fd, child_fd = os.pipe()
        deadline = time.monotonic() + limits.seconds
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(child.__file__)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env=_environment(scratch),
                pass_fds=(child_fd,),
                start_new_session=True,
            )
        except BaseException:
            os.close(answer_fd)
            raise
        finally:
            os.close(child_fd)
        sandbox = cls(process, answer_fd, limits, deadline)
        sandbox._send(_request(function, argument, limits, child_fd))
        return sandbox

    def _send(self, request: bytes) -> None:
        """A child that died already is reported by `watch`."""
        assert self.process.stdin is not None  # noqa: S101 (Popen was given PIPE)
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(request)

    def watch(self, stop: threading.Event) -> str | None:
        """Read both pipes until every process is gone; None, or why the sandbox has to be ended."""
        assert self.process.stdout is not None  # noqa: S101 (Popen was given PIPE)
        with selectors.DefaultSelector() as selector:
            selector.register(self.answer_fd, selectors.EVENT_READ)
            selector.register(self.process.stdout.fileno(), selectors.EVENT_READ)
            while selector.get_map():
                ending = self._over_a_limit(stop)
                if ending:
                    return ending
                for key, _ in selector.select(_TICK):
                    chunk = os.read(key.fd, 65536)
                    if not chunk:
                        selector.unregister(key.fd)
                    elif key.fd == self.answer_fd:
                        self.answer += chunk
                    else:
                        self.tail = (self.tail + chunk)[-_TAIL_NBYTES:]
        return None

    def _over_a_limit(self, stop: threading.Event) -> str | None:
        if stop.is_set():
            return "was cancelled"
        if time.monotonic() > self.deadline:
            return f"took longer than {self.limits.seconds:g} s"
        if len(self.answer) > _ANSWER_NBYTES:
            return f"describes itself in more than {_mib(_ANSWER_NBYTES)}"
        if time.monotonic() > self.looked + _TICK:  # it costs milliseconds, and a flood of output comes by here for each chunk
            self.looked = time.monotonic()
            if Tree.of(self.process.pid).nbytes > self.limits.memory_nbytes:
                return f"needs more than {_mib(self.limits.memory_nbytes)} of memory"
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The keeper ends what is left; if it can't, its process group is killed."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.answer_fd)
        if self.process.stdout:
            self.process.stdout.close()


def _request(function: str, argument: Any, limits: Limits, answer_fd: int) -> bytes:
    memory = limits.memory_nbytes
    # CPU time too, since it holds even where this process is killed.
    cpu = 2 * limits.seconds if limits.cpu_seconds is None else limits.cpu_seconds
    request = {
        "function": function,
        "argument": argument,
        "parent": os.getpid(),
        "answer": answer_fd,
        "path": [os.path.abspath(entry) for entry in sys.path],  # noqa: PTH100 (Path.resolve would follow links of virtual environments)
        "limits": {
            "memory_nbytes": memory,
            "file_nbytes": limits.file_nbytes,
            "cpu_seconds": int(cpu) + 1,
            "network": limits.network,
            "signals": False,
        },
    }
    return json.dumps(request).encode()


def _environment(scratch: str) -> dict[str, str]:
    """No secrets, no graphics card, no caches in the user's home."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**passed, "HOME": scratch, "TMPDIR": scratch, "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}


def _outcome(sandbox: _Sandbox, ending: str | None) -> Any:
    if ending:
        raise BadModelError(f"the model {ending} in the sandbox{_said(sandbox)}")
    if not sandbox.answer:
        raise BadModelError(f"the model {_death(sandbox.process.returncode)} in the sandbox{_said(sandbox)}")
    try:
        answer = json.loads(sandbox.answer)
        kind, value = next(iter(answer.items()))
    except (ValueError, AttributeError, StopIteration):
        raise BadModelError(f"the model wrote over the sandbox's answer{_said(sandbox)}") from None
    match kind:
        case "value":
            return value
        case "error":
            raise from_code(*value)
        case "memory":
            raise BadModelError(f"the model needs more than {_mib(sandbox.limits.memory_nbytes)} of memory in the sandbox{_said(sandbox)}")
        case _:
            raise BadModelError(f"the model can't be read: {value}{_said(sandbox)}")


def _death(returncode: int) -> str:
    number = -returncode % 256  # the keeper's exit status is its worker's, a signal negative, modulo 256
    if number == signal.SIGKILL:
        return "was killed (signal 9, SIGKILL: mostly for want of memory)"
    if number == signal.SIGXCPU:
        return "used up its processor time (SIGXCPU)"
    with contextlib.suppress(ValueError):
        return f"crashed (signal {number}, {signal.Signals(number).name})"
    return f"ended its process (exit status {returncode})"


def _said(sandbox: _Sandbox) -> str:
    """The last lines that the model printed, as a tail of the message."""
    lines = sandbox.tail.decode(errors="replace").split("\n")
    kept = [line.strip()[:300] for line in lines if line.strip()][-4:]
    return f"; its last words: {' | '.join(kept)}" if kept else ""


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):g} MiB"
