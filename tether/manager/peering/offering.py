"""What this lab says of itself in its record: what it has, where it is, with which cards it works, how busy it is.

A record is public: the load is told in tens of per cent, and another one only when it moved by more than that, since each is a write to the
DHT.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import structlog

from tether.errors import TetherError
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.region import Region
from tether.store import Repository
from tether.swarm.records.records import MAX_GPUS, MAX_NAME, Capabilities, Gpu, Held
from tether.types import Digest, ModelRef

__all__ = ["AskMeans", "Means", "Offering", "means_of", "steady"]

log = structlog.get_logger("tether.swarm")
_LOOK: Final = 20.0
"""Seconds between questions to the orchestrator."""
_STEP, _SLACK = 10, 8
"""Per cent: in what steps the load is told, and by how much it has to be another one than the one that was told."""
_WHOLE: Final = 100

AskMeans = Callable[[], Awaitable[Mapping[str, Any]]]
"""The orchestrator's `tether_means`. Raises: OSError: it is away."""


class Means(NamedTuple):
    """What the lab has to work with."""

    gpus: tuple[Gpu, ...] = ()
    load: int = 0
    """Per cent of its workers' time, as it is told."""
    loaded: frozenset[Digest] = frozenset()
    """Versions that a worker of its own has in memory."""


def steady(before: int, per_cent: float) -> int:
    """What load to tell: as before, unless it moved by most of a step."""
    return before if abs(per_cent - before) < _SLACK else round(per_cent / _STEP) * _STEP


def means_of(answer: Mapping[str, Any], before: Means) -> Means:
    """Of what workers say in their heartbeats; one that has said nothing yet counts as idle, with no cards that anybody knows."""
    workers: Sequence[Mapping[str, Any]] = answer["workers"]
    counted = Counter((str(name)[:MAX_NAME], int(nbytes)) for worker in workers for name, nbytes in worker.get("cards", ()))
    gpus = tuple(Gpu(name, count, nbytes) for (name, nbytes), count in sorted(counted.items()))[:MAX_GPUS]
    busy = sum(float(worker.get("busy", 0.0)) for worker in workers) / max(len(workers), 1)
    return Means(gpus, steady(before.load, min(_WHOLE * busy, _WHOLE)), frozenset(map(Digest, answer["loaded"])))


class Offering:
    """Of one lab. `run` belongs to the event loop; `offered` blocks, in any thread."""

    def __init__(self, repository: Repository, gateway: Gateway, region: Region, ask: AskMeans | None) -> None:
        """`ask`: None: there is no orchestrator, so there are no workers."""
        self._repository, self._gateway, self._region, self._ask = repository, gateway, region, ask
        self._means = Means()

    def offered(self) -> Capabilities:
        """What it has now."""
        means = self._means
        held = tuple(
            Held(
                model.publisher,
                ModelRef.parse(model.name).name,
                version.version,
                version.digest,
                version.nbytes,
                loaded=version.digest in means.loaded,
            )
            for model in self._repository.models()
            for version in model.versions
        )
        return Capabilities(held, self._gateway.is_there, self._region.name, means.gpus, means.load)

    async def run(self, changed: Callable[[], None]) -> None:
        """Until cancelled, ask what the workers say; `changed`: told when the record is to say something else."""
        while self._ask is not None:
            await asyncio.sleep(_LOOK)
            if await self.look():
                changed()

    async def look(self) -> bool:
        """Ask now; whether something is other than before."""
        before = self._means
        if self._ask is None:
            return False
        try:
            self._means = means_of(await self._ask(), before)
        except (OSError, TetherError) as error:  # what it said last is likelier than nothing
            log.debug("the orchestrator does not say what its workers have", error=str(error))
        except (KeyError, TypeError, ValueError):
            log.warning("what the workers say of themselves makes no sense: is one of another version of Tether?", exc_info=True)
        return self._means != before
