"""A worker as a process: a Dask worker with Tether's engine. The supervisor is its nanny."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import importlib
import os
import shutil
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import dask.config
import msgspec
import psutil
import structlog
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from distributed import Worker
from distributed.core import connect, rpc
from distributed.system import MEMORY_LIMIT

from tether.config import HOUSEKEEPING, ORCHESTRATOR_PORT, REGION_ENV, DataFolder, Limits
from tether.errors import ConfigError, NotWriterError, ServiceUnavailableError, from_code
from tether.routing.table import Table
from tether.runtimes import devices
from tether.security.comms import dask_security
from tether.security.tls import ensure_tls
from tether.security.volatile import sweep
from tether.store.replicas.cache import default_nbytes
from tether.telemetry.service import Life, run_service
from tether.worker.engine import Engine
from tether.worker.footprint import default_budget
from tether.worker.manager_blobs import ManagerBlobs
from tether.worker.model_files import ModelFiles, load_pinned
from tether.worker.plugin import EnginePlugin, LastingPlugin
from tether.worker.residency import RAM
from tether.worker.runner import default_pool
from tether.worker.runner_limits import RunnerLimits
from tether.worker.site import LABELS, REGION, worker_site

log = structlog.get_logger("tether.worker")
__all__ = ["Cluster", "choose_devices", "main", "make_plugin", "memory_budget"]

_CONNECT = 2.0
"""Seconds: Dask tries again and again until then."""
_ANSWER = 20.0
"""Seconds for one operation of the manager: a blob of 4 MiB over 2 Mbit/s."""
_START = 20.0
"""Seconds for the orchestrator to take the first worker of this process in: it may be starting, too."""
_FAREWELL = 8.0
"""Seconds for the lab to do without this worker once it is told to end: the supervisor gives it ten, Kubernetes thirty."""
_LOOK = 0.1
"""Seconds between tries to find an orchestrator that went away."""
_REFUSED = "failure-to-start"
_LOST = {"worker-handle-scheduler-connection-broken", "worker-heartbeat-missing", "worker-heartbeat-error", "scheduler-close", _REFUSED}
"""Why Dask ends a worker that nobody wanted to end: the scheduler went, or forgot it, or did not take it in."""


class _Worker(Worker):  # type: ignore[misc]  # distributed is untyped
    """Without Dask's HTTP server, which knows no callers' certificates; nothing here uses it."""

    ended_for = ""
    """Why it was closed, in Dask's words."""

    async def close(self, *, reason: str = "worker-close", **options: Any) -> Any:
        """As Dask's, but it waits for no task that still runs: the next worker is to be there soon."""
        self.ended_for = self.ended_for or reason
        return await super().close(reason=reason, **({"executor_wait": False} | options))

    def start_http_server(self, *_: Any, **__: Any) -> None:
        """Listen on nothing."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """How to reach the cluster's other services."""

    orchestrator: str
    connection_args: dict[str, Any]
    """Of Dask's comms: the worker's certificate."""


