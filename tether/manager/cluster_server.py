"""A manager's operations on Dask's comms, for gateways and for the other managers of its cluster.

Each operation answers `{"answer": …}` or `{"error": [code, …]}`: errors of the tree cross as values, never as pickles.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog
from distributed import Security
from distributed.comm import Comm, CommClosedError
from distributed.core import Server, Status, connect

from tether.config import DataFolder
from tether.errors import (
    ChunkAlteredError,
    ChunkMissingError,
    InternalError,
    NotFoundError,
    NotWriterError,
    ServiceUnavailableError,
    TetherError,
)
from tether.events import LentWorker
from tether.manager import borrowing, secrets
from tether.manager.asking import READING, Operation
from tether.manager.following import Follower
from tether.manager.links import CONNECT, Link
from tether.manager.membership import Membership, Signal
from tether.manager.operations import Operations
from tether.manager.peering.lines import Lines
from tether.manager.peering.peering import Peering
from tether.manager.tenure import Tenure
from tether.routing.table import Table
from tether.types import ModelVersion

__all__ = ["ClusterServer"]

log = structlog.get_logger("tether.manager")
_RECONNECT = 0.2
"""Seconds."""
_UNSHARED = frozenset({"put_blob", *Peering.NAMES, *Lines.NAMES})
"""Operations of the writer that change nothing which followers have: they are not waited for, and sent again to another writer."""


class ClusterServer(Server):  # type: ignore[misc]  # distributed is untyped
    """Serves `Operations` to gateways, and is one of its cluster's managers."""

    def __init__(self, operations: Operations, orchestrator: str, security: Security, *, forced: bool = False) -> None:
        """`forced`: whether it is to write though nobody can tell that it has all."""
        handlers = {f"tether_{name}": self.answering(name, operation) for name, operation in operations.handlers().items()}
        handlers |= {"tether_feed": self._feed, "tether_secrets": self.answering("get_blob", self._secrets)}
        super().__init__(handlers, connection_args=security.get_connection_args("worker"))
        self._operations, self._orchestrator, self._forced = operations, orchestrator, forced
        self._arguments = security.get_connection_args("worker")
        self.signal = Signal()
        """Fired when the catalog may be another one."""
        self.on_files: list[Callable[[], None]] = []
        """Called, in a thread, when small files beside the store may be others than before: the writer's."""
        self._membership: Membership | None = None

    @property
    def asking(self) -> Mapping[str, Operation]:
        """The operations for callers in this process: acknowledged as for any other, and raising what they raise."""
        return {name: self._asked(name, operation) for name, operation in self._operations.handlers().items()}

    def offer(self, operations: Mapping[str, Operation]) -> None:
        """Answer these too."""
        self.handlers |= {f"tether_{name}": self.answering(name, operation) for name, operation in operations.items()}

    def offer_borrowing(self, lines: borrowing.Borrowing) -> None:
        """Load models at labs that lend their workers, when the orchestrator asks."""
        self.handlers |= borrowing.handlers(lines)

    def tell_lent(self, workers: tuple[LentWorker, ...]) -> None:
        """These labs lend workers to this one now. Only a member of the cluster that writes has any."""
        if self._membership is not None:
            self._membership.tell_lent(workers)

    async def follow(self) -> None:
        """Be a member of the cluster; connect to the orchestrator again whenever it comes back.

        Raises: what is no lost connection: the process should end.
        """
        await self  # else it makes no calls before the first one comes in
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

    @property
    def writes(self) -> bool:
        """Whether this is the one of its cluster that may write now."""
        try:
            if self._membership is not None:
                self._membership.check()
        except NotWriterError:
            return False
        return self._membership is not None

    async def _enter(self) -> Membership:
        repository = self._operations.repository
        footing = await asyncio.to_thread(repository.footing)
        # In the orchestrator's own data folder a store that is new took the place of one that somebody removed.
        forced = self._forced or (footing.term == 0 and DataFolder(repository.root.parent).lease.exists())
        tenure = Tenure(footing.member, self.address, term=footing.term, wrote=footing.wrote, forced=forced)
        follower = Follower(repository, self._keys, self._operations, self._connect, lambda address: Link(address, self._arguments))
        follower.on_files = self._files_came
        return Membership(repository, tenure, follower, self._operations.catalog, self.signal)

    def _files_came(self) -> None:
        for told in self.on_files:
            told()

    @property
    def _keys(self) -> Path:
        return self._operations.repository.root.parent / "keys"

    async def _connect(self, address: str) -> Any:
        return await connect(address, timeout=CONNECT, **self._arguments)

    async def table(self) -> Table:
        """All that the orchestrator knows. Raises: ServiceUnavailableError: it is away."""
        return msgspec.msgpack.decode((await self._asked_of_orchestrator("tether_table"))["table"], type=Table)

    async def want(self, model: ModelVersion) -> tuple[str, str]:
        """As `Cluster` says."""
        answer = await self._asked_of_orchestrator("tether_want", model=msgspec.msgpack.encode(model))
        return answer["state"], answer["reason"]

    async def _asked_of_orchestrator(self, operation: str, **arguments: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(CONNECT):
                return dict(await getattr(self.rpc(self._orchestrator), operation)(**arguments))
        except OSError as error:
            raise ServiceUnavailableError(f"the orchestrator does not answer ({error}): the supervisor restarts it, try again") from error

    async def means(self) -> dict[str, Any]:
        """What the cluster's workers have to work with, as the orchestrator heard of them. Raises: OSError: it is away."""
        comm = await self._connect(self._orchestrator)
        try:
            async with asyncio.timeout(CONNECT):
                await comm.write({"op": "tether_means", "reply": True})
                return dict(await comm.read())
        finally:
            comm.abort()

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
                await self._membership.feed(comm, member, self._operations)
        except CommClosedError:
            pass
        finally:
            comm.abort()
        return Status.dont_reply

    async def _secrets(self) -> dict[str, object]:
        """What another manager of this lab needs to write in its name."""
        return await asyncio.to_thread(secrets.collect, self._keys)

    def answering(self, name: str, operation: Operation) -> Callable[..., Awaitable[dict[str, Any]]]:
        """A handler: the answer and the change count after it, or the error. A change is answered when it can be answered for."""
        asked = self._asked(name, operation)

        async def handle(**arguments: Any) -> dict[str, Any]:
            try:
                answer = await asked(**arguments)
                return {"answer": answer, "change": await asyncio.to_thread(self._operations.change_count)}
            except TetherError as error:
                return {"error": [error.code, *error.args]}
            except Exception as error:
                log.exception("operation failed")
                return {"error": [InternalError.code, f"{type(error).__name__} in the manager; its log has the traceback"]}

        return handle

    def _asked(self, name: str, operation: Operation) -> Operation:
        @functools.wraps(operation)
        async def ask(**arguments: Any) -> Any:
            if name in READING:
                return await self._read(operation, arguments)
            return await self._changed(name, operation, arguments)

        return ask

    async def _read(self, operation: Operation, arguments: dict[str, Any]) -> Any:
        """What a follower does not have, or has damaged, the writer may have."""
        try:
            return await operation(**arguments)
        except (NotFoundError, ChunkMissingError, ChunkAlteredError):
            if self._membership is not None:
                self._membership.check()
            raise

    async def _changed(self, name: str, operation: Operation, arguments: dict[str, Any]) -> Any:
        if self._membership is None:
            raise NotWriterError("this manager is starting, nothing was done: call again")
        if name in _UNSHARED:
            self._membership.check()
            return await operation(**arguments)
        async with self._membership.changing():
            return await operation(**arguments)
