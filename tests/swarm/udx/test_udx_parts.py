"""The pure parts of a stream, each against a plain model of itself."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.swarm.udx.congestion import Congestion
from tether.swarm.udx.flight import Batch, Flight
from tether.swarm.udx.loss import LossDetector, RoundTrip
from tether.swarm.udx.mtu import PathMtu
from tether.swarm.udx.outbox import Outbox
from tether.swarm.udx.ranges import Ranges
from tether.swarm.udx.receiving import WINDOW_NBYTES, Receiver

SPAN = st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda drawn: (drawn[0], drawn[0] + drawn[1]))


@given(st.lists(st.one_of(SPAN, st.integers(0, 80)), max_size=30), SPAN)
def test_ranges_are_a_set_of_numbers(steps, asked):
    ranges, model = Ranges(), set()
    for step in steps:
        if isinstance(step, int):
            gone = {number for number in model if number < step}
            assert ranges.trim(step) == len(gone)
            model -= gone
        else:
            new = set(range(*step)) - model
            assert {number for part in ranges.add(*step) for number in range(*part)} == new
            model |= new
    assert {number for part in ranges for number in range(*part)} == model
    assert ranges.count == len(model)
    assert all(before[1] < after[0] for before, after in zip(ranges, list(ranges)[1:], strict=False))
    assert {number for part in ranges.gaps(*asked) for number in range(*part)} == set(range(*asked)) - model
    for number in range(*asked):
        assert (number in ranges) == (number in model)
        assert ranges.last_gap(number) == next(each for each in range(number, -2, -1) if each not in model)
    if model:
        assert (ranges.first, ranges.end) == (min(model), max(model) + 1)
        every = list(ranges)
        assert sorted(ranges.slice(len(every) - 1, len(every))) == every


@given(st.lists(st.binary(min_size=1, max_size=40)), st.lists(st.integers(1, 60)))
def test_an_outbox_gives_the_bytes_in_order_whatever_their_sizes(written, sizes):
    outbox, taken = Outbox(), []
    for piece in written:
        outbox.put(piece)
    for size in sizes:
        if not outbox.nbytes:
            break
        taken.append(bytes(outbox.take(size)))
        assert len(taken[-1]) <= size
    assert b"".join(taken) == b"".join(written)[: sum(map(len, taken))]
    assert outbox.nbytes == sum(map(len, written)) - sum(map(len, taken))


def test_a_large_piece_is_not_joined_to_the_beginning_of_the_next_one():
    outbox, piece = Outbox(), bytes(60_000)
    outbox.put(piece)
    outbox.put(b"more")
    assert outbox.take(63_000) is piece
    assert outbox.take(63_000) == b"more"


def test_large_runs_are_delivered_as_they_came_and_small_ones_as_one_piece():
    receiver, runs = Receiver(), [bytes(44 * 1452), bytes(22 * 1452)]
    receiver.accept_run(0, 44, runs[0])
    receiver.accept_run(44, 22, runs[1])
    assert [piece is run for piece, run in zip(receiver.take(), runs, strict=True)] == [True, True]
    for seq in range(66, 70):
        receiver.accept(seq, b"small")
    assert receiver.take() == [b"small" * 4]
    assert receiver.nbytes == 0


@given(st.integers(1, 40), st.integers(), st.booleans())
def test_packets_in_any_order_and_number_give_the_stream_once(count, seed, batched):
    order = random.Random(str(seed))
    packets = [random.Random(f"{count} {index}").randbytes(3 if batched else index % 7 + 1) for index in range(count)]
    receiver, got = Receiver(first=5), b""
    while not receiver.is_ended:
        start = order.randrange(count + 1)
        if start == count:
            receiver.accept(5 + count, b"", end=True)
        elif batched:
            some = packets[start : start + order.randrange(1, 9)]
            receiver.accept_run(5 + start, len(some), b"".join(some))
        else:
            receiver.accept(5 + start, packets[start])
        if receiver.is_ready and order.random() < 0.5:
            got += b"".join(receiver.take())
        assert receiver.window() == WINDOW_NBYTES - receiver.nbytes
    assert got + b"".join(receiver.take()) == b"".join(packets)
    assert receiver.nbytes == 0
    assert not receiver.blocks()
    assert not receiver.accept(6 + count, b"behind the end")


def test_memory_of_a_receiver_is_bounded_whatever_is_sent():
    receiver = Receiver(limit=100_000)
    for seq in range(1, 60_000, 2):
        receiver.accept(seq, bytes(1400))
    assert receiver.nbytes <= 100_000 + (1 << 16)
    assert receiver.window() == 0
    small = Receiver()
    for seq in range(1, 200_000, 2):
        small.accept(seq, b"xy")
    assert small.nbytes <= 2 * 16_384
    assert not small.accept(1 << 31, b"far ahead")
    flood = Receiver()
    for seq in range(50_000):
        flood.accept(seq, b"xy")
    assert len(flood._ready) <= 4097


def test_more_holes_than_an_ack_has_room_for_are_told_in_turns():
    receiver = Receiver()
    for seq in range(1, 401, 2):
        receiver.accept(seq, b"x")
    told = [receiver.blocks() for _ in range(4)]
    assert {len(each) for each in told} == {50}
    assert {block for each in told for block in each} == {(seq, seq + 1) for seq in range(1, 401, 2)}


class Path:
    """Carries packets up to a size; tells the search what came of its probes."""

    def __init__(self, mtu, limit):
        self.mtu, self.limit, self.now, self.probes = mtu, limit, 0.0, 0

    def search(self):
        while padding := self.mtu.padding(self.now):
            assert padding <= 255
            self.probes += 1
            size = self.mtu.size + padding
            self.mtu.sent(padding)
            if size <= self.limit:
                self.mtu.passed()
            else:
                self.mtu.lost()


@pytest.mark.parametrize("limit", [1200, 1201, 1280, 1392, 1420, 1454, 1455, 1456, 1492, 1499, 1500, 9000])
def test_the_search_finds_what_the_path_carries(limit):
    path = Path(PathMtu(48), limit)
    path.search()
    assert min(limit, 1500) - 16 <= path.mtu.size <= min(limit, 1500)
    assert path.probes <= 20
    path.limit, path.now = 1500, 700.0
    path.search()
    assert path.mtu.size == 1500


def test_a_black_hole_leads_back_to_the_base_and_is_tried_again_later():
    path = Path(PathMtu(48), 1500)
    path.search()
    path.mtu.shrink(100.0)
    path.mtu.passed()  # of a probe that was on its way
    assert path.mtu.size == 1200
    path.now = 130.0
    assert path.mtu.padding(path.now) == 0
    path.now, path.limit = 161.0, 1300
    path.search()
    assert 1284 <= path.mtu.size <= 1300


def flight_of(*counts, at=0.0):
    """A flight of batches of so many packets of 100 bytes, a second apart."""
    flight = Flight()
    for count in counts:
        batch = Batch(flight.next, count, bytearray(120 * count), None, at)
        batch.nbytes, batch.payload_nbytes, batch.data_nbytes = 120, 100, 100 * count
        flight.add(batch)
        at += 1.0
    return flight


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.lists(st.tuples(st.integers(-3, 80), st.lists(SPAN, max_size=3)), max_size=12)
)
def test_acks_of_any_kind_count_each_packet_once(counts, acks):
    flight = flight_of(*counts)
    end, delivered, data_nbytes, model = flight.next, 0, 0, set()
    for ack, blocks in acks:
        ack = min(max(ack, flight.una), end)  # noqa: PLW2901  # as the sender clips it
        found = flight.acknowledge(ack, blocks, 1.0, 100.0)
        valid = [block for block in blocks if flight.una <= block[0] and block[1] <= end]
        new = (set(range(ack)) | {number for block in valid for number in range(*block)}) - model
        model |= new
        assert found.count == len(new)
        delivered, data_nbytes = delivered + found.count, data_nbytes + found.data_nbytes
        assert data_nbytes == 100 * flight.una
        assert flight.count == end - len(model)
    assert delivered == len(model)


def test_loss_is_told_from_later_packets_that_came():
    flight, losses, trip = flight_of(1, 1, 1, 1, 1), LossDetector(), RoundTrip()
    trip.sample(0.1)
    losses.observe(flight.acknowledge(1, [], trip.shortest, 0.1), 0.1)
    assert losses.find(flight, trip, 0.1) == ([], 0.0)
    found = flight.acknowledge(1, [(3, 4)], trip.shortest, 3.1)
    losses.observe(found, 3.1)
    lost, wait = losses.find(flight, trip, 3.1)
    assert (lost, wait) == ([1, 2], 0.0)


def test_reordering_that_was_seen_is_waited_for():
    flight, losses, trip = flight_of(1, 1, 1), LossDetector(), RoundTrip()
    trip.sample(2.0)
    losses.observe(flight.acknowledge(0, [(1, 2)], trip.shortest, 3.0), 3.0)
    lost, wait = losses.find(flight, trip, 3.0)
    assert lost == [0]  # sent a second before one that came, and a quarter of the round trip is over
    losses.observe(flight.acknowledge(1, [], trip.shortest, 3.1), 3.1)
    late = flight_of(1, 1, at=2.6)
    late.batches[1].sent_at = 2.7
    late.highest = 1
    losses.observe(late.acknowledge(0, [(1, 2)], trip.shortest, 4.7), 4.7)
    lost, wait = losses.find(late, trip, 4.7)
    assert lost == []
    assert 0 < wait <= 0.5


def test_the_timeout_follows_rfc_6298_and_a_laptop_s_sleep_does_not_spoil_it():
    trip = RoundTrip()
    assert trip.timeout == 1.0
    trip.sample(0.1)
    assert trip.timeout == 1.0
    assert trip.smoothed == pytest.approx(0.1)
    for _ in range(50):
        trip.sample(2.0)
    assert 2.0 < trip.timeout < 5.0
    trip.sample(3600.0)
    assert trip.timeout < 10.0


def test_pace_is_kept_over_time_and_missed_ticks_are_made_up_for_only_when_pace_held_back():
    congestion = Congestion(0.0)
    congestion._pace, congestion._filled_at = 1000.0, 0.0
    sent, now = 0, 0.0
    while now < 1.0:
        allowed = congestion.allowance(now)
        sent += allowed
        congestion._tokens -= allowed
        now = max(congestion.release_at(now), now + 0.001)
    assert 950 <= sent <= 1050
    congestion.allowance(now)
    assert congestion.allowance(now + 5.0) <= 10
