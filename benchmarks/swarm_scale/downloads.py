"""Many labs fetch one version at the same time, simulated: `tether.manager.peering.sources.Sources`, the real code, decides for each.

A lab sends one blob at a time, in the order in which it was asked, as fast as its own line; what comes waits for the receiver's line. What
is no longer wanted is not sent, or not to its end. As `downloading.Download`: what has come is told to all who are connected and
still fetch, a lab asks for more when something came or was told, and each quarter of a second looks at what stalls.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tether.manager.peering.sources import Asking, Sources

__all__ = ["Scenario", "rows"]

MIB = 1 << 20
BLOB = 4 * MIB
ORIGIN = "origin"
ORIGIN_UPLINK = 12.5e6
"""Bytes a second: 100 Mbit/s."""
SLOWEST_DOWNLINK, FASTEST = 1.25e6, 1.25e8
TOLD_AFTER = 0.02
"""Seconds until the others know what came."""
ASKED_AT_ONCE = 3
"""As in `downloading`: peers that one blob is asked of at the same time."""
PATIENCE = 1000.0
"""Times the origin's line: a run that takes longer has got stuck."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who fetches what."""

    labs: int
    blobs: int
    neighbours: int | None = None
    """Others that each lab is connected to, on average, drawn by lot; None: all."""
    is_origin_known: bool = True
    """By all; else it has as many neighbours as anybody."""
    late: float = 0.25
    """Share that comes later, within twice the time that the origin's line takes for one copy."""
    leaving: float = 0.1
    """Share that goes again within that time, for good, whether it has all or not."""
    has_equal_lines: bool = False
    """All as the origin's, both ways; else drawn."""
    wake: float = 0.02
    """Seconds in which what is told to a lab is heard of together: more costs the simulation less."""
    joining: float = 0.3
    """Seconds until a lab is connected to another one, at most."""
    tick: float = 0.25
    """Seconds between looks at what stalls."""


@dataclass(slots=True, eq=False)
class Lab:
    name: str
    uplink: float
    downlink: float
    has: npt.NDArray[np.bool_]
    sources: Sources | None = None
    """None: not here yet, gone, or all came."""
    comes: float = 0.0
    is_here: bool = False
    done: float | None = None
    free: set[int] = field(default_factory=set)
    """What is missing and asked of nobody."""
    asked: set[tuple[str, int]] = field(default_factory=set)
    askings: Counter[int] = field(default_factory=Counter)
    neighbours: list[Lab] = field(default_factory=list)
    queue: deque[tuple[Lab, int]] = field(default_factory=deque)
    sending: tuple[Lab, int, float] | None = None
    """To whom, what, since when."""
    sent: float = 0.0
    """Blobs, and parts of them."""
    received_until: float = 0.0
    is_woken: bool = False


