"""The process of one model, once it is confined (`runner_start`): reads messages, loads, runs, answers."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tether.errors import InternalError, ModelFailedError, PoisonInputError, TetherError, WorkerLostError
from tether.ports import Streaming
from tether.runtimes import load, load_arriving, warm
from tether.runtimes.arena import Arena, Place
from tether.runtimes.arrivals import Arrivals
from tether.worker.runner_wire import (
    REQUESTS,
    Begin,
    DeadError,
    Done,
    Ended,
    Failed,
    Grown,
    Leave,
    Load,
    Reply,
    Request,
    Run,
    Step,
    Warm,
    Whole,
    receive,
    send,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import FrameType

    from tether.ports import LoadedModel
    from tether.types import Tensors

__all__ = ["main"]

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


class _Server:
    """The child's end: one message at a time."""

    def __init__(self, connection: socket.socket, arenas: tuple[Arena, Arena]) -> None:
        self._socket = connection
        self._in, self._out = arenas
        self._model: LoadedModel | None = None
        self._is_running = False
        """Whether the model's own code runs, which an interrupt ends; at other times it does nothing."""
        self._streams: dict[int, Generator[Tensors]] = {}

    def serve(self) -> NoReturn:
        """Until the parent goes."""
        signal.signal(signal.SIGINT, self._interrupt)
        with contextlib.suppress(DeadError):
            while True:
                send(self._socket, self._answer(receive(self._socket, REQUESTS)))
        os._exit(0)  # not the interpreter's exit, where libraries' threads have been seen to hang

    def _answer(self, message: Request) -> Reply:
        try:
            match message:
                case Run(places):
                    return Done(self._run(places))
                case Step(number):
                    return self._step(number)
                case _:
                    self._do(message)
                    return Done()
        except TetherError as error:
            return Failed(error.code, [value if isinstance(value, (str, int, float, list)) else str(value) for value in error.args])
        except KeyboardInterrupt:
            return Failed(ModelFailedError.code, ["the run was interrupted: nobody waited for it any more, or its deadline passed"])
        except Exception as error:
            _log.exception("the runner failed")
            return Failed(InternalError.code, [f"the runner failed: {type(error).__name__}: {error}"])

    def _do(self, message: Warm | Load | Grown | Whole | Begin | Leave) -> None:
        match message:
            case Warm(framework):
                warm(framework)
            case Load():
                self._load(message)
            case Begin(number, places):
                self._streams[number] = self._begin(places)
            case Leave(number):
                self._leave(number)
            case Grown() | Whole():
                raise InternalError("files came and no load waited for them")

    def _load(self, message: Load) -> None:
        if message.scratch:
            os.environ["TMPDIR"] = tempfile.tempdir = message.scratch
        os.environ["OMP_NUM_THREADS"] = str(message.threads)  # for what a custom model imports; the others are told by `load`
        path, info = Path(message.path), message.info
        if not message.arriving:
            self._model = load(path, info, message.threads)
            return
        arrivals = Arrivals()
        following = threading.Thread(target=self._follow, args=(arrivals,), name="arrivals")
        following.start()
        try:
            self._model = load_arriving(path, info, message.threads, arrivals)
        finally:
            following.join()  # a load that failed is answered when all that was said about its files has been read

    def _follow(self, arrivals: Arrivals) -> None:
        """Pass on what the worker says of the files, to its last word."""
        try:
            while not isinstance(message := receive(self._socket, REQUESTS), Whole):
                if not isinstance(message, Grown):
                    raise InternalError("something else came while files were coming")
                arrivals.begun(Path(message.folder))
                for file, nbytes in message.files.items():
                    arrivals.grew(file, nbytes)
            arrivals.finish()
        except DeadError:
            arrivals.fail(WorkerLostError("the worker ended while the model's files came"))
        except BaseException as error:
            arrivals.fail(error)

    def _run(self, places: list[Place]) -> list[Place]:
        model = self._loaded()
        # A custom model may keep what it is given; the frameworks' runtimes do not.
        inputs = self._in.read(places, copy=model.info.framework == "custom")
        with self._running():
            outputs = model.run(inputs)
        return self._out.write(outputs)

    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise InternalError("a run came before a load")
        return self._model

    def _begin(self, places: list[Place]) -> Generator[Tensors]:
        model = self._loaded()
        if not isinstance(model, Streaming):
            raise InternalError("a stream was asked of a model that has none")
        return model.stream(self._in.read(places, copy=True))

    def _step(self, number: int) -> Done | Ended:
        parts = self._streams.pop(number)
        with self._running():
            part = next(parts, None)
        if part is None:
            return Ended()
        self._streams[number] = parts
        return Done(self._out.write(part))

    def _leave(self, number: int) -> None:
        parts = self._streams.pop(number, None)
        if parts is not None:
            with self._running():
                parts.close()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """An interrupt meets the model's code only: the worker sends none but during a run, so that a late one can't hit the next.

        Raises: ModelFailedError: the model raised what is said of processes and of inputs that end them; it may have it of another model.
        """
        self._is_running = True
        try:
            yield
        except (WorkerLostError, PoisonInputError) as error:
            raise ModelFailedError(f"the model raised {type(error).__name__}: {error}") from error
        finally:
            self._is_running = False

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        """Raised once: what the model does about it is not disturbed. Raises: KeyboardInterrupt."""
        if self._is_running:
            self._is_running = False
            raise KeyboardInterrupt


def main(parent: int, fds: list[int]) -> NoReturn:
    """`fds`: of the socket and the two arenas, inherited."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    _Server(socket.socket(fileno=fds[0]), (Arena(fds[1]), Arena(fds[2]))).serve()
