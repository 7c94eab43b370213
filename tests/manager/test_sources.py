"""From whom each blob comes: rarest first, the quick ones more, the slow ones asked twice, the liars never again."""

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.manager.peering.sources import Sources
from tether.swarm.wire.bandwidth import TokenBucket

BLOB = 4 << 20
ME = "me"


def everything(count):
    return [True] * count


def test_what_few_have_is_asked_for_first_and_what_nobody_has_not_at_all():
    sources = Sources(4, ME, "v")
    sources.joined("a", [True, True, True, False], 0.0)
    sources.joined("b", [True, False, True, False], 0.0)
    sources.joined("c", [True, False, False, False], 0.0)
    assert sources.order(range(4)) == [1, 2, 0]
    assert sources.lacking(range(4)) == [3]
    sources.gained("c", [1, 1, 99, -1], 1.0)
    sources.left("a")
    assert sources.order(range(4)) == [*sources.order([1, 2]), 0]


@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), max_size=5))
def test_the_order_is_that_of_how_many_have_it(bitmaps):
    sources = Sources(12, ME, "v")
    for number, bits in enumerate(bitmaps):
        sources.joined(f"p{number}", bits, 0.0)
    counts = [sum(bits[index] for bits in bitmaps) for index in range(12)]
    order = sources.order(range(12))
    assert sorted(order) == [index for index in range(12) if counts[index]]
    assert [counts[index] for index in order] == sorted(counts[index] for index in order)


def test_everybody_has_another_order_among_equals_and_the_same_each_time():
    orders = []
    for own in ("a", "b", "a"):
        sources = Sources(50, own, "v")
        sources.joined("origin", everything(50), 0.0)
        orders.append(sources.order(range(50)))
    assert orders[0] == orders[2] != orders[1]


def test_who_says_again_what_it_has_is_counted_once():
    sources = Sources(3, ME, "v")
    for bits in ([True, False, False], [False, True, True], [False, True, True]):
        sources.joined("a", bits, 0.0)
    assert list(sources._available) == [0, 1, 1]
    sources.left("a")
    sources.left("a")
    assert list(sources._available) == [0, 0, 0]


@pytest.mark.parametrize("bits", [[], [True], [True] * 4, [True] * 100_000])
def test_a_bitmap_of_another_length_says_nothing(bits):
    sources = Sources(3, ME, "v")
    sources.joined("a", bits, 0.0)
    assert sources.order(range(3)) == []


def test_the_first_wrong_blob_is_the_last():
    sources = Sources(3, ME, "v")
    sources.joined("liar", everything(3), 0.0)
    asked = [asking.index for asking in sources.next(range(3), [BLOB] * 3, 0.0)]
    assert sorted(sources.lied("liar")) == sorted(asked)
    sources.joined("liar", everything(3), 1.0)
    assert sources.liars == {"liar"}
    assert sources.next(range(3), [BLOB] * 3, 1.0) == []


def test_what_a_peer_has_is_the_downloads_own_and_no_callers_array():
    bits, sources = np.array([True, False, False]), Sources(3, ME, "v")
    for name in ("a", "b"):
        sources.joined(name, bits, 0.0)
    sources.gained("a", [1], 0.0)
    bits[2] = True
    assert list(sources._available) == [2, 1, 0]
    assert list(bits) == [True, False, True]
    sources.left("a")
    sources.left("b")
    assert list(sources._available) == [0, 0, 0]


def test_of_thousands_of_blobs_those_that_are_others_to_ask_for_are_not_gone_through_each_time(monkeypatch):
    count, tried = 5000, []
    sources = Sources(count, ME, "v")
    sources.joined("origin", everything(count), 0.0, is_origin=True)
    for number in range(8):
        sources.joined(f"p{number}", [False] * count, 0.0)
    sizes, ask = [BLOB] * count, sources.ask
    monkeypatch.setattr(sources, "ask", lambda *blob: tried.append(blob) or ask(*blob))
    asked = [asking.index for asking in sources.next(range(count), sizes, 0.0)]
    sources.arrived("origin", asked[0], 0.1)
    sources.next([index for index in range(count) if index not in asked], sizes, 0.1)
    assert 0 < len(tried) < 50


