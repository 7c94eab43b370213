"""To the orchestrator and the manager as a member of the cluster: Dask's comms under mutual TLS. Control only; no inference passes here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import structlog
from distributed.core import CommClosedError, connect, rpc

from tether.errors import NotWriterError, ServiceUnavailableError, from_code
from tether.events import GatewayLoad
from tether.routing.table import Table, TableChange, WorkerEntry
from tether.security.comms import dask_security
from tether.security.tls import TlsFiles
from tether.types import ModelVersion

__all__ = ["ManagerClient", "OrchestratorClient"]

log = structlog.get_logger("tether.gateway")
OnTable = Callable[[Table, TableChange | None], None]
_RECONNECT = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds between tries; the last one again and again."""
_CONTROL_TIMEOUT = 10.0
"""Seconds for a control call."""


def _connection_args(tls: TlsFiles) -> dict[str, Any]:
    arguments: dict[str, Any] = dask_security(tls).get_connection_args("client")
    return arguments


class OrchestratorClient:
    """A gateway's link to the orchestrator: tables in, wants out. Keeps the last table while the orchestrator is away."""

    def __init__(self, address: str, tls: TlsFiles, on_table: OnTable, used: Callable[[], list[ModelVersion]]) -> None:
        """`on_table` gets each table, and what made it of the one before; None: it is another orchestrator's, or changes were missed."""
        self._address, self._args = address, _connection_args(tls)
        self._on_table, self._used = on_table, used
        self._rpc = rpc(address, connection_args=self._args)
        self._last = Table()
        self._first = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    async def start(self, patience: float) -> None:
        """Begin to follow the table; returns with the first one.

        Raises: ServiceUnavailableError: none came in time.
        """
        self._watching = asyncio.create_task(self._follow())
        try:
            async with asyncio.timeout(patience):
                await self._first.wait()
        except TimeoutError:
            raise ServiceUnavailableError(f"no orchestrator answers at {self._address}; is `tether orchestrator` running?") from None

    async def _follow(self) -> None:
        tries = 0
        while True:
            try:
                await self._watch()
                tries = 0
            except OSError as error:
                log.warning("orchestrator away", address=self._address, error=str(error))
            except Exception:  # whatever it was: a gateway that follows nobody would serve an ever older table
                log.exception("following the orchestrator failed", address=self._address)
            await asyncio.sleep(_RECONNECT[min(tries, len(_RECONNECT) - 1)])
            tries += 1

    async def _watch(self) -> None:
        """Take tables in until the connection ends."""
        comm = await connect(self._address, timeout=2.0, **self._args)
        try:
            there = [worker.id for worker in self._last.workers.values() if worker.state == "running" and worker.peer is None]
            await comm.write({"op": "tether_watch", "reply": False, "workers": there})
            table = await self._take(comm, Table())
            self._first.set()
            for model in self._used():
                await self.want(model)
            while True:
                table = await self._take(comm, table)
        except CommClosedError:
            return
        finally:
            comm.abort()

    async def _take(self, comm: Any, table: Table) -> Table:
        """The table after the next message; the orchestrator hears that it is here."""
        message: dict[str, Any] = await comm.read()
        has: int | None
        if "table" in message:
            table = msgspec.msgpack.decode(message["table"], type=Table)
            self._on_table(table, None)
            has = table.seq
        else:
            changes = [msgspec.msgpack.decode(change, type=TableChange) for change in message["changes"]]
            fitting = [change for number, change in enumerate(changes, table.seq + 1) if change.seq == number]
            for change in fitting:
                table = table.amended(change)
                self._on_table(table, change)
            has = table.seq if len(fitting) == len(changes) else None  # None: all of it once more
        self._last = table
        await comm.write({"has": has})
        return table

    async def want(self, model: ModelVersion) -> tuple[str, str]:
        """Ask for a version to be loaded: its state after placement, and the reason when it failed.

        Raises: ServiceUnavailableError.
        """
        answer = await _call(self._rpc.tether_want, "orchestrator", self._address, model=msgspec.msgpack.encode(model))
        return answer["state"], answer["reason"]

    async def vitals(self) -> dict[str, Any]:
        """By worker, what it uses of its machine and what its models did.

        Raises: ServiceUnavailableError.
        """
        answer: dict[str, Any] = await _call(self._rpc.tether_vitals, "orchestrator", self._address, _GLANCE)
        return answer

    async def quarantine(self, model: ModelVersion, mark: str | None) -> None:
        """An input is not to be run any more; None: the version is to run in a process of its own. Raises: ServiceUnavailableError."""
        encoded = msgspec.msgpack.encode(model)
        await _call(self._rpc.tether_quarantine, "orchestrator", self._address, model=encoded, mark=mark)

    async def load(self, load: GatewayLoad) -> None:
        """What this gateway saw lately. Raises: ServiceUnavailableError."""
        await _call(self._rpc.tether_load, "orchestrator", self._address, _GLANCE, load=msgspec.msgpack.encode(load))

    async def explain(self, model: str) -> list[dict[str, Any]]:
        """Why each version of a model is where it is. Raises: ServiceUnavailableError."""
        answer = await _call(self._rpc.tether_explain, "orchestrator", self._address, model=model)
        return list(answer["versions"])

    async def drain(self, worker: str, patience: float | None, wait: float) -> WorkerEntry:
        """Have a worker take no more requests, or (None) go on; how it stands then, or after `wait` seconds.

        Raises: ServiceUnavailableError, UnknownWorkerError, UnsupportedError.
        """
        asked = {"worker": worker, "within": patience, "wait": wait}
        answer = await _call(self._rpc.tether_drain, "orchestrator", self._address, _CONTROL_TIMEOUT + wait, **asked)
        return msgspec.msgpack.decode(answer["worker"], type=WorkerEntry)

    async def restart_worker(self, worker: str) -> WorkerEntry:
        """End a worker's process; how it stood. Raises: as `drain`."""
        answer = await _call(self._rpc.tether_restart, "orchestrator", self._address, worker=worker)
        return msgspec.msgpack.decode(answer["worker"], type=WorkerEntry)

    async def forgive(self, model: str) -> None:
        """Nothing is held any more against inputs of this model, nor against its versions. Raises: ServiceUnavailableError."""
        await _call(self._rpc.tether_forgive, "orchestrator", self._address, model=model)

    async def close(self) -> None:
        """Stop following."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._rpc.close_rpc()


async def _call(
    operation: Callable[..., Awaitable[Any]], service: str, address: str | None, /, patience: float = _CONTROL_TIMEOUT, **arguments: Any
) -> Any:
    """Raises: ServiceUnavailableError: it does not answer; what the service answered as an error of the tree."""
    try:
        async with asyncio.timeout(patience):
            answer = await operation(**arguments)
    except (OSError, TimeoutError) as error:
        raise ServiceUnavailableError(f"the {service} at {address} does not answer; the supervisor restarts it, try again") from error
    if isinstance(answer, dict) and "error" in answer:
        code, *args = answer["error"]
        raise from_code(code, *args)
    return answer


_PUBLISH_TIMEOUT = 300.0
_JOIN_TIMEOUT = 60.0
"""Seconds: the lab may have to enter the DHT, and punch a hole."""
"""Seconds for a call that parses, hashes or runs a model."""


_TAKE_OVER = 15.0
"""Seconds from the first failure in which a call is repeated: a take-over may take ten."""
_GLANCE = 1.0
"""Seconds for a look at how things are: it is taken when something is away, and has to come then, too."""
_RETRY = 0.2
_LOOK = 0.25
_AWAY = 5.0
"""Seconds without a manager after which one that was asked before will not answer; for less, it may have connected anew."""
_REPEATABLE = frozenset(
    {
        "put_blob",
        "get_blob",
        "publish",
        "models",
        "model",
        "manifest",
        "signed_manifest",
        "set_alias",
        "set_serving",
        "verify",
        "diff",
        "read_zarr",
        "trust",
        "join",
        "replicate",
        "replications",
        "release",
        "set_policy",
        "policies",
        "hold",
        "holdings",
        "end_holding",
        "lend",
        "lendings",
        "end_lending",
        "borrowings",
        "copies",
        "address",
        "invitations",
        "revoke_invitation",
        "allow",
        "ban",
        "unban",
        "peers",
        "name_peer",
        "audit",
        "accept",
    }
)
"""Operations that may be done twice. Another one, whose answer was lost, is for the caller to look at."""


class ManagerClient:
    """`ports.Management` over the cluster's comms.

    `address` gives the manager's address as the table has it now; `reflects` waits until the table has a change of the catalog.
    """

    def __init__(self, address: Callable[[], str | None], reflects: Callable[[int], Awaitable[None]], tls: TlsFiles) -> None:
        self._address, self._reflects, self._args = address, reflects, _connection_args(tls)
        self._rpc: rpc | None = None
        self._connected: str | None = None

    async def _ask(self, operation: str, patience: float = _CONTROL_TIMEOUT, **arguments: Any) -> Any:
        """While another manager takes over, and while the one is started again, it is asked again, where that does no harm."""
        end: float | None = None
        while True:
            try:
                answer = await self._try(operation, patience, arguments)
                break
            except ServiceUnavailableError as error:
                now = asyncio.get_running_loop().time()
                end = end or now + _TAKE_OVER
                if now >= end or not (operation in _REPEATABLE or isinstance(error, NotWriterError)):
                    raise ServiceUnavailableError(*error.args) from error
            await asyncio.sleep(_RETRY)
        await self._reflects(answer["change"])
        return answer["answer"]

    async def _try(self, operation: str, patience: float, arguments: dict[str, Any]) -> Any:
        """Raises: NotWriterError: nothing was done; ServiceUnavailableError: it may have been done."""
        address, away = self._address(), 0.0
        if address is None:
            raise NotWriterError("the model manager is away; what is loaded serves on, try again in a few seconds")
        manager = await self._manager(address)
        call = asyncio.ensure_future(_call(getattr(manager, f"tether_{operation}"), "manager", address, patience=patience, **arguments))
        try:
            while not (await asyncio.wait([call], timeout=_LOOK))[0]:
                away = away + _LOOK if self._address() is None else 0.0
                if self._address() not in {None, address} or away > _AWAY:  # it may be stopped, and its connection open for ever
                    raise ServiceUnavailableError("the model manager went away while it was asked; what is loaded serves on, ask again")
            return call.result()
        finally:
            if not call.done():
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)

    async def _manager(self, address: str) -> rpc:
        """The connections to this address. Changed before anything is awaited: of two callers one makes them, the other finds them."""
        if self._rpc is not None and address == self._connected:
            return self._rpc
        made, old = rpc(address, connection_args=self._args), self._rpc
        self._rpc, self._connected = made, address
        if old is not None:
            await old.close_rpc()
        return made

    async def close(self) -> None:
        """Drop the connections."""
        old, self._rpc = self._rpc, None
        if old is not None:
            await old.close_rpc()

    async def put_blob(self, digest: str, data: bytes, encrypt: str | None = None) -> dict[str, Any]:
        return dict(await self._ask("put_blob", digest=digest, data=data, encrypt=encrypt))

    async def get_blob(self, digest: str, version: str | None = None) -> bytes:
        return bytes(await self._ask("get_blob", digest=digest, version=version))

    async def publish(self, name: str, draft: Mapping[str, Any]) -> dict[str, Any]:
        return dict(await self._ask("publish", _PUBLISH_TIMEOUT, name=name, draft=dict(draft)))

    async def models(self) -> list[dict[str, Any]]:
        return list(await self._ask("models"))

    async def model(self, name: str) -> dict[str, Any]:
        return dict(await self._ask("model", name=name))

    async def manifest(self, name: str, version: int) -> dict[str, Any]:
        return dict(await self._ask("manifest", name=name, version=version))

    async def signed_manifest(self, digest: str) -> dict[str, Any]:
        return dict(await self._ask("signed_manifest", digest=digest))

    async def set_alias(self, name: str, alias: str, version: int) -> dict[str, Any]:
        return dict(await self._ask("set_alias", name=name, alias=alias, version=version))

    async def delete_alias(self, name: str, alias: str) -> dict[str, Any]:
        return dict(await self._ask("delete_alias", name=name, alias=alias))

    async def rollback(self, name: str, alias: str | None) -> dict[str, Any]:
        return dict(await self._ask("rollback", name=name, alias=alias))

    async def set_serving(self, name: str, changes: Mapping[str, Any] | None) -> dict[str, Any]:
        return dict(await self._ask("set_serving", name=name, changes=None if changes is None else dict(changes)))

    async def delete_version(self, name: str, version: int) -> dict[str, Any]:
        return dict(await self._ask("delete_version", name=name, version=version))

    async def verify(self, name: str, version: int | None) -> dict[str, Any]:
        return dict(await self._ask("verify", _PUBLISH_TIMEOUT, name=name, version=version))

    async def diff(self, name: str, before: int, after: int) -> dict[str, Any]:
        return dict(await self._ask("diff", _PUBLISH_TIMEOUT, name=name, before=before, after=after))

    async def read_zarr(self, ref: str, path: str, start: int | None, nbytes: int) -> dict[str, Any]:
        return dict(await self._ask("read_zarr", ref=ref, path=path, start=start, nbytes=nbytes))

    async def repair(self, name: str, version: int | None) -> dict[str, Any]:
        return dict(await self._ask("repair", _PUBLISH_TIMEOUT, name=name, version=version))

    async def gc(self, *, dry_run: bool, grace: float | None) -> dict[str, Any]:
        return dict(await self._ask("gc", _PUBLISH_TIMEOUT, dry_run=dry_run, grace=grace))

    async def rebuild_index(self) -> dict[str, Any]:
        return dict(await self._ask("rebuild_index", _PUBLISH_TIMEOUT))

    async def forget_store(self, store: str) -> dict[str, Any]:
        return dict(await self._ask("forget_store", store=store))

    async def trust(self, publisher: str, scopes: Sequence[str]) -> dict[str, Any]:
        return dict(await self._ask("trust", publisher=publisher, scopes=list(scopes)))

    async def join(self, url: str) -> dict[str, Any]:
        return dict(await self._ask("join", _JOIN_TIMEOUT, url=url))

    async def replicate(self, publisher: str, model: str, via: str | None = None, wait: float = 20.0) -> dict[str, Any]:
        return dict(await self._ask("replicate", _JOIN_TIMEOUT + wait, publisher=publisher, model=model, via=via, wait=wait))

    async def replications(self) -> list[dict[str, Any]]:
        return list(await self._ask("replications"))

    async def release(self, publisher: str, model: str) -> dict[str, Any]:
        return dict(await self._ask("release", publisher=publisher, model=model))

    async def swarm(self) -> dict[str, Any]:
        """Asked once: that the manager does not answer now is what one wants to know, too."""
        return dict((await self._try("swarm", _GLANCE, {}))["answer"])

    async def contacts(self) -> dict[str, Any]:
        """Asked once, as `swarm`: who wants to know looks again."""
        return dict((await self._try("contacts", _GLANCE, {}))["answer"])

    async def set_policy(self, model: str, policy: Mapping[str, Any] | None) -> dict[str, Any]:
        return dict(await self._ask("set_policy", model=model, policy=None if policy is None else dict(policy)))

    async def policies(self) -> dict[str, Any]:
        return dict(await self._ask("policies"))

    async def hold(self, publisher: str, region: str = "", room: int | None = None) -> dict[str, Any]:
        return dict(await self._ask("hold", _JOIN_TIMEOUT, publisher=publisher, region=region, room=room))

    async def holdings(self) -> list[dict[str, Any]]:
        return list(await self._ask("holdings"))

    async def end_holding(self, publisher: str) -> dict[str, Any]:
        return dict(await self._ask("end_holding", publisher=publisher))

    async def lend(self, publisher: str, models: str = "*", slots: int | None = None) -> dict[str, Any]:
        return dict(await self._ask("lend", _JOIN_TIMEOUT, publisher=publisher, models=models, slots=slots))

    async def lendings(self) -> list[dict[str, Any]]:
        return list(await self._ask("lendings"))

    async def end_lending(self, publisher: str) -> dict[str, Any]:
        return dict(await self._ask("end_lending", publisher=publisher))

    async def borrowings(self) -> list[dict[str, Any]]:
        return list(await self._ask("borrowings"))

    async def copies(self, model: str) -> dict[str, Any]:
        return dict(await self._ask("copies", model=model))

    async def address(self) -> dict[str, Any]:
        return dict(await self._ask("address"))

    async def invite(self, scopes: Sequence[str], expires: str | float, uses: int, label: str) -> dict[str, Any]:
        return dict(await self._ask("invite", scopes=list(scopes), expires=expires, uses=uses, label=label))

    async def invitations(self) -> list[dict[str, Any]]:
        return list(await self._ask("invitations"))

    async def revoke_invitation(self, invitation: str) -> dict[str, Any]:
        return dict(await self._ask("revoke_invitation", invitation=invitation))

    async def allow(self, peer: str, scopes: Sequence[str], label: str | None = None) -> dict[str, Any]:
        return dict(await self._ask("allow", peer=peer, scopes=list(scopes), label=label))

    async def disallow(self, peer: str, scopes: Sequence[str] | None) -> dict[str, Any]:
        return dict(await self._ask("disallow", peer=peer, scopes=None if scopes is None else list(scopes)))

    async def ban(self, peer: str, reason: str) -> dict[str, Any]:
        return dict(await self._ask("ban", peer=peer, reason=reason))

    async def unban(self, peer: str) -> dict[str, Any]:
        return dict(await self._ask("unban", peer=peer))

    async def peers(self) -> list[dict[str, Any]]:
        return list(await self._ask("peers"))

    async def name_peer(self, peer: str, petname: str) -> dict[str, Any]:
        return dict(await self._ask("name_peer", peer=peer, petname=petname))

    async def audit(self, most: int) -> list[dict[str, Any]]:
        return list(await self._ask("audit", most=most))

    async def accept(self, envelope: str) -> dict[str, Any]:
        return dict(await self._ask("accept", envelope=envelope))

    async def rotate(self) -> dict[str, Any]:
        return dict(await self._ask("rotate", _PUBLISH_TIMEOUT))
