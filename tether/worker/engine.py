"""load → batch → run → answer: the models of one worker. Owns their threads; Dask's side only calls in."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from tether.errors import LoadFailedError, TetherError
from tether.events import Holding
from tether.ports import LoadedModel
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import ModelInfo, ModelVersion, WorkerMemory
from tether.wire.npz import from_npz
from tether.worker.footprint import Files, Footprints, card_nbytes, runner_nbytes
from tether.worker.means import card_users
from tether.worker.residency import GPU, RAM, Size
from tether.worker.rooms import Rooms, Use
from tether.worker.serving import ModelServer
from tether.worker.stats import ServingStats

__all__ = ["Engine", "Source"]

log = structlog.get_logger("tether.worker")
_WATCH = 0.25
"""Seconds between looks for runs that nobody waits for."""
_MEASURE = 5.0
"""Seconds between looks at what the models in processes of their own take; only at those that were used meanwhile."""
_WARM_UP: Final = 10.0
"""Seconds that an example may take before requests do without it. It ran in the sandbox when it was published."""
_INSIST: Final = 1.0
"""Seconds that it has to end when it was interrupted."""
_EXAMPLE_NBYTES: Final = 64 << 20
_NOTHING_SAID: Final[Size] = {}


@dataclass(frozen=True, slots=True)
class Source:
    """What a version is loaded from: verified files on this host."""

    path: Path
    info: ModelInfo
    nbytes: int = 0
    """Of all its files."""
    example: Path | None = None
    """Where its example tensors are, as `.npz`, if it has some."""
    in_memory: bool = False
    """Whether the files lie in memory."""

    def release(self) -> None:
        """It is not loaded after all. What is done at the end of one that was is the loaded model's business."""


Fetch = Callable[[ModelVersion, Callable[[int], None]], Source]
"""Gives the verified files of a version. If they lie in memory it first calls what it is given with their bytes, which waits for room."""


