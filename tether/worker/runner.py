"""A code model in a process of its own: tensors through shared memory, small messages over a socket, and a warm spare.

Wire (private to one version of Tether, both ends being this file): four bytes of length, then msgpack of one message below.  The tensors
themselves lie in two memfds, one for each direction, which their writer lets grow.  The process is started by `python -m`, never by fork:
the worker has threads, and a fork would copy their locks.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import functools
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec

from tether.errors import InternalError, LoadFailedError, TetherError, WorkerLostError, from_code
from tether.runtimes import load, warm
from tether.runtimes.arena import Arena, Place
from tether.types import Framework, ModelInfo, Tensors

if TYPE_CHECKING:
    from tether.ports import LoadedModel

__all__ = ["RunnerModel", "RunnerPool", "load_model"]

_log = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")
_TAIL_LINES = 4
"""Lines of a runner's own output that go into the error about its death."""
_PR_SET_PDEATHSIG = 1
_EXIT_SECONDS = 2.0
"""For a killed process to be gone; longer only where something that it started holds its output open."""


class _Warm(msgspec.Struct, tag="warm", frozen=True):
    framework: Framework


class _Load(msgspec.Struct, tag="load", frozen=True):
    path: str
    info: ModelInfo
    threads: int
    scratch: str = ""


class _Run(msgspec.Struct, tag="run", frozen=True):
    tensors: list[Place]


class _Done(msgspec.Struct, tag="done", frozen=True):
    tensors: list[Place] = []


class _Failed(msgspec.Struct, tag="failed", frozen=True):
    code: str
    args: list[Any]


_Request = _Warm | _Load | _Run
_Reply = _Done | _Failed


def load_model(path: Path, info: ModelInfo, threads: int = 1, pool: RunnerPool | None = None, scratch: Path | None = None) -> LoadedModel:
    """Bring a model into memory where its format belongs: data in this process, code in a runner.

    `scratch`: of an encrypted model, where its library may unpack it; what such a model prints goes to no log.

    Raises: BadModelError, MissingDependencyError; LoadFailedError: the runner died while it loaded.
    """
    if not info.code:
        return load(path, info, threads)
    return RunnerModel(path, info, threads, pool, scratch)


@functools.cache
def default_pool() -> RunnerPool:
    """The pool of this process, made when the first code model comes."""
    pool = RunnerPool(patience=_PATIENCE)
    atexit.register(pool.close)
    return pool


_PATIENCE = 5.0
"""Seconds between a first model and its spare: importing TensorFlow takes a core for 5 s, which those who wait for that model need."""


class RunnerPool:
    """Starts runner processes, and keeps one warm for each library that was used: it has imported it when the next model comes.

    `patience`: seconds between the use of a library and the start of its spare.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self._patience = patience
        self._spares: dict[Framework, _Process] = {}
        self._lock = threading.Lock()
        self._closed = False

    def take(self, framework: Framework) -> _Process:
        """A process for one model of the framework: the spare, or a new one."""
        with self._lock:
            spare = self._spares.pop(framework, None)
        if spare is not None and spare.is_warm():
            return spare
        if spare is not None:
            spare.close()
        return _Process.start()

    def warm(self, framework: Framework) -> None:
        """Start a spare in `patience` seconds, unless there is one then; does not wait for it."""
        if not self._patience:
            self._start_spare(framework)
            return
        timer = threading.Timer(self._patience, self._start_spare, (framework,))
        timer.daemon = True
        timer.start()

    def _start_spare(self, framework: Framework) -> None:
        with self._lock:
            if not self._closed and framework not in self._spares:
                self._spares[framework] = spare = _Process.start()
                spare.warm(framework)

    @property
    def pids(self) -> list[int]:
        """Of the spares."""
        with self._lock:
            return [spare.pid for spare in self._spares.values()]

    def close(self) -> None:
        """End the spares. Models that came from here live on."""
        with self._lock:
            self._closed = True
            spares, self._spares = self._spares, {}
        for spare in spares.values():
            spare.close()


class RunnerModel:
    """A `LoadedModel` in another process. If that dies, the call that it was on fails and the next one starts it anew."""

    def __init__(self, path: Path, info: ModelInfo, threads: int = 1, pool: RunnerPool | None = None, scratch: Path | None = None) -> None:
        """As `load_model`."""
        self.info = info
        self._message = _Load(str(Path.cwd() / path), info, threads, str(scratch or ""))
        self._pool = pool or default_pool()
        self._closed = False
        self._process: _Process | None = self._start()

    @property
    def pid(self) -> int | None:
        """Of the process; None when there is none."""
        process = self._process
        return process.pid if process else None

    def run(self, inputs: Tensors) -> Tensors:
        """As `LoadedModel.run`; the outputs are copies.

        Raises: WorkerLostError: the process died on it; LoadFailedError: it had died, and could not be started again.
        """
        if self._closed:
            raise InternalError("the model is closed; load it again")
        if self._process is None:
            self._process = self._start()
        process = self._process
        try:
            return process.run(inputs)
        except _DeadError:
            self._process = None
            raise WorkerLostError(f"the model's process died ({process.end()}) on this input; the next request starts it again") from None

    def interrupt(self) -> None:
        """End a `run` that takes too long, from another thread: its process is killed, the run fails with WorkerLostError."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process, and with it all that the model held."""
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _start(self) -> _Process:
        process = self._pool.take(self.info.framework)
        process.is_discreet = bool(self._message.scratch)
        try:
            process.ask(self._message)
        except _DeadError:
            raise LoadFailedError(f"the model's process died ({process.end()}) while it loaded the model") from None
        except TetherError:
            process.close()
            raise
        self._pool.warm(self.info.framework)
        return process


