"""Which streams a lab has with whom: over streams in memory, without a network."""

import asyncio

import pytest
import structlog

from tether.errors import (
    ForbiddenError,
    PayloadTooLargeError,
    PeerNotFoundError,
    PeerUnreachableError,
    QueueFullError,
    ServiceUnavailableError,
)
from tether.swarm.blobs.blobs import BlobConnection
from tether.swarm.node.connections import Connections
from tether.swarm.node.standing import ConnectionLimits, OwnSide, Standing
from tether.swarm.rpc.rpc import RpcConnection, Service
from tether.testing.streams import stream_pair

OWN = "11" * 32
PATIENCE = 10.0
NOBODY = 1e9
"""Seconds, for clocks that say how late it is."""


def key(number):
    return f"{number:064x}"


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (nothing says when a peer has seen something)
            await asyncio.sleep(0)


def travelling(stream):
    """With what a stream of the network has besides."""
    stream.route, stream.remote_address, stream.rtt, stream.max_message_nbytes = "direct", ("192.0.2.1", 1), 0.01, 1 << 24
    stream.pulse, stream.poked = (0, False), 0
    stream.poke = lambda: setattr(stream, "poked", stream.poked + 1)
    return stream


class Lab:
    """One side, and the others as far as it meets them."""

    def __init__(self, **limits):
        self.standings = {}
        self.asked = []
        self.hold = asyncio.Event()
        self.cancelled = 0
        self.service = Service(lambda _peer, _method: None)
        self.service.respond("echo", lambda _, value: value)
        self.service.respond("held", self.held)
        self.reached = []
        self.peers = []
        self.way = asyncio.Event()
        self.way.set()
        own = OwnSide(OWN, self.service, None, self.admits)
        self.connections = Connections(own, self.connect, ConnectionLimits(**limits))

    def admits(self, peer):
        self.asked.append((peer, self.connections.knows(peer)))
        return self.standings.get(peer, Standing.KNOWN)

    async def held(self, _, value):
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return value

    async def connect(self, peer):
        """To a peer that answers `echo` and `held`."""
        self.reached.append(peer)
        await self.way.wait()
        if peer == key(404):
            raise PeerNotFoundError("nobody announces this key", "PEER_NOT_FOUND")
        near, far = stream_pair(OWN, peer)
        self.peers.append(far)
        if peer != key(666):
            far.rpc = RpcConnection(far, peer, self.service)
        return travelling(near)

    def visit(self, peer, standing=Standing.KNOWN):
        """A peer comes: its end of the stream, which says nothing yet."""
        self.standings[peer] = standing
        theirs, ours = stream_pair(peer, OWN)
        self.connections.arrived(travelling(ours))
        return theirs

    def call(self, peer, standing=Standing.KNOWN):
        return RpcConnection(self.visit(peer, standing), peer)

    @property
    def now(self):
        return asyncio.get_running_loop().time()


@pytest.fixture
async def lab():
    lab = Lab()
    yield lab
    lab.connections.cut_all()


async def test_many_callers_share_one_connection(lab):
    lab.way.clear()
    waiting = asyncio.gather(*(lab.connections.rpc(key(1)) for _ in range(50)))
    await until(lambda: lab.reached)
    lab.way.set()
    found = await waiting
    assert len(set(found)) == 1
    assert await found[0].request("echo", b"hello") == b"hello"
    assert await lab.connections.rpc(key(1)) is found[0]
    assert lab.reached == [key(1)]


async def test_the_connection_that_a_peer_opened_serves_both(lab):
    theirs = lab.call(key(1))
    assert await theirs.request("echo", b"from there") == b"from there"
    ours = await lab.connections.rpc(key(1))
    assert lab.reached == []
    assert not ours.is_closed


async def test_a_peer_that_comes_while_it_is_looked_for_has_been_found(lab):
    lab.way.clear()
    waiting = asyncio.create_task(lab.connections.rpc(key(1)))
    await until(lambda: lab.reached)
    lab.call(key(1))
    connection = await waiting
    assert not connection.is_closed
    assert [each.is_initiator for each in lab.connections.listed()] == [False]


