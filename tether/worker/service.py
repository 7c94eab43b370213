"""A worker as a process: a Dask worker with Tether's engine. The supervisor is its nanny."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import importlib
import os
import shutil
from collections.abc import Coroutine, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import dask.config
import psutil
from distributed import Security, Worker

from tether.config import HOUSEKEEPING, ORCHESTRATOR_PORT, DataFolder, Limits
from tether.errors import UntrustedCodeError
from tether.ports import LoadedModel
from tether.security.tls import ensure_tls
from tether.store import Repository
from tether.telemetry.service import Life, run_service
from tether.types import ModelRef, ModelVersion
from tether.worker.engine import Engine, Source
from tether.worker.plugin import EnginePlugin
from tether.worker.runner import default_pool, load_model

__all__ = ["main", "make_plugin"]


class _Worker(Worker):  # type: ignore[misc]  # distributed is untyped
    """Without Dask's HTTP server, which knows no callers' certificates; nothing here uses it."""

    def start_http_server(self, *_: Any, **__: Any) -> None:
        """Listen on nothing."""


def make_plugin(folder: DataFolder, name: str, threads: int) -> EnginePlugin:
    """An engine over the data folder's store, for a Dask worker of this name."""
    sockets = _socket_folder(folder.runtime, name)
    # opened for the first model: a worker may be up before the manager has made the store
    store = cache(partial(Repository.open, folder.store, read_only=True))
    engine = Engine(sockets, lambda model: _fetch(store(), model), partial(_load, threads), Limits().batch_rows)
    return EnginePlugin(engine, sockets)


def _socket_folder(runtime: Path, name: str) -> Path:
    """A new folder for this process: a gateway's table may still name the sockets of a killed one. Those of the dead are removed."""
    for path in runtime.glob(f"{glob.escape(name)}-*"):
        pid = path.name.removeprefix(f"{name}-")
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)
    sockets = runtime / f"{name}-{os.getpid()}"
    sockets.mkdir(mode=0o700, exist_ok=True)
    return sockets


def _is_alive(pid: int) -> bool:
    """Whether a process of this user has the number; another's got it after the worker's death."""
    try:
        process = psutil.Process(pid)
        return process.uids().real == os.getuid() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _fetch(repository: Repository, model: ModelVersion) -> Source:
    """Raises: UntrustedCodeError: trust is asked for at every load, since it can be taken away; what resolving and checking out raise."""
    manifest = repository.manifest(model.digest)
    publisher = repository.resolve(ModelRef.parse(str(model))).publisher
    if manifest.info.code and not repository.trusted(publisher, "code"):
        advice = f"if you know whose key that is: tether trust {publisher} --code"
        raise UntrustedCodeError(f"{model} can run code and its publisher is not trusted for code; {advice}")
    return Source(repository.checkout(model.digest) / manifest.entry, manifest.info)


def _load(threads: int, source: Source) -> LoadedModel:
    return load_model(source.path, source.info, threads)


def _warm_up() -> None:
    """The import costs 0.2 s, which the first request need not pay."""
    with contextlib.suppress(ImportError):
        importlib.import_module("onnxruntime")


@click.command("worker")
@click.argument("orchestrator", default=f"tls://127.0.0.1:{ORCHESTRATOR_PORT}")
@click.option("--data", type=click.Path(file_okay=False), help="Data folder of the lab.")
@click.option("--name", default="worker-1", show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8001, show_default=True)
@click.option("--gpus", default=0, show_default=True, help="GPUs to offer, as the Dask resource GPU.")
@click.option("--threads", default=1, show_default=True, help="Threads of one run of a model.")
def _command(orchestrator: str, data: str | None, name: str, host: str, port: int, gpus: int, threads: int) -> None:  # noqa: PLR0913, PLR0917 (the command line's options)
    """Run a worker: loads models and answers requests."""
    folder = DataFolder.locate(data).create()
    security = Security(**ensure_tls(folder.tls, "worker").security())

    async def serve(life: Life) -> None:
        plugin = make_plugin(folder, name, threads)
        async with _Worker(
            orchestrator,
            name=name,
            host=host,
            port=port,
            protocol="tls",
            security=security,
            nthreads=1,
            memory_limit=0,
            resources={"GPU": gpus} if gpus else None,
            plugins=(plugin,),
            death_timeout=20,
            local_directory=str(folder.runtime),
        ) as worker:
            life.ready(address=worker.address)
            await asyncio.to_thread(_warm_up)
            await _first(life.ended(), worker.finished())

    with dask.config.set(HOUSEKEEPING | {"temporary-directory": str(folder.runtime)}):
        try:
            run_service(serve)
        finally:
            default_pool().close()


async def _first(*ends: Coroutine[Any, Any, Any]) -> None:
    """Until the supervisor says so, or Dask closed the worker because its scheduler is gone (the supervisor then starts both anew)."""
    tasks = [asyncio.ensure_future(end) for end in ends]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `tether worker`."""
    _command(list(arguments) if arguments is not None else None)
