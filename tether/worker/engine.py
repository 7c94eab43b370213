"""load → batch → run → answer: the models of one worker. Owns their threads; Dask's side only calls in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from tether.errors import LoadFailedError, TetherError
from tether.ports import LoadedModel
from tether.types import ModelInfo, ModelVersion
from tether.worker.serving import ModelServer, ServingStats

__all__ = ["Engine", "Source"]

log = structlog.get_logger("tether.worker")
_WATCH = 0.5
"""Seconds between looks for runs that nobody waits for."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a version is loaded from: verified files on this host."""

    path: Path
    info: ModelInfo


class Engine:
    """The models in this worker's memory.

    `fetch` gives the verified files of a version and `load` brings them into memory; both block.  `sockets` is a folder with a short path;
    `latency`: seconds within which answers are wanted.
    """

    def __init__(
        self,
        sockets: Path,
        fetch: Callable[[ModelVersion], Source],
        load: Callable[[Source], LoadedModel],
        latency: float = 0.1,
    ) -> None:
        self._sockets, self._fetch, self._load, self._latency = sockets, fetch, load, latency
        self._servers: dict[ModelVersion, ModelServer] = {}
        self._loading: dict[ModelVersion, threading.Lock] = {}
        self._lock = threading.Lock()
        self._started = 0
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def load(self, model: ModelVersion) -> str:
        """Bring the version into memory, once for all who ask at the same time; the endpoint where it answers. Blocks.

        Raises: TetherError: what fetching or loading raised; LoadFailedError: anything else.
        """
        with self._lock:
            turn = self._loading.setdefault(model, threading.Lock())
        with turn:
            server = self._servers.get(model)
            if server is None:
                server = self._start(model)
            return str(server.endpoint)

    def _start(self, model: ModelVersion) -> ModelServer:
        try:
            loaded = self._load(self._fetch(model))
        except TetherError:
            raise
        except Exception as error:
            log.exception("load failed", model=str(model))
            raise LoadFailedError(f"{model}: {type(error).__name__}: {error}") from error
        with self._lock:
            self._started += 1
            endpoint = self._sockets / f"{model.digest[:12]}-{self._started}.sock"
        try:
            server = ModelServer(model, loaded, endpoint, self._latency)
        except BaseException:
            loaded.close()
            raise
        server.start()
        self._servers[model] = server
        log.info("model loaded", model=str(model), digest=model.digest)
        return server

    def unload(self, model: ModelVersion) -> bool:
        """Answer what has arrived, then free the version; False if it was not loaded. Blocks."""
        with self._lock:
            turn = self._loading.setdefault(model, threading.Lock())
        with turn:
            server = self._servers.pop(model, None)
            if server is None:
                return False
            server.stop()
            log.info("model unloaded", model=str(model))
            return True

    def models(self) -> dict[ModelVersion, ServingStats]:
        """What is in memory and what each has done so far."""
        return {model: server.stats for model, server in list(self._servers.items())}

    def _watch(self) -> None:
        while not self._closing.wait(_WATCH):
            for server in list(self._servers.values()):
                server.interrupt_if_late(time.monotonic())

    def close(self) -> None:
        """Unload everything."""
        for model in list(self._servers):
            self.unload(model)
        self._closing.set()
