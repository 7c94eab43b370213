"""The model manager as a process: the one writer of the store, on Dask's comms under mutual TLS.

Each operation answers `{"answer": …}` or `{"error": [code, …]}`: errors of the tree cross as values, never as pickles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import click
import dask.config
import msgspec
import structlog
from distributed import Security
from distributed.comm import CommClosedError
from distributed.core import Server, connect

from tether.config import HOUSEKEEPING, MANAGER_PORT, ORCHESTRATOR_PORT, DataFolder
from tether.errors import InternalError, TetherError
from tether.manager.operations import Operations
from tether.security.identity import Identity
from tether.security.tls import ensure_tls
from tether.store import Repository
from tether.telemetry.service import Life, run_service

__all__ = ["main"]

log = structlog.get_logger("tether.manager")
_RECONNECT = 0.2
_WATCH = 0.5
"""Seconds between looks at the catalog's change count, for changes that did not come through this process."""


class _Manager(Server):  # type: ignore[misc]  # distributed is untyped
    """Serves `Operations` to gateways and tells the orchestrator of every change."""

    def __init__(self, operations: Operations, orchestrator: str, security: Security) -> None:
        handlers = {f"tether_{name}": self.answering(getattr(operations, name)) for name in Operations.NAMES}
        super().__init__(handlers, connection_args=security.get_connection_args("worker"))
        self._operations, self._orchestrator, self._security = operations, orchestrator, security
        self._change = asyncio.Event()

    async def follow(self) -> None:
        """Keep the orchestrator told; connect again whenever it comes back. Raises: what is no lost connection: the process should end."""
        while True:
            try:
                await self._tell()
            except TetherError:  # StoreError is an OSError too: the catalog can't be read, connecting again won't mend it
                raise
            except (OSError, CommClosedError) as error:
                log.info("orchestrator away", error=str(error))
            await asyncio.sleep(_RECONNECT)

    async def _tell(self) -> None:
        comm = await connect(self._orchestrator, timeout=2.0, **self._security.get_connection_args("worker"))
        closed = asyncio.ensure_future(comm.read())  # the orchestrator never writes here: this ends when it goes away
        try:
            told = await asyncio.to_thread(self._catalog)
            await comm.write({"op": "tether_manager", "address": self.address, "reply": False} | told)
            while not closed.done():
                await self._next_change(closed)
                if await asyncio.to_thread(self._operations.change_count) != told["count"]:
                    told = await asyncio.to_thread(self._catalog)
                    await comm.write(told)
        finally:
            comm.abort()
            await asyncio.gather(closed, return_exceptions=True)

    async def _next_change(self, closed: asyncio.Future[Any]) -> None:
        """A change through this process, or the time to look for others, or the end of the connection."""
        change = asyncio.ensure_future(self._change.wait())
        await asyncio.wait([change, closed], timeout=_WATCH, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()
        self._change.clear()

    def _catalog(self) -> dict[str, Any]:
        """At least as new as its count, which is read first."""
        count = self._operations.change_count()
        return {"count": count, "catalog": msgspec.msgpack.encode(self._operations.catalog())}

    def answering(self, operation: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[dict[str, Any]]]:
        """A handler: the answer and the change count after it, or the error; wakes the stream to the orchestrator."""

        async def handle(**arguments: Any) -> dict[str, Any]:
            try:
                answer = await operation(**arguments)
                return {"answer": answer, "change": await asyncio.to_thread(self._operations.change_count)}
            except TetherError as error:
                return {"error": [error.code, *error.args]}
            except Exception as error:
                log.exception("operation failed")
                return {"error": [InternalError.code, f"{type(error).__name__} in the manager; its log has the traceback"]}
            finally:
                self._change.set()

        return handle


@click.command("manager")
@click.argument("orchestrator", default=f"tls://127.0.0.1:{ORCHESTRATOR_PORT}")
@click.option("--data", type=click.Path(file_okay=False), help="Data folder of the lab.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=MANAGER_PORT, show_default=True)
def _command(orchestrator: str, data: str | None, host: str, port: int) -> None:
    """Run the model manager: store, catalog, publishing."""
    folder = DataFolder.locate(data).create()
    security = Security(**ensure_tls(folder.tls, "manager").security())

    async def serve(life: Life) -> None:
        identity = Identity.load_or_create(folder.identity)
        with Repository.open(folder.store, own=identity.public) as repository:
            server = _Manager(Operations(repository, identity, folder.run / "publishing"), orchestrator, security)
            await server.listen(f"tls://{host}:{port}", **security.get_listen_args("worker"))
            following = asyncio.create_task(server.follow())
            life.ready(address=server.address)
            try:
                await _until(life.ended(), following)
            finally:
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
