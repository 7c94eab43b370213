"""Pure: which blob to ask of which source next: order, room, retries, second askings, bans. Events and a time in, instructions out."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from tether.types import Digest

__all__ = [
    "AHEAD",
    "NEEDED",
    "WHOLE",
    "Abandon",
    "Absent",
    "Arrived",
    "Ask",
    "Event",
    "Failed",
    "FetchRules",
    "Fetching",
    "GiveUp",
    "Instruction",
    "Lied",
    "Wanted",
]

NEEDED, WHOLE, AHEAD = range(3)
"""How urgent a blob is: a reader waits for it; it is a part of a version that comes down whole; it may be read soon."""


@dataclass(frozen=True, slots=True)
class FetchRules:
    """What fetching may use of memory and patience."""

    max_nbytes: int = 32 << 20
    """Asked for and not here yet: at 100 ms of latency enough for 300 MB/s."""
    patience: float = 2.0
    """Seconds in which a source gives nothing until the next one is asked for the same blob as well."""
    rests: tuple[float, ...] = (0.1, 0.4, 1.0, 2.0)
    """Seconds that a source is left alone after failures in a row; the last again and again."""
    wary: float = 30.0
    """Seconds for which a source that stalled is asked only for what no other has."""
    give_up: float = 30.0
    """Seconds without a blob from anywhere: about what the supervisor needs to bring a manager back, doubled."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A blob that is to come."""

    digest: Digest
    nbytes: int
    """At least so many."""
    path: str
    """The array that needs it, for errors."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A source gave the blob, verified."""

    source: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class Absent:
    """A source says that it has no such blob."""

    source: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class Failed:
    """A source did not answer."""

    source: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class Lied:
    """A source gave other bytes than the digest says: it is not asked again."""

    source: int
    digest: Digest


Event = Arrived | Absent | Failed | Lied


