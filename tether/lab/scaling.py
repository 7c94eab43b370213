"""Workers of a lab on this machine that come and go with its requests: the supervisor, as Dask's `Adaptive` sees a cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

from tether.config import DataFolder

__all__ = ["Staffed", "scaled"]

_LOOK: Final = "2s"
"""Between looks: two questions to the orchestrator, a thousandth of a core."""
_LEAD: Final = 10.0
"""Seconds for a worker to start and a model to be loaded."""


class Staffed(Protocol):
    """Who keeps workers."""

    def workers(self) -> dict[str, bool]:
        """Name of each worker that is kept, and whether it answers."""
        ...

    def add_workers(self, count: int) -> None: ...

    async def end_workers(self, names: Collection[str]) -> None: ...


@asynccontextmanager
async def scaled(lab: Staffed, data: DataFolder, orchestrator: str, fewest: int, most: int | None) -> AsyncIterator[None]:
    """Meanwhile there are as many workers as requests need, from `fewest` to `most`. None: as many as there are; nothing is done then."""
    if most is None:
        yield
        return
    # heavy: for labs that scale only
    from distributed.core import Status, rpc
    from tornado.ioloop import IOLoop

    from tether.orchestrator.adaptive import Adaptive
    from tether.security.comms import dask_security
    from tether.security.tls import ensure_tls

    class Cluster:
        """What Adaptive asks of one."""

        status, loop = Status.running, IOLoop.current()
        scheduler_comm = rpc(orchestrator, connection_args=dask_security(ensure_tls(data.tls, "worker")).get_connection_args("client"))

        @property
        def plan(self) -> set[str]:
            return set(lab.workers())

        requested = plan

        @property
        def observed(self) -> set[str]:
            return {name for name, answers in lab.workers().items() if answers}

        def scale(self, count: int) -> None:
            lab.add_workers(count - len(self.plan))

        async def scale_down(self, names: Collection[str]) -> None:
            await lab.end_workers(names)

    cluster: Any = Cluster()
    adaptive = Adaptive(cluster, minimum=fewest, maximum=most, interval=_LOOK, lead=_LEAD)
    try:
        yield
    finally:
        adaptive.stop()
        await cluster.scheduler_comm.close_rpc()