def test_of_thousands_of_blobs_that_others_have_none_is_gone_through_for_the_origin_that_has_nothing_to_do(monkeypatch):
    count, tried = 5000, []
    sources, sizes = Sources(count, ME, "v"), [BLOB] * count
    sources.joined("origin", everything(count), 0.0, is_origin=True)
    for number in range(8):
        sources.joined(f"p{number}", everything(count), 0.0)
    asked = sources.next(range(count), sizes, 0.0)
    sources.arrived(asked[0].peer, asked[0].index, 0.1)
    ask = sources.ask
    monkeypatch.setattr(sources, "ask", lambda *blob: tried.append(blob) or ask(*blob))
    more = sources.next([index for index in range(count) if index not in {asking.index for asking in asked}], sizes, 0.1)
    assert {asking.peer for asking in more} == {asked[0].peer}
    assert 0 < len(tried) < 50


@given(
    st.lists(st.tuples(st.lists(st.booleans(), min_size=12, max_size=12), st.sampled_from([1e3, 1e6, 3e6, 8e6, 1e8])), max_size=5),
    st.sampled_from([1e5, 2e6, 8e6, 1e8]),
    st.integers(0, 8),
    st.sampled_from([0.5, 3.0]),
)
def test_what_is_not_gone_through_would_not_have_been_asked_for(others, origins_rate, asked, now):
    made = []
    for is_filtered in (True, False):
        sources = Sources(12, ME, "v")
        sources.joined("origin", everything(12), 0.0, is_origin=True)
        for number, (bits, rate) in enumerate(others):
            sources.joined(f"p{number}", bits, 0.0)
            sources._peers[f"p{number}"].rate = rate
        sources._peers["origin"].rate = origins_rate
        busy = {index for index in range(asked) if sources.ask(index, BLOB, 0.0)}
        if not is_filtered:
            sources._askable = lambda *_: (np.ones(12, bool), np.ones(12, bool))
        made.append(sources.next([index for index in range(12) if index not in busy], [BLOB] * 12, now))
    assert made[0] == made[1]


def test_a_peer_that_claims_what_it_lacks_is_not_asked_for_it_again():
    sources = Sources(1, ME, "v")
    sources.joined("a", [True], 0.0)
    assert sources.ask(0, BLOB, 0.0).peer == "a"
    sources.absent("a", 0)
    assert sources.ask(0, BLOB, 0.1) is None
    assert sources.lacking([0]) == [0]


def test_who_fails_rests_longer_each_time():
    sources = Sources(1, ME, "v")
    sources.joined("a", [True], 0.0)
    now, rests = 0.0, []
    for _ in range(6):
        assert sources.ask(0, BLOB, now) is not None
        sources.failed("a", 0, now)
        start = now
        while sources.ask(0, BLOB, now) is None:
            now += 0.05
        sources._release("a", 0)
        rests.append(round(now - start, 1))
    assert rests == sorted(rests)
    assert rests[-1] > 5


def test_a_peer_at_one_byte_a_second_costs_two_seconds_and_then_little():
    sources = Sources(10, ME, "v")
    for name in ("slow", "quick"):
        sources.joined(name, everything(10), 0.0)
    asked = {asking.index: asking.peer for asking in sources.next(range(10), [BLOB] * 10, 0.0)}
    (stuck,) = [index for index, peer in asked.items() if peer == "slow"]
    for index in [index for index, peer in asked.items() if peer == "quick"]:
        sources.arrived("quick", index, 0.1)
    assert sources.stalled(1.9) == []
    assert sources.stalled(2.1) == [stuck]
    assert sources.ask(stuck, BLOB, 2.1).peer == "quick"
    assert sources.ask(stuck, BLOB, 2.1) is None  # both are asked
    assert sources.arrived("quick", stuck, 2.2) == ["slow"]
    assert sources.peers["quick"] > 4 * sources.peers["slow"]
    assert [sources.ask(index, BLOB, 2.3).peer for index in range(1, 3)] == ["quick", "quick"]


def test_a_connection_that_is_lost_with_much_on_it_is_one_failure():
    sources = Sources(8, ME, "v")
    sources.joined("a", everything(8), 0.0)
    for index in range(8):
        sources.ask(index, 1000, 0.0)
    for index in range(8):
        sources.failed("a", index, 1.0)
    assert sources.ask(0, 1000, 1.05) is None
    assert sources.ask(0, 1000, 1.2).peer == "a"


