"""What it costs to be found: announcing and looking up in a simulated DHT that asks as Holepunch's does.

The rules and numbers are those of dht-rpc 6.27.0 (`index.js`, `lib/query.js`, `lib/io.js`), kademlia-routing-table 1.0.6 and hyperdht
6.34.0 (`announce`: a query, then one request to each of the 20 closest that answered). Ids are random, as there, where they are hashes of
addresses. Not simulated: the congestion window (80 requests in 750 ms: one query has 10 under way), pings of old nodes, expiry of records.
"""

from __future__ import annotations

import heapq
import random
import statistics
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

__all__ = ["DhtOptions", "rows"]

K = 20
CONCURRENCY = 10
TIMEOUT = 1.0
"""Seconds until a request is sent again; from then on it counts as slow, and another one goes out beside it."""
QUERY_RETRIES, COMMIT_RETRIES = 5, 3
ID_BITS = 256
BOOTSTRAPS = 3
ACROSS = 0.3
"""Seconds of round trip between two antipodes; and each end's own line adds some (`Network.draw`)."""
PENDING, DONE, DOWN = range(3)


@dataclass(frozen=True, slots=True)
class DhtOptions:
    """The network."""

    ephemeral: float = 0.7
    """Share behind firewalls or just started: they ask, and are in nobody's table."""
    dead: float = 0.1
    """Share of the others that is in the tables and gone, before the announcements and again between these and the lookups."""
    loss: float = 0.01
    """Of datagrams, each way."""
    topics: int = 100
    """Announced, each by another lab, and looked up, each by another one."""


@dataclass(slots=True)
class Node:
    id: int
    place: float
    """On a ring of length 1."""
    line: float
    """Seconds that its own line adds to a round trip."""
    is_ephemeral: bool
    is_alive: bool = True
    rows: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Leading bits shared with the own id → (id, number) of at most K nodes, sorted by id."""
    stored: set[int] = field(default_factory=set)

    def _row(self, other: int) -> int:
        return ID_BITS - (self.id ^ other).bit_length()

    def learn(self, other: int, number: int) -> None:
        if other == self.id:
            return
        row = self.rows.setdefault(self._row(other), [])
        at = bisect_left(row, (other, number))
        if len(row) < K and not (at < len(row) and row[at][1] == number):
            row.insert(at, (other, number))

    def forget(self, other: int, number: int) -> None:
        row = self.rows.get(self._row(other), [])
        if (other, number) in row:
            row.remove((other, number))

    def closest(self, target: int, count: int = K) -> list[tuple[int, int]]:
        """As the package has it: the target's own row, then those that share less with it, then those that share more with this node."""
        found: list[tuple[int, int]] = []
        at = self._row(target)
        numbers = sorted(self.rows)
        for number in (*(each for each in reversed(numbers) if each <= at), *(each for each in numbers if each > at)):
            found += self.rows[number][: count - len(found)]
            if len(found) == count:
                break
        return found


class Network:
    """All nodes, and what lies between them."""

    def __init__(self, count: int, options: DhtOptions, seed: str) -> None:
        self.random, self.options, self.loss = random.Random(f"{seed} dht {count}"), options, 0.0
        self.nodes = [self.draw(is_ephemeral=number >= BOOTSTRAPS and self._drawn(options.ephemeral)) for number in range(count)]
        self.persistent = [number for number, node in enumerate(self.nodes) if not node.is_ephemeral]
        for number in self.persistent:
            Query(self, number, self.nodes[number].id).run()
        for number in self.persistent:  # its first refresh, at some node that it knows
            known = [each for row in self.nodes[number].rows.values() for each in row]
            if known:
                Query(self, number, self.random.choice(known)[0]).run()
        self.loss = options.loss

    def _drawn(self, share: float) -> bool:
        return self.random.random() < share

    def draw(self, *, is_ephemeral: bool) -> Node:
        line = min(self.random.lognormvariate(-4.6, 0.8), 0.5)  # 10 ms, one in ten over 28
        return Node(self.random.getrandbits(ID_BITS), self.random.random(), line, is_ephemeral)

    def round_trip(self, one: int, other: int) -> float:
        a, b = self.nodes[one], self.nodes[other]
        apart = abs(a.place - b.place)
        return a.line + b.line + 2 * ACROSS * min(apart, 1 - apart)

    def is_lost(self) -> bool:
        return self.loss > 0 and self.random.random() < 1 - (1 - self.loss) ** 2

    def kill(self) -> None:
        """Some of those in the tables are gone, and nobody knows."""
        for number in self.persistent[BOOTSTRAPS:]:
            if self.nodes[number].is_alive and self._drawn(self.options.dead):
                self.nodes[number].is_alive = False

    def asker(self, number: int) -> None:
        """A lab that was there for a while: it knows its surroundings."""
        if self.nodes[number].is_ephemeral and not self.nodes[number].rows:
            Query(self, number, self.nodes[number].id).run()


