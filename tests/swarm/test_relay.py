"""A blind relay: who is joined to whom, what it costs at most, who is told of an end. With npm's package on either side: test_nat.py."""

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from relay_parties import SECONDS, TOKEN, Meeting, until
from structlog.testing import capture_logs

from tether.errors import ProtocolError, QueueFullError
from tether.swarm.relaying.pairs import PROTOCOL, End, Pairs, RelayLimits, Wish, pair_message, read_pair, read_unpair
from tether.swarm.relaying.relay import Relay, is_relaying
from tether.swarm.wire.line import Line

OTHER = bytes(32)
ANNA, BERT, CORA = "aa" * 32, "bb" * 32, "cc" * 32
DATA = bytes(range(256)) * 4096


def end(peer, asking, *, is_initiator=False):
    return End(peer, asking, is_initiator, asking * 100)


class TestPairs:
    def test_two_that_name_one_token_are_joined_the_initiator_first(self):
        pairs = Pairs(RelayLimits())
        assert pairs.ask(TOKEN, end(ANNA, 1), 0.0) is None
        assert pairs.ask(OTHER, end(CORA, 3, is_initiator=True), 0.0) is None
        assert pairs.ask(TOKEN, end(BERT, 2, is_initiator=True), 0.0) == (end(BERT, 2, is_initiator=True), end(ANNA, 1))
        assert (len(pairs), pairs.waiting) == (1, 1)

    def test_a_third_one_and_two_of_one_kind_are_passed_over(self):
        pairs = Pairs(RelayLimits())
        pairs.ask(TOKEN, end(ANNA, 1), 0.0)
        assert pairs.ask(TOKEN, end(BERT, 2), 0.0) is None
        pairs.ask(TOKEN, end(BERT, 2, is_initiator=True), 0.0)
        assert pairs.ask(TOKEN, end(CORA, 3), 0.0) is None
        assert (len(pairs), pairs.waiting) == (1, 0)

    def test_a_peer_has_so_many_ends_and_all_together_so_many_pairs(self):
        pairs = Pairs(RelayLimits(max_pairs=1, max_ends=2))
        for number in range(2):
            pairs.ask(bytes([number]) * 32, end(ANNA, 1), 0.0)
        with pytest.raises(QueueFullError, match="this peer"):
            pairs.ask(TOKEN, end(ANNA, 1), 0.0)
        assert pairs.ask(bytes(32), end(BERT, 2, is_initiator=True), 0.0) is not None
        with pytest.raises(QueueFullError, match="another relay"):
            pairs.ask(bytes([1]) * 32, end(BERT, 2, is_initiator=True), 0.0)
        assert pairs.leave(1) == [bytes(32)]
        assert pairs.ask(TOKEN, end(ANNA, 1), 0.0) is None

    def test_only_who_is_part_of_it_withdraws(self):
        pairs = Pairs(RelayLimits())
        pairs.ask(TOKEN, end(ANNA, 1), 0.0)
        assert not pairs.withdraw(TOKEN, 2)
        assert pairs.waiting == 1
        pairs.ask(TOKEN, end(BERT, 2, is_initiator=True), 0.0)
        assert not pairs.withdraw(TOKEN, 3)
        assert pairs.withdraw(TOKEN, 1)
        assert len(pairs) == 0

    def test_waiting_and_lasting_have_an_end(self):
        pairs = Pairs(RelayLimits(patience=5.0, seconds=50.0))
        pairs.ask(OTHER, end(CORA, 3), 0.0)
        pairs.ask(TOKEN, end(ANNA, 1), 0.0)
        pairs.ask(TOKEN, end(BERT, 2, is_initiator=True), 1.0)
        assert pairs.expire(4.9) == []
        assert pairs.waiting == 1
        assert pairs.expire(5.0) == []
        assert pairs.waiting == 0
        assert pairs.expire(51.0) == [TOKEN]
        assert pairs.ask(TOKEN, end(ANNA, 1), 51.0) is None

    @given(st.lists(st.tuples(st.sampled_from("awle"), st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=40))
    def test_whatever_happens_the_bounds_hold_and_nothing_is_left_behind(self, deeds):
        pairs = Pairs(RelayLimits(max_pairs=2, max_ends=2, patience=3.0, seconds=9.0))
        for now, (deed, token, asking, is_initiator) in enumerate(deeds):
            match deed:
                case "a":
                    with contextlib.suppress(QueueFullError):
                        pairs.ask(bytes([token]) * 32, end("abc"[asking] * 64, asking, is_initiator=is_initiator), now)
                case "w":
                    pairs.withdraw(bytes([token]) * 32, asking)
                case "l":
                    pairs.leave(asking)
                case "e":
                    pairs.expire(now)
            assert len(pairs) <= 2
            assert all(0 < count <= 2 for count in pairs._ends.values())
            assert pairs._ends.total() == 2 * len(pairs) + pairs.waiting
        pairs.expire(1000.0)
        assert (len(pairs), pairs.waiting, pairs._ends.total()) == (0, 0, 0)


class TestWire:
    @given(st.booleans(), st.binary(min_size=32, max_size=32), st.integers(0, (1 << 32) - 1))
    def test_a_pairing_comes_back(self, is_initiator, token, stream_id):
        wish = Wish(is_initiator, token, stream_id)
        assert read_pair(memoryview(pair_message(wish))[1:]) == wish

    @given(st.binary(max_size=64))
    def test_garbage_is_refused_and_nothing_else_happens(self, body):
        for read in (read_pair, read_unpair):
            with contextlib.suppress(ProtocolError):
                read(memoryview(body))

    def test_no_stream_has_more_than_32_bits(self):
        with pytest.raises(ProtocolError, match="32 bits"):
            read_pair(memoryview(pair_message(Wish(True, TOKEN, 1 << 32)))[1:])


@pytest.fixture
async def relaying():
    """Makes a relay and parties that ask it."""
    meeting = Meeting()

    async def make(limits=None, admits=lambda _: True, keys=(ANNA, BERT)):
        relay = Relay(admits, limits)
        for key in keys:
            await meeting.come(key, lambda stream: relay.accept(stream, stream.carrier))
        return relay, meeting, meeting.parties

    yield make
    await meeting.aclose()


async def test_two_are_joined_and_what_passes_is_counted(relaying):
    relay, meeting, (anna, bert) = await relaying()
    await meeting.join(anna, bert)
    anna.raw.write(DATA)
    bert.raw.write(DATA[::-1])
    await until(lambda: len(anna.data) == len(bert.data) == len(DATA))
    assert (bytes(bert.data), bytes(anna.data)) == (DATA, DATA[::-1])
    status = relay.status
    assert (status.pairs, status.waiting, status.total, status.dropped_nbytes) == (1, 0, 1, 0)
    assert status.nbytes > 2 * len(DATA)
    anna.raw.destroy()
    assert await asyncio.wait_for(bert.codes.get(), SECONDS) == "ECONNRESET"
    await until(lambda: relay.status.pairs == 0)


async def test_two_that_found_a_direct_way_go_on_without_the_relay(relaying):
    relay, meeting, (anna, bert) = await relaying()
    await meeting.join(anna, bert)
    anna.raw.write(DATA)
    await until(lambda: len(bert.data) == len(DATA))
    anna.raw.change_remote(anna.socket, 1, bert.port, "127.0.0.1")
    bert.raw.change_remote(bert.socket, 1, anna.port, "127.0.0.1")
    anna.line.finish(None)
    await until(lambda: relay.status.pairs == 0)
    passed = relay.status.nbytes
    bert.raw.write(DATA)
    await until(lambda: len(anna.data) == len(DATA))
    assert relay.status.nbytes == passed


@pytest.mark.parametrize("how", ["time", "cut", "close"])
async def test_a_pair_that_the_relay_ends_is_told_on_both_sides(relaying, how):
    relay, meeting, (anna, bert) = await relaying(RelayLimits(seconds=0.5 if how == "time" else 60.0))
    await meeting.join(anna, bert)
    anna.raw.write(b"x")
    await until(lambda: bert.data == b"x")
    if how == "cut":
        relay.cut(ANNA)
    elif how == "close":
        relay.close()
    for party in (anna, bert):
        assert await asyncio.wait_for(party.codes.get(), SECONDS) == "ECONNRESET"
    assert relay.status.pairs == 0
    if how == "cut":
        await asyncio.wait_for(anna.closed.wait(), SECONDS)
        assert not bert.closed.is_set()


async def test_more_than_the_rate_is_delayed_and_then_lost_and_the_stream_lives(relaying):
    rate = 1e6
    _, meeting, (anna, bert) = await relaying(RelayLimits(nbytes_per_second=rate))
    await meeting.join(anna, bert)
    began = asyncio.get_running_loop().time()
    anna.raw.write(DATA)
    await until(lambda: len(bert.data) == len(DATA))
    assert bytes(bert.data) == DATA
    assert asyncio.get_running_loop().time() - began > 0.8 * (len(DATA) / rate - 0.1)


async def test_who_is_not_admitted_is_cut_at_once_and_who_is_no_more_is_not_joined(relaying):
    admitted = {ANNA}
    relay, meeting, (anna, bert) = await relaying(admits=lambda key: key in admitted)
    await asyncio.wait_for(bert.closed.wait(), SECONDS)
    admitted.clear()
    anna.ask(TOKEN, is_initiator=True)
    await asyncio.wait_for(anna.closed.wait(), SECONDS)
    assert meeting.heard.empty()
    assert relay.status.waiting == 0


async def test_a_peer_that_asks_for_too_much_loses_what_it_has(relaying):
    relay, _, (anna, bert) = await relaying(RelayLimits(max_ends=3))
    for number in range(4):
        anna.ask(bytes([number]) * 32, is_initiator=True)
    await asyncio.wait_for(anna.closed.wait(), SECONDS)
    assert relay.status.waiting == 0
    assert not bert.closed.is_set()


async def test_a_peer_opens_so_many_streams(relaying):
    _, _, parties = await relaying(RelayLimits(max_streams=2), keys=(ANNA, ANNA, ANNA, BERT))
    await asyncio.wait_for(parties[2].closed.wait(), SECONDS)
    assert [party.closed.is_set() for party in parties] == [False, False, True, False]


@pytest.mark.parametrize("message", [b"\x00short", b"\x07what", b"\x00" + b"\xff" * 64, b"\x01"])
async def test_who_breaks_the_protocol_is_cut_and_named(relaying, message):
    with capture_logs() as logs:
        relay, _, (anna, bert) = await relaying()
        anna.line.post(anna.channel, message)
        await asyncio.wait_for(anna.closed.wait(), SECONDS)
    assert [(entry["event"], entry["peer"]) for entry in logs] == [("peer cut", ANNA)]
    assert relay.status.waiting == 0
    assert not bert.closed.is_set()


async def test_what_a_stream_is_for_shows_in_its_first_message(relaying):
    _, _, (anna, _) = await relaying()
    mux = Line(anna.line._stream, 1).mux
    mux.open(PROTOCOL, bytes.fromhex(ANNA))
    assert is_relaying(mux.take()[0])
    mux.open("protomux-rpc", bytes.fromhex(ANNA))
    assert not is_relaying(mux.take()[0])
