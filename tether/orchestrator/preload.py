"""`dask scheduler --preload tether.orchestrator.preload`: makes a Dask scheduler an orchestrator; refuses one without mutual TLS."""

from __future__ import annotations

import sys

import dask.config
from distributed import Scheduler

from tether.config import DataFolder
from tether.orchestrator.memory import Memory
from tether.orchestrator.plugin import OrchestratorPlugin

__all__ = ["dask_setup"]

_ADVICE = (
    "tether: this scheduler does not require TLS, so anyone who reaches its port could run code in it.\n"
    "Start it with `tether orchestrator`, or give `dask scheduler` --protocol tls with --tls-ca-file, --tls-cert and --tls-key\n"
    "and set DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=True."
)


async def dask_setup(scheduler: Scheduler, folder: DataFolder | None = None) -> None:
    """Install the plugin; `folder`: of the orchestrator, found as always if it is not said.

    Exits with 2 when the scheduler would accept unencrypted peers.
    """
    security = scheduler.security
    listeners = [listener.contact_address for listener in scheduler.listeners] or [scheduler.protocol or "tcp://"]
    if not security.require_encryption or any(not address.startswith("tls") for address in listeners):
        sys.stderr.write(_ADVICE + "\n")
        raise SystemExit(2)
    folder = folder or DataFolder.locate(dask.config.get("tether.data", None)).create()
    plugin = OrchestratorPlugin(memory=Memory(folder.lease))
    await plugin.start(scheduler)
    scheduler.add_plugin(plugin)
