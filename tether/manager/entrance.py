"""Who comes to a manager from outside of its cluster: the user's own processes at its door, and other labs over the swarm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from tether.events import LentWorker
from tether.manager.asking import Operation
from tether.manager.borrowing import Borrowing
from tether.manager.membership import Signal
from tether.manager.operations import Operations
from tether.manager.peering.door import Door
from tether.manager.peering.offering import AskMeans
from tether.manager.peering.own_workers import Cluster
from tether.manager.peering.peering import Peering
from tether.manager.settings import ManagerSettings
from tether.swarm.wire.local import serve

__all__ = ["Standing", "entrance"]

_GRACE: Final = 3.0
"""Seconds for calls that are made when a manager ends: a lab that starts waits for it, and a supervisor kills after ten."""

_PATIENCE: Final = 10.0
"""Seconds for them when nobody waits for the end: the manager grew too heavy, and another one takes its place."""


async def _nothing_held() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Standing:
    """What a manager is in its cluster; one without a cluster is all that there is."""

    may_serve: Callable[[], bool] = lambda: True
    """Whether this is the manager that other labs are to reach."""
    offer: Callable[[Mapping[str, Operation]], None] = lambda _: None
    """Told of the operations that there are besides."""
    end: Callable[[], None] = lambda: None
    """Asks the process to end: another one is to take its place."""
    hand_over: Callable[[], Awaitable[None]] = _nothing_held
    """Awaited at the end, when no call is made any more and before the lab leaves the swarm: another manager may write from here on."""
    on_files: list[Callable[[], None]] = field(default_factory=list)
    """To be called, in a thread, when small files beside the store may be others than before."""
    means: AskMeans | None = None
    """Asked what the cluster's workers have to work with."""
    signal: Signal = field(default_factory=Signal)
    """Fired when the catalog may be another one."""
    lent: Callable[[tuple[LentWorker, ...]], None] = lambda _: None
    """Told of the labs that lend workers to this one, at each change."""
    borrowing: Callable[[Borrowing], None] = lambda _: None
    """Told who loads models there."""
    cluster: Cluster | None = None
    """The orchestrator, for who lends the cluster's workers; None: there are none."""


@asynccontextmanager
async def entrance(
    settings: ManagerSettings, operations: Operations, asking: Mapping[str, Operation], standing: Standing, *, alone: bool = False
) -> AsyncIterator[Door]:
    """Open both for as long as the body runs."""
    peering = Peering(operations, asking, settings, standing.signal, standing.means)
    peering.replace = standing.end
    standing.on_files.append(peering.read_again)
    peering.lines.join(standing.cluster, standing.lent)
    standing.borrowing(peering.lines.borrower)
    standing.offer(peering.handlers())
    door = Door(operations.public, {**asking, **peering.handlers()}, peering, alone=alone)
    server = await serve(settings.data.door, door.admit)
    running = asyncio.create_task(peering.run(standing.may_serve))
    try:
        yield door
    finally:
        server.close()
        grace = _PATIENCE if peering.is_heavy else _GRACE
        await asyncio.gather(door.aclose(grace), peering.retire(grace))
        await standing.hand_over()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