def test_the_cap_on_what_comes_in_is_that_of_all_downloads_together():
    cap = TokenBucket(1e6, burst_nbytes=1_000_000)
    one, other = (Sources(8, ME, version, cap) for version in "ab")
    waits = []
    for number, sources in enumerate((one, other) * 4):
        sources.joined(f"p{number}", everything(8), 0.0)
        waits.append(sources.ask(number, 1_000_000, 0.0).wait)
    assert waits == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])


def parts(count, *others):
    """Of blobs that only the origin has: mine, and those of `others`, by whose lots are lowest."""
    lots = {name: Sources(count, name, "v")._lots for name in (ME, *others)}
    lowest = [min(lots, key=lambda name: lots[name][index]) for index in range(count)]
    return [[index for index in range(count) if lowest[index] == name] for name in (ME, *others)]


def asked_of(sources, count, now, nbytes=BLOB):
    return sorted(asking.index for asking in sources.next(range(count), [nbytes] * count, now))


def with_origin(count):
    sources = Sources(count, ME, "v")
    sources.joined("origin", everything(count), 0.0, is_origin=True)
    sources._peers["origin"].rate = 1e9  # so that there is room for all
    return sources


def with_the_part_of_another():
    """A version of one blob, which another one who fetches it, too, is to ask the origin for."""
    lucky, own = sorted("ab", key=lambda name: Sources(1, name, "v")._lots[0])
    sources = Sources(1, own, "v")
    sources.joined("origin", [True], 0.0, is_origin=True)
    sources.joined(lucky, [False], 0.0)
    return sources


def test_who_is_being_connected_to_has_a_part_of_what_the_origin_sends():
    mine, theirs = parts(4, "a")
    sources = with_origin(4)
    sources.expected(["a"], 0.0)
    assert asked_of(sources, 4, 0.0) == mine
    assert sources.next(theirs, [BLOB] * 4, 2.9) == []
    assert asked_of(sources, 4, 3.1) == theirs


def test_who_does_not_come_has_none():
    sources = with_origin(4)
    sources.expected(["a"], 0.0)
    sources.left("a")
    assert asked_of(sources, 4, 0.0) == [0, 1, 2, 3]


def test_who_has_nothing_to_do_leaves_others_their_part_for_about_as_long_as_it_takes():
    sources = with_the_part_of_another()
    assert [bool(sources.next([0], [BLOB], now)) for now in (0.0, 1.0, 1.1)] == [False, False, True]


def test_a_small_blob_is_not_waited_for():
    sources = with_the_part_of_another()
    assert [bool(sources.next([0], [4096], now)) for now in (0.0, 0.01)] == [False, True]


def test_another_one_is_asked_later_where_all_take_long():
    sources = Sources(3, ME, "v")
    for name in ("slow", "slower"):
        sources.joined(name, everything(3), 0.0)
    asked = [sources.ask(index, BLOB, 0.0) for index in range(2)]
    assert {asking.peer for asking in asked} == {"slow", "slower"}
    (first,) = [asking.index for asking in asked if asking.peer == "slow"]
    sources.arrived("slow", first, 1.5)
    assert sources.stalled(2.5) == []
    assert sources.stalled(6.1) == [1 - first]


CALLS = {
    "join": lambda sources, peer, _, now, bits: sources.joined(peer, bits, now, is_origin=peer == "origin"),
    "gain": lambda sources, peer, index, now, _: sources.gained(peer, [index], now),
    "expect": lambda sources, peer, _, now, __: sources.expected([peer], now),
    "leave": lambda sources, peer, *_: sources.left(peer),
    "next": lambda sources, _peer, _index, now, _bits: sources.next(range(6), [BLOB] * 6, now),
    "arrive": lambda sources, peer, index, now, _: sources.arrived(peer, index, now),
    "absent": lambda sources, peer, index, *_: sources.absent(peer, index),
    "fail": lambda sources, peer, index, now, _: sources.failed(peer, index, now),
    "lie": lambda sources, peer, *_: sources.lied(peer),
    "stall": lambda sources, _peer, _index, now, _bits: sources.stalled(now),
}
calls = st.tuples(
    st.sampled_from(sorted(CALLS)),
    st.sampled_from(["a", "b", "origin"]),
    st.integers(0, 5),
    st.floats(0, 3),
    st.lists(st.booleans(), min_size=6, max_size=6),
)


