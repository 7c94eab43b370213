"""A lab's models as a source of blobs, over HTTP through its gateway."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from tether.client.http import HttpClient
from tether.errors import ChunkAlteredError, ChunkMissingError, NotFoundError, RemoteError
from tether.ports import SignedManifest
from tether.types import Digest

__all__ = ["GatewayBlobs"]


class GatewayBlobs:
    """`ports.BlobSource` over a gateway; needs a key that may manage. Belongs to the event loop that makes the first call; pickles."""

    in_flight = 4
    """As many as an export has: 16 MiB, which over 100 ms of latency are 150 MB/s."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises: UnsupportedError: `url` is not `http(s)://host[:port]`."""
        self._client, self._api_key = HttpClient(url, api_key), api_key
        self.name = self._client.url

    def __reduce__(self) -> tuple[type[GatewayBlobs], tuple[str, str | None]]:
        return GatewayBlobs, (self.name, self._api_key)

    def __repr__(self) -> str:
        return f"GatewayBlobs({self.name!r}, api_key={'***' if self._api_key else None})"

    async def fetch(self, digest: Digest, nbytes: int) -> bytes | None:
        """As the port says. Raises: UnauthenticatedError, ForbiddenError besides."""
        del nbytes
        try:
            return await self._client.get_blob(digest)
        except (NotFoundError, ChunkMissingError, ChunkAlteredError):
            return None

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """As the port says. Raises: UnauthenticatedError, ForbiddenError besides."""
        try:
            return _signed(await self._client.signed_manifest(digest), self.name)
        except (NotFoundError, ChunkMissingError, ChunkAlteredError):
            return None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _signed(answer: dict[str, Any], name: str) -> SignedManifest:
    try:
        data, signature = base64.b64decode(answer["manifest"], validate=True), bytes.fromhex(answer["signature"])
        return SignedManifest(data, str(answer["publisher"]), signature)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise RemoteError(f"{name} answered with something that is no signed manifest ({error}); is it a Tether gateway?") from error