class Engine:
    """The models in this worker's memory.

    `fetch` gives the files of a version and `load` brings them into memory; both block.  `sockets` is a folder with a short path;
    `latency`: seconds within which answers are wanted; `budget`: bytes for models, by place (`residency.RAM`), unbounded where not said.
    """

    withdraw: Callable[[ModelVersion, str], None]
    """Called before a version is put out: its name and endpoint. Blocks until gateways are about to be told, or nobody is there to."""

    def __init__(
        self,
        sockets: Path,
        fetch: Fetch,
        load: Callable[[Source], LoadedModel],
        latency: float = 0.1,
        budget: Size = _NOTHING_SAID,
    ) -> None:
        self._sockets, self._fetch, self._load, self._latency = sockets, fetch, load, latency
        self.withdraw = lambda _model, _endpoint: None
        self._servers: dict[ModelVersion, ModelServer] = {}
        self._turns: dict[ModelVersion, tuple[threading.RLock, int]] = {}
        """Whose turn it is, and how many hold it or wait for it."""
        self._settings: dict[ModelVersion, ServingSettings] = {}
        """How versions that are loaded, or about to be, are served."""
        self._lock = threading.Lock()
        self._started = 0
        self._rooms, self._footprints = Rooms(budget, self._evict, self._uses), Footprints()
        self._measured: dict[ModelVersion, float] = {}
        """What a model had run, in seconds, when its process was measured last."""
        self._volatile: dict[ModelVersion, int] = {}
        """Bytes of its files where they lie in memory."""
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        threading.Thread(target=self._weigh, name="weighing", daemon=True).start()

    def load(self, model: ModelVersion, settings: ServingSettings = DEFAULTS) -> str:
        """Bring the version into memory, once for all who ask at the same time; the endpoint where it answers. Blocks.

        `settings`: how it is served, and how long it stays.

        Raises: TetherError: what fetching or loading raised; MemoryFullError, ModelTooLargeError; LoadFailedError: anything else.
        """
        with self._turn(model):
            self.configure(model, settings)
            server = self._servers.get(model)
            if server is None:
                server = self._start(_Claim(self._rooms, model, settings))
            return str(server.endpoint)

    def configure(self, model: ModelVersion, settings: ServingSettings) -> None:
        """Serve the version like this from now on, also if it is about to be loaded; without loading it anew."""
        with self._lock:
            self._settings[model] = settings
            server = self._servers.get(model)
            if server is not None:
                server.configure(settings)
        self._rooms.keep(model, pinned=settings.pinned, keep_alive=settings.keep_alive)

    @contextlib.contextmanager
    def _turn(self, model: ModelVersion) -> Iterator[None]:
        """Held by who loads or frees a version; forgotten when nobody holds it or waits for it."""
        with self._lock:
            turn, users = self._turns.get(model, (None, 0))
            turn = turn or threading.RLock()
            self._turns[model] = turn, users + 1
        try:
            with turn:
                yield
        finally:
            with self._lock:
                users = self._turns[model][1] - 1
                self._turns[model] = turn, users
                if not users:
                    del self._turns[model]

    def _start(self, claim: _Claim) -> ModelServer:
        model, begun = claim.model, time.monotonic()
        try:
            server, size = self._brought(claim)
        except BaseException as error:
            self._rooms.gone(model)
            if isinstance(error, TetherError) or not isinstance(error, Exception):
                raise
            log.exception("load failed", model=str(model))
            raise LoadFailedError(f"{model}: {type(error).__name__}: {error}") from error
        with self._lock:
            self._servers[model] = server
            server.configure(self._settings.get(model, DEFAULTS))
        server.stats.load_seconds = time.monotonic() - begun - claim.waited
        self._rooms.loaded(model, size, server.stats.load_seconds)
        log.info("model loaded", model=str(model), digest=model.digest, nbytes=size[RAM])
        return server

    def _brought(self, claim: _Claim) -> tuple[ModelServer, Size]:
        source = self._fetch(claim.model, claim.take)
        try:
            claim.take(source.nbytes)
        except BaseException:
            source.release()
            raise
        loaded, nbytes = self._measured_load(claim.model, source)
        self._volatile[claim.model] = source.nbytes if source.in_memory else 0
        try:
            return self._serve(claim.model, loaded), {**claim.size, RAM: nbytes}
        except BaseException:
            loaded.close()
            raise

    def _measured_load(self, model: ModelVersion, source: Source) -> tuple[LoadedModel, int]:
        def bring() -> LoadedModel:
            loaded = self._load(source)
            try:
                _warm_up(model, loaded, source.example)
            except BaseException:
                loaded.close()
                raise
            return loaded

        if not source.info.code:
            return self._footprints.brought(Files(source.nbytes, source.in_memory), bring)
        loaded = bring()
        pid = getattr(loaded, "pid", None)
        nbytes = runner_nbytes(pid) if pid is not None else 0
        return loaded, max(nbytes + source.nbytes if source.in_memory else nbytes, source.nbytes)

    def _serve(self, model: ModelVersion, loaded: LoadedModel) -> ModelServer:
        with self._lock:
            self._started += 1
            endpoint = self._sockets / f"{model.digest[:12]}-{self._started}.sock"
        server = ModelServer(model, loaded, endpoint, self._latency)
        server.start()
        return server

    def unload(self, model: ModelVersion) -> bool:
        """Answer what has arrived, then free the version; False if it was not loaded. Blocks."""
        self._rooms.leaves(model)
        return self._free(model, ModelServer.leave)

    def _evict(self, model: ModelVersion) -> None:
        """For room: the gateways hear of it before it goes, so that no request is lost on the way."""
        with self._turn(model):
            server = self._servers.get(model)
            if server is not None:
                self.withdraw(model, str(server.endpoint))
            self._free(model, ModelServer.leave)

    def _free(self, model: ModelVersion, end: Callable[[ModelServer], None]) -> bool:
        with self._turn(model):
            server = self._servers.pop(model, None)
            try:
                if server is not None:
                    end(server)
                    log.info("model unloaded", model=str(model))
            finally:
                self._settings.pop(model, None)
                self._measured.pop(model, None)
                self._volatile.pop(model, None)
                self._rooms.gone(model)
        return server is not None

    def isolate(self, model: ModelVersion) -> None:
        """Run the version in a process of its own from its next batch on, if it is loaded."""
        server = self._servers.get(model)
        if server is not None:
            server.isolate()

    def models(self) -> dict[ModelVersion, ServingStats]:
        """What is in memory and what each has done so far."""
        return {model: server.stats for model, server in list(self._servers.items())}

    def holdings(self) -> list[Holding]:
        """What is in memory, where it answers and how it is served."""
        with self._lock:
            servers = list(self._servers.items())  # who frees one does not hold the lock
            return [Holding(model, str(server.endpoint), self._settings.get(model, DEFAULTS)) for model, server in servers]

    @property
    def memory(self) -> WorkerMemory:
        """What models take, and may take."""
        sizes = {str(model): size.get(RAM, 0) for model, size in self._rooms.sizes.items()}
        taken, budget = self._rooms.taken, self._rooms.budget
        return WorkerMemory(taken.get(RAM, 0), budget.get(RAM, 0), sizes, taken.get(GPU, 0), budget.get(GPU, 0))

    def limit_card(self, nbytes: int) -> None:
        """This worker has a card, of which models may take so much."""
        self._rooms.limit(GPU, nbytes)

    def _uses(self) -> dict[ModelVersion, Use]:
        servers = list(self._servers.items())
        return {
            model: Use(server.stats.requests + server.stats.failures, server.is_in_use, server.is_streaming) for model, server in servers
        }

    def _watch(self) -> None:
        while not self._closing.wait(_WATCH):
            try:
                for server in list(self._servers.values()):
                    server.end_unwanted_run(time.monotonic())
                self._rooms.look()
            except Exception:  # a bug of ours must not leave the models unwatched
                log.exception("watching models failed")

    def _weigh(self) -> None:
        """On a thread of its own: what has to be asked may take seconds to answer, and runs that nobody waits for end within one."""
        while not self._closing.wait(_MEASURE):
            try:
                self._measure()
            except Exception:  # as above
                log.exception("measuring models failed")

    def _measure(self) -> None:
        """A process grows while its model is used: by what a run needs, and by what its library keeps for the next one."""
        used = {model: server for model, server in list(self._servers.items()) if server.stats.busy != self._measured.get(model)}
        users = card_users() if used and GPU in self._rooms.budget else {}
        for model, server in used.items():
            self._measured[model] = server.stats.busy
            pid, size = getattr(server.loaded, "pid", None), dict[str, int]()
            if pid is not None and (nbytes := runner_nbytes(pid)):
                size[RAM] = nbytes + self._volatile.get(model, 0)
            if users and (pid is not None or os.getpid() not in users):  # what several models in one process take can't be told apart
                size[GPU] = card_nbytes(pid, users) if pid is not None else 0
            self._rooms.measured(model, size)

    def close(self) -> None:
        """Unload everything."""
        self._rooms.close()
        for model in list(self._servers):
            self._free(model, ModelServer.stop)
        self._closing.set()