class Crowd:
    """The labs, and the time."""

    def __init__(self, scenario: Scenario, seed: str) -> None:
        self.scenario, self._random = scenario, random.Random(f"{seed} {scenario}")
        self.line = scenario.blobs * BLOB / ORIGIN_UPLINK
        """Seconds that the origin's line takes for one copy."""
        self.sizes = [BLOB] * scenario.blobs
        self.haves = 0
        self.origin = Lab(ORIGIN, ORIGIN_UPLINK, ORIGIN_UPLINK, np.ones(scenario.blobs, np.bool_), is_here=True)
        self.labs = [self._drawn(number) for number in range(scenario.labs)]
        self.by_name = {lab.name: lab for lab in (self.origin, *self.labs)}
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0
        self._connect()
        leaving = round(scenario.leaving * scenario.labs) if scenario.labs > 1 else 0
        self._leaving = self._random.sample(self.labs, leaving)
        self._waiting = {lab.name for lab in self.labs} - {lab.name for lab in self._leaving}

    def _drawn(self, number: int) -> Lab:
        uplink, downlink = (ORIGIN_UPLINK, ORIGIN_UPLINK) if self.scenario.has_equal_lines else self._line()
        lab = Lab(f"lab-{number}", uplink, downlink, np.zeros(self.scenario.blobs, np.bool_))
        if number > 0 and self._random.random() < self.scenario.late:
            lab.comes = self._random.uniform(0.0, 2 * self.line)
        return lab

    def _line(self) -> tuple[float, float]:
        """Homes and offices: 40 Mbit/s up, half of them within a factor of 2; down as fast, 4 or 10 times."""
        uplink = min(max(self._random.lognormvariate(0.0, 1.0) * 5e6, SLOWEST_DOWNLINK / 10), FASTEST)
        return uplink, min(max(uplink * self._random.choice((1, 4, 10)), SLOWEST_DOWNLINK), FASTEST)

    def _connect(self) -> None:
        wanted, everybody = self.scenario.neighbours, [*self.labs] + ([] if self.scenario.is_origin_known else [self.origin])
        if wanted is None or wanted >= len(everybody) - 1:
            edges = {(one, other) for one in range(len(everybody)) for other in range(one)}
        else:
            edges = set()
            for one in range(len(everybody)):
                for other in self._random.sample(range(len(everybody)), wanted // 2):
                    if one != other:
                        edges.add((max(one, other), min(one, other)))
        for one, other in sorted(edges):
            everybody[one].neighbours.append(everybody[other])
            everybody[other].neighbours.append(everybody[one])
        if self.scenario.is_origin_known:
            for lab in self.labs:
                lab.neighbours.append(self.origin)

    # --- time

    def _at(self, when: float, work: Callable[..., None], *arguments: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, work, arguments))

    def run(self) -> float:
        """Seconds until all who stay have all."""
        for lab in self.labs:
            self._at(lab.comes, self._come, lab)
        for lab in self._leaving:
            self._at(self._random.uniform(lab.comes, lab.comes + 2 * self.line), self._leave, lab)
        now = 0.0
        while self._waiting:
            now, _, work, arguments = heapq.heappop(self._events)
            if now > PATIENCE * self.line:
                raise SystemExit(f"{self.scenario}: {len(self._waiting)} labs are still fetching after {now:.0f} s")
            work(now, *arguments)
        return now

    # --- coming and going

    def _come(self, now: float, lab: Lab) -> None:
        lab.is_here, lab.free = True, set(range(self.scenario.blobs))
        lab.sources = Sources(self.scenario.blobs, lab.name, "v")
        lab.sources.expected([other.name for other in lab.neighbours if other is not self.origin], now)
        for other in lab.neighbours:
            if other.is_here:
                self._at(now + self._random.uniform(0.0, self.scenario.joining), self._meet, lab, other)
                self._at(now + self._random.uniform(0.0, self.scenario.joining), self._meet, other, lab)
        self._at(now + self._random.uniform(0, self.scenario.tick), self._tick, lab)
        self._wake(now, lab)

    def _meet(self, now: float, lab: Lab, other: Lab) -> None:
        if lab.sources is not None and other.is_here:
            lab.sources.joined(other.name, other.has, now, is_origin=other is self.origin)
            self._wake(now, lab)

    def _leave(self, now: float, lab: Lab) -> None:
        lab.is_here, lab.sources = False, None
        for peer, index in list(lab.asked):
            self._ended(now, lab, peer, index)
        lab.free.clear()
        for other in lab.neighbours:
            if other.sources is not None:
                for index in other.sources.left(lab.name):
                    self._ended(now, other, lab.name, index)
                self._wake(now, other)

    def _ended(self, now: float, lab: Lab, peer: str, index: int) -> None:
        """It came, or is not wanted any more, or not from there."""
        if (peer, index) not in lab.asked:
            return
        lab.asked.discard((peer, index))
        lab.askings[index] -= 1
        if not lab.askings[index] and not lab.has[index]:
            lab.free.add(index)
        giver = self.by_name[peer]
        if giver.sending is not None and giver.sending[:2] == (lab, index):
            giver.sent += (now - giver.sending[2]) * giver.uplink / BLOB
            giver.sending = None
            self._send(now, giver)

    # --- asking

    def _wake(self, now: float, lab: Lab) -> None:
        if not lab.is_woken and lab.free:
            lab.is_woken = True
            self._at(now + self.scenario.wake, self._ask_more, lab)

    def _ask_more(self, now: float, lab: Lab) -> None:
        lab.is_woken = False
        if lab.sources is not None and lab.free:
            for asking in lab.sources.next(sorted(lab.free), self.sizes, now):
                self._ask(now, lab, asking)

    def _tick(self, now: float, lab: Lab) -> None:
        if lab.sources is None:
            return
        for index in lab.sources.stalled(now) if lab.asked else ():
            if lab.askings[index] < ASKED_AT_ONCE:
                asking = lab.sources.ask(index, BLOB, now)
                if asking is not None:
                    self._ask(now, lab, asking)
        self._wake(now, lab)
        self._at(now + self.scenario.tick, self._tick, lab)

    def _ask(self, now: float, lab: Lab, asking: Asking) -> None:
        lab.asked.add((asking.peer, asking.index))
        lab.askings[asking.index] += 1
        lab.free.discard(asking.index)
        giver = self.by_name[asking.peer]
        giver.queue.append((lab, asking.index))
        self._send(now, giver)

    # --- giving

    def _send(self, now: float, giver: Lab) -> None:
        while giver.queue and giver.sending is None and giver.is_here:
            lab, index = giver.queue.popleft()
            if (giver.name, index) in lab.asked:
                giver.sending = (lab, index, now)
                self._at(now + BLOB / giver.uplink, self._sent, giver, giver.sending)

    def _sent(self, now: float, giver: Lab, sending: tuple[Lab, int, float]) -> None:
        if giver.sending is not sending:
            return
        lab, index, _ = sending
        giver.sending, giver.sent = None, giver.sent + 1
        lab.received_until = max(lab.received_until + BLOB / lab.downlink, now)
        self._at(lab.received_until + TOLD_AFTER, self._received, giver, lab, index)
        self._send(now, giver)

    def _received(self, now: float, giver: Lab, lab: Lab, index: int) -> None:
        if lab.sources is None or (giver.name, index) not in lab.asked:
            return
        others = lab.sources.arrived(giver.name, index, now)
        lab.has[index] = True
        for name in (giver.name, *others):
            self._ended(now, lab, name, index)
        self._at(now + TOLD_AFTER, self._told, lab, index)
        if lab.has.all():
            self._complete(now, lab)
        else:
            self._ask_more(now, lab)

    def _complete(self, now: float, lab: Lab) -> None:
        lab.done, lab.sources = now, None
        self._waiting.discard(lab.name)

    def _told(self, now: float, lab: Lab, index: int) -> None:
        if not lab.is_here:
            return
        for other in lab.neighbours:
            if other.sources is not None:
                self.haves += 1
                other.sources.gained(lab.name, (index,), now)
                if index in other.free:
                    self._wake(now, other)


