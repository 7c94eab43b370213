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
from concurrent.futures import Future
from pathlib import Path

from tether.errors import from_code
from tether.runtimes.arena import Arena
from tether.runtimes.arrivals import Arrivals
from tether.types import Framework, Tensors
from tether.worker.runner_wire import REPLIES, DeadError, Done, Failed, Grown, Load, Run, Warm, Whole, receive, send

__all__ = ["RunnerProcess"]

_log = logging.getLogger("tether.worker.runner")
_SERVER = "tether.worker.runner_server"
_TAIL_LINES = 4
"""Lines of a runner's own output that go into the error about its death."""
_EXIT_SECONDS = 2.0
"""For a killed process to be gone; longer only where something that it started holds its output open."""


class RunnerProcess:
    """The parent's end of one runner process."""

    def __init__(self, popen: subprocess.Popen[bytes], connection: socket.socket, arenas: tuple[Arena, Arena]) -> None:
        self._popen, self._socket = popen, connection
        self._out, self._in = arenas
        self._closing = threading.Lock()
        self._owed = 0
        """Answers that were not waited for."""
        self.is_discreet = False
        """Whether its output is dropped: it may tell what is in an encrypted model."""
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._reader = threading.Thread(target=self._log_output, name=f"runner-log-{popen.pid}", daemon=True)
        self._reader.start()

    @classmethod
    def start(cls) -> RunnerProcess:
        """A process that waits for a model; returns before it runs."""
        mine, theirs = socket.socketpair()
        arenas = Arena.new(), Arena.new()
        fds = (theirs.fileno(), arenas[0].fd, arenas[1].fd)
        try:
            popen = _spawn([sys.executable, "-P", "-m", _SERVER, str(os.getpid()), *map(str, fds)], fds)
        except BaseException:
            mine.close()
            raise
        finally:
            theirs.close()
        return cls(popen, mine, arenas)

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

    def ask(self, message: Load | Run | Whole) -> Done:
        """Send it, and wait for its answer.

        Raises: DeadError; the error of the tree that the runner answered.
        """
        send(self._socket, message)
        reply = receive(self._socket, REPLIES)
        if isinstance(reply, Failed):
            raise from_code(reply.code, *reply.args)
        return reply

    def ask_arriving(self, message: Load, arrivals: Arrivals) -> Done:
        """As `ask`, of a load whose files are still coming: passes on how far they are. Raises: what `arrivals` raises besides."""
        send(self._socket, message)
        for folder, files in arrivals.changes():
            send(self._socket, Grown(str(folder or message.path), files))
        return self.ask(Whole())

    def run(self, inputs: Tensors) -> Tensors:
        done = self.ask(Run(self._out.write(inputs)))
        return self._in.read(done.tensors, copy=True)

    def kill(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def end(self) -> str:
        """Clean up after a process that went away by itself; how it ended, and its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(_EXIT_SECONDS)
        self.close()
        status = self._popen.returncode
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        said = " | ".join(line[:300] for line in self._tail)
        return f"{how}; its last words: {said}" if said else how

    def close(self) -> None:
        """End it and free the shared memory; a second call does nothing, also beside the first: the model is closed by one thread while
        another notices that its process died, and a descriptor that is closed twice may be another's by then.
        """
        with self._closing:
            if self._popen.returncode is None:
                self.kill()
                self._popen.wait()
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


def _spawn(command: list[str], fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Start it from the one thread that starts all of them: the kernel's parent-death signal follows the *thread* that started a
    process, and the caller's may end long before its model is closed.
    """
    result: Future[subprocess.Popen[bytes]] = Future()
    _spawner().put((result, command, fds))
    return result.result()


@functools.cache
def _spawner() -> queue.SimpleQueue[tuple[Future[subprocess.Popen[bytes]], list[str], tuple[int, ...]]]:
    orders: queue.SimpleQueue[tuple[Future[subprocess.Popen[bytes]], list[str], tuple[int, ...]]] = queue.SimpleQueue()

    def serve() -> None:
        while True:
            result, command, fds = orders.get()
            try:
                result.set_result(_popen(command, fds))
            except BaseException as error:
                result.set_exception(error)

    threading.Thread(target=serve, name="runner-spawner", daemon=True).start()
    return orders


def _popen(command: list[str], fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])  # where tether itself is, installed or not
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        pass_fds=fds,
        start_new_session=True,
    )