@given(st.lists(calls, max_size=40))
def test_whatever_happens_the_sums_stay_right(made):
    sources, now = Sources(6, ME, "v"), 0.0
    for call, peer, index, passed, bits in made:
        now += passed
        came = CALLS[call](sources, peer, index, now, bits)
        for asking in came if call == "next" else ():
            assert asking.peer not in sources.liars
            assert sources._peers[asking.peer].has[asking.index]
        total = sum((known.has.astype(int) for known in sources._peers.values()), np.zeros(6, int))
        assert list(sources._available) == list(total)
        for known in sources._peers.values():
            assert known.nbytes == sum(nbytes for nbytes, _ in known.asked.values())
            assert known.rate > 0


# --- many who fetch at once, simulated: a line of 100 MB/s each, what is had is told 20 ms later


class Swarm:
    def __init__(self, labs, count, *, slow=()):
        self.names, self.count = [f"lab-{number}" for number in range(labs)], count
        self.sources = {name: Sources(count, name, "v") for name in self.names}
        self.have = {name: set() for name in self.names}
        self.asked = {name: set() for name in self.names}
        self.slow = set(slow)
        self.free = dict.fromkeys(["origin", *self.names], 0.0)
        self.sent = dict.fromkeys(self.free, 0)
        self.events, self.numbers = [], itertools.count()
        for name in self.names:
            self.sources[name].joined("origin", everything(count), 0.0, is_origin=True)
            for other in self.names:
                if other != name:
                    self.sources[name].joined(other, [False] * count, 0.0)
            self.at(0.0, self.tick, name)

    def at(self, time, work, *arguments):
        heapq.heappush(self.events, (time, next(self.numbers), work, arguments))

    def run(self):
        now = 0.0
        while any(len(have) < self.count for have in self.have.values()):
            now, _, work, arguments = heapq.heappop(self.events)
            work(now, *arguments)
        return now

    def tick(self, now, name):
        for index in self.sources[name].stalled(now):
            self.send(now, name, self.sources[name].ask(index, BLOB, now))
        self.pump(now, name)
        self.at(now + 0.1, self.tick, name)

    def pump(self, now, name):
        missing = [index for index in range(self.count) if index not in self.have[name] and index not in self.asked[name]]
        for asking in self.sources[name].next(missing, [BLOB] * self.count, now):
            self.asked[name].add(asking.index)
            self.send(now, name, asking)

    def send(self, now, name, asking):
        if asking is not None:
            peer = asking.peer
            self.free[peer] = max(self.free[peer], now) + BLOB / (1e5 if peer in self.slow else 1e8)
            self.sent[peer] += 1
            self.at(self.free[peer], self.come, name, peer, asking.index)

    def come(self, now, name, peer, index):
        if index in self.have[name]:
            return
        self.sources[name].arrived(peer, index, now)
        self.have[name].add(index)
        for other in self.names:
            if other != name:
                self.at(now + 0.02, lambda now, other: self.sources[other].gained(name, [index], now), other)
        self.pump(now, name)


@pytest.mark.parametrize("labs", [1, 2, 8])
def test_the_origin_sends_little_more_than_one_copy_however_many_fetch(labs, measured):
    swarm = Swarm(labs, 128)
    seconds = swarm.run()
    ratio, line = swarm.sent["origin"] / 128, 128 * BLOB / 1e8
    measured(
        f"{labs} labs fetch 512 MiB at once: the origin sends {ratio:.2f} copies, {seconds / line:.2f} times as long as its line takes"
    )
    assert ratio <= 1.1
    assert seconds < 1.6 * line


def test_so_it_is_where_each_fetches_one_blob_of_it():
    swarm = Swarm(8, 8)
    seconds = swarm.run()
    assert swarm.sent["origin"] == 8
    assert seconds < 2.5 * 8 * BLOB / 1e8


def test_a_lab_with_a_slow_line_holds_the_others_up_little(measured):
    swarm = Swarm(6, 64, slow={"lab-0"})
    seconds = swarm.run()
    measured(f"one of six with a thousandth of the speed: {seconds / (64 * BLOB / 1e8):.2f} times as long as the origin's line takes")
    assert seconds < 5 * (64 * BLOB / 1e8)
    assert swarm.sent["origin"] <= 1.6 * 64
