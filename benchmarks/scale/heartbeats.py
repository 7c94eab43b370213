"""What workers cost the scheduler that do nothing: Dask's heartbeats with Tether's metrics, at the scheduler's end, without the socket."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import dask.config
from distributed import Scheduler
from distributed.comm import CommClosedError
from distributed.scheduler import heartbeat_interval

from tether.config import HOUSEKEEPING
from tether.security.comms import dask_security
from tether.security.tls import ensure_tls

__all__ = ["heartbeats"]

_METRICS = {
    "task_counts": {},
    "bandwidth": {"total": 1e8, "workers": {}, "types": {}},
    "digests_total_since_heartbeat": {},
    "managed_bytes": 0,
    "spilled_bytes": {"memory": 0, "disk": 0},
    "transfer": {f"{way}_{what}": 0 for way in ("incoming", "outgoing") for what in ("bytes", "count", "count_total")},
    "event_loop_interval": 0.02,
    "cpu": 1.0,
    "memory": 1 << 28,
    "time": 0.0,
    "tether_vitals": {"cpu": 1.0, "memory": 1 << 28},
    "tether_memory": {"used": 1 << 30, "budget": 1 << 34, "models": {f"model-{number}:1": 1 << 25 for number in range(20)}},
}


class _Comm:
    """Of a worker that says nothing."""

    def __init__(self, number: int) -> None:
        self.number, self.ended = number, asyncio.Event()
        self.address = self.peer_address = self.local_address = f"tls://10.0.{number // 250}.{number % 250 + 1}:8001"

    async def write(self, *_: Any, **__: Any) -> None:
        """Nobody reads it."""

    async def read(self, *_: Any, **__: Any) -> Any:
        await self.ended.wait()
        raise CommClosedError

    def abort(self) -> None:
        self.ended.set()

    async def close(self) -> None:
        self.ended.set()

    def closed(self) -> bool:
        return self.ended.is_set()


def _introduced(comm: _Comm) -> dict[str, Any]:
    """What a worker says when it registers."""
    said = {
        "address": comm.address,
        "status": "running",
        "nthreads": 1,
        "name": comm.number,
        "pid": comm.number + 1,
        "server_id": f"s{comm.number}",
    }
    said |= {"now": time.time(), "resources": {}, "memory_limit": None, "metrics": _METRICS, "services": {}, "local_directory": ""}
    return said | {"versions": {}, "nanny": None, "extra": {}, "stimulus_id": "joined"}


async def _measure(workers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        security = dask_security(ensure_tls(Path(folder), "orchestrator"))
        async with Scheduler(host="127.0.0.1", port=0, protocol="tls", security=security, dashboard=False) as scheduler:
            comms = [_Comm(number) for number in range(workers)]
            joining = [asyncio.create_task(scheduler.add_worker(comm, **_introduced(comm))) for comm in comms]
            while len(scheduler.workers) < workers:  # noqa: ASYNC110 (Dask's own dict)
                await asyncio.sleep(0.05)
            begun = time.process_time()
            for comm in comms:
                scheduler.heartbeat_worker(address=comm.address, metrics=_METRICS, executing={}, extensions={}, now=time.time())
            took = (time.process_time() - begun) / workers
            for comm in comms:
                comm.abort()
            await asyncio.gather(*joining, return_exceptions=True)
    interval = heartbeat_interval(workers)
    return {"milliseconds": took * 1e3, "interval": interval, "cores": took * workers / interval}


def heartbeats(workers: int) -> dict[str, float]:
    """Of one heartbeat the scheduler's CPU, the seconds between two of a worker, and what all together take of a core."""
    with dask.config.set(HOUSEKEEPING):
        return asyncio.run(_measure(workers))
