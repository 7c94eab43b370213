"""Which labs are used as relays, and which say that they are: on a swarm in memory."""

import asyncio
import time

import pytest
from structlog.testing import capture_logs

from tether.errors import ConfigError, PeerUnreachableError
from tether.manager.peering.relaying import Relaying
from tether.manager.settings import relay_keys
from tether.security.addresses import Address
from tether.security.identity import Identity
from tether.swarm.node.node import NodeSettings, Standing
from tether.swarm.node.standing import ConnectionLimits
from tether.swarm.records.records import Capabilities, parse, sign
from tether.swarm.relaying.relay import RelayLimits
from tether.swarm.rpc.rpc import Service
from tether.testing.memory_swarm import MemorySwarm

SECONDS = 10


def identity(name):
    return Identity(name.encode().ljust(32, b"."))


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (what several tasks do has no one event)
            await asyncio.sleep(0.005)


class Said:
    """What others say of themselves, as `Neighbours` finds it."""

    def __init__(self, node):
        self._node, self._said, self.asked = node, {}, []

    async def meet(self, peers, _):
        self.asked += peers
        for peer in peers:
            found = await self._node.get_record(peer)
            if found is not None:
                self._said[peer] = parse(found[0], peer)

    def said(self):
        return self._said


class World:
    """Labs on one swarm, each with what it says of itself, and whom they know."""

    def __init__(self, swarm):
        self.swarm, self.tasks = swarm, []
        self.told = 0

    async def lab(self, name, *, relays=False, says=True):
        """One whose record says that it relays, or not; `relays`: whether it does."""
        limits = ConnectionLimits(relaying=RelayLimits() if relays else None)
        node = await self.swarm.start(
            identity(name).seed, Service(lambda *_: None), None, lambda _: Standing.KNOWN, NodeSettings(limits=limits)
        )
        if says:
            now = time.time()
            await node.put_record(sign(identity(name), Capabilities(relays=relays), int(now * 1000), now), int(now * 1000))
        return node

    def begin(self, node, known=(), fixed=()):
        self.labs = Said(node)
        relaying = Relaying(node, self.labs, lambda: set(known), fixed)
        self.tasks.append(asyncio.create_task(relaying.run(self.tell)))
        return relaying

    def tell(self):
        self.told += 1


@pytest.fixture
async def world(monkeypatch):
    monkeypatch.setattr("tether.manager.peering.relaying._SPACING", 0.0)
    async with MemorySwarm() as swarm:
        world = World(swarm)
        yield world
        for task in world.tasks:
            task.cancel()
        await asyncio.gather(*world.tasks, return_exceptions=True)


async def test_of_those_who_are_known_the_ones_that_say_so_are_used(world):
    own = await world.lab("own")
    relay, friend, stranger = [await world.lab(name, relays=name != "friend") for name in ("relay", "friend", "stranger")]
    silent = await world.lab("silent", says=False)
    known = {relay.key, friend.key, silent.key}
    relaying = world.begin(own, known)
    await until(lambda: relaying.aid.through)
    assert own._network.relays == (relay.key,)
    known.add(stranger.key)
    relaying.changed()
    await until(lambda: relaying.aid.through == 2)
    assert set(own._network.relays) == {relay.key, stranger.key}
    known.clear()
    relaying.changed()
    await until(lambda: own._network.relays == ())


async def test_what_a_person_chose_is_used_alone(world):
    relay, own = await world.lab("relay", relays=True), await world.lab("own")
    relaying = world.begin(own, {relay.key}, fixed=("ab" * 32,))
    await relaying._look_for_relays()
    assert relaying.aid.through == 1
    assert world.labs.asked == []


async def test_a_lab_says_that_it_relays_when_it_found_out_that_it_is_reached(world, monkeypatch):
    own, reached = await world.lab("own", relays=True), False

    async def probe():
        return reached

    monkeypatch.setattr(own, "probe", probe)
    with capture_logs() as logs:
        relaying = world.begin(own)
        await until(lambda: any(line["log_level"] == "warning" for line in logs))
        assert (relaying.is_of_use, relaying.aid.relays, world.told) == (False, True, 0)
        reached = True
        relaying.changed()
        await until(lambda: relaying.is_of_use)
    assert world.told == 1
    (warning,) = [line["event"] for line in logs if line["log_level"] == "warning"]
    assert "no other lab can use it" in warning


async def test_without_a_network_it_is_tried_again(world, monkeypatch):
    monkeypatch.setattr("tether.manager.peering.relaying._AGAIN", 0.01)
    own, relay, failures = await world.lab("own"), await world.lab("relay", relays=True), [1, 1, 1]
    ready = own.ready

    async def failing():
        if failures:
            failures.pop()
            raise PeerUnreachableError("no network", "NO_NODES")
        await ready()

    monkeypatch.setattr(own, "ready", failing)
    relaying = world.begin(own, {relay.key})
    await until(lambda: relaying.aid.through == 1)


def test_relays_are_named_by_address_or_key():
    one, two = identity("one").public, identity("two").public
    assert relay_keys(f"{Address(one)}, {two},") == (one, two)
    assert relay_keys(None) == ()
    for wrong in ("nobody", f"{one}#secret", "00" * 32):
        with pytest.raises(ConfigError, match="relay-through"):
            relay_keys(wrong)
