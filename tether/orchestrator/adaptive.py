"""Dask's `Adaptive` for a lab: workers of any cluster that has `scale` come and go with the requests, and none goes while it is in use.

    cluster = SLURMCluster(…)                                            # or KubeCluster, SpecCluster, LocalCluster
    cluster.adapt(Adaptive=tether.orchestrator.adaptive.Adaptive, minimum=0, maximum=8)

The cluster's scheduler is a lab's orchestrator (`--preload tether.orchestrator.preload`), its workers are a lab's.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, fields
from inspect import isawaitable
from typing import Any, Final

import dask.config
import msgspec
from distributed.deploy import adaptive

from tether.errors import ConfigError
from tether.orchestrator.scaling import Goal

__all__ = ["Adaptive"]

_PATIENCE: Final = 30.0
"""Seconds in which what a worker has is loaded elsewhere before it goes."""
_GOAL: Final = {field.name for field in fields(Goal)}
_LEAD: Final = 60.0
"""Seconds for a job to begin where there is room, a worker to start and a model to be loaded."""


class Adaptive(adaptive.Adaptive):  # type: ignore[misc]  # distributed is untyped
    """Dask's counts tasks, of which requests are none. The orchestrator decides (`scaling.py`), and drains who is to go."""

    state = "inactive"
    """Until Dask's says otherwise: its `__del__` asks, also of one that could not be made."""

    def __init__(
        self, cluster: Any = None, *, patience: float = _PATIENCE, lead: float = _LEAD, forecast: bool = True, **options: Any
    ) -> None:
        """As Dask's, and `latency`, `keep`, `idle` (`scaling.Goal`), else as `tether.scaling` of Dask's configuration has them.

        `patience`: seconds for what a worker has to be elsewhere. `forecast`: whether workers come before what comes by the clock, where
        `tether[forecast]` is installed on the orchestrator's host; `lead`: seconds for one to come. Raises: ConfigError.
        """
        self._goal = _goal({name: options.pop(name) for name in _GOAL & options.keys()})
        for name, seconds in {"patience": patience, "lead": lead}.items():
            _check_seconds(name, seconds)
        self._patience, self._lead = patience, lead if forecast else None
        super().__init__(cluster, **({"wait_count": 1} | options))  # the orchestrator waits before it wants fewer

    @property
    def observed(self) -> set[Any]:
        """Those that joined, by the cluster's names, which may be numbers. Who is taken for one that has not come is ended at once."""
        there = {str(name) for name in self.cluster.observed}
        return {name for name in self.plan if str(name) in there}

    async def target(self) -> int:
        """Workers that the lab wants of this cluster."""
        answer = await self.scheduler.tether_workers_wanted(names=self._names(), goal=self._goal, lead=self._lead)
        return int(answer["workers"])

    async def recommendations(self, target: int) -> dict[str, Any]:
        """As Dask's. Who was to go and is needed again goes on."""
        if target >= len(self.plan):
            await self._leaving(target)
        return dict(await super().recommendations(target))

    async def workers_to_close(self, target: int) -> list[Any]:
        """Those that have nothing any more, of those that are to go."""
        drained = await self._leaving(target)
        return [name for name in self.plan if str(name) in drained]

    async def scale_down(self, workers: Collection[Any]) -> None:
        """They are drained and have nothing that Dask could save: it would end them, and who looks after them might start them again."""
        ending = self.cluster.scale_down(workers)
        if isawaitable(ending):
            await ending

    async def _leaving(self, target: int) -> set[str]:
        answer = await self.scheduler.tether_workers_leaving(names=self._names(), target=target, patience=self._patience)
        return set(answer["workers"])

    def _names(self) -> list[str]:
        return [str(name) for name in self.plan]


def _check_seconds(name: str, value: object) -> None:
    """Raises: ConfigError."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} is {value!r}: give seconds, from 0 on")


def _goal(said: dict[str, Any]) -> dict[str, float]:
    asked = dask.config.get("tether.scaling", {})
    try:
        asked = {**asked, **said}
        return asdict(msgspec.convert(asked, Goal, strict=False))
    except (TypeError, msgspec.ValidationError) as error:
        raise ConfigError(f"tether.scaling is {asked!r}: give seconds of {', '.join(sorted(_GOAL))} ({error})") from None
