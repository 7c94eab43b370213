"""The worker's end of a runner process: starts it, asks it, logs what it prints, ends it."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from tether.errors import from_code
from tether.runtimes.arena import Arena
from tether.runtimes.arrivals import Arrivals
from tether.types import Framework, Tensors
from tether.worker.runner_limits import RunnerLimits, Scratch, end_strays, runner_watch
from tether.worker.runner_wire import (
    REPLIES,
    Begin,
    DeadError,
    Done,
    Ended,
    Failed,
    Grown,
    Leave,
    Load,
    Run,
    Step,
    Warm,
    Whole,
    receive,
    send,
)

__all__ = ["RunnerProcess"]

_log = logging.getLogger("tether.worker.runner")
_START = "tether.worker.runner_start"
_TAIL_LINES = 4
"""Lines of a runner's own output that go into the error about its death."""
_EXIT_SECONDS = 2.0
"""For a killed process to be gone; longer only where something that it started holds its output open."""


class RunnerProcess:
    """The parent's end of one runner process."""

    def __init__(
        self, popen: subprocess.Popen[bytes], connection: socket.socket, arenas: tuple[Arena, Arena], limits: RunnerLimits, scratch: Scratch
    ) -> None:
        self._popen, self._socket, self.limits, self._scratch = popen, connection, limits, scratch
        self._out, self._in = arenas
        self.busy_since: float | None = None
        self.exceeded = ""
        """How it went over a limit, or hung up, and was ended for."""
        self._closing = threading.Lock()
        self._is_closed = False
        self._owed = 0
        """Answers that were not waited for."""
        self._between = threading.Lock()
        """Held where a run begins or ends, and by who interrupts it: an interrupt meets the run that it is meant for, or none."""
        self._interrupts: int | None = None
        """How often the run that goes on was interrupted; None between runs."""
        self._opened = 0
        """Streams so far."""
        self.was_ended = False
        """Whether it, or the run that goes on, was told to end."""
        self.is_discreet = False
        """Whether its output is dropped: it may tell what is in an encrypted model."""
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._reader = threading.Thread(target=self._log_output, name=f"runner-log-{popen.pid}", daemon=True)
        self._reader.start()
        runner_watch().add(self)

    @classmethod
    def start(cls, limits: RunnerLimits) -> RunnerProcess:
        """A process that waits for a model; returns before it runs."""
        scratch = Scratch()
        mine, theirs = socket.socketpair()
        arenas = Arena.new(), Arena.new()
        fds = (theirs.fileno(), arenas[0].fd, arenas[1].fd)
        try:
            command = [sys.executable, "-P", "-m", _START, limits.argument(scratch.path), str(os.getpid()), *map(str, fds)]
            popen = _spawn(command, fds, scratch.environment)
        except BaseException:
            mine.close()
            for arena in arenas:
                arena.close()
            scratch.remove()
            raise
        finally:
            theirs.close()
        return cls(popen, mine, arenas, limits, scratch)

    def warm(self, framework: Framework) -> None:
        """Let it import the framework's library; does not wait for that."""
        with contextlib.suppress(DeadError):  # whoever takes it finds out
            send(self._socket, Warm(framework))
            self._owed += 1

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_warm(self) -> bool:
        """Whether it lives, once it has done what it was told before; waits for that."""
        try:
            while self._owed:
                receive(self._socket, REPLIES)
                self._owed -= 1
        except DeadError:
            return False
        return self._popen.poll() is None

    def ask(self, message: Load | Run | Whole | Begin | Step | Leave) -> Done | None:
        """Send it, and wait for its answer. None: `Ended`.

        Raises: DeadError; the error of the tree that the runner answered.
        """
        self.busy_since = time.monotonic()
        runner_watch().wake()
        try:
            send(self._socket, message)
            reply = receive(self._socket, REPLIES)
        finally:
            self.busy_since = None
        match reply:
            case Done() as done:
                return done
            case Ended():
                return None
            case Failed(code, args):
                raise from_code(code, *args)

    def ask_arriving(self, message: Load, arrivals: Arrivals) -> None:
        """As `ask`, of a load whose files are still coming: passes on how far they are. Raises: what `arrivals` raises besides."""
        send(self._socket, message)
        for folder, files in arrivals.changes():
            send(self._socket, Grown(str(folder or message.path), files))
        self.ask(Whole())

    def run(self, inputs: Tensors) -> Tensors:
        return self._run(Run(self._out.write(inputs))) or {}

    def begin(self, inputs: Tensors) -> int:
        """Open a stream; its number."""
        self.was_ended = False
        self._opened += 1
        self.ask(Begin(self._opened, self._out.write(inputs)))
        return self._opened

    def step(self, stream: int) -> Tensors | None:
        """Its next part; None: it has no more."""
        return self._run(Step(stream))

    def leave(self, stream: int) -> None:
        """End it before its end."""
        self._run(Leave(stream))

    def _run(self, message: Run | Step | Leave) -> Tensors | None:
        """What makes the model's own code run, until it is interrupted."""
        with self._between:
            self._interrupts, self.was_ended = 0, False
        try:
            done = self.ask(message)
        finally:
            with self._between:
                self._interrupts = None
        return None if done is None else self._in.read(done.tensors, copy=True)

    def interrupt(self) -> None:
        """End the run that goes on, if any; kill the process if it was told so before and did not."""
        with self._between:
            if self._interrupts is None:
                return
            self._interrupts += 1
            if self._interrupts > 1:
                self.kill()
            else:
                self.was_ended = True  # if it ends of that
                self._popen.send_signal(signal.SIGINT)

    @property
    def died_by_itself(self) -> bool:
        """Whether what it ran may be why it ended: SIGKILL comes from outside, but for what it exceeded."""
        return bool(self.exceeded) or self._popen.returncode != -signal.SIGKILL

    def exceed(self, how: str) -> None:
        """It is over a limit: end it. From another thread."""
        self.exceeded = how
        self._kill()

    def kill(self) -> None:
        """End it and whatever it started."""
        self.was_ended = True
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def end(self) -> str:
        """Clean up after a process that went away by itself; how it ended, and its last words."""
        try:
            self._popen.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.exceeded = self.exceeded or "it hung up and did not end"
        self.close()
        status = self._popen.returncode
        how = self.exceeded or (f"signal {-status}" if status < 0 else f"exit status {status}")
        said = " | ".join(line[:300] for line in self._tail)
        return f"{how}; its last words: {said}" if said else how

    def close(self) -> None:
        """End it and free the shared memory; a second call does nothing, also beside the first: the model is closed by one thread while
        another notices that its process died, and a descriptor that is closed twice may be another's by then.
        """
        with self._closing:
            if self._popen.returncode is None:
                self._kill()
                self._popen.wait()
            if not self._is_closed:
                self._is_closed = True
                runner_watch().remove(self)
                end_strays(self._scratch)
                self._scratch.remove()
            self._socket.close()
            self._reader.join(_EXIT_SECONDS)
            self._out.close()
            self._in.close()

    def _log_output(self) -> None:
        """The model's own output goes to the worker's log; it has no other way out."""
        pipe = self._popen.stdout
        assert pipe is not None  # noqa: S101 (Popen was given PIPE)
        with pipe:
            while line := pipe.readline(8192):
                if self.is_discreet:
                    continue
                text = line.decode(errors="replace").rstrip()
                self._tail.append(text)
                _log.info("runner %d: %s", self._popen.pid, text)


def _spawn(command: list[str], fds: tuple[int, ...], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start it from the one thread that starts all of them: the kernel's parent-death signal follows the *thread* that started a
    process, and the caller's may end long before its model is closed.
    """
    result: Future[subprocess.Popen[bytes]] = Future()
    _spawner().put((result, functools.partial(_popen, command, fds, environment)))
    return result.result()


@functools.cache
def _spawner() -> queue.SimpleQueue[tuple[Future[subprocess.Popen[bytes]], Callable[[], subprocess.Popen[bytes]]]]:
    orders: queue.SimpleQueue[tuple[Future[subprocess.Popen[bytes]], Callable[[], subprocess.Popen[bytes]]]] = queue.SimpleQueue()

    def serve() -> None:
        while True:
            result, start = orders.get()
            try:
                result.set_result(start())
            except BaseException as error:
                result.set_exception(error)

    threading.Thread(target=serve, name="runner-spawner", daemon=True).start()
    return orders


def _popen(command: list[str], fds: tuple[int, ...], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])  # where tether itself is, installed or not
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment,
        pass_fds=fds,
        start_new_session=True,
    )
