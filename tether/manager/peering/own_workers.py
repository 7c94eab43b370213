"""This lab's own workers, as its orchestrator sees them: what can be lent of them, and what they have in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, Protocol

from tether.errors import LoadFailedError, NoWorkerError, TetherError, from_code
from tether.manager.peering.lendings import Lending
from tether.manager.peering.lent_state import Offer
from tether.routing.table import Table
from tether.types import ModelVersion

__all__ = ["Cluster", "OwnWorkers", "Staff", "staff_of"]

SLOTS: Final = 32
"""Of a worker, where nobody said how many: a batch."""
_FRESH: Final = 1.0
"""Seconds for which what the orchestrator said is good: several ask at once, and each answer is all that there is."""
_PLACED: Final = 15.0
"""Seconds that a version may take to be known to the orchestrator and to begin to load: it hears of the catalog within one, and a worker
that died is back after five."""
_AGAIN, _AT_LAST = 0.05, 1.0
"""Seconds between looks at how far a load is: at first, and at most."""


class Cluster(Protocol):
    """What a manager can ask of its orchestrator."""

    async def table(self) -> Table:
        """All that it knows. Raises: ServiceUnavailableError."""
        ...

    async def want(self, model: ModelVersion) -> tuple[str, str]:
        """Have a version loaded: its state after placement, and the reason where that is `failed`. Raises: ServiceUnavailableError."""
        ...


@dataclass(frozen=True, slots=True)
class Staff:
    """The workers of this lab itself that run; lent ones are others' to lend."""

    workers: int = 0
    gpus: int = 0
    models: frozenset[str] = frozenset()
    """`name:version` of what they have in memory."""

    @property
    def slots(self) -> int:
        """Requests that they take at a time."""
        return SLOTS * self.workers

    def offer(self, lending: Lending) -> Offer:
        """What of them is lent."""
        slots = self.slots if lending.slots is None else lending.slots
        return Offer(self.workers, self.gpus, slots if self.workers else 0, lending.models)


def staff_of(table: Table) -> Staff:
    """Pure: who they are."""
    own = [each for each in table.workers.values() if each.state == "running" and each.transport == "unix"]
    return Staff(len(own), sum(each.gpus for each in own), frozenset(model for each in own for model in each.models))


class OwnWorkers:
    """Asked for no more often than is useful. Belongs to one event loop."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._looking = asyncio.Lock()
        self._looked = float("-inf")
        self.staff = Staff()
        """As it was looked at last."""

    async def look(self) -> Staff:
        """Who they are now, or were a second ago. Raises: ServiceUnavailableError: the orchestrator is away."""
        clock = asyncio.get_running_loop().time
        async with self._looking:
            if clock() - self._looked > _FRESH:
                self.staff = staff_of(await self._cluster.table())
                self._looked = clock()
        return self.staff

    async def load(self, model: ModelVersion) -> None:
        """Return when a worker has it in memory. Raises: NoWorkerError; what the worker said; ServiceUnavailableError."""
        clock, pause = asyncio.get_running_loop().time, _AGAIN
        end = clock() + _PLACED
        while True:
            state, reason = await self._cluster.want(model)
            if state == "ready":
                self._looked = float("-inf")
                return
            if state == "failed":
                raise _load_error(model, reason)
            if state == "loading":
                end = clock() + _PLACED  # from then on, if its worker dies
            elif state == "unloaded" and clock() > end:
                raise NoWorkerError(f"no worker of this lab takes {model}: `tether status` there shows why")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _AT_LAST)


def _load_error(model: ModelVersion, reason: str) -> TetherError:
    code, _, text = reason.partition(": ")
    error = from_code(code, f"{model} can't be loaded: {text}")
    return error if type(error) is not TetherError else LoadFailedError(f"{model} can't be loaded: {reason}")
