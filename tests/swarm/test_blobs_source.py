"""A peer is a source of blobs like any other: the contract, over two ends of a stream in memory."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from tether.errors import ChunkAlteredError, ChunkMissingError, WrongBytesError
from tether.store.replicas.held import Held
from tether.swarm.blobs.blobs import BlobConnection
from tether.testing.blob_sources import BlobSourceSuite
from tether.testing.streams import stream_pair
from tether.types import Digest


class RepositoryShelf:
    def __init__(self, repository):
        self.repository = repository

    async def authorise(self, peer, kind, digest):
        del peer, kind, digest

    async def blob(self, digest):
        return await asyncio.to_thread(self._read, digest)

    def _read(self, digest):
        try:
            return self.repository.read_blob(digest)
        except (ChunkMissingError, ChunkAlteredError):
            return None

    async def manifest(self, digest):
        return await asyncio.to_thread(Held(self.repository).whole, digest)

    async def bitmap(self, digest):
        del digest


class TestPeerBlobs(BlobSourceSuite):
    @asynccontextmanager
    async def open_source(self, repository):
        ours, theirs = stream_pair()
        self.connection, giver = BlobConnection(ours), BlobConnection(theirs, RepositoryShelf(repository))
        yield self.connection.source()
        await self.connection.aclose()
        assert giver.is_closed

    async def cut_off(self, source):
        assert source.name == "peer 22222222…"
        self.connection._link._stream.cut(ConnectionResetError("no route"))
        await self.connection.wait_closed()


async def test_who_hashes_itself_gets_what_came_whatever_it_is():
    digest = Digest("1" * 64)
    ours, theirs = stream_pair()
    shelf = RepositoryShelf(None)
    shelf._read = lambda _: b"other bytes"
    connection, _ = BlobConnection(ours), BlobConnection(theirs, shelf)
    assert await connection.source().unchecked().fetch(digest, 1) == b"other bytes"
    assert not connection.is_closed
    with pytest.raises(WrongBytesError):
        await connection.source().fetch(digest, 1)
    assert connection.is_closed