_Message = TypeVar("_Message")
_REPLIES: msgspec.msgpack.Decoder[_Reply] = msgspec.msgpack.Decoder(_Reply)
_REQUESTS: msgspec.msgpack.Decoder[_Request] = msgspec.msgpack.Decoder(_Request)
_ENCODER = msgspec.msgpack.Encoder()


class _DeadError(Exception):
    """The other end is gone."""


class _Process:
    """The parent's end of one runner process."""

    def __init__(self, popen: subprocess.Popen[bytes], connection: socket.socket, arenas: tuple[Arena, Arena]) -> None:
        self._popen, self._socket = popen, connection
        self._out, self._in = arenas
        self._owed = 0
        """Answers that were not waited for."""
        self.is_discreet = False
        """Whether its output is dropped: it may tell what is in an encrypted model."""
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._reader = threading.Thread(target=self._log_output, name=f"runner-log-{popen.pid}", daemon=True)
        self._reader.start()

    @classmethod
    def start(cls) -> _Process:
        """A process that waits for a model; returns before it runs."""
        mine, theirs = socket.socketpair()
        arenas = Arena.new(), Arena.new()
        fds = (theirs.fileno(), arenas[0].fd, arenas[1].fd)
        try:
            popen = _spawn([sys.executable, "-P", "-m", __name__, str(os.getpid()), *map(str, fds)], fds)
        except BaseException:
            mine.close()
            raise
        finally:
            theirs.close()
        return cls(popen, mine, arenas)

    def warm(self, framework: Framework) -> None:
        """Let it import the framework's library; does not wait for that."""
        with contextlib.suppress(_DeadError):  # whoever takes it finds out
            _send(self._socket, _Warm(framework))
            self._owed += 1

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_warm(self) -> bool:
        """Whether it lives, once it has done what it was told before; waits for that."""
        try:
            while self._owed:
                _receive(self._socket, _REPLIES)
                self._owed -= 1
        except _DeadError:
            return False
        return self._popen.poll() is None

    def ask(self, message: _Load | _Run) -> _Done:
        """Send it, and wait for its answer.

        Raises: _DeadError; the error of the tree that the runner answered.
        """
        _send(self._socket, message)
        reply = _receive(self._socket, _REPLIES)
        if isinstance(reply, _Failed):
            raise from_code(reply.code, *reply.args)
        return reply

    def run(self, inputs: Tensors) -> Tensors:
        done = self.ask(_Run(self._out.write(inputs)))
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
        """End it and free the shared memory; a second call does nothing."""
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


def _send(connection: socket.socket, message: _Request | _Reply) -> None:
    data = _ENCODER.encode(message)
    try:
        connection.sendall(_LENGTH.pack(len(data)) + data)
    except OSError:
        raise _DeadError from None


def _receive(connection: socket.socket, decoder: msgspec.msgpack.Decoder[_Message]) -> _Message:
    data = _exactly(connection, _LENGTH.size)
    return decoder.decode(_exactly(connection, _LENGTH.unpack(data)[0]))


def _exactly(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        try:
            part = connection.recv(nbytes - len(data))
        except OSError:
            part = b""
        if not part:
            raise _DeadError
        data += part
    return data


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


class _Server:
    """The child's end: one message at a time."""

    def __init__(self, connection: socket.socket, arenas: tuple[Arena, Arena]) -> None:
        self._socket = connection
        self._in, self._out = arenas
        self._model: LoadedModel | None = None

    def serve(self) -> NoReturn:
        """Until the parent goes."""
        with contextlib.suppress(_DeadError):
            while True:
                _send(self._socket, self._answer(_receive(self._socket, _REQUESTS)))
        os._exit(0)  # not the interpreter's exit, where libraries' threads have been seen to hang

    def _answer(self, message: _Request) -> _Reply:
        try:
            match message:
                case _Warm(framework):
                    warm(framework)
                    return _Done()
                case _Load(path, info, threads, scratch):
                    if scratch:
                        os.environ["TMPDIR"] = tempfile.tempdir = scratch
                    os.environ["OMP_NUM_THREADS"] = str(threads)  # for what a custom model imports; the others are told by `load`
                    self._model = load(Path(path), info, threads)
                    return _Done()
                case _Run(places):
                    return _Done(self._run(places))
        except TetherError as error:
            return _Failed(error.code, [value if isinstance(value, (str, int, float, list)) else str(value) for value in error.args])
        except Exception as error:
            _log.exception("the runner failed")
            return _Failed(InternalError.code, [f"the runner failed: {type(error).__name__}: {error}"])

    def _run(self, places: list[Place]) -> list[Place]:
        if self._model is None:
            raise InternalError("a run came before a load")
        # A custom model may keep what it is given; the frameworks' runtimes do not.
        inputs = self._in.read(places, copy=self._model.info.framework == "custom")
        return self._out.write(self._model.run(inputs))


def main(arguments: list[str]) -> NoReturn:
    """`python -m tether.worker.runner PARENT SOCKET IN OUT`: descriptors, inherited."""
    parent, *fds = map(int, arguments)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    _Server(socket.socket(fileno=fds[0]), (Arena(fds[1]), Arena(fds[2]))).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
