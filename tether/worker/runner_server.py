"""The process of one model: reads messages, loads, runs, answers. Started by `python -m`, never by fork: the worker has threads."""

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

from tether.errors import InternalError, TetherError, WorkerLostError
from tether.runtimes import load, load_arriving, warm
from tether.runtimes.arena import Arena, Place
from tether.runtimes.arrivals import Arrivals
from tether.worker.runner_wire import REQUESTS, DeadError, Done, Failed, Grown, Load, Reply, Request, Run, Warm, Whole, receive, send

if TYPE_CHECKING:
    from tether.ports import LoadedModel

__all__ = ["main"]

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


class _Server:
    """The child's end: one message at a time."""

    def __init__(self, connection: socket.socket, arenas: tuple[Arena, Arena]) -> None:
        self._socket = connection
        self._in, self._out = arenas
        self._model: LoadedModel | None = None

    def serve(self) -> NoReturn:
        """Until the parent goes."""
        with contextlib.suppress(DeadError):
            while True:
                send(self._socket, self._answer(receive(self._socket, REQUESTS)))
        os._exit(0)  # not the interpreter's exit, where libraries' threads have been seen to hang

    def _answer(self, message: Request) -> Reply:
        try:
            match message:
                case Warm(framework):
                    warm(framework)
                    return Done()
                case Load():
                    self._load(message)
                    return Done()
                case Run(places):
                    return Done(self._run(places))
                case Grown() | Whole():
                    raise InternalError("files came and no load waited for them")
        except TetherError as error:
            return Failed(error.code, [value if isinstance(value, (str, int, float, list)) else str(value) for value in error.args])
        except Exception as error:
            _log.exception("the runner failed")
            return Failed(InternalError.code, [f"the runner failed: {type(error).__name__}: {error}"])

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
        if self._model is None:
            raise InternalError("a run came before a load")
        # A custom model may keep what it is given; the frameworks' runtimes do not.
        inputs = self._in.read(places, copy=self._model.info.framework == "custom")
        return self._out.write(self._model.run(inputs))


def main(arguments: list[str]) -> NoReturn:
    """`python -m tether.worker.runner_server PARENT SOCKET IN OUT`: descriptors, inherited."""
    parent, *fds = map(int, arguments)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    _Server(socket.socket(fileno=fds[0]), (Arena(fds[1]), Arena(fds[2]))).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
