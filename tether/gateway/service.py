"""A gateway as a process: the HTTP door of a lab."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import click
import dask.config
import msgspec

from tether.client.cluster import ManagerClient, OrchestratorClient
from tether.config import GATEWAY_PORT, HOUSEKEEPING, ORCHESTRATOR_PORT, DataFolder
from tether.errors import ConfigError, PortBusyError, TetherError
from tether.events import GatewayLoad
from tether.gateway.admission import Keys, fingerprint
from tether.gateway.app import serve
from tether.gateway.dispatch import Dispatch
from tether.gateway.door import Settings
from tether.routing.table import Table, WorkerEntry
from tether.security.keys import ensure_api_key
from tether.security.tls import TlsFiles, ensure_tls
from tether.telemetry.service import Life, run_service
from tether.types import ModelVersion
from tether.worker.site import worker_site

__all__ = ["main"]

_START_TIMEOUT = 30.0


class _Control:
    """The orchestrator's client plus what only this host knows: the supervisor's list of services."""

    def __init__(self, folder: DataFolder, orchestrator: str, tls: TlsFiles) -> None:
        self._folder = folder
        self.manager = ManagerClient(lambda: self.dispatch.table.manager, lambda change: self.dispatch.reflects(change), tls)  # noqa: PLW0108 (made next)
        self.dispatch = Dispatch(self, self.manager, worker_site(folder).region)
        self.orchestrator = OrchestratorClient(orchestrator, tls, self.dispatch.replace_table, self.dispatch.used)

    async def want(self, model: ModelVersion) -> tuple[str, str]:
        return await self.orchestrator.want(model)

    async def vitals(self) -> dict[str, Any]:
        return await self.orchestrator.vitals()

    async def quarantine(self, model: ModelVersion, mark: str | None) -> None:
        await self.orchestrator.quarantine(model, mark)

    async def load(self, load: GatewayLoad) -> None:
        await self.orchestrator.load(load)

    async def explain(self, model: str) -> list[dict[str, Any]]:
        return await self.orchestrator.explain(model)

    async def drain(self, worker: str, patience: float | None, wait: float) -> WorkerEntry:
        return await self.orchestrator.drain(worker, patience, wait)

    async def restart_worker(self, worker: str) -> WorkerEntry:
        return await self.orchestrator.restart_worker(worker)

    async def forgive(self, model: str) -> None:
        await self.orchestrator.forgive(model)

    async def status(self) -> dict[str, Any]:
        """What the supervisor says of the services, with the workers and models of the table, and what the manager says of the swarm."""
        swarm, silent = await asyncio.gather(self._swarm(), self._silent())
        if swarm["state"] == "unknown":
            silent["manager"] = swarm["detail"]
        table, described = self.dispatch.table, _described(self._folder)
        described["services"] = [_seen(service, table, silent) for service in described["services"]]
        return described | {"swarm": swarm, "workers": _workers(table), "models": _models(table)}

    async def _silent(self) -> dict[str, str]:
        """The orchestrator, if it does not answer, and why."""
        try:
            await self.orchestrator.vitals()
        except TetherError as error:
            return {"orchestrator": str(error)}
        return {}

    async def _swarm(self) -> dict[str, Any]:
        try:
            return await self.manager.swarm()
        except TetherError as error:
            return {"state": "unknown", "detail": str(error)}

    async def close(self) -> None:
        self.dispatch.close()
        await self.orchestrator.close()
        await self.manager.close()


def _described(folder: DataFolder) -> dict[str, Any]:
    try:
        facts = json.loads((folder.run / "lab.json").read_text())
    except (OSError, ValueError):  # not under a supervisor
        facts = {}
    known = {name: facts.get(name) for name in ("address", "gateway")}
    return known | {"data": str(folder.root), "services": facts.get("services", [])}


def _seen(service: dict[str, Any], table: Table, silent: Mapping[str, str]) -> dict[str, Any]:
    """A service that runs as far as its supervisor knows, as others see it. `silent`: by role, why one gave no answer."""
    worker = table.workers.get(service["name"])
    if service["state"] != "running":
        return service
    if worker is not None and worker.pid == service["pid"]:
        return service | {"state": worker.state, "since": worker.since} if worker.state != "running" else service
    return service | {"state": "silent", "error": silent[service["role"]]} if service["role"] in silent else service


def _workers(table: Table) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(each) for each in table.workers.values()]


def _models(table: Table) -> list[dict[str, Any]]:
    return [
        {
            "name": entry.name,
            "default": entry.default,
            "aliases": entry.aliases,
            "versions": [
                {
                    "version": number,
                    "digest": version.model.digest,
                    "framework": version.info.framework,
                    "state": version.state,
                    "reason": version.reason,
                    "isolated": version.is_isolated,
                    "poison": len(version.poison),
                    "workers": [route.worker for route in version.routes],
                }
                for number, version in sorted(entry.versions.items())
            ],
        }
        for entry in table.models.values()
    ]


@click.command("gateway")
@click.argument("orchestrator", default=f"tls://127.0.0.1:{ORCHESTRATOR_PORT}")
@click.option("--data", type=click.Path(file_okay=False), help="Data folder of the lab.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=GATEWAY_PORT, show_default=True)
@click.option("--fd", type=int, help="A listening socket that was handed over, instead of host and port.")
def _command(orchestrator: str, data: str | None, host: str, port: int, fd: int | None) -> None:
    """Run a gateway: the HTTP door."""
    folder = DataFolder.locate(data).create()
    settings = Settings(keys=_keys(folder), access_log=folder.logs / "access.log")
    sock = socket.socket(fileno=fd) if fd is not None else _bound(host, port)
    if not ipaddress.ip_address(sock.getsockname()[0]).is_loopback:
        raise ConfigError("the gateway serves loopback only, until it can be given a certificate; put a TLS proxy in front of it")

    async def live(life: Life) -> None:
        control = _Control(folder, orchestrator, ensure_tls(folder.tls, "gateway"))
        await control.orchestrator.start(_START_TIMEOUT)
        stop = asyncio.Event()
        ending = asyncio.create_task(_end_with(life, stop))
        try:
            await serve(control.dispatch, [sock], settings, stop, life.ready)
        finally:
            ending.cancel()
            await control.close()

    with dask.config.set(HOUSEKEEPING):
        run_service(live)


async def _end_with(life: Life, stop: asyncio.Event) -> None:
    await life.ended()
    stop.set()


def _keys(folder: DataFolder) -> Keys:
    """The lab's own key; it is made by the supervisor, or here where none started this gateway."""
    ensure_api_key(folder.api_key)
    return Keys({fingerprint(folder.api_key.read_text().strip()): "lab"})


def _bound(host: str, port: int) -> socket.socket:
    """Raises: PortBusyError."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        raise PortBusyError(f"port {port} of {host} can't be used ({error.strerror}); choose another with --port") from error
    return sock


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `tether gateway`."""
    _command(list(arguments) if arguments is not None else None)
