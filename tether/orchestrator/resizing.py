"""Answers whoever makes workers of this lab come and go: how many it wants, and which were drained so that they may go. Glue only.

It has no timer: a lab that nobody scales pays nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import structlog

from tether.errors import MissingDependencyError
from tether.events import DrainAsked, Event, GatewayLoad
from tether.orchestrator.forecasting import Forecast
from tether.orchestrator.scaling import Batch, Gauge, Goal, Scaler, Staff, leaving
from tether.telemetry.clock import steady_time
from tether.types import WorkerId

__all__ = ["Resizing"]

log = structlog.get_logger("tether.orchestrator")


class Resizing:
    """Of one orchestrator. Others' workers may be in the lab, too: `names` are those of who asks."""

    def __init__(
        self,
        staff: Callable[[], Sequence[Staff]],
        spent: Callable[[], Mapping[str, float]],
        batch: Callable[[], Batch],
        handle: Callable[[Event], None],
    ) -> None:
        """`spent`: by process of a worker, seconds inside runtimes, as its last heartbeat told."""
        self._staff, self._spent, self._batch, self._handle = staff, spent, batch, handle
        self._gauge, self._scaler = Gauge(), Scaler()
        self._forecast: Forecast | None = Forecast()
        """None: it can't be made here."""
        self._drained: set[str] = set()
        """Whom this drained, so that whom a person drained stays so."""
        self._named: set[WorkerId] = set()
        """Who may go, until they are gone or go on."""

    def sent_away(self, address: str) -> bool:
        """Whether who leaves there had nothing any more and was named as one that may go."""
        return bool(self._named) and any(
            each.address == address and each.is_drained and each.worker in self._named for each in self._staff()
        )

    def hear(self, load: GatewayLoad, now: float) -> None:
        """What a gateway saw."""
        self._gauge.take(load, now)

    async def wanted(self, names: Collection[str], goal: Mapping[str, float], lead: float | None) -> dict[str, Any]:
        """Workers that who has these should have. `goal`: a `Goal`; `lead`: seconds for one to come, which are foretold; None: not."""
        now, staff = steady_time(), self._staff()
        pressure = self._gauge.look(self._spent(), now)
        expected = 0.0 if lead is None else await asyncio.to_thread(self._foretold, pressure.arrived, lead, now)
        self._scaler.goal = Goal(**goal)
        total = max(self._scaler.look(pressure, len(staff), now, expected), self._batch().workers)
        return {"workers": max(total - sum(each.worker not in names for each in staff), 0)}

    async def leaving(self, names: Collection[str], target: int, patience: float) -> dict[str, Any]:
        """Have those drained that may go, so that `target` of these stay; the answer: who has nothing any more. Others go on."""
        staff = [each for each in self._staff() if each.worker in names]
        chosen = set(leaving(staff, target, self._batch().busy))
        for each in staff:
            if each.worker in chosen and not each.is_leaving:
                self._drained.add(each.worker)
                self._handle(DrainAsked(each.worker, patience))
            elif each.worker not in chosen and each.is_leaving and each.worker in self._drained:
                self._handle(DrainAsked(each.worker, None))
        self._drained &= chosen
        drained = {each.worker for each in self._staff() if each.is_drained}
        self._named = drained & (self._named | chosen)
        return {"workers": sorted(drained & chosen)}

    def _foretold(self, arrived: int, lead: float, now: float) -> float:
        """Requests a second. In a thread: a library is imported, and works for a moment now and then."""
        if self._forecast is None:
            return 0.0
        self._forecast.take(arrived, now)
        try:
            return self._forecast.expected(lead)
        except MissingDependencyError:
            self._forecast = None
            return 0.0
        except Exception:  # what can't be foretold is met when it is there
            log.exception("no forecast")
            return 0.0
