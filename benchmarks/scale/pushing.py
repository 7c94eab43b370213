"""How long a change takes to the tables of gateways: a real scheduler, real gateways' clients and dispatch, Dask's comms under TLS.

Each gateway is a process and passes its share of the requests meanwhile; their answers are made up after a millisecond.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import dask.config
from cluster import Cluster, version
from distributed import Scheduler

from tether.client.cluster import OrchestratorClient
from tether.config import HOUSEKEEPING
from tether.events import Evicting
from tether.gateway import lines
from tether.gateway.dispatch import Dispatch
from tether.orchestrator.instructions import Push
from tether.orchestrator.plugin import OrchestratorPlugin
from tether.ports import Hop, HopReply
from tether.routing.table import Table, TableChange
from tether.security.comms import dask_security
from tether.security.tls import ensure_tls
from tether.types import WorkerMemory

__all__ = ["pushed"]

_PAUSE = 0.02
"""Seconds between changes."""


async def _orchestrate(workers: int, models: int, loaded: int, gateways: int, rate: float, changes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tls = Path(folder)
        security = dask_security(ensure_tls(tls, "orchestrator"))
        async with Scheduler(host="127.0.0.1", port=0, protocol="tls", security=security, dashboard=False) as scheduler:
            plugin = OrchestratorPlugin()
            await plugin.start(scheduler)
            cluster = Cluster(workers, models, loaded, plugin._state)  # noqa: SLF001 (measured from inside)
            cluster.push = lambda change: plugin._carry_out(Push(cluster.state.table, change))  # noqa: SLF001
            command = [sys.executable, __file__, scheduler.address, folder, str(rate / gateways), str(loaded)]
            started = [await asyncio.create_subprocess_exec(*command, stdin=-1, stdout=-1) for _ in range(gateways)]
            whole = [float(await process.stdout.readline()) for process in started]
            sent, cpu = {}, time.process_time()
            begun = time.monotonic()
            for number in range(changes):
                sent |= _change(cluster, number % loaded)
                await asyncio.sleep(_PAUSE)
            used = (time.process_time() - cpu) / (time.monotonic() - begun)
            await asyncio.sleep(0.5)
            seen = [json.loads((await process.communicate(b"\n"))[0]) for process in started]
    return _figures(sent, seen) | {"first table": max(whole), "cores of the orchestrator": used}


def _change(cluster: Cluster, number: int) -> dict[int, float]:
    """A copy goes or comes: number of the table, and when its change was sent."""
    sent: dict[int, float] = {}
    push, cluster.push = cluster.push, lambda change: sent.update({change.seq: begun}) or push(change)
    entry = cluster.state.table.resolve(version(number).name)
    route = entry.routes[-1]
    worker = cluster.state.table.workers[route.worker]
    begun = time.monotonic()
    cluster.settle(Evicting(worker.address, worker.pid, entry.model, route.endpoint, worker.memory or WorkerMemory()))
    cluster.push = push
    return sent


def _figures(sent: dict[int, float], seen: list[dict[str, Any]]) -> dict[str, float]:
    took = sorted(max(gateway["seen"][str(seq)] for gateway in seen) - begun for seq, begun in sent.items())
    requests = sum(gateway["answered"] / gateway["seconds"] for gateway in seen)
    return {
        "changes": len(took),
        "median": took[len(took) // 2] * 1e3,
        "p99": took[int(len(took) * 0.99)] * 1e3,
        "longest": took[-1] * 1e3,
        "requests a second": requests,
        "applied in": max(gateway["applied"] for gateway in seen) * 1e3,
    }


class _Line:
    """In the place of a connection to a worker."""

    def __init__(self, *_: object) -> None:
        self.closed, self.in_flight, self.load = False, 0, 0

    def send(self, _: Hop, done: Any) -> Any:
        return asyncio.get_running_loop().call_later(0.001, done, HopReply(200, b"{}")).cancel

    def close(self) -> None:
        self.closed = True


class _Gateway:
    """Follows, and passes requests."""

    def __init__(self, address: str, folder: str) -> None:
        self.dispatch = Dispatch(self, mock.Mock())  # type: ignore[arg-type]  # nothing is asked of either
        self.client = OrchestratorClient(address, ensure_tls(Path(folder), "gateway"), self._take, list)
        self.seen: dict[int, float] = {}
        self.took: list[float] = []
        self.answered = 0

    async def load(self, _: object) -> None:
        """As of `ControlPlane`."""

    async def want(self, _: object) -> tuple[str, str]:
        """As of `ControlPlane`."""
        return "loading", ""

    def _take(self, table: Table, change: TableChange | None) -> None:
        begun = time.perf_counter()
        self.dispatch.replace_table(table, change)
        self.seen[table.seq] = time.monotonic()
        if change is not None:
            self.took.append(time.perf_counter() - begun)

    def _count(self, reply: HopReply) -> None:
        self.answered += reply.status == 200

    async def pass_requests(self, rate: float, loaded: int) -> None:
        chance, loop = random.Random("requests"), asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += chance.expovariate(rate)
            await asyncio.sleep(max(due - loop.time(), 0))
            self.dispatch.infer(version(chance.randrange(loaded)).name, None, Hop(b"{}", 0, 5.0), self._count)


async def _follow(address: str, folder: str, rate: str, loaded: str) -> None:
    with mock.patch.object(lines, "UnixTransport", _Line):
        gateway, begun = _Gateway(address, folder), time.monotonic()
        await gateway.client.start(60.0)
        print(time.monotonic() - begun, flush=True)
        started = time.monotonic()
        passing = asyncio.create_task(gateway.pass_requests(float(rate), int(loaded)))
        await asyncio.to_thread(sys.stdin.readline)
        passing.cancel()
        seconds, applied = time.monotonic() - started, sorted(gateway.took)
        found = {"seen": gateway.seen, "answered": gateway.answered, "seconds": seconds, "applied": applied[len(applied) // 2]}
        print(json.dumps(found))
        await gateway.client.close()
        gateway.dispatch.close()


def pushed(workers: int, models: int, loaded: int, gateways: int = 3, rate: float = 1000.0, changes: int = 300) -> dict[str, Any]:
    """Milliseconds from an event to the last gateway's table, while requests pass."""
    with dask.config.set(HOUSEKEEPING):
        return asyncio.run(_orchestrate(workers, models, loaded, gateways, rate, changes))


if __name__ == "__main__":
    with dask.config.set(HOUSEKEEPING):
        asyncio.run(_follow(*sys.argv[1:]))