@dataclass(slots=True)
class Answer:
    """What a query came to."""

    sent: int = 0
    """Datagrams that ask or store, those sent again too."""
    hints: int = 0
    """Datagrams that tell a node that one of its table is down."""
    rounds: int = 0
    """Round trips one after the other until the closest were known."""
    seconds: float = 0.0
    found_after: float | None = None
    """Seconds until the first answer that had the record."""
    stored: int = 0


@dataclass(slots=True)
class _Request:
    node: tuple[int, int]
    depth: int
    sent: int = 1
    is_slow: bool = False
    is_over: bool = False


class Query:
    """One, from its first question to the last."""

    def __init__(self, network: Network, asker: int, target: int) -> None:
        self._net, self._asker, self._target = network, asker, target
        self._own = network.nodes[asker]
        self._seen: dict[int, int] = {}
        self._referrers: dict[int, list[int]] = {}
        self._pending: list[tuple[tuple[int, int], int]] = []
        self._closest: list[tuple[int, int, int]] = []
        """Distance, number, depth."""
        self._events: list[tuple[float, int, bool, _Request]] = []
        self._count = self._in_flight = self._slow = 0
        self._now = 0.0
        self._is_over = False
        self.answer = Answer()

    def run(self, *, store: bool = False) -> Answer:
        for node in self._own.closest(self._target):
            self._add(node, None, 1)
        if len(self._pending) < K:
            for number in range(min(BOOTSTRAPS, len(self._net.nodes))):
                self._add((self._net.nodes[number].id, number), None, 1)
        self._read_more()
        while self._events and not self._is_over:
            self._now, _, is_reply, request = heapq.heappop(self._events)
            if not request.is_over:
                (self._replied if is_reply else self._cycled)(request)
        self.answer.rounds = max((depth for _, _, depth in self._closest), default=0)
        if store:
            self._commit()
        self.answer.seconds = self._now
        return self.answer

    def _is_closer(self, distance: int) -> bool:
        return len(self._closest) < K or distance < self._closest[-1][0]

    def _add(self, node: tuple[int, int], referrer: int | None, depth: int) -> bool:
        identity, number = node
        is_closer, state = self._is_closer(identity ^ self._target), self._seen.get(number)
        if state is not None:
            if state == DOWN and referrer is not None:
                self._hint(referrer, node)
            elif state == PENDING and referrer is not None:
                self._referrers[number].append(referrer)
            return is_closer
        if is_closer:
            self._seen[number], self._referrers[number] = PENDING, [] if referrer is None else [referrer]
            self._pending.append((node, depth))
        return is_closer

    def _read_more(self) -> None:
        while self._in_flight < CONCURRENCY + self._slow and self._pending:
            node, depth = self._pending.pop()
            if self._is_closer(node[0] ^ self._target):
                self._in_flight += 1
                self._send(_Request(node, depth))
        is_idle = self._in_flight == 0 or (self._slow == self._in_flight and len(self._closest) >= K)
        self._is_over = not self._pending and is_idle

    def _send(self, request: _Request) -> None:
        self.answer.sent += 1
        number = request.node[1]
        if self._net.nodes[number].is_alive and not self._net.is_lost():
            self._at(self._net.round_trip(self._asker, number), request, is_reply=True)
        self._at(TIMEOUT, request, is_reply=False)

    def _at(self, seconds: float, request: _Request, *, is_reply: bool) -> None:
        self._count += 1
        heapq.heappush(self._events, (self._now + seconds, self._count, is_reply, request))

    def _cycled(self, request: _Request) -> None:
        if request.sent > QUERY_RETRIES:
            self._ended(request, DOWN)
            self._own.forget(*request.node)
            for referrer in self._referrers[request.node[1]]:
                self._hint(referrer, request.node)
        else:
            if not request.is_slow:
                request.is_slow = True
                self._slow += 1
            request.sent += 1
            self._send(request)
        self._read_more()

    def _ended(self, request: _Request, state: int) -> None:
        self._in_flight -= 1
        self._slow -= request.is_slow
        request.is_over, self._seen[request.node[1]] = True, state

    def _hint(self, referrer: int, down: tuple[int, int]) -> None:
        """It pings that one, and finds that it is so."""
        self.answer.hints += 1
        self._net.nodes[referrer].forget(*down)

    def _replied(self, request: _Request) -> None:
        self._ended(request, DONE)
        identity, number = request.node
        other = self._net.nodes[number]
        self._own.learn(identity, number)
        if not self._own.is_ephemeral:
            other.learn(self._own.id, self._asker)
        if self.answer.found_after is None and self._target in other.stored:
            self.answer.found_after = self._now
        if self._is_closer(identity ^ self._target):
            insort(self._closest, (identity ^ self._target, number, request.depth))
            del self._closest[K:]
        for node in other.closest(self._target):
            if node[1] != self._asker and not self._add(node, number, request.depth + 1):
                break
        self._read_more()

    def _commit(self) -> None:
        """To all of the closest at once; who dies meanwhile is left out."""
        begun, ends = self._now, [self._now]
        for _, number, _ in self._closest:
            for attempt in range(1 + COMMIT_RETRIES):
                self.answer.sent += 1
                if not self._net.is_lost():
                    self._net.nodes[number].stored.add(self._target)
                    self.answer.stored += 1
                    ends.append(begun + attempt * TIMEOUT + self._net.round_trip(self._asker, number))
                    break
            else:
                ends.append(begun + (1 + COMMIT_RETRIES) * TIMEOUT)
        self._now = max(ends)
        self.answer.rounds += 1