class _Claim:
    """To room for one version, which is waited for once."""

    def __init__(self, rooms: Rooms, model: ModelVersion, settings: ServingSettings) -> None:
        self.model, self.waited = model, 0.0
        self.size: Size = {}
        """That it is expected to take: as much as its files in each memory that there is."""
        self._rooms, self._settings, self._taken = rooms, settings, False

    def take(self, nbytes: int) -> None:
        """Wait for it; a second call does nothing. Raises: MemoryFullError, ModelTooLargeError."""
        if self._taken:
            return
        begun = time.monotonic()
        self.size = dict.fromkeys(self._rooms.budget, nbytes) | {RAM: nbytes}
        self._rooms.take(self.model, self.size, pinned=self._settings.pinned, keep_alive=self._settings.keep_alive)
        self._taken, self.waited = True, time.monotonic() - begun


def _warm_up(model: ModelVersion, loaded: LoadedModel, example: Path | None) -> None:
    """Run the example, so that the first request need not pay for what a first run does. Not where a run leaves something behind."""
    if example is None or not loaded.info.pure or loaded.info.streams:
        return
    with contextlib.suppress(FileNotFoundError):
        if _unpacked_nbytes(example) > _EXAMPLE_NBYTES:
            return
        over = threading.Event()
        threading.Thread(target=_end_late, args=(loaded, over), name=f"warm-up-{model}", daemon=True).start()
        try:
            loaded.run(from_npz(example.read_bytes()))
        except Exception as error:  # it ran when it was published: requests will tell
            log.warning("the example failed", model=str(model), code=error.code if isinstance(error, TetherError) else type(error).__name__)
        finally:
            over.set()


def _end_late(loaded: LoadedModel, over: threading.Event) -> None:
    """Again and again: a runner that goes on when it was interrupted once is ended. Nobody else looks after a model that is loading."""
    patience = _WARM_UP
    while not over.wait(patience):
        loaded.interrupt()
        patience = _INSIST


def _unpacked_nbytes(example: Path) -> int:
    """Of the file, or of what is in it: its publisher may be anybody, and some kilobytes unpack to gigabytes."""
    nbytes = example.stat().st_size
    if nbytes <= _EXAMPLE_NBYTES:
        with contextlib.suppress(Exception), zipfile.ZipFile(example) as archive:  # what zipfile can't read, nothing unpacks
            nbytes = max(nbytes, sum(entry.file_size for entry in archive.infolist()))
    return nbytes