def rows(scenarios: Sequence[Scenario], seed: str) -> Iterator[dict[str, object]]:
    """A row for each."""
    for scenario in scenarios:
        begun, crowd = time.process_time(), Crowd(scenario, seed)
        crowd.run()
        yield _row(crowd) | {"seconds of CPU": time.process_time() - begun}


def _row(crowd: Crowd) -> dict[str, object]:
    """Times are multiples of what the origin's line takes for one copy, and begin when a lab comes."""
    scenario, blobs = crowd.scenario, crowd.scenario.blobs
    whole = [(lab, lab.done - lab.comes) for lab in crowd.labs if lab.done is not None]
    took = [seconds / crowd.line for _, seconds in whole]
    sent, kept = crowd.origin.sent + sum(lab.sent for lab in crowd.labs), sum(int(lab.has.sum()) for lab in crowd.labs)
    return {
        "labs": scenario.labs,
        "blobs": blobs,
        "neighbours": scenario.neighbours,
        "origin known": scenario.is_origin_known,
        "equal lines": scenario.has_equal_lines,
        "late": scenario.late,
        "leaving": scenario.leaving,
        "done": len(whole),
        "half after": float(np.median(took)),
        "95 of 100 after": float(np.percentile(took, 95)),
        "all after": max(took),
        "worst of its own line": max(seconds / max(crowd.line, blobs * BLOB / lab.downlink) for lab, seconds in whole),
        "origin sends": crowd.origin.sent / blobs,
        "worst lab sends": max(lab.sent for lab in crowd.labs) / blobs,
        "sent in vain": sent / kept - 1,
        "haves a lab": crowd.haves / scenario.labs,
    }
