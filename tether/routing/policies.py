"""Pure: which of the routes to a version gets the next request. Lent routes, to other labs, come last under every policy.

A decision costs the same however many routes there are: of many, those that compare look at `_WINDOW` neighbours, the next time at the
next ones. To look at all 1,000 would cost more than the request, and chooses no better than of 32 (the power of two choices says why).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from random import Random
from typing import Final, Protocol

import numpy as np
from blake3 import blake3

from tether.routing.tracks import Track
from tether.serving_settings import PolicyName

__all__ = ["BUSY", "Policy", "Sticky", "choose", "policy_of"]

BUSY: Final = 64
"""Open requests of this gateway from which a worker of the lab is busy: one batch runs, and at least another waits. What comes then would
wait for both, which mostly takes longer than the way to another lab."""
_WINDOW: Final = 32
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio: an odd factor whose product has well-mixed high bits (Fibonacci hashing)."""
_SHIFT: Final = np.uint64(32)


class Policy(Protocol):
    """Chooses among routes that are in order. `tracks`: at least one; the same object as long as they are the same."""

    def choose(self, tracks: Sequence[Track], key: bytes) -> Track:
        """`key`: of the session that the request belongs to; b"": of none."""
        ...


def choose(policy: Policy, own: Sequence[Track], lent: Sequence[Track], key: bytes) -> Track | None:
    """One of the lab's own, if there is one; a lent one where it is busy and that has free slots. A session stays where it is."""
    if not lent:
        return (policy.choose(own, key) if len(own) > 1 else own[0]) if own else None
    freest = max(lent, key=attrgetter("free"))
    if not own:
        return freest
    chosen = policy.choose(own, key) if len(own) > 1 else own[0]
    is_to_stay = key and isinstance(policy, Sticky)
    return freest if not is_to_stay and freest.free > 0 and chosen.outstanding() >= BUSY else chosen


def policy_of(name: PolicyName, random: Random, region: str = "") -> Policy:
    """`region`: where the gateway is."""
    if name == "power_of_two":
        return PowerOfTwo(random)
    if name == "region":
        return Nearest(region)
    return _PLAIN[name]()


class _Window:
    """The next few of many."""

    def __init__(self) -> None:
        self._from = 0

    def next(self, tracks: Sequence[Track]) -> Sequence[Track]:
        """`tracks`: more than `_WINDOW`."""
        count = len(tracks)
        first = self._from % count
        self._from = first + _WINDOW
        found = tracks[first : first + _WINDOW]
        return found if len(found) == _WINDOW else [*found, *tracks[: _WINDOW - len(found)]]


class LeastOutstanding:
    """The fewest open requests of this gateway, the first of equals: with few requests batches are fuller, and fewer workers awake."""

    def __init__(self) -> None:
        self._window = _Window()

    def choose(self, tracks: Sequence[Track], key: bytes) -> Track:  # noqa: ARG002 (the policies' signature)
        """As `Policy.choose`."""
        chosen, fewest = tracks[0], -1
        for track in tracks if len(tracks) <= _WINDOW else self._window.next(tracks):
            outstanding = track.outstanding()
            if not outstanding:
                return track
            if outstanding < fewest or fewest < 0:
                chosen, fewest = track, outstanding
        return chosen


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = -1

    def choose(self, tracks: Sequence[Track], key: bytes) -> Track:  # noqa: ARG002 (the policies' signature)
        """As `Policy.choose`."""
        self._next = (self._next + 1) % len(tracks)
        return tracks[self._next]


class WeightedRoundRobin:
    """One after the other, as often as their weights say, evenly spread: each is due again one over its weight later (EDF, as Envoy's)."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Track]] = []
        self._tracks: Sequence[Track] = ()

    def choose(self, tracks: Sequence[Track], key: bytes) -> Track:  # noqa: ARG002 (the policies' signature)
        """As `Policy.choose`."""
        if tracks is not self._tracks:
            self._follow(tracks)
        due, order, track = self._due[0]
        heapq.heapreplace(self._due, (due + 1.0 / track.weight, order, track))
        return track

    def _follow(self, tracks: Sequence[Track]) -> None:
        """Who is new begins with the others; who stays is not due sooner for that."""
        now, known = (self._due[0][0] if self._due else 0.0), {id(track): due for due, _, track in self._due}
        self._due = [(known.get(id(track), now + 1.0 / track.weight), order, track) for order, track in enumerate(tracks)]
        heapq.heapify(self._due)
        self._tracks = tracks


class PowerOfTwo:
    """Of two at random the one with fewer open requests: gateways that know nothing of each other do not run to the same one."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def choose(self, tracks: Sequence[Track], key: bytes) -> Track:  # noqa: ARG002 (the policies' signature)
        """As `Policy.choose`."""
        count = len(tracks)
        one = int(self._random.random() * count)
        other = (one + 1 + int(self._random.random() * (count - 1))) % count
        first, second = tracks[one], tracks[other]
        return first if first.outstanding() <= second.outstanding() else second


class LeastLatency:
    """The shortest wait, by what answers took lately and how many are open; a slow answer counts at once, and is forgiven slowly."""

    def __init__(self) -> None:
        self._window = _Window()

    def choose(self, tracks: Sequence[Track], key: bytes) -> Track:  # noqa: ARG002 (the policies' signature)
        """As `Policy.choose`."""
        return min(tracks if len(tracks) <= _WINDOW else self._window.next(tracks), key=attrgetter("cost"))


class Sticky:
    """A session always goes to the same worker, on every gateway, and only those of a worker that is gone move (rendezvous hashing).

    Requests of no session go where the fewest are open.
    """

    def __init__(self) -> None:
        self._others = LeastOutstanding()
        self._tracks: Sequence[Track] = ()
        self._seeds = np.empty(0, np.uint64)

    def choose(self, tracks: Sequence[Track], key: bytes) -> Track:
        """As `Policy.choose`."""
        if not key:
            return self._others.choose(tracks, key)
        if tracks is not self._tracks:
            self._seeds = np.array([_hash(track.route.worker.encode()) for track in tracks], np.uint64)
            self._tracks = tracks
        mixed = (self._seeds ^ np.uint64(_hash(key))) * _MIX
        mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX
        return tracks[int(mixed.argmax())]


class Nearest:
    """The fewest open requests among workers of the gateway's own region; where all of those are busy, among all."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._near, self._all = LeastOutstanding(), LeastOutstanding()
        self._tracks: Sequence[Track] = ()
        self._here: list[Track] = []

    def choose(self, tracks: Sequence[Track], key: bytes) -> Track:
        """As `Policy.choose`."""
        if tracks is not self._tracks:
            self._here = [track for track in tracks if track.region == self._region]
            self._tracks = tracks
        if self._here:
            near = self._near.choose(self._here, key)
            if near.outstanding() < BUSY:
                return near
        return self._all.choose(tracks, key)


def _hash(name: bytes) -> int:
    return int.from_bytes(blake3(name).digest(8), "little")


_PLAIN: Final[Mapping[PolicyName, Callable[[], Policy]]] = {
    "least_outstanding": LeastOutstanding,
    "round_robin": RoundRobin,
    "weighted_round_robin": WeightedRoundRobin,
    "latency": LeastLatency,
    "sticky": Sticky,
}
