"""What this gateway sees of each version: requests are steered by it, and the orchestrator is told once a second while there are any."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from random import Random
from typing import Final

import structlog

from tether.events import GatewayLoad
from tether.gateway.event_log import EventLog
from tether.gateway.lines import Lines
from tether.routing.lab_events import Kind
from tether.routing.load import LoadCounter
from tether.routing.steering import Steering
from tether.routing.table import Table, VersionEntry
from tether.routing.tracks import Track
from tether.telemetry.steering_metrics import STEERING
from tether.types import ModelVersion

__all__ = ["Traffic", "VersionTraffic"]

log = structlog.get_logger("tether.gateway")
_TOLD: Final = 1.0
"""Seconds between two reports."""


class VersionTraffic:
    """Of one version: the way of its requests, and what became of them."""

    __slots__ = ("load", "steering")

    def __init__(self, steering: Steering) -> None:
        self.steering, self.load = steering, LoadCounter()


class Traffic:
    """Of one gateway. Versions that nobody asked for cost nothing. `tell` takes each report; it does not block."""

    def __init__(self, lines: Lines, events: EventLog, tell: Callable[[GatewayLoad], None], region: str = "") -> None:
        self._lines, self._events, self._tell, self._region = lines, events, tell, region
        self._versions: dict[ModelVersion, VersionTraffic] = {}
        self.chance = Random()  # noqa: S311 (spreads load; nobody gains by guessing it)
        self._name = f"{self.chance.getrandbits(64):016x}"
        self._table = Table()
        self._found: dict[int, VersionTraffic] = {}
        """By the identity of the entry in the table: to hash a version costs more than to steer it."""
        self._telling: asyncio.TimerHandle | None = None
        self._told = 0.0

    def of(self, entry: VersionEntry, table: Table) -> VersionTraffic:
        """Of the version, as the table has it now."""
        found = self._found.get(id(entry))
        if found is None or table is not self._table:
            self.follow(table)
            found = self._versions.get(entry.model)
            if found is None:
                found = self._versions[entry.model] = VersionTraffic(self._steering(entry.model))
            found.steering.follow(entry, table, self._region)
            self._found[id(entry)] = found
        return found

    def began(self, version: VersionTraffic) -> None:
        """A request has come."""
        version.load.open += 1
        self._wake()

    def labelled(self, entry: VersionEntry, table: Table, right: int, wrong: int) -> None:
        """So many answers of the version were right, and wrong, by labels that came now."""
        load = self.of(entry, table).load
        load.right += right
        load.wrong += wrong
        self._wake()

    def _wake(self) -> None:
        if self._telling is None:
            self._told = time.monotonic()
            self._telling = asyncio.get_running_loop().call_later(_TOLD, self._report)

    def follow(self, table: Table) -> None:
        """Versions may be gone, and others stand for what there was."""
        if table is not self._table:
            self._table, self._found = table, {}

    def close(self) -> None:
        """Tell nothing any more."""
        if self._telling is not None:
            self._telling.cancel()

    def _steering(self, model: ModelVersion) -> Steering:
        return Steering(self._lines, lambda track, is_out: self._ejected(model, track, is_out=is_out), self.chance)

    def _report(self) -> None:
        """As long as something is seen, and once after."""
        now = time.monotonic()
        seconds, self._told, self._telling = now - self._told, now, None
        loads = {}
        for model, version in self._versions.items():
            version.steering.health.review(now)
            if (load := version.load.take()) is not None:
                loads[model] = load
                if load.right or load.wrong:
                    self._events.tell(Kind.LABELLED, model=model.name, version=model.version, right=load.right, wrong=load.wrong)
        if loads:
            self._tell(GatewayLoad(self._name, seconds, loads))
            self._telling = asyncio.get_running_loop().call_later(_TOLD, self._report)
        else:
            self._forget()

    def _forget(self) -> None:
        """Nothing was asked for lately, so there is time to look what is there no more."""
        there = {version.model for model in self._table.models.values() for version in model.versions.values()}
        self._versions = {model: version for model, version in self._versions.items() if model in there}

    def _ejected(self, model: ModelVersion, track: Track, *, is_out: bool) -> None:
        worker, cause = track.route.worker, track.cause
        log.warning("worker ejected" if is_out else "worker back", model=str(model), worker=worker, cause=cause)
        kind = Kind.WORKER_EJECTED if is_out else Kind.WORKER_BACK
        self._events.tell(kind, model=model.name, version=model.version, worker=worker, reason=cause if is_out else None)
        if is_out:
            STEERING.count("ejections", model.name, cause)
