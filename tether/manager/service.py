"""The model manager as a process: the one writer of the store, on Dask's comms under mutual TLS.

Each operation answers `{"answer": …}` or `{"error": [code, …]}`: errors of the tree cross as values, never as pickles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import click
import dask.config
import structlog
from distributed import Security
from distributed.comm import Comm, CommClosedError
from distributed.core import Server, Status, connect, rpc

from tether.config import HOUSEKEEPING, MANAGER_PORT, ORCHESTRATOR_PORT, DataFolder
from tether.errors import (
    ChunkAlteredError,
    ChunkMissingError,
    InternalError,
    NotFoundError,
    NotWriterError,
    ServiceUnavailableError,
    TetherError,
    from_code,
)
from tether.manager import secrets
from tether.manager.collecting import FollowerCollection
from tether.manager.following import Follower
from tether.manager.membership import Membership, Signal
from tether.manager.operations import Operations
from tether.manager.scrubbing import Scrubber
from tether.manager.tenure import Tenure
from tether.security.identity import Identity
from tether.security.tls import ensure_tls
from tether.security.volatile import sweep
from tether.store import Repository
from tether.telemetry.service import Life, run_service

__all__ = ["main"]

log = structlog.get_logger("tether.manager")
_RECONNECT = 0.2
_CONNECT = 2.0
"""Seconds."""
_ANSWER = 20.0
"""Seconds for one operation of another manager: a blob of 4 MiB over 2 Mbit/s."""
_READING = frozenset({"get_blob", "models", "model", "manifest", "signed_manifest", "model_key", "verify", "diff", "read_zarr"})
"""Operations that change nothing: any manager answers them, and at once."""
_STAGING = "put_blob"
"""Changes what is staged, which no follower has: it is not waited for, and sent again to another writer."""


class _Link:
    """The operations of another manager. Belongs to the event loop that uses it first."""

    def __init__(self, address: str, arguments: dict[str, Any]) -> None:
        self._address, self._arguments = address, arguments
        self._rpc: rpc | None = None

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """Raises: ServiceUnavailableError; what it answers as an error of the tree."""
        if self._rpc is None:
            self._rpc = rpc(self._address, timeout=_CONNECT, connection_args=self._arguments)
        try:
            async with asyncio.timeout(_ANSWER):
                answer = await getattr(self._rpc, f"tether_{operation}")(**arguments)
        except (OSError, TimeoutError) as error:
            raise ServiceUnavailableError(f"the manager at {self._address} does not answer ({error}); it is asked again") from error
        if "error" in answer:
            code, *args = answer["error"]
            raise from_code(code, *args)
        return answer["answer"]

    async def close(self) -> None:
        """Drop the connections; a second call does nothing."""
        old, self._rpc = self._rpc, None
        if old is not None:
            await old.close_rpc()


class _Manager(Server):  # type: ignore[misc]  # distributed is untyped
    """Serves `Operations` to gateways, and is one of its cluster's managers."""

    def __init__(self, operations: Operations, orchestrator: str, security: Security, *, forced: bool = False) -> None:
        """`forced`: whether it is to write though nobody can tell that it has all."""
        handlers = {f"tether_{name}": self.answering(name, getattr(operations, name)) for name in Operations.NAMES}
        handlers |= {"tether_feed": self._feed, "tether_secrets": self.answering("get_blob", self._secrets)}
        super().__init__(handlers, connection_args=security.get_connection_args("worker"))
        self._operations, self._orchestrator, self._forced = operations, orchestrator, forced
        self._arguments = security.get_connection_args("worker")
        self._signal = Signal()
        self._membership: Membership | None = None

    async def follow(self) -> None:
        """Be a member of the cluster; connect to the orchestrator again whenever it comes back.

        Raises: what is no lost connection: the process should end.
        """
        membership = self._membership = await self._enter()
        try:
            while True:
                try:
                    await self._converse(membership)
                except TetherError:  # StoreError is an OSError too: the catalog can't be read, connecting again won't mend it
                    raise
                except (OSError, CommClosedError) as error:
                    log.info("orchestrator away", error=str(error))
                await asyncio.sleep(_RECONNECT)
        finally:
            await membership.aclose()

    @property
    def rests(self) -> bool:
        """As `Membership` says."""
        return self._membership is not None and self._membership.rests

    async def _enter(self) -> Membership:
        repository = self._operations.repository
        footing = await asyncio.to_thread(repository.footing)
        # In the orchestrator's own data folder a store that is new took the place of one that somebody removed.
        forced = self._forced or (footing.term == 0 and DataFolder(repository.root.parent).lease.exists())
        tenure = Tenure(footing.member, self.address, term=footing.term, wrote=footing.wrote, forced=forced)
        follower = Follower(repository, self._keys, self._operations, self._connect, lambda address: _Link(address, self._arguments))
        return Membership(repository, tenure, follower, self._operations.catalog, self._signal)

    @property
    def _keys(self) -> Path:
        return self._operations.repository.root.parent / "keys"

    async def _connect(self, address: str) -> Any:
        return await connect(address, timeout=_CONNECT, **self._arguments)

    async def _converse(self, membership: Membership) -> None:
        comm = await self._connect(self._orchestrator)
        try:
            await membership.converse(comm)
        finally:
            comm.abort()

    async def _feed(self, comm: Comm, member: str) -> Status:
        """A stream for a follower: the catalog now and after each change."""
        try:
            if self._membership is not None:
                await self._membership.feed(comm, member, self._operations.public)
        except CommClosedError:
            pass
        finally:
            comm.abort()
        return Status.dont_reply

    async def _secrets(self) -> dict[str, object]:
        """What another manager of this lab needs to write in its name."""
        return await asyncio.to_thread(secrets.collect, self._keys)

    def answering(self, name: str, operation: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[dict[str, Any]]]:
        """A handler: the answer and the change count after it, or the error. A change is answered when it can be answered for."""

        async def handle(**arguments: Any) -> dict[str, Any]:
            try:
                if name in _READING:
                    answer = await self._read(operation, arguments)
                else:
                    answer = await self._changed(name, operation, arguments)
                return {"answer": answer, "change": await asyncio.to_thread(self._operations.change_count)}
            except TetherError as error:
                return {"error": [error.code, *error.args]}
            except Exception as error:
                log.exception("operation failed")
                return {"error": [InternalError.code, f"{type(error).__name__} in the manager; its log has the traceback"]}

        return handle

    async def _read(self, operation: Callable[..., Awaitable[Any]], arguments: dict[str, Any]) -> Any:
        """What a follower does not have, or has damaged, the writer may have."""
        try:
            return await operation(**arguments)
        except (NotFoundError, ChunkMissingError, ChunkAlteredError):
            if self._membership is not None:
                self._membership.check()
            raise

    async def _changed(self, name: str, operation: Callable[..., Awaitable[Any]], arguments: dict[str, Any]) -> Any:
        if self._membership is None:
            raise NotWriterError("this manager is starting, nothing was done: call again")
        if name == _STAGING:
            self._membership.check()
            return await operation(**arguments)
        async with self._membership.changing():
            return await operation(**arguments)