async def test_what_a_connection_fails_with_is_told_to_all_and_the_next_one_tries_again(lab):
    found = await asyncio.gather(*(lab.connections.rpc(key(404)) for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in found] == [PeerNotFoundError] * 3
    assert len(set(map(id, found))) == 3
    with pytest.raises(PeerNotFoundError):
        await lab.connections.rpc(key(404))
    assert len(lab.reached) == 2


async def test_who_does_not_wait_any_longer_takes_nobody_elses_connection_away(lab):
    lab.way.clear()
    impatient, patient = (asyncio.create_task(lab.connections.rpc(key(1))) for _ in range(2))
    await until(lambda: lab.reached)
    impatient.cancel()
    lab.way.set()
    assert not (await patient).is_closed
    assert lab.reached == [key(1)]


async def test_a_connection_that_was_lost_is_made_anew(lab):
    first = await lab.connections.rpc(key(1))
    lab.peers[0].destroy()
    await first.wait_closed()
    second = await lab.connections.rpc(key(1))
    assert second is not first
    assert await second.request("echo", b"again") == b"again"


async def test_a_stream_is_known_before_anybody_is_asked_what_its_peer_may(lab):
    lab.visit(key(1))
    assert lab.asked == [(key(1), True)]


async def test_cutting_a_peer_ends_calls_of_both_sides_and_what_is_on_its_way(lab):
    ours = await lab.connections.rpc(key(1))
    asked = asyncio.gather(ours.request("held", b""), return_exceptions=True)
    theirs = lab.call(key(1))
    told = asyncio.gather(theirs.request("held", b""), return_exceptions=True)
    mute = lab.visit(key(1))
    other = lab.call(key(2))
    await until(lambda: lab.connections.listed()[1].purpose == "rpc" and ours.in_flight and theirs.in_flight)
    await other.request("echo")
    lab.way.clear()
    coming = asyncio.gather(lab.connections.blobs(key(1)), return_exceptions=True)
    await until(lambda: len(lab.reached) == 2)
    lab.connections.cut(key(1))
    assert isinstance((await asked)[0], ServiceUnavailableError)
    assert isinstance((await told)[0], ServiceUnavailableError)
    assert isinstance((await coming)[0], PeerUnreachableError)
    assert mute.closed
    assert {each.peer for each in lab.connections.listed()} == {key(2)}
    assert lab.cancelled
    lab.way.set()


async def test_who_is_cut_right_after_its_first_word_is_not_heard(lab):
    with structlog.testing.capture_logs():
        for turns in range(12):
            asked = lab.asked.copy()
            theirs = lab.call(key(1))
            call = asyncio.gather(theirs.request("echo", b""), return_exceptions=True)
            for _ in range(turns):
                await asyncio.sleep(0)
            lab.connections.cut(key(1))
            await call
            assert lab.connections.listed() == []
            assert len(lab.asked) <= len(asked) + 2


async def test_a_banned_key_is_refused_before_and_after_and_not_looked_for(lab):
    lab.standings[key(1)] = Standing.BANNED
    assert lab.connections.refuses(key(1))
    assert lab.visit(key(1), Standing.BANNED).closed
    with pytest.raises(ForbiddenError, match="banned"):
        await lab.connections.rpc(key(1))
    assert lab.reached == []


async def test_where_it_cannot_be_told_what_a_key_is_nobody_comes_in(lab):
    def broken(_):
        raise ZeroDivisionError

    connections = Connections(OwnSide(OWN, lab.service, None, broken), lab.connect)
    with structlog.testing.capture_logs() as logs:
        assert connections.refuses(key(1))
    assert logs[0]["peer"] == key(1)


async def test_an_unknown_key_may_say_little_and_has_not_long(lab):
    stranger = lab.call(key(1), Standing.UNKNOWN)
    assert await stranger.request("echo", bytes(4000)) == bytes(4000)
    with pytest.raises(PayloadTooLargeError):
        await stranger.request("echo", bytes(4097))
    held = asyncio.gather(*(stranger.request("held") for _ in range(5)), return_exceptions=True)
    await until(lambda: stranger.in_flight == 4)
    lab.hold.set()
    assert [type(error) for error in await held if error] == [QueueFullError]
    lab.connections.sweep(lab.now + 29)
    assert not stranger.is_closed
    lab.connections.sweep(lab.now + 30)
    await stranger.wait_closed()
    assert lab.connections.listed() == []


async def test_what_an_unknown_key_opened_is_used_for_nothing_of_ours(lab):
    stranger = lab.call(key(1), Standing.UNKNOWN)
    await stranger.request("echo")
    await lab.connections.rpc(key(1))
    assert lab.reached == [key(1)]


async def test_an_unknown_key_that_asks_for_blobs_is_cut(lab):
    taker = BlobConnection(lab.visit(key(1), Standing.UNKNOWN))
    with structlog.testing.capture_logs() as logs:
        await taker.wait_closed()
    assert [(entry["peer"], entry["code"]) for entry in logs] == [(key(1), "forbidden")]


@pytest.mark.parametrize("is_told", [True, False])
async def test_a_key_that_becomes_known_goes_on_and_may_do_more(lab, is_told):
    peer = lab.call(key(1), Standing.UNKNOWN)
    await peer.request("echo")
    lab.standings[key(1)] = Standing.KNOWN
    if is_told:
        lab.connections.welcome(key(1))
    else:
        lab.connections.sweep(lab.now)
    assert await peer.request("echo", bytes(1 << 20)) == bytes(1 << 20)
    lab.connections.sweep(NOBODY)
    assert not peer.is_closed
    await lab.connections.rpc(key(1))
    assert lab.reached == []


async def test_a_flood_of_unknown_keys_keeps_its_bound_and_lets_the_next_one_in(lab):
    flood = [lab.visit(key(number), Standing.UNKNOWN) for number in range(100)]
    assert [stream.closed for stream in flood] == [True] * 36 + [False] * 64
    honest = lab.call(key(100), Standing.UNKNOWN)
    assert await honest.request("echo", b"secret") == b"secret"
    assert not lab.connections.refuses(key(101))
    assert len(lab.connections.listed()) == 64


async def test_a_known_key_opens_eight_streams_and_no_more(lab):
    opened = [lab.visit(key(1)) for _ in range(9)]
    assert [stream.closed for stream in opened] == [False] * 8 + [True]
    assert lab.connections.refuses(key(1))
    opened[0].destroy()
    await until(lambda: not lab.connections.refuses(key(1)))


async def test_what_we_opened_and_nobody_uses_is_closed_in_order(lab):
    rpc = await lab.connections.rpc(key(1))
    await rpc.request("echo")
    theirs = lab.call(key(2))
    await theirs.request("echo")
    lab.connections.sweep(lab.now)
    lab.connections.sweep(lab.now + 59)
    assert not rpc.is_closed
    lab.connections.sweep(lab.now + 61)
    assert (await lab.connections.rpc(key(1))) is not rpc, "one that is about to be closed is not given out"
    await rpc.wait_closed()
    await until(lambda: lab.peers[0].closed)
    assert lab.peers[0].error is None
    assert not theirs.is_closed


async def test_what_is_in_use_is_not_idle(lab):
    rpc = await lab.connections.rpc(key(1))
    call = asyncio.create_task(rpc.request("held", b"late"))
    await until(lambda: rpc.in_flight)
    lab.connections.sweep(lab.now + 1000)
    assert not rpc.is_closed
    lab.hold.set()
    assert await call == b"late"
    await lab.peers[0].rpc.request("echo", b"from there")
    lab.connections.sweep(lab.now + 1001)
    assert not rpc.is_closed


async def test_no_more_are_opened_than_are_kept():
    lab = Lab(max_outgoing=3)
    await asyncio.gather(*(lab.connections.rpc(key(number)) for number in range(3)))
    with pytest.raises(QueueFullError):
        await lab.connections.rpc(key(3))
    lab.peers[0].destroy()
    await until(lambda: len(lab.connections.listed()) == 2)
    await lab.connections.rpc(key(3))
    lab.connections.cut_all()


async def test_blobs_have_a_stream_of_their_own_and_news_of_them_names_the_peer(lab):
    heard = []
    lab.connections.on_have.append(lambda *told: heard.append(told))
    blobs = await lab.connections.blobs(key(666))
    assert await lab.connections.blobs(key(666)) is blobs

    class Shelf:
        async def authorise(self, *_):
            pass

        async def bitmap(self, _):
            return b"\0"

    giver = BlobConnection(lab.peers[0], Shelf())
    digest = "ab" * 32
    assert await blobs.bitmap(digest, 3) == [False] * 3
    giver.announce(digest, (1, 2))
    await until(lambda: heard)
    assert heard == [(key(666), digest, (1, 2))]
    assert [each.purpose for each in lab.connections.listed()] == ["blobs"]


async def test_closing_lets_what_was_sent_go_out_and_takes_nothing_more(lab):
    rpc = await lab.connections.rpc(key(1))
    theirs = lab.call(key(2))
    mute = lab.visit(key(3))
    await theirs.request("echo")
    await lab.connections.aclose()
    assert rpc.is_closed
    assert theirs.is_closed
    assert mute.closed
    assert lab.connections.listed() == []
    assert lab.visit(key(4)).closed
    with pytest.raises(ServiceUnavailableError):
        await lab.connections.rpc(key(5))


async def test_a_connection_is_shown_as_it_is(lab):
    await lab.connections.rpc(key(1))
    (shown,) = lab.connections.listed()
    assert (shown.peer, shown.purpose, shown.is_initiator, shown.route, shown.round_trip, shown.address) == (
        key(1),
        "rpc",
        True,
        "direct",
        0.01,
        ("192.0.2.1", 1),
    )
