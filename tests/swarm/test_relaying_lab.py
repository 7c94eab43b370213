"""A lab that relays for those it knows: over real UDX sockets, without a DHT."""

import asyncio

import pytest
from relay_parties import SECONDS, TOKEN, Meeting, until
from structlog.testing import capture_logs

from tether.swarm.node.connections import Connections
from tether.swarm.node.standing import ConnectionLimits, OwnSide, Standing
from tether.swarm.relaying.relay import RelayLimits
from tether.swarm.rpc.rpc import Service

ANNA, BERT, CORA = "aa" * 32, "bb" * 32, "cc" * 32


def travelling(stream):
    """With what a stream of the engine has besides."""
    stream.route, stream.remote_address, stream.rtt, stream.max_message_nbytes = "direct", ("127.0.0.1", 1), 0.0, 1 << 24
    stream.pulse, stream.poke = (0, False), lambda: None
    return stream


class RelayingLab:
    """Its streams, and the parties that come to it."""

    def __init__(self, limits):
        self.standings = {ANNA: Standing.KNOWN, BERT: Standing.KNOWN, CORA: Standing.UNKNOWN}
        own = OwnSide("11" * 32, Service(lambda *_: None), None, lambda peer: self.standings[peer])
        self.connections = Connections(own, None, limits)
        self.meeting = Meeting()

    async def come(self, key):
        return await self.meeting.come(key, lambda stream: self.connections.arrived(travelling(stream)))

    async def pair(self):
        """Anna and Bert, relayed."""
        anna, bert = await self.come(ANNA), await self.come(BERT)
        await self.meeting.join(anna, bert)
        anna.raw.write(b"x")
        await until(lambda: bert.data == b"x")
        return anna, bert


@pytest.fixture
async def make():
    made = []

    def make(relaying=RelayLimits()):  # noqa: B008 (a value)
        made.append(RelayingLab(ConnectionLimits(relaying=relaying, max_streams=2)))
        return made[-1]

    yield make
    for lab in made:
        await lab.connections.aclose()
        await lab.meeting.aclose()


async def test_two_known_keys_are_relayed_and_shown(make):
    lab = make()
    await lab.pair()
    status = lab.connections.relaying
    assert (status.pairs, status.total) == (1, 1)
    assert sorted((each.peer, each.purpose) for each in lab.connections.listed()) == [(ANNA, "relay"), (BERT, "relay")]


async def test_an_unknown_key_that_asks_is_cut_and_named(make):
    lab = make()
    with capture_logs() as logs:
        cora = await lab.come(CORA)
        cora.ask(TOKEN, is_initiator=True)
        await asyncio.wait_for(cora.closed.wait(), SECONDS)
    assert [(line["event"], line["peer"]) for line in logs] == [("peer cut", CORA)]
    assert lab.connections.relaying.waiting == 0
    assert lab.connections.listed() == []


async def test_a_lab_that_does_not_relay_says_no_at_once(make):
    lab = make(relaying=None)
    anna = await lab.come(ANNA)
    anna.ask(TOKEN, is_initiator=True)
    await asyncio.wait_for(anna.closed.wait(), SECONDS)
    assert lab.connections.relaying is None


@pytest.mark.parametrize("how", ["cut", "asleep", "banned and cut", "end"])
async def test_who_is_cut_is_relayed_no_more_and_the_other_end_is_told(make, how):
    lab = make()
    anna, bert = await lab.pair()
    if how == "end":
        await lab.connections.aclose()
    elif how == "asleep":
        lab.connections.cut_all()
    else:
        if how == "banned and cut":
            lab.standings[ANNA] = Standing.BANNED
        lab.connections.cut(ANNA)
    for party in (anna, bert):  # of silence they would know after thirty seconds
        assert await asyncio.wait_for(party.codes.get(), SECONDS) == "ECONNRESET"
    assert lab.connections.relaying.pairs == 0
    assert ANNA not in {each.peer for each in lab.connections.listed()}


async def test_streams_for_relaying_take_none_of_the_places_of_others(make):
    lab = make()
    for _ in range(4):
        (await lab.come(ANNA)).ask(TOKEN, is_initiator=True)
        await until(lambda: all(each.purpose for each in lab.connections.listed()))
    assert len(lab.connections.listed()) == 4
    assert not lab.connections.refuses(ANNA)


async def test_who_was_only_relayed_is_not_waited_for(make):
    lab = make()
    anna, _ = await lab.pair()
    anna.line.finish(None)
    await until(lambda: ANNA not in {each.peer for each in lab.connections.listed()})
    assert lab.connections.expected_until(ANNA) == 0