class _Manager:
    """The manager, wherever the orchestrator says that it is now. Belongs to one event loop."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._rpc: rpc | None = None

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """Raises: ServiceUnavailableError: it does not answer, or none is known; what it answers as an error of the tree."""
        try:
            async with asyncio.timeout(_ANSWER):
                manager = await self._connected()
                answer = await getattr(manager, f"tether_{operation}")(**arguments)
        except ServiceUnavailableError:
            raise
        except (OSError, TimeoutError) as error:
            await self.close()  # the next call asks the orchestrator where it is
            raise ServiceUnavailableError(f"the manager does not answer ({error}); the supervisor restarts it, try again") from error
        if "error" in answer:
            code, *args = answer["error"]
            if code == NotWriterError.code:  # another one took over
                await self.close()
            raise from_code(code, *args)
        return answer["answer"]

    async def _connected(self) -> rpc:
        if self._rpc is None:
            table = await self._table()
            if table.manager is None:
                raise ServiceUnavailableError("the model manager is away; the supervisor restarts it, try again in a few seconds")
            if self._rpc is None:  # of two callers one makes the connections, the other finds them
                self._rpc = rpc(table.manager, timeout=_CONNECT, connection_args=self._cluster.connection_args)
        return self._rpc

    async def _table(self) -> Table:
        comm = await connect(self._cluster.orchestrator, timeout=_CONNECT, **self._cluster.connection_args)
        try:
            await comm.write({"op": "tether_table", "reply": True})
            return msgspec.msgpack.decode((await comm.read())["table"], type=Table)
        finally:
            comm.abort()

    async def close(self) -> None:
        """Drop the connections; a second call does nothing."""
        old, self._rpc = self._rpc, None
        if old is not None:
            await old.close_rpc()


class _Engine(Engine):
    """The engine of a process, with the stores that its models come from."""

    def __init__(self, sockets: Path, files: ModelFiles, threads: int, budget: int) -> None:
        super().__init__(sockets, files.fetch, partial(load_pinned, threads), Limits().latency, {RAM: budget})
        self._files = files

    def close(self) -> None:
        """Unload everything and close the stores."""
        super().close()
        self._files.close()


def choose_devices(gpus: int) -> None:
    """What the models of this process may run on: its cards where it has the resource GPU, else none; and what the settings name.

    Which of the machine's cards are its own is said by `CUDA_VISIBLE_DEVICES`, as for all that uses them. Raises: ConfigError.
    """
    if not gpus:
        devices.hide_cards()
    providers, compiler = dask.config.get("tether.onnx.providers", None), dask.config.get("tether.torch.compile", None)
    if providers is not None:
        import onnxruntime  # heavy (0.2 s)

        devices.use_providers(providers, onnxruntime.get_available_providers())
    if compiler is not None:
        devices.use_torch_compiler(compiler)


def memory_budget(wished: str | None, machine_nbytes: int, workers: int = 1) -> int:
    """Bytes that models may take: as wished, else as configured, else a part of the machine's, of one of so many workers on it.

    Raises: ConfigError.
    """
    return _nbytes("tether.worker.memory", wished) or default_budget(machine_nbytes, workers)


def _nbytes(setting: str, wished: str | None = None) -> int | None:
    """As wished, else as configured; None: nobody said. Raises: ConfigError."""
    said = dask.config.get(setting, None) if wished is None else wished
    if said is None:
        return None
    try:
        nbytes = int(parse_bytes(said)) if str(said).strip() else 0
    except (ValueError, OverflowError, TypeError, AttributeError):  # the settings' file may say a list, or 1e400
        nbytes = 0
    if nbytes < 1:
        raise ConfigError(f"a memory budget of {said!r}: give a number of bytes, as 4GiB (--memory-budget or {setting})")
    return nbytes


def make_plugin(folder: DataFolder, name: str, threads: int, cluster: Cluster, budget: int) -> EnginePlugin:
    """An engine for a Dask worker of this name, over the data folder's store, else over what it fetches from the manager.

    `budget`: bytes that models may take.
    """
    default_pool().limits = RunnerLimits.configured(dask.config.get("tether.runner", {}), MEMORY_LIMIT)
    sweep()  # of what a killed worker left in memory
    sockets = _socket_folder(folder.runtime, name)
    manager = _Manager(cluster)
    blobs = ManagerBlobs(manager.ask, manager.close)
    files = ModelFiles(folder.store, folder.replicas / name, blobs, _cache_nbytes(folder))
    return EnginePlugin(_Engine(sockets, files, threads, budget), sockets, _nbytes("tether.worker.gpu-memory"), worker_site(folder))


def _cache_nbytes(folder: DataFolder) -> int:
    """Raises: ConfigError."""
    configured = dask.config.get("tether.cache", None)
    try:
        return default_nbytes(folder.root) if configured is None else int(parse_bytes(configured))
    except ValueError as error:
        raise ConfigError(f"tether.cache is {configured!r}: give a number of bytes, as 20GB ({error})") from None


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
@click.option("--contact-address", metavar="URL", help="Where the orchestrator reaches it, where that is not tls://HOST:PORT.")
@click.option("--gpus", default=0, show_default=True, help="GPUs to offer, as the Dask resource GPU.")
@click.option("--threads", type=click.IntRange(1), help="Threads of one run of a model  [default: as many as cores, shared].")
@click.option("--memory-budget", "wished", metavar="BYTES", help="For models, as 4GiB  [default: 60 % of the machine's memory, shared].")
@click.option("--region", envvar=REGION_ENV, help="Where it is, for models that are to run there  [default: as the lab].")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="What it has, as gpu=a100, for models that need it.")
@click.option("--workers-here", type=click.IntRange(1), default=1, show_default=True, help="Workers that share this machine.")
def _command(  # noqa: PLR0913, PLR0917 (the command line's options)
    orchestrator: str,
    data: str | None,
    name: str,
    host: str,
    port: int,
    contact_address: str | None,
    gpus: int,
    threads: int | None,
    wished: str | None,
    region: str | None,
    labels: tuple[str, ...],
    workers_here: int,
) -> None:
    """Run a worker: loads models and answers requests."""
    budget = memory_budget(wished, MEMORY_LIMIT, workers_here)
    site: dict[str, Any] = {REGION: region} if region is not None else {}
    site |= {LABELS: labels} if labels else {}
    folder = DataFolder.locate(data).create()
    choose_devices(gpus)
    security = dask_security(ensure_tls(folder.tls, "worker"))

    async def serve(life: Life) -> None:
        cluster = Cluster(orchestrator, security.get_connection_args("worker"))
        plugin = make_plugin(folder, name, threads or max(CPU_COUNT // workers_here, 1), cluster, budget)
        make = partial(
            _Worker,
            orchestrator,
            name=name,
            host=host,
            port=port,
            contact_address=contact_address,
            protocol="tls",
            security=security,
            nthreads=1,
            memory_limit=0,
            resources={"GPU": gpus} if gpus else None,
            plugins=(LastingPlugin(plugin),),
            death_timeout=_START,
            local_directory=str(folder.runtime),
        )
        try:
            await _first(_told_to_end(life, plugin), _live(make, cluster, life))
        finally:
            await plugin.aclose()

    with dask.config.set(HOUSEKEEPING | site | {"temporary-directory": str(folder.runtime)}):
        try:
            run_service(serve)
        finally:
            default_pool().close()


async def _live(make: Callable[[], _Worker], cluster: Cluster, life: Life) -> None:
    """One Dask worker after the other around the same engine, since each ends with its scheduler; until one is ended on purpose.

    Dask gave up to let workers reconnect (2022), since they forgot to agree on their tasks. No request is one: gateways go on
    sending what models here are to answer, and the next orchestrator is told what is loaded.
    """
    async with make() as worker:
        life.ready(address=worker.address)
        await asyncio.to_thread(_warm_up)
        await worker.finished()
    ended_for = worker.ended_for
    while ended_for in _LOST:
        log.warning("orchestrator away, models serve on", orchestrator=cluster.orchestrator, reason=ended_for)
        await _reachable(cluster)
        ended_for = await _next_life(make())


async def _next_life(worker: _Worker) -> str:
    """Why it ended."""
    try:
        await worker
        log.info("joined again", orchestrator=worker.scheduler.address)
        await worker.finished()
    except (OSError, TimeoutError, RuntimeError) as error:  # RuntimeError: what kept it from starting is its cause
        log.warning("not taken in, it is tried again", error=str(error.__cause__ or error))
        await asyncio.sleep(_LOOK)  # it answers and refuses at once, as long as it likes
        return _REFUSED
    finally:
        await worker.close()
    return worker.ended_for


async def _reachable(cluster: Cluster) -> None:
    """Return when the orchestrator answers. A worker of Dask's waits longer and longer between its own tries."""
    while True:
        with contextlib.suppress(OSError):
            comm = await connect(cluster.orchestrator, timeout=_CONNECT, **cluster.connection_args)
            comm.abort()
            return
        await asyncio.sleep(_LOOK)


async def _told_to_end(life: Life, plugin: EnginePlugin) -> None:
    """Return when it is told, and the lab does without it."""
    await life.ended()
    await plugin.drain(_FAREWELL)


async def _first(*ends: Coroutine[Any, Any, Any]) -> None:
    """Until the supervisor says so, or the worker was ended; what ended it by an error is raised."""
    tasks = [asyncio.ensure_future(end) for end in ends]
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for task in done:
        task.result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `tether worker`."""
    _command(list(arguments) if arguments is not None else None)
