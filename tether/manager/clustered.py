"""The process of a lab's manager: on Dask's comms under mutual TLS, with the user's own door beside it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Coroutine
from typing import Any

import dask.config
import structlog
from distributed import Security

from tether.config import HOUSEKEEPING
from tether.manager import hops
from tether.manager.cluster_server import ClusterServer
from tether.manager.collecting import FollowerCollection
from tether.manager.entrance import Standing, entrance
from tether.manager.operations import Operations
from tether.manager.scrubbing import Scrubber
from tether.manager.settings import ManagerSettings
from tether.security.comms import dask_security
from tether.security.identity import Identity
from tether.security.tls import ensure_tls
from tether.security.volatile import sweep
from tether.store import Repository
from tether.telemetry.service import READY_ENV, Life, run_service

__all__ = ["run", "until"]

log = structlog.get_logger("tether.manager")


def run(settings: ManagerSettings) -> None:
    """Serve until the process is told to end."""

    async def serve(life: Life) -> None:
        await asyncio.to_thread(sweep)  # of what a killed manager left in memory
        folder, security = settings.data, dask_security(ensure_tls(settings.data.tls, "manager"))
        identity = Identity.load_or_create(folder.identity)
        with Repository.open(folder.store, own=identity.public) as repository:
            hops.sweep(folder.runtime)
            operations = Operations(repository, identity, folder.run / "publishing")
            server = ClusterServer(operations, settings.orchestrator, security, forced=settings.take_over)
            await _listen(server, settings, security)
            following = asyncio.create_task(server.follow())
            scrubber = Scrubber(repository, folder.run / "scrub.json")
            scrubber.start()
            collection = FollowerCollection(repository, lambda: server.rests)
            collection.start()
            try:
                async with entrance(settings, operations, server.asking, _standing(server, life, following)):
                    life.ready(address=server.address)
                    await until(life.ended(), following)
            finally:
                await _ended(following)
                await asyncio.to_thread(scrubber.stop)
                await asyncio.to_thread(collection.stop)
                await server.close()
                operations.close()

    with dask.config.set(HOUSEKEEPING | {"temporary-directory": str(settings.data.runtime)}):
        run_service(serve)


def _standing(server: ClusterServer, life: Life, following: asyncio.Task[None]) -> Standing:
    return Standing(
        lambda: server.writes,
        server.offer,
        life.end,
        hand_over=lambda: _ended(following),
        on_files=server.on_files,
        means=server.means,
        signal=server.signal,
        lent=server.tell_lent,
        borrowing=server.offer_borrowing,
        cluster=server,
    )


async def _listen(server: ClusterServer, settings: ManagerSettings, security: Security) -> None:
    """On its port, or, where a supervisor chose it and somebody took it while no manager was there, on any: callers are told where.

    Raises: OSError: the port is taken.
    """
    arguments = security.get_listen_args("worker")
    try:
        await server.listen(f"tls://{settings.host}:{settings.port}", **arguments)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or READY_ENV not in os.environ:
            raise
        log.warning("another process took the manager's port: it listens on another one", port=settings.port)
        await server.listen(f"tls://{settings.host}:0", **arguments)


async def until(ended: Coroutine[Any, Any, None], following: asyncio.Task[None]) -> None:
    """Wait for the end, up to which the lease is held: calls that are under way then are still answered for.

    A follower that fails ends the process: the supervisor's next one tells the orchestrator again. Raises: why it failed.
    """
    ending = asyncio.ensure_future(ended)
    await asyncio.wait([ending, following], return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    if following.done():
        following.result()


async def _ended(following: asyncio.Task[None]) -> None:
    """Follow nobody, and give the lease back; a second call does nothing."""
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