def rows(counts: Sequence[int], options: DhtOptions, seed: str) -> Iterator[dict[str, object]]:
    """A row for each size of the network."""
    for count in counts:
        network = Network(count, options, seed)
        network.kill()
        topics = [network.random.getrandbits(ID_BITS) for _ in range(options.topics)]
        labs = [network.random.choice(range(BOOTSTRAPS, count)) for _ in range(2 * options.topics)]
        announced = [_asked(network, *each, store=True) for each in zip(labs, topics, strict=False)]
        network.kill()
        found = [_asked(network, *each, store=False) for each in zip(labs[options.topics :], topics, strict=True)]
        yield {"nodes": count, "announce": _figures(announced), "lookup": _figures(found)}


def _asked(network: Network, asker: int, topic: int, *, store: bool) -> Answer:
    network.nodes[asker].is_alive = True
    network.asker(asker)
    return Query(network, asker, topic).run(store=store)


def _figures(answers: Sequence[Answer]) -> dict[str, float]:
    firsts = [each.found_after for each in answers if each.found_after is not None]
    return {
        "sent": statistics.median(each.sent for each in answers),
        "sent, 95 of 100": _most(each.sent for each in answers),
        "hints": statistics.mean(each.hints for each in answers),
        "rounds": statistics.mean(each.rounds for each in answers),
        "seconds": statistics.median(each.seconds for each in answers),
        "seconds, 95 of 100": _most(each.seconds for each in answers),
        "stored": statistics.mean(each.stored for each in answers),
        "found": len(firsts) / len(answers),
        "first after": statistics.median(firsts) if firsts else 0.0,
    }


def _most(values: Iterator[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
