"""`dask worker --preload tether.worker.preload`: makes a Dask worker one of Tether's; refuses one without mutual TLS."""

from __future__ import annotations

import re
import sys

import dask.config
from distributed import Worker
from distributed.system import MEMORY_LIMIT

from tether.config import DataFolder
from tether.worker.service import Cluster, choose_devices, make_plugin, memory_budget

__all__ = ["dask_setup"]

_ADVICE = (
    "tether: this worker does not require TLS, so anyone who reaches its port could run code in it.\n"
    "Start it with `tether worker tls://HOST:8002`, or give `dask worker` a tls:// scheduler, --tls-ca-file, --tls-cert and --tls-key\n"
    "and set DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=True."
)


async def dask_setup(worker: Worker) -> None:
    """Install the engine. Exits with 2 when the worker would accept unencrypted peers."""
    if not worker.security.require_encryption:
        sys.stderr.write(_ADVICE + "\n")
        raise SystemExit(2)
    name = re.sub(r"[^\w.-]+", "-", str(worker.name))  # Dask names a worker that was given none after its address; here it names a folder
    choose_devices(int(worker.state.total_resources.get("GPU", 0)))
    folder = DataFolder.locate(dask.config.get("tether.data", None)).create()
    cluster = Cluster(worker.scheduler.address, worker.security.get_connection_args("worker"))
    budget = memory_budget(None, worker.memory_manager.memory_limit or MEMORY_LIMIT)  # Dask's is of one of its workers here
    plugin = make_plugin(folder, name, worker.state.nthreads, cluster, budget)
    await worker.plugin_add(plugin=plugin)
