"""`dask scheduler --preload tether.orchestrator.preload`: makes a Dask scheduler an orchestrator; refuses one without mutual TLS."""

from __future__ import annotations

import sys

from distributed import Scheduler

from tether.orchestrator.plugin import OrchestratorPlugin

__all__ = ["dask_setup"]

_ADVICE = (
    "tether: this scheduler does not require TLS, so anyone who reaches its port could run code in it.\n"
    "Start it with `tether orchestrator`, or give `dask scheduler` --protocol tls with --tls-ca-file, --tls-cert and --tls-key\n"
    "and set DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=True."
)


async def dask_setup(scheduler: Scheduler) -> None:
    """Install the plugin. Exits with 2 when the scheduler would accept unencrypted peers."""
    security = scheduler.security
    listeners = [listener.contact_address for listener in scheduler.listeners] or [scheduler.protocol or "tcp://"]
    if not security.require_encryption or any(not address.startswith("tls") for address in listeners):
        sys.stderr.write(_ADVICE + "\n")
        raise SystemExit(2)
    plugin = OrchestratorPlugin()
    await plugin.start(scheduler)
    scheduler.add_plugin(plugin)
