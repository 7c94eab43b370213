"""Calls to a peer that goes and comes again: what is waited for, what is asked again, and what is not. On a swarm in memory."""

import asyncio
import hashlib

import pytest

from tether.errors import (
    DeadlineExceededError,
    ManagerLeavingError,
    PeerLeavingError,
    PeerNotFoundError,
    ServiceUnavailableError,
    StreamLostError,
)
from tether.swarm.node.node import NodeSettings
from tether.swarm.node.standing import ConnectionLimits, Standing
from tether.swarm.rpc.rpc import Service
from tether.testing.memory_swarm import MemorySwarm

PATIENCE = 10.0


def seed_of(name):
    return hashlib.sha256(name.encode()).digest()


class Labs:
    """Nodes, each a process of its own kind: what it answers, and whether it is leaving."""

    def __init__(self, returning):
        self.swarm, self.nodes = MemorySwarm(), []
        self.settings = NodeSettings(limits=ConnectionLimits(returning=returning), interval=0.05)
        self.heard, self.hold = [], asyncio.Event()

    async def start(self, name, number=0):
        lab = Lab(self, number)
        lab.node = await self.swarm.start(seed_of(name), lab.service, None, lambda _: Standing.KNOWN, self.settings)
        await lab.node.ready()
        self.nodes.append(lab.node)
        return lab


class Lab:
    def __init__(self, labs, number):
        self.labs, self.number, self.is_leaving, self.cuts, self.refuses = labs, number, False, 0, False
        self.service = Service(self.authorise)
        for method in ("ping", "publish"):
            self.service.respond(f"tether/1/{method}", self.answer)
        self.service.respond("tether/1/held", self.held)

    def authorise(self, _peer, _method):
        if self.is_leaving:
            raise ManagerLeavingError("this one did nothing")

    def answer(self, call, _):
        self.labs.heard.append(call.method.removeprefix("tether/1/"))
        if self.refuses:
            raise ServiceUnavailableError("the gateway is away")
        if self.cuts:
            self.cuts -= 1
            self.node.cut(call.peer)
        return b"%d" % self.number

    async def held(self, _, value):
        self.labs.heard.append("held")
        await self.labs.hold.wait()
        return value

    async def leave(self):
        """As a manager that is replaced: what runs ends, nothing new begins."""
        self.is_leaving = True
        await self.node.retire(PATIENCE)
        await self.node.aclose()


@pytest.fixture
async def labs():
    labs = Labs(returning=PATIENCE)
    yield labs
    await asyncio.gather(*(node.aclose() for node in labs.nodes))


@pytest.fixture
async def us(labs):
    return await labs.start("us")


@pytest.fixture
async def them(labs):
    return await labs.start("them")


async def test_what_only_reads_is_asked_again_when_it_was_lost_on_the_way(labs, us, them):
    them.cuts = 1
    assert await us.node.request(them.node.key, "ping", b"", PATIENCE) == b"0"
    assert labs.heard == ["ping", "ping"]


async def test_what_changes_something_is_not_asked_again(labs, us, them):
    them.cuts = 1
    with pytest.raises(StreamLostError, match="publish"):
        await us.node.request(them.node.key, "publish", b"", PATIENCE)
    assert labs.heard == ["publish"]


async def test_what_the_peer_answers_is_its_answer(labs, us, them):
    them.refuses = True
    with pytest.raises(ServiceUnavailableError, match="gateway"):
        await us.node.request(them.node.key, "ping", b"", PATIENCE)
    assert labs.heard == ["ping"]


async def test_across_a_replacement_no_call_is_lost_and_none_is_made_twice(labs, us, them):
    key = them.node.key
    held = asyncio.create_task(us.node.request(key, "held", b"early", PATIENCE))
    while "held" not in labs.heard:  # noqa: ASYNC110 (nothing says when the other side has heard)
        await asyncio.sleep(0)
    leaving = asyncio.create_task(them.leave())
    await asyncio.sleep(0)
    late = asyncio.create_task(us.node.request(key, "publish", b"", PATIENCE))
    await asyncio.sleep(0)
    labs.hold.set()
    await leaving
    assert await held == b"early"
    await labs.start("them", 2)
    assert await late == b"2"
    assert labs.heard == ["held", "publish"]


async def test_who_never_comes_back_is_not_waited_for_longer_than_the_deadline(us, them):
    key = them.node.key
    await us.node.request(key, "ping", b"", PATIENCE)
    await them.leave()
    with pytest.raises(DeadlineExceededError):
        await us.node.request(key, "ping", b"", 0.3)


async def test_nor_longer_than_is_worth_it():
    labs = Labs(returning=0.3)
    us, them = await labs.start("us"), await labs.start("them")
    await us.node.request(them.node.key, "ping", b"", PATIENCE)
    await them.leave()
    with pytest.raises(PeerNotFoundError):
        await us.node.request(them.node.key, "ping", b"", PATIENCE)
    await us.node.aclose()


async def test_who_can_ask_others_does_not_wait_for_one_that_ends(us, them):
    them.is_leaving = True
    with pytest.raises(PeerLeavingError):
        await us.node.request(them.node.key, "publish", b"", PATIENCE, patient=False)


async def test_who_says_that_it_ends_and_stays_is_unavailable():
    labs = Labs(returning=0.3)
    us, them = await labs.start("us"), await labs.start("them")
    them.is_leaving = True
    with pytest.raises(ServiceUnavailableError, match="ends") as raised:
        await us.node.request(them.node.key, "ping", b"", PATIENCE)
    assert not isinstance(raised.value, ManagerLeavingError), "that is what the user's own manager says of itself"
    await asyncio.gather(us.node.aclose(), them.node.aclose())
