"""The orchestrator as a process: a Dask scheduler with Tether's plugin, mutual TLS and Dask's housekeeping turned down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import click
import dask.config
from distributed import Scheduler
from distributed.comm import Comm

from tether.config import HOUSEKEEPING, ORCHESTRATOR_PORT, DataFolder
from tether.orchestrator.preload import dask_setup
from tether.security.comms import dask_security
from tether.security.tls import ensure_tls
from tether.telemetry.service import Life, run_service

__all__ = ["main"]

_HEARTBEAT = 1.0
_TURN = 0.005


class _Scheduler(Scheduler):  # type: ignore[misc]  # distributed is untyped
    """Without Dask's HTTP server, which knows no callers' certificates and listens before anybody is asked; nothing here uses it."""

    def start_http_server(self, *_: Any, **__: Any) -> None:
        """Listen on nothing."""

    def heartbeat_worker(self, **facts: Any) -> dict[str, Any]:
        """As Dask's, which wants two a second of ten workers. They cost four times as much as a ping, and tell what few look at."""
        answer: dict[str, Any] = super().heartbeat_worker(**facts)
        if "heartbeat-interval" in answer:
            answer["heartbeat-interval"] = max(answer["heartbeat-interval"], _HEARTBEAT)
        return answer

    async def add_worker(self, comm: Comm, *, address: str, **facts: Any) -> None:
        """As Dask's. A worker that was cut off may come again before that is noticed here, where its old connection seems open."""
        if (old := self.stream_comms.get(address)) is not None:
            old.abort()
            while address in self.workers:  # noqa: ASYNC110 (who reads the connection removes it, and tells nobody)
                await asyncio.sleep(_TURN)
        await super().add_worker(comm, address=address, **facts)


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