@dataclass(frozen=True, slots=True)
class Ask:
    """Begin to fetch the blob from the source."""

    source: int
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Abandon:
    """Cancel that."""

    source: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The blob will not come."""

    wanted: Wanted
    silent: tuple[int, ...]
    """The sources that did not answer in time and may have it; none: every source says that it lacks it, or lied."""


Instruction = Ask | Abandon | GiveUp

_AT_ONCE = 2
"""Sources that are asked for one blob at the same time."""
_SCAN = 256
"""Blobs that are looked at, and not asked for, in one turn: those that only a resting source may have."""
_LONG_AGO = float("-inf")


@dataclass(slots=True)
class _Source:
    room: int
    asked: dict[Digest, None] = field(default_factory=dict)
    """For which blobs, in order."""
    delivered: float = _LONG_AGO
    resting: float = _LONG_AGO
    """Until when."""
    wary: float = _LONG_AGO
    """Until when it counts as slow."""
    failures: int = 0
    """In a row."""
    banned: bool = False


@dataclass(slots=True)
class _Want:
    wanted: Wanted
    urgency: int
    number: int
    since: float
    lacking: set[int] = field(default_factory=set)
    asked: dict[int, float] = field(default_factory=dict)
    """Source → when."""


class Fetching:
    """What is wanted, who was asked, whom to ask next. Sources have the numbers of their order, the preferred first.

    One source is asked for a blob; the next one where it lacks it, fails, lies, or gives nothing at all for `patience`.
    """

    def __init__(self, rooms: Sequence[int], rules: FetchRules) -> None:
        """`rooms`: how many askings each source takes at a time."""
        self._rules = rules
        self._sources = [_Source(room) for room in rooms]
        self._wants: dict[Digest, _Want] = {}
        self._queue: list[tuple[int, int, Digest]] = []
        """Heap of those that nobody is asked for: urgency, number, digest. An entry that does not fit its want any more is skipped."""
        self._count = 0
        self._nbytes = 0
        self._progress = _LONG_AGO

    @property
    def banned(self) -> tuple[int, ...]:
        return tuple(number for number, source in enumerate(self._sources) if source.banned)

    def want(self, wanted: Wanted, urgency: int, now: float) -> list[Instruction]:
        """A blob is wanted, or more urgently than before."""
        want = self._wants.get(wanted.digest)
        if want is None:
            self._count += 1
            want = self._wants[wanted.digest] = _Want(wanted, urgency, self._count, now)
        elif urgency >= want.urgency:
            return []
        want.urgency = urgency
        self._enqueue(want)
        return self.tick(now)

    def unwant(self, digest: Digest, now: float) -> list[Instruction]:
        """Nobody waits for it any more."""
        want = self._wants.get(digest)
        return [*self._forget(want), *self.tick(now)] if want else []

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """What an asking came to. One that was abandoned says nothing more."""
        want, source = self._wants.get(event.digest), self._sources[event.source]
        out: list[Instruction] = []
        if want is not None and event.source in want.asked:
            self._release(want, event.source)
            out += self._settle(want, event, now)
        elif isinstance(event, Lied):
            out += self._ban(event.source)
        if isinstance(event, Arrived):
            source.delivered = self._progress = now
        return [*out, *self.tick(now)]

    def _settle(self, want: _Want, event: Event, now: float) -> list[Instruction]:
        source = self._sources[event.source]
        match event:
            case Arrived():
                source.failures, source.wary = 0, _LONG_AGO
                return self._forget(want)
            case Absent():
                source.failures = 0
                want.lacking.add(event.source)
            case Failed():
                rests = self._rules.rests
                source.resting = now + rests[min(source.failures, len(rests) - 1)]
                source.failures += 1
            case Lied():
                self._requeue(want)
                return self._ban(event.source)
            case _:
                assert_never(event)
        self._requeue(want)
        return []

    def _ban(self, number: int) -> list[Instruction]:
        source, out = self._sources[number], list[Instruction]()
        source.banned = True
        for digest in list(source.asked):
            want = self._wants[digest]
            self._release(want, number)
            self._requeue(want)
            out.append(Abandon(number, digest))
        return out

    def _release(self, want: _Want, number: int) -> None:
        del want.asked[number]
        self._sources[number].asked.pop(want.wanted.digest, None)
        self._nbytes -= want.wanted.nbytes

    def _requeue(self, want: _Want) -> None:
        if not want.asked:
            self._enqueue(want)

    def _enqueue(self, want: _Want) -> None:
        heapq.heappush(self._queue, (want.urgency, want.number, want.wanted.digest))

    def _forget(self, want: _Want) -> list[Instruction]:
        del self._wants[want.wanted.digest]
        others = list(want.asked)
        for number in others:
            self._release(want, number)
        return [Abandon(number, want.wanted.digest) for number in others]

    # --- whom to ask

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed."""
        return [*self._expired(now), *self._second_askings(now), *self._first_askings(now)]

    def next_tick(self, now: float) -> float | None:
        """When `tick` has something to do if nothing happens before; None: nothing is wanted."""
        if not self._wants:
            return None
        oldest = next(iter(self._wants.values())).since
        times = [max(oldest, self._progress) + self._rules.give_up]
        times += [source.resting for source in self._sources if source.resting > now]
        times += [time for want in self._asked() if (time := self._stalls_at(want)) > now]
        return min(times)

    def _asked(self) -> Iterator[_Want]:
        """Those that somebody is asked for."""
        digests = dict.fromkeys(digest for source in self._sources for digest in source.asked)
        return (self._wants[digest] for digest in digests)

    def _stalls_at(self, want: _Want) -> float:
        """When all that were asked for it have given nothing for too long."""
        return max(max(since, self._sources[number].delivered) for number, since in want.asked.items()) + self._rules.patience

    def _expired(self, now: float) -> Iterator[Instruction]:
        if now - self._progress < self._rules.give_up or not self._wants:
            return
        for want in list(self._wants.values()):
            if now - want.since < self._rules.give_up:
                return  # they are in the order of their coming
            silent = tuple(number for number in self._candidates(want) + list(want.asked))
            yield from self._forget(want)
            yield GiveUp(want.wanted, tuple(sorted(silent)))

    def _second_askings(self, now: float) -> Iterator[Instruction]:
        for want in list(self._asked()):
            if len(want.asked) >= _AT_ONCE or self._stalls_at(want) > now:
                continue
            for number in want.asked:
                self._sources[number].wary = now + self._rules.wary
            # Not held back by `max_nbytes`: what stalled is not coming in.
            choice = self._choice(want, now)
            if choice is not None:
                yield self._ask(want, choice, now)

    def _first_askings(self, now: float) -> Iterator[Instruction]:
        passed: list[_Want] = []
        while self._queue and len(passed) < _SCAN and self._has_room(now):
            want = self._next_queued()
            if want is None:
                break
            if not self._candidates(want):
                yield from self._forget(want)
                yield GiveUp(want.wanted, ())
                continue
            choice = self._choice(want, now)
            if choice is None:
                passed.append(want)
            elif self._nbytes and self._nbytes + want.wanted.nbytes > self._rules.max_nbytes:
                passed.append(want)
                break
            else:
                yield self._ask(want, choice, now)
        for want in passed:
            self._enqueue(want)

    def _next_queued(self) -> _Want | None:
        while self._queue:
            urgency, number, digest = heapq.heappop(self._queue)
            want = self._wants.get(digest)
            if want is not None and not want.asked and (want.urgency, want.number) == (urgency, number):
                return want
        return None

    def _has_room(self, now: float) -> bool:
        """Whether a look at the queue can come to anything: a source that takes more, or none that ever will."""
        open_ones = [source for source in self._sources if not source.banned]
        return not open_ones or any(source.resting <= now and len(source.asked) < source.room for source in open_ones)

    def _candidates(self, want: _Want) -> list[int]:
        """The sources that may have it and are not asked."""
        return [
            number
            for number, source in enumerate(self._sources)
            if not source.banned and number not in want.lacking and number not in want.asked
        ]

    def _choice(self, want: _Want, now: float) -> int | None:
        """The first of them that is not resting, slow ones last; None where that one has no room: it is waited for."""
        awake = [number for number in self._candidates(want) if self._sources[number].resting <= now]
        if not awake:
            return None
        best = min(awake, key=lambda number: (self._sources[number].wary > now, number))
        source = self._sources[best]
        return best if len(source.asked) < source.room else None

    def _ask(self, want: _Want, number: int, now: float) -> Ask:
        want.asked[number] = now
        self._sources[number].asked[want.wanted.digest] = None
        self._nbytes += want.wanted.nbytes
        return Ask(number, want.wanted)
