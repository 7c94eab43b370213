"""Another store on this disk as a source of blobs: what it has whole need not come over the network."""

from __future__ import annotations

import asyncio

from tether.errors import ChunkAlteredError, ChunkMissingError
from tether.ports import SignedManifest
from tether.store.replicas.held import Held
from tether.store.repository import Repository
from tether.types import Digest

__all__ = ["RepositoryBlobs"]


class RepositoryBlobs:
    """`ports.BlobSource` over a repository, which stays the caller's to close."""

    in_flight = 2

    def __init__(self, repository: Repository, name: str = "this host's store") -> None:
        self.name = name
        self._repository = repository

    async def fetch(self, digest: Digest, nbytes: int) -> bytes | None:
        """As the port says."""
        del nbytes
        return await asyncio.to_thread(self._read, digest)

    def _read(self, digest: Digest) -> bytes | None:
        try:
            return self._repository.read_blob(digest)
        except (ChunkMissingError, ChunkAlteredError):
            return None

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """As the port says."""
        return await asyncio.to_thread(Held(self._repository).whole, digest)

    async def aclose(self) -> None:
        """Nothing to close."""
