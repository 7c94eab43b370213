"""Peers that fall silent: connected to beside, and cut only where they answer elsewhere; over streams in memory, without a network."""

import asyncio

import pytest
import structlog

from tether.errors import PeerUnreachableError, ServiceUnavailableError
from tether.swarm.node.connections import Connections
from tether.swarm.node.standing import ConnectionLimits, OwnSide, Standing
from tether.swarm.rpc.rpc import RpcConnection, Service
from tether.testing.streams import MemoryStream

OWN, PEER = "11" * 32, "22" * 32
PATIENCE = 10.0


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (nothing says when a peer has seen something)
            await asyncio.sleep(0)


async def cancelled(call):
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


class Stream(MemoryStream):
    """With what one of the network has besides, and switches: how many packets came, and whether one is owed."""

    route, remote_address, rtt, max_message_nbytes = "direct", None, 0.01, 1 << 24
    came, owes, answers_poke = 0, False, False

    @property
    def pulse(self):
        return self.came, self.owes

    def poke(self):
        self.came += self.answers_poke


class Lab:
    """One side, and a peer that it calls."""

    def __init__(self, **limits):
        self.service = Service(lambda _peer, _method: None)
        self.service.respond("echo", lambda _, value: value)
        self.service.respond("held", self.held)
        self.hold, self.way = asyncio.Event(), asyncio.Event()
        self.way.set()
        self.streams, self.theirs = [], []
        self.is_reachable = True
        own = OwnSide(OWN, self.service, None, lambda _: Standing.KNOWN)
        self.connections = Connections(own, self.connect, ConnectionLimits(proof=0.0, **limits))
        self.now = asyncio.get_running_loop().time()

    async def held(self, _, value):
        await self.hold.wait()
        return value

    async def connect(self, peer):
        await self.way.wait()
        if not self.is_reachable:
            raise PeerUnreachableError("no stream came about", "PEER_CONNECTION_FAILED")
        near, far = Stream(peer, is_initiator=True), MemoryStream(OWN, is_initiator=False)
        near.other, far.other = far, near
        self.streams.append(near)
        self.theirs.append(RpcConnection(far, peer, self.service))
        return near

    async def call(self):
        """A connection, and a call on it that waits for its answer."""
        connection = await self.connections.rpc(PEER)
        call = asyncio.create_task(connection.request("held", b"late"))
        await until(lambda: connection.in_flight)
        return connection, call

    def sweep(self, seconds):
        self.now += seconds
        self.connections.sweep(self.now)


@pytest.fixture
async def lab():
    lab = Lab()
    with structlog.testing.capture_logs() as lab.logs:
        yield lab
        lab.connections.cut_all()


async def test_who_is_silent_and_answers_elsewhere_is_spoken_with_there(lab):
    old, call = await lab.call()
    lab.streams[0].owes = True
    lab.sweep(1.0)
    assert len(lab.streams) == 1
    lab.sweep(2.0)
    await old.wait_closed()
    with pytest.raises(ServiceUnavailableError):
        await call
    new = await lab.connections.rpc(PEER)
    assert new is not old
    assert await new.request("echo", b"there") == b"there"
    assert len(lab.streams) == 2
    assert lab.logs[-1]["event"].startswith("a stream that leads nowhere is cut")


async def test_who_was_only_slow_keeps_what_it_works_on(lab):
    old, call = await lab.call()
    lab.streams[0].owes = lab.streams[0].answers_poke = True
    lab.sweep(2.5)
    await until(lambda: lab.streams[0].came)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not old.is_closed
    lab.hold.set()
    assert await call == b"late"


async def test_a_long_round_trip_is_no_silence(lab):
    _, call = await lab.call()
    lab.streams[0].owes, lab.streams[0].rtt = True, 1.0
    lab.sweep(3.9)
    await asyncio.sleep(0)
    assert len(lab.streams) == 1
    await cancelled(call)


async def test_acknowledgements_alone_show_that_it_lives(lab):
    _, call = await lab.call()
    lab.streams[0].owes = True
    for _ in range(10):
        lab.streams[0].came += 1
        lab.sweep(1.0)
    assert len(lab.streams) == 1
    await cancelled(call)


async def test_who_answers_nowhere_is_asked_again_and_nothing_is_cut(lab):
    old, call = await lab.call()
    lab.streams[0].owes, lab.is_reachable = True, False
    while len(lab.logs) < 3:
        lab.sweep(2.5)
        for _ in range(10):
            await asyncio.sleep(0)
    assert {entry["event"] for entry in lab.logs} == {"a peer is silent, and can't be reached anew"}
    assert not old.is_closed
    lab.streams[0].came += 1
    lab.sweep(1.0)
    assert await lab.connections.rpc(PEER) is old
    await cancelled(call)


async def test_who_is_heard_again_while_it_is_looked_for_has_been_found(lab):
    old, call = await lab.call()
    lab.streams[0].owes = True
    lab.way.clear()
    lab.sweep(2.5)
    waiting = asyncio.create_task(lab.connections.rpc(PEER))
    await asyncio.sleep(0)
    assert not waiting.done()
    lab.streams[0].came += 1
    lab.sweep(1.0)
    assert await waiting is old
    lab.hold.set()
    assert await call == b"late"


async def test_nobody_is_connected_to_for_whom_nobody_waits_and_the_next_call_does_not_take_the_silent_stream(lab):
    old = await lab.connections.rpc(PEER)
    lab.streams[0].owes = True
    lab.sweep(2.5)
    await asyncio.sleep(0)
    assert len(lab.streams) == 1
    assert await lab.connections.rpc(PEER) is not old


async def test_who_was_lost_is_waited_for_and_who_was_cut_or_not_needed_is_not(lab):
    limits, loop = ConnectionLimits(), asyncio.get_running_loop()
    assert lab.connections.expected_until(PEER) == 0
    await lab.connections.rpc(PEER)
    lab.streams[-1].cut(None)
    await until(lambda: not lab.connections.listed())
    assert 0 < lab.connections.expected_until(PEER) - loop.time() <= limits.returning
    lab.sweep(limits.returning + 1)
    assert lab.connections.expected_until(PEER) == 0
    await lab.connections.rpc(PEER)
    lab.connections.cut(PEER)
    assert lab.connections.expected_until(PEER) == 0
    connection = await lab.connections.rpc(PEER)
    lab.sweep(1.0)
    lab.sweep(limits.idle + 1)  # nobody uses it
    await connection.wait_closed()
    await until(lambda: not lab.connections.listed())
    assert lab.connections.expected_until(PEER) == 0


async def test_nothing_new_begins_with_who_says_that_it_ends_and_another_process_of_it_is_waited_for(lab):
    old, call = await lab.call()
    lab.connections.leave_to_end(old)
    assert lab.connections.expected_until(PEER) > asyncio.get_running_loop().time()
    assert await lab.connections.rpc(PEER) is not old
    lab.hold.set()
    assert await call == b"late"
