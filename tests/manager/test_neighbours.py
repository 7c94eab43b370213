"""Labs find each other by what they announce: on a swarm in memory, from which they may be away."""

import asyncio
import time

import pytest
import structlog

from tether.errors import EngineError
from tether.manager.peering import neighbours
from tether.manager.peering.neighbours import Neighbours
from tether.security.access import Access
from tether.security.access_file import AccessFile
from tether.security.identity import Identity
from tether.swarm.node.standing import Standing
from tether.swarm.records.records import Capabilities, Held, sign, topic
from tether.swarm.rpc.rpc import Service
from tether.testing.memory_dht import sign_record
from tether.testing.memory_swarm import MemorySwarm
from tether.types import Digest

ONE, TWO, THREE = (Identity(bytes([number]) * 32) for number in (1, 2, 3))
PATIENCE = 10.0


@pytest.fixture
async def swarm():
    async with MemorySwarm() as swarm:
        yield swarm


@pytest.fixture
async def nodes(swarm):
    """Of ONE, TWO and THREE, by key."""
    service = Service(lambda _peer, _method: None)
    started = [await swarm.start(each.seed, service, None, lambda _: Standing.KNOWN) for each in (ONE, TWO, THREE)]
    return {node.key: node for node in started}


@pytest.fixture
def access(tmp_path):
    file = AccessFile.open(tmp_path / "access.sqlite")
    yield Access(file)
    file.close()


def held(publisher, digest="a" * 64):
    return Capabilities((Held(publisher.public, "digits", 1, Digest(digest), 10, loaded=False),), serves=True)


@pytest.fixture
def lab(nodes, access):
    def make(identity, offered=None, follows=()):
        return Neighbours(nodes[identity.public], identity, access, lambda: offered or Capabilities(), lambda key: key in follows)

    return make


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (a dictionary tells nobody)
            await asyncio.sleep(0.001)


def number(swarm, identity):
    """Of its record."""
    record = swarm.dht.get(identity.public)
    return 0 if record is None else record.seq


def write(swarm, identity, offered, seq):
    """Its record, as if it had put it there before."""
    swarm.dht.put(identity.public, sign_record(identity, sign(identity, offered, seq, time.time()), seq))


async def appeared(neighbours, swarm, identity, before=0):
    """It runs until its record is written, and it is found under the key of ONE, which it announces last."""
    running = asyncio.create_task(neighbours.run())
    await until(lambda: number(swarm, identity) > before)
    await until(lambda: identity.public in swarm.dht.lookup(topic(ONE.public)))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_who_holds_a_publishers_model_is_found_by_the_publishers_key(lab, swarm):
    await appeared(lab(TWO, held(ONE)), swarm, TWO)
    found = await lab(THREE).find(ONE.public)
    assert [(record.peer, record.serves) for record in found] == [(TWO.public, True)]
    assert await lab(THREE).holders(ONE.public, Digest("a" * 64)) == [TWO.public]
    assert await lab(THREE).holders(ONE.public, Digest("b" * 64)) == []


async def test_the_publisher_itself_is_asked_though_it_was_not_found(lab, swarm):
    write(swarm, ONE, held(ONE), 5)
    assert [record.peer for record in await lab(THREE).find(ONE.public)] == [ONE.public]


async def test_after_a_restart_the_record_is_newer_than_the_last_one(lab, swarm):
    far = 1 << 52
    write(swarm, ONE, Capabilities(), far)
    await appeared(lab(ONE), swarm, ONE, before=far)
    assert number(swarm, ONE) == far + 1


async def test_who_takes_leave_is_found_no_more(lab, swarm):
    one = lab(ONE, held(ONE))
    await appeared(one, swarm, ONE)
    assert await lab(TWO).find(ONE.public)
    await one.leave()
    assert await lab(TWO).find(ONE.public) == []
    assert swarm.dht.lookup(topic(ONE.public)) == []


async def test_who_takes_leave_is_announced_for_none_of_the_publishers_whose_models_it_had(lab, swarm):
    two = lab(TWO, held(ONE))
    await appeared(two, swarm, TWO)
    await until(lambda: all(TWO.public in swarm.dht.lookup(topic(each.public)) for each in (ONE, TWO)))
    await two.leave()
    assert [swarm.dht.lookup(topic(each.public)) for each in (ONE, TWO)] == [[], []]


