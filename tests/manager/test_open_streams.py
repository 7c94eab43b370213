"""Answers in parts that peers read: who may ask, how many, and what becomes of those for which nobody asks."""

import asyncio
import contextlib

import aiohttp
import pytest

from tether.errors import MalformedRequestError, QueueFullError, StreamLostError
from tether.manager.peering import open_streams
from tether.manager.peering.open_streams import OpenStreams


class Content:
    """A body, as the gateway's client has it."""

    def __init__(self):
        self.pieces = asyncio.Queue()
        self.left = asyncio.Event()

    async def readany(self):
        piece = await self.pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    @contextlib.asynccontextmanager
    async def answer(self):
        try:
            yield self
        finally:
            self.left.set()


@pytest.fixture
async def streams():
    streams = OpenStreams()
    yield streams
    await streams.aclose()


async def opened(streams, peer="him", model="digits"):
    content = Content()
    return content, await streams.open(peer, model, content.answer())


async def test_what_came_is_given_and_nothing_within_the_wait_is_nothing(streams):
    content, name = await opened(streams)
    content.pieces.put_nowait(b"part")
    stream = streams.find("him", name)
    assert (await stream.read(5.0), await stream.read(0.01)) == (b"part", b"")
    content.pieces.put_nowait(b"")
    with pytest.raises(StreamLostError, match="nothing follows"):
        await stream.read(5.0)
    assert content.left.is_set()
    with pytest.raises(StreamLostError):
        streams.find("him", name)


async def test_a_stream_is_its_peers_alone_and_read_by_one_question_at_a_time(streams):
    content, name = await opened(streams)
    with pytest.raises(StreamLostError):
        streams.find("her", name)
    stream = streams.find("him", name)
    question = asyncio.create_task(stream.read(30.0))
    await asyncio.sleep(0)
    with pytest.raises(MalformedRequestError):
        await stream.read(0.01)
    content.pieces.put_nowait(b"part")
    assert await question == b"part"


async def test_a_peer_has_so_many_open_and_no_more(streams):
    for _ in range(16):
        await opened(streams)
    with pytest.raises(QueueFullError, match="16 of your streams"):
        await opened(streams)
    await opened(streams, "her")


async def test_those_that_the_gateway_has_not_answered_count_too(streams):
    never = asyncio.Event()

    @contextlib.asynccontextmanager
    async def unanswered():
        await never.wait()
        yield Content()

    waiting = [asyncio.create_task(streams.open("him", "digits", unanswered())) for _ in range(16)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="16 of your streams"):
        await opened(streams)
    await opened(streams, "her")
    for opening in waiting:
        opening.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await opened(streams)


async def test_one_whose_gateway_goes_away_is_lost(streams):
    content, name = await opened(streams)
    content.pieces.put_nowait(aiohttp.ClientPayloadError("Response payload is not completed"))
    with pytest.raises(StreamLostError, match="gateway went away"):
        await streams.find("him", name).read(5.0)
    assert content.left.is_set()
    with pytest.raises(StreamLostError):
        streams.find("him", name)


async def test_what_nobody_asks_for_ends(streams, monkeypatch):
    monkeypatch.setattr(open_streams, "_PATIENCE", 0.0)
    monkeypatch.setattr(open_streams, "_LOOK", 0.01)
    content, name = await opened(streams)
    async with asyncio.timeout(20):
        await content.left.wait()
    with pytest.raises(StreamLostError):
        streams.find("him", name)


async def test_who_may_run_a_model_no_more_reads_no_more_of_it(streams):
    kept, _ = await opened(streams)
    taken, name = await opened(streams, model="secret")
    hers, _ = await opened(streams, "her", "secret")
    await streams.less("him", lambda model: model == "digits")
    assert (kept.left.is_set(), taken.left.is_set(), hers.left.is_set()) == (False, True, False)
    with pytest.raises(StreamLostError):
        streams.find("him", name)
