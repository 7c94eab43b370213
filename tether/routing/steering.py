"""Pure: how the requests for one version are steered: by its policy, past routes that are out of order, and no more often than is good."""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random
from typing import Protocol

from tether.ports import Endpoint
from tether.routing.budget import RetryBudget
from tether.routing.health import Health
from tether.routing.hedging import Hedging
from tether.routing.policies import Policy, Sticky, choose, policy_of
from tether.routing.table import Route, Table, VersionEntry
from tether.routing.tracks import Track
from tether.serving_settings import DEFAULTS, ServingSettings

__all__ = ["Outstanding", "Steering"]


class Outstanding(Protocol):
    """What is under way from this gateway, by endpoint: as of `Track`."""

    def outstanding(self, endpoint: Endpoint) -> Callable[[], int]:
        """Counts requests that one more would feel."""
        ...

    def owed(self, endpoint: Endpoint) -> Callable[[], int]:
        """Counts answers that are to come from there."""
        ...


class Steering:
    """Of one version on one gateway. `tell`: as of `Health`."""

    def __init__(self, lines: Outstanding, tell: Callable[[Track, bool], None], random: Random) -> None:
        self._lines, self._random = lines, random
        self.health = Health(tell)
        self.budget = RetryBudget(0.0)
        self.hedging: Hedging | None = None
        self._tracks: dict[Route, Track] = {}
        self._entry: VersionEntry | None = None
        self._table: Table | None = None
        self._serving = DEFAULTS
        self._policy: Policy = policy_of(DEFAULTS.policy, random)
        self.has_sessions = False
        """Whether it matters which session a request belongs to."""

    def follow(self, entry: VersionEntry, table: Table, region: str = "") -> None:
        """As the table has it now; costs nothing where it is the same table. `region`: where the gateway is."""
        if table is self._table:
            return
        self._table = table
        model = table.models.get(entry.model.name)
        serving = DEFAULTS if model is None else model.serving
        if entry is not self._entry or serving != self._serving:
            self._configure(serving, region)
            self._take(entry, table)

    def _take(self, entry: VersionEntry, table: Table) -> None:
        self._entry, known, self._tracks = entry, self._tracks, {}
        for route in entry.routes:
            track = self._tracks[route] = known.get(route) or self._track(route)
            worker = table.workers.get(route.worker)
            track.weight = self._serving.weight(route.worker) or float(max(worker.gpus if worker is not None else 0, 1))
            track.region = worker.site.region if worker is not None else ""
        self.health.follow(list(self._tracks.values()))

    def _track(self, route: Route) -> Track:
        return Track(route, self._lines.outstanding(route.endpoint), self._lines.owed(route.endpoint))

    def _configure(self, serving: ServingSettings, region: str) -> None:
        before, self._serving = self._serving, serving
        if serving.policy != before.policy:
            self._policy = policy_of(serving.policy, self._random, region)
            self.has_sessions = isinstance(self._policy, Sticky)
        if serving.hedge != before.hedge:
            self.hedging = None if serving.hedge is None else Hedging(serving.hedge)

    def choose(self, key: bytes, avoid: Collection[Track], now: float) -> Track | None:
        """The route for a request of session `key`, one of `avoid` (tried already) only where there is no other."""
        health = self.health
        if health.out:
            probe = health.due(now)
            if probe is not None and key:  # its own sessions try it
                health.trust(probe, now)
            elif probe is not None and probe not in avoid:
                health.probe(probe, now)
                return probe
        if not avoid:
            return choose(self._policy, health.own, health.lent, key)
        own, lent = (tuple(track for track in tracks if track not in avoid) for tracks in (health.own, health.lent))
        if not own and not lent:
            own, lent = tuple(health.own), tuple(health.lent)
        return choose(self._policy, own, lent, key)

    def has_other(self, avoid: Collection[Track]) -> bool:
        """Whether a route in order is left besides these."""
        return any(track not in avoid for tracks in (self.health.own, self.health.lent) for track in tracks)
