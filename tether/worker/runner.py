"""A code model in a process of its own: tensors through shared memory, small messages over a socket, and a warm spare.

The parent's half of that process is `runner_process`, the child's `runner_start` and `runner_server`, what they say `runner_wire`.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tether.errors import InternalError, LoadFailedError, ModelDiedError, WorkerLostError
from tether.runtimes import load
from tether.runtimes.arrivals import Arrivals, Coming
from tether.types import Framework, ModelInfo, Tensors
from tether.worker.discretion import discretion
from tether.worker.runner_limits import RunnerLimits
from tether.worker.runner_process import RunnerProcess
from tether.worker.runner_wire import DeadError, Load

if TYPE_CHECKING:
    from tether.ports import LoadedModel

__all__ = ["ResidentModel", "RunnerModel", "RunnerPool", "load_model"]


def load_model(
    files: Path | Coming, info: ModelInfo, threads: int = 1, pool: RunnerPool | None = None, scratch: Path | None = None
) -> LoadedModel:
    """Bring a model into memory where its format belongs: data in this process, code in a runner.

    `files`: where they are, or what fetches them; a runner does what it can meanwhile. `scratch`: of an encrypted model, where its
    library may unpack it; what such a model prints goes to no log.

    Raises: BadModelError, MissingDependencyError; LoadFailedError: the runner died while it loaded; what fetching raises.
    """
    if info.code:
        return RunnerModel(files, info, threads, pool, scratch)
    if isinstance(files, Coming):
        files.fetch(Arrivals())
        files = files.path

    def again() -> RunnerModel:
        with discretion(is_needed=scratch is not None):
            return RunnerModel(files, info, threads, pool, scratch)

    return ResidentModel(load(files, info, threads), again)


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

    def __init__(self, patience: float = 0.0, limits: RunnerLimits | None = None) -> None:
        self._patience = patience
        self.limits = limits or RunnerLimits.default()
        """Of processes that are started from now on."""
        self._spares: dict[Framework, RunnerProcess] = {}
        self._lock = threading.Lock()
        self._closed = False

    def take(self, framework: Framework) -> RunnerProcess:
        """A process for one model of the framework: the spare, or a new one."""
        with self._lock:
            spare = self._spares.pop(framework, None)
        if spare is not None and spare.is_warm():
            return spare
        if spare is not None:
            spare.close()
        return RunnerProcess.start(self.limits)

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
                self._spares[framework] = spare = RunnerProcess.start(self.limits)
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

    def __init__(
        self, files: Path | Coming, info: ModelInfo, threads: int = 1, pool: RunnerPool | None = None, scratch: Path | None = None
    ) -> None:
        """As `load_model`."""
        self.info = info
        path = files.path if isinstance(files, Coming) else files
        self._message = Load(str(Path.cwd() / path), info, threads, str(scratch or ""))
        self._pool = pool or default_pool()
        self._closed = self._has_started = False
        self._process: RunnerProcess | None = self._start_arriving(files) if isinstance(files, Coming) else self._start()

    @property
    def pid(self) -> int | None:
        """Of the process; None when there is none."""
        process = self._process
        return process.pid if process else None

    def run(self, inputs: Tensors) -> Tensors:
        """As `LoadedModel.run`; the outputs are copies.

        Raises: ModelDiedError: the process died on it; WorkerLostError: it was interrupted; LoadFailedError, BadModelError: it had died,
        and could not be started again (of an encrypted model without its text).
        """
        process = self._alive()
        with self._asking(process):
            return process.run(inputs)

    def stream(self, inputs: Tensors) -> Generator[Tensors]:
        """As `ports.Streaming.stream`; the parts are copies. Raises: as `run`; WorkerLostError: the process died of something else."""
        process = self._alive()
        with self._asking(process):
            number = process.begin(inputs)
        part: Tensors | None = {}
        try:
            while (part := self._step(process, number)) is not None:
                yield part
        finally:
            if part is not None and self._process is process:
                with self._asking(process):
                    process.leave(number)

    def _step(self, process: RunnerProcess, number: int) -> Tensors | None:
        if self._process is not process:
            raise WorkerLostError("the model's process died while this stream waited for its turn; ask again")
        with self._asking(process):
            return process.step(number)

    def _alive(self) -> RunnerProcess:
        if self._closed:
            raise InternalError("the model is closed; load it again")
        if self._process is None:
            with discretion(is_needed=bool(self._message.scratch)):
                self._process = self._start()
        return self._process

    @contextmanager
    def _asking(self, process: RunnerProcess) -> Iterator[None]:
        try:
            yield
        except DeadError:
            self._process = None
            how = f"the model's process died ({process.end()})"
            if process.was_ended or self._closed:
                raise WorkerLostError(f"{how} when its run was interrupted") from None
            raise ModelDiedError(f"{how} on this input", process.died_by_itself) from None

    def interrupt(self) -> None:
        """As `LoadedModel.interrupt`: the model's code gets KeyboardInterrupt, and may keep what it holds. Where it does not end by that
        until it is interrupted again, its process is killed: the run fails with WorkerLostError.
        """
        process = self._process
        if process is not None:
            process.interrupt()

    def close(self) -> None:
        """End the process, and with it all that the model held."""
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _start(self) -> RunnerProcess:
        with self._starting() as process:
            process.ask(self._message)
        return process

    def _start_arriving(self, files: Coming) -> RunnerProcess:
        """With files that are fetched meanwhile; started again, it finds them there."""
        arrivals = Arrivals()
        fetching = threading.Thread(target=_fetch, args=(files, arrivals), name=f"fetch {files.path.name[:12]}", daemon=True)
        fetching.start()
        try:
            with self._starting() as process:
                process.ask_arriving(msgspec.structs.replace(self._message, arriving=True), arrivals)
        finally:
            fetching.join()  # where the process died first: what was begun comes to its end, for the next load
        return process

    @contextmanager
    def _starting(self) -> Iterator[RunnerProcess]:
        process = self._pool.take(self.info.framework)
        process.is_discreet = bool(self._message.scratch)
        try:
            yield process
        except DeadError:
            how = f"the model's process died ({process.end()}) while it loaded the model"
            if self._has_started and not process.died_by_itself:  # it was loaded before: that it was killed again says nothing of it
                raise ModelDiedError(how, process.died_by_itself) from None
            raise LoadFailedError(how) from None
        except BaseException:
            process.close()
            raise
        self._has_started = True
        self._pool.warm(self.info.framework)


class ResidentModel:
    """A `LoadedModel` of a data format, in this process; `isolate` moves it into one of its own."""

    def __init__(self, loaded: LoadedModel, again: Callable[[], LoadedModel]) -> None:
        """`again`: loads it there."""
        self.info, self._loaded, self._again = loaded.info, loaded, again
        self._is_isolated = False

    @property
    def pid(self) -> int | None:
        """Of its own process; None while it has none."""
        return getattr(self._loaded, "pid", None)

    def run(self, inputs: Tensors) -> Tensors:
        """As `LoadedModel.run`, before or after it moved."""
        return self._loaded.run(inputs)

    def interrupt(self) -> None:
        """As `LoadedModel.interrupt`."""
        self._loaded.interrupt()

    def isolate(self) -> None:
        """As `Isolatable.isolate`; both are in memory for a moment, so that it stays here where it can't move."""
        if not self._is_isolated:
            left, self._loaded = self._loaded, self._again()
            self._is_isolated = True
            left.close()

    def close(self) -> None:
        """Free it; a second call does nothing."""
        self._loaded.close()


def _fetch(files: Coming, arrivals: Arrivals) -> None:
    try:
        files.fetch(arrivals)
    except BaseException as error:
        arrivals.fail(error)
    else:
        arrivals.finish()