@click.command("manager")
@click.argument("orchestrator", default=f"tls://127.0.0.1:{ORCHESTRATOR_PORT}")
@click.option("--data", type=click.Path(file_okay=False), help="Data folder of the lab.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=MANAGER_PORT, show_default=True)
@click.option("--take-over", is_flag=True, help="Write, though this store may lack something: the manager that wrote is gone for good.")
def _command(orchestrator: str, data: str | None, host: str, port: int, take_over: bool) -> None:
    """Run the model manager: store, catalog, publishing. A second one, with a data folder of its own, follows the first and takes over."""
    folder = DataFolder.locate(data).create()
    security = Security(**ensure_tls(folder.tls, "manager").security())

    async def serve(life: Life) -> None:
        await asyncio.to_thread(sweep)  # of what a killed manager left in memory
        identity = Identity.load_or_create(folder.identity)
        with Repository.open(folder.store, own=identity.public) as repository:
            server = _Manager(Operations(repository, identity, folder.run / "publishing"), orchestrator, security, forced=take_over)
            await server.listen(f"tls://{host}:{port}", **security.get_listen_args("worker"))
            following = asyncio.create_task(server.follow())
            scrubber = Scrubber(repository, folder.run / "scrub.json")
            scrubber.start()
            collection = FollowerCollection(repository, lambda: server.rests)
            collection.start()
            life.ready(address=server.address)
            try:
                await _until(life.ended(), following)
            finally:
                await asyncio.to_thread(scrubber.stop)
                await asyncio.to_thread(collection.stop)
                await server.close()

    with dask.config.set(HOUSEKEEPING | {"temporary-directory": str(folder.runtime)}):
        run_service(serve)


async def _until(ended: Coroutine[Any, Any, None], following: asyncio.Task[None]) -> None:
    """Wait for the end. A follower that fails ends the process: the supervisor's next one tells the orchestrator again."""
    ending = asyncio.ensure_future(ended)
    await asyncio.wait([ending, following], return_when=asyncio.FIRST_COMPLETED)
    failed = following.done()
    for task in (ending, following):
        task.cancel()
    await asyncio.gather(ending, following, return_exceptions=True)
    if failed:
        following.result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `tether manager`."""
    _command(list(arguments) if arguments is not None else None)
