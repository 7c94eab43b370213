"""A lab listens once: what a peer that connects wants is told by its first message, of which nothing is lost."""

import asyncio

import pytest
import structlog

from tether.errors import ProtocolError, ServiceUnavailableError
from tether.swarm.blobs.blobs import BlobConnection
from tether.swarm.node.arrivals import purpose_of
from tether.swarm.rpc.rpc import RpcConnection, Service
from tether.testing.streams import INITIATOR, RESPONDER, stream_pair


@pytest.fixture
async def ends():
    near, far = stream_pair()
    yield near, far
    near.destroy()


async def test_a_caller_is_answered(ends):
    near, far = ends
    caller = RpcConnection(near, INITIATOR)
    early = asyncio.gather(*(caller.request("echo", b"%d" % number) for number in range(100)))
    purpose, stream = await purpose_of(far)
    assert (purpose, stream.peer, stream.is_initiator) == ("rpc", INITIATOR, False)
    service = Service(lambda _peer, _method: None)
    service.respond("echo", lambda _, value: value)
    answerer = RpcConnection(stream, RESPONDER, service)
    assert await early == [b"%d" % number for number in range(100)]
    assert await caller.request("echo", bytes(1 << 20)) == bytes(1 << 20)
    await caller.aclose()
    assert answerer.is_closed


async def test_a_taker_of_blobs_is_given_some(ends):
    near, far = ends
    taker = BlobConnection(near)
    purpose, stream = await purpose_of(far)
    giver = BlobConnection(stream)
    assert purpose == "blobs"
    assert await taker.blob("0" * 64) is None
    await taker.aclose()
    assert giver.is_closed


async def test_who_says_nothing_or_leaves_is_not_waited_for(ends):
    near, far = ends
    with structlog.testing.capture_logs() as logs, pytest.raises(ServiceUnavailableError, match=INITIATOR):
        await purpose_of(far, 0.01)
    assert [entry["peer"] for entry in logs] == [INITIATOR]
    assert near.closed
    near, far = stream_pair()
    near.destroy()
    with pytest.raises(ServiceUnavailableError, match="left without a word"):
        await purpose_of(far)


async def test_who_speaks_something_else_is_cut_and_named(ends):
    near, far = ends
    near.send(b"GET / HTTP/1.1")
    with structlog.testing.capture_logs() as logs, pytest.raises(ProtocolError):
        await purpose_of(far)
    assert [entry["peer"] for entry in logs] == [INITIATOR]
    assert near.closed


async def test_who_leaves_before_the_stream_is_used_is_seen_to_have_left(ends):
    near, far = ends
    caller = RpcConnection(near, INITIATOR)
    _, stream = await purpose_of(far)
    caller.destroy()
    for _ in range(3):
        await asyncio.sleep(0)
    answerer = RpcConnection(stream, RESPONDER)
    await asyncio.wait_for(answerer.wait_closed(), 5)