async def test_who_has_no_model_of_a_publisher_any_more_is_not_announced_for_it(nodes, access, swarm, monkeypatch):
    monkeypatch.setattr(neighbours, "_SPACING", 0.01)
    offered = held(ONE)
    two = Neighbours(nodes[TWO.public], TWO, access, lambda: offered, lambda _: False)
    running = asyncio.create_task(two.run())
    await until(lambda: TWO.public in swarm.dht.lookup(topic(ONE.public)))
    offered = Capabilities()
    two.changed()
    await until(lambda: TWO.public not in swarm.dht.lookup(topic(ONE.public)))
    assert TWO.public in swarm.dht.lookup(topic(TWO.public))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_ten_thousand_inventions_cost_a_few_questions_and_hide_nobody_who_is_known(lab, swarm):
    for invention in range(9_001):
        swarm.dht.announce(topic(ONE.public), f"{invention:064x}")
    await appeared(lab(TWO, held(ONE)), swarm, TWO)
    for invention in range(9_001, 10_000):
        swarm.dht.announce(topic(ONE.public), f"{invention:064x}")
    assert swarm.dht.lookup(topic(ONE.public))[-1] == TWO.public
    swarm.asked.clear()
    found = await lab(THREE, follows={TWO.public}).find(ONE.public)
    assert [record.peer for record in found] == [TWO.public]
    assert len(swarm.asked) <= 64
    assert 1 < swarm.most_at_once <= 8


async def test_the_banned_are_not_asked(lab, swarm, access):
    await appeared(lab(TWO, held(ONE)), swarm, TWO)
    access.ban(TWO.public, "it lied")
    swarm.asked.clear()
    assert await lab(THREE).find(ONE.public) == []
    assert TWO.public not in swarm.asked


async def test_without_a_network_it_is_said_once_and_tried_again(lab, nodes, swarm, monkeypatch):
    monkeypatch.setattr("tether.manager.peering.neighbours._SPACING", 0.01)
    monkeypatch.setattr("tether.manager.peering.neighbours._AGAIN", 0.02)
    nodes[ONE.public].go_away()
    one = lab(ONE)
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(one.run())
        await until(lambda: len(swarm.asked) > 3)
        await nodes[ONE.public].come_back()
        await until(lambda: number(swarm, ONE))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [entry["log_level"] for entry in logs].count("warning") == 1


async def test_a_search_that_failed_is_not_taken_for_one_that_found_nobody(lab, nodes, swarm):
    await appeared(lab(TWO, held(ONE)), swarm, TWO)
    three = lab(THREE)
    nodes[THREE.public].go_away()
    with pytest.raises(EngineError):
        await three.find(ONE.public)
    await nodes[THREE.public].come_back()
    assert [record.peer for record in await three.find(ONE.public)] == [TWO.public]


async def test_what_changes_is_announced_soon(lab, swarm, monkeypatch):
    monkeypatch.setattr("tether.manager.peering.neighbours._SPACING", 0.01)
    one = lab(ONE)
    running = asyncio.create_task(one.run())
    await until(lambda: ONE.public in swarm.dht.lookup(topic(ONE.public)))
    first = number(swarm, ONE)
    one.changed()
    await until(lambda: number(swarm, ONE) > first)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_a_lab_that_people_know_says_of_itself_is_looked_for_and_kept_for_a_while(lab, swarm):
    write(swarm, TWO, Capabilities(region="eu-west", load=30), 5)
    three = lab(THREE)
    await three.meet([TWO.public, ONE.public], PATIENCE)
    assert {peer: (record.region, record.load) for peer, record in three.said().items()} == {TWO.public: ("eu-west", 30)}
    swarm.asked.clear()
    await three.meet([TWO.public, ONE.public], PATIENCE)
    assert swarm.asked == []
    write(swarm, TWO, held(ONE), 6)
    await three.find(ONE.public)
    await three.find(TWO.public)
    assert three.said()[TWO.public].count == 1, "the newest of all that was found"


async def test_nobody_waits_for_a_network_that_is_away(lab, nodes):
    three = lab(THREE)
    nodes[THREE.public].go_away()
    await three.meet([TWO.public], PATIENCE)
    assert three.said() == {}


async def test_the_banned_are_not_looked_for_and_this_lab_itself_is_not_among_the_others(lab, swarm, access):
    write(swarm, ONE, held(ONE), 5)
    write(swarm, TWO, held(ONE), 5)
    access.ban(TWO.public, "it lied")
    one = lab(ONE)
    await one.meet([TWO.public, ONE.public], PATIENCE)
    assert one.said() == {}
