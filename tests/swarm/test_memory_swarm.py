"""A swarm in memory: the contract of `Node`, what its network can be made to do, and that the contract tells a wrong one."""

import asyncio
import dataclasses

import pytest
import structlog

from tether.errors import (
    BadSignatureError,
    DeadlineExceededError,
    EngineError,
    PeerUnreachableError,
    StreamLostError,
    TetherError,
    UnsupportedError,
)
from tether.security.identity import Identity
from tether.swarm.engine.engine import EngineSettings
from tether.swarm.engine.secure import StreamLimits
from tether.swarm.node.connections import Connections
from tether.swarm.node.node import ConnectionLimits
from tether.testing import nodes
from tether.testing.memory_dht import MemoryDht, sign_record
from tether.testing.memory_lines import LineStream
from tether.testing.memory_swarm import MemorySwarm
from tether.testing.node_labs import failure, making, until

TOPIC = b"a topic." * 4
ONE, TWO = Identity(bytes(range(32))), Identity(bytes(range(1, 33)))
KIB = 1 << 10


def on(swarm, streams=None):
    """What makes labs on it."""

    def start(lab):
        settings = dataclasses.replace(lab.settings, engine=EngineSettings(limits=streams or StreamLimits()))
        return swarm.start(lab.seed, lab.service, lab.shelf, lab.standing, settings)

    return making(start)


@pytest.fixture(autouse=True)
def quiet():
    with structlog.testing.capture_logs():
        yield


@pytest.mark.parametrize("case", nodes.CASES, ids=lambda case: case.__name__)
async def test_the_contract_of_a_node(case):
    async with on(MemorySwarm()) as make:
        await case(make)


@pytest.mark.parametrize("case", nodes.CASES, ids=lambda case: case.__name__)
async def test_the_contract_of_a_node_on_a_slow_network(case):
    async with on(MemorySwarm(latency=0.005, nbytes_per_second=50_000_000)) as make:
        await case(make)


# --- a contract that a wrong network passed would say nothing


class OldestWins(MemoryDht):
    def replaces(self, record, kept):
        return record.seq < kept.seq


class LastWins(MemoryDht):
    def replaces(self, record, kept):
        return record.seq >= kept.seq


class OneRecord(MemoryDht):
    def get(self, key):
        return super().get(key) or next((record for record, _ in self._records.values()), None)


class TakesNothingBack(MemoryDht):
    def unannounce(self, topic, key):
        pass


class MixesTopics(MemoryDht):
    def announce(self, topic, key):
        super().announce(bytes(32), key)
        super().announce(topic, key)


@pytest.mark.parametrize(
    ("dht", "case"),
    [
        (OldestWins, nodes.the_newest_record_of_a_key_wins),
        (LastWins, nodes.the_newest_record_of_a_key_wins),
        (OneRecord, nodes.the_newest_record_of_a_key_wins),
        (TakesNothingBack, nodes.who_announces_is_found_until_it_takes_it_back),
        (TakesNothingBack, nodes.who_left_is_found_no_more),
        (MixesTopics, nodes.who_announces_is_found_until_it_takes_it_back),
    ],
)
async def test_a_wrong_dht_fails_the_contract(dht, case):
    async with on(MemorySwarm(dht())) as make:
        with pytest.raises(AssertionError):
            await case(make)


