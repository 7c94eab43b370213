"""The orchestrator as a process: a Dask scheduler with Tether's plugin, mutual TLS and Dask's housekeeping turned down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import dask.config
from distributed import Scheduler

from tether.config import HOUSEKEEPING, ORCHESTRATOR_PORT, DataFolder
from tether.orchestrator.preload import dask_setup
from tether.security.comms import dask_security
from tether.security.tls import ensure_tls
from tether.telemetry.service import Life, run_service

__all__ = ["main"]


class _Scheduler(Scheduler):  # type: ignore[misc]  # distributed is untyped
    """Without Dask's HTTP server, which knows no callers' certificates and listens before anybody is asked; nothing here uses it."""

    def start_http_server(self, *_: Any, **__: Any) -> None:
        """Listen on nothing."""


@click.command("orchestrator")
@click.option("--data", type=click.Path(file_okay=False), help="Data folder of the lab.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=ORCHESTRATOR_PORT, show_default=True)
def _command(data: str | None, host: str, port: int) -> None:
    """Run the orchestrator: registry, placement, routing table."""
    folder = DataFolder.locate(data).create()
    security = dask_security(ensure_tls(folder.tls, "orchestrator"))

    async def serve(life: Life) -> None:
        async with _Scheduler(host=host, port=port, protocol="tls", security=security, dashboard=False) as scheduler:
            await dask_setup(scheduler, folder)
            life.ready(address=scheduler.address)
            await life.ended()

    with dask.config.set(HOUSEKEEPING | {"temporary-directory": str(folder.runtime)}):
        run_service(serve)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `tether orchestrator`."""
    _command(list(arguments) if arguments is not None else None)