def _ignore(*_):
    pass


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "case"),
    [
        (Connections, "cut", _ignore, nodes.who_is_cut_has_lost_its_calls_within_a_second),
        (Connections, "sweep", _ignore, nodes.an_unknown_key_has_not_long),
        (Connections, "sweep", _ignore, nodes.what_nobody_uses_is_closed_by_who_opened_it),
        (Connections, "welcome", _ignore, nodes.an_unknown_key_may_enrol_and_little_else),
        (Connections, "_take_in", _ignore, nodes.an_unknown_key_that_says_too_much_is_cut),
        (Connections, "_live", _ignore, nodes.calls_go_both_ways_over_one_connection),
        (LineStream, "_violated", _ignore, nodes.an_unknown_key_that_says_too_much_is_cut),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
async def test_a_wrong_node_or_line_fails_the_contract(monkeypatch, owner, name, wrong, case):
    monkeypatch.setattr("tether.testing.node_labs._PATIENCE", 1.5)
    monkeypatch.setattr("tether.testing.nodes._SECONDS", 1.5)
    async with on(MemorySwarm()) as make:
        monkeypatch.setattr(owner, name, wrong)
        with pytest.raises((AssertionError, TimeoutError, TetherError)):
            await case(make)
        monkeypatch.undo()


# --- the switches


async def test_a_line_takes_its_time_and_many_messages_share_it():
    swarm, loop = MemorySwarm(), asyncio.get_running_loop()
    async with on(swarm) as make:
        one, two, three = await make("one"), await make("two"), await make("three")
        line = swarm.line(one.key, two.key)
        line.latency = 0.05
        await one.node.request(two.key, "echo")
        began = loop.time()
        await asyncio.gather(*(one.node.request(two.key, "echo", b"%d" % number) for number in range(20)))
        assert 0.1 <= loop.time() - began < 20 * 0.1
        line.nbytes_per_second = 1000 * KIB
        blobs, digest = await one.node.blobs(two.key), two.shelf.put(bytes(100 * KIB))
        began = loop.time()
        await asyncio.gather(blobs.fetch(digest, 1), one.node.request(two.key, "echo", bytes(100 * KIB)))
        assert loop.time() - began >= 0.2 + 0.1
        await one.node.request(three.key, "echo", bytes(100 * KIB))
        assert swarm.line(one.key, three.key).free_at == {}
        assert [each.round_trip for each in one.node.connections() if each.peer == two.key] == [0.1, 0.1]


async def test_two_that_cannot_reach_each_other_both_reach_a_third():
    swarm = MemorySwarm()
    async with on(swarm) as make:
        one, two, three = await make("one"), await make("two"), await make("three")
        swarm.separate(one.key, two.key)
        assert isinstance(await failure(one.node.request(two.key, "echo")), PeerUnreachableError)
        assert await one.node.request(three.key, "echo", b"there") == b"there"
        assert await two.node.request(three.key, "echo", b"there") == b"there"
        swarm.reunite(one.key, two.key)
        assert await one.node.request(two.key, "echo", b"at last") == b"at last"


async def test_a_call_outlives_a_gap_in_the_line():
    swarm = MemorySwarm()
    async with on(swarm) as make:
        one, two = await make("one"), await make("two")
        await one.node.request(two.key, "echo")
        swarm.separate(one.key, two.key)
        call = asyncio.create_task(one.node.request(two.key, "echo", b"late"))
        assert isinstance(await failure(one.node.request(two.key, "echo", b"", 0.05)), DeadlineExceededError)
        assert not call.done()
        swarm.reunite(one.key, two.key)
        assert await call == b"late"


async def test_a_node_that_is_away_is_not_heard_of_and_hears_nothing_until_it_is_back():
    swarm, back = MemorySwarm(), []
    async with on(swarm) as make:
        one, two, three = await make("one"), await make("two"), await make("three")
        two.node.on_back.append(lambda: back.append(True))
        await two.node.announce(TOPIC)
        await one.node.request(two.key, "echo")
        two.node.go_away()
        assert isinstance(await failure(one.node.request(two.key, "echo", b"", 0.05)), DeadlineExceededError)
        assert isinstance(await failure(three.node.request(two.key, "echo")), PeerUnreachableError)
        assert isinstance(await failure(two.node.request(three.key, "echo")), PeerUnreachableError)
        assert isinstance(await failure(two.node.lookup(TOPIC)), EngineError)
        assert not (await two.node.status()).announced
        assert await three.node.lookup(TOPIC) == [two.key]
        assert len(one.node.connections()) == 1
        await two.node.come_back()
        assert back == [True]
        await until(lambda: one.node.connections() == [])
        assert await one.node.request(two.key, "echo", b"again", 5.0) == b"again"
        assert await two.node.request(three.key, "echo", b"there", 5.0) == b"there"


async def test_a_peer_that_stays_away_is_given_up_and_the_call_with_it():
    async with on(MemorySwarm(), StreamLimits(idle=0.2)) as make:
        one, two = await make("one", ConnectionLimits(returning=0.0)), await make("two")
        call = asyncio.create_task(failure(one.node.request(two.key, "held")))
        await until(two.started.is_set)
        two.node.go_away()
        assert isinstance(await call, StreamLostError)
        await until(two.ended.is_set)
        assert one.node.connections() == two.node.connections() == []


async def test_one_that_was_killed_is_called_again_once_it_is_silent_here_and_there_anew():
    limits = ConnectionLimits(silence=0.2, proof=0.1)
    async with on(MemorySwarm()) as make:
        one, two = await make("one", limits), await make("two")
        await one.node.request(two.key, "echo")
        await two.node.kill()
        again = await make("two")
        assert await one.node.request(two.key, "ping", b"answered", 5.0) == b"answered"
        assert len(again.node.connections()) == 1


async def test_there_are_no_feeds_in_memory():
    async with on(MemorySwarm()) as make:
        with pytest.raises(UnsupportedError, match="testnet"):
            _ = (await make("one")).node.engine


# --- the DHT


def test_what_is_not_said_again_is_forgotten_announcements_sooner_than_records():
    now = [0.0]
    dht = MemoryDht(lambda: now[0])
    dht.announce(TOPIC, ONE.public)
    dht.put(ONE.public, sign_record(ONE, b"here", 1))
    now[0] = 600.0
    dht.announce(TOPIC, TWO.public)
    now[0] = 1199.0
    assert dht.lookup(TOPIC) == [TWO.public, ONE.public]
    now[0] = 1200.0
    assert dht.lookup(TOPIC) == [TWO.public]
    now[0] = 48 * 3600.0 - 1
    assert dht.lookup(TOPIC) == []
    assert dht.get(ONE.public).value == b"here"
    now[0] += 1
    assert dht.get(ONE.public) is None
    dht.put(ONE.public, sign_record(ONE, b"lower than what was forgotten", 0))
    assert dht.get(ONE.public).seq == 0


def test_a_record_that_its_key_did_not_sign_is_not_kept():
    dht, record = MemoryDht(), sign_record(ONE, b"here", 1)
    for forged in (dataclasses.replace(record, seq=2), dataclasses.replace(record, value=b"there"), sign_record(TWO, b"here", 1)):
        with pytest.raises(BadSignatureError):
            dht.put(ONE.public, forged)
    assert dht.get(ONE.public) is None


def test_a_lookup_finds_a_thousand_at_most():
    dht = MemoryDht()
    for number in range(1500):
        dht.announce(TOPIC, f"{number:064x}")
    assert len(dht.lookup(TOPIC)) == 1000
