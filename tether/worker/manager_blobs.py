"""The manager's models as a source of blobs, over whatever carries its operations: Dask's comms, in a worker."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tether.errors import ChunkAlteredError, ChunkMissingError, NotFoundError
from tether.ports import SignedManifest
from tether.store.format.encrypted import ModelContext, ModelKey
from tether.types import Digest

__all__ = ["ManagerBlobs", "Origin"]

Ask = Callable[..., Awaitable[Any]]
"""An operation of the manager by name, and its arguments. Raises: the errors of the tree that it answers; ServiceUnavailableError."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What the manager says of a version."""

    signed: SignedManifest
    code_trusted: bool
    """Whether the lab trusts the publisher for code."""


class ManagerBlobs:
    """`ports.BlobSource` over the manager of the cluster."""

    name = "manager"
    in_flight = 4
    """16 MiB on their way: the manager reads and hashes the next ones while these travel."""

    def __init__(self, ask: Ask, close: Callable[[], Awaitable[None]]) -> None:
        """`close` gives up the connections that `ask` uses."""
        self._ask, self._close = ask, close

    async def fetch(self, digest: Digest, nbytes: int) -> bytes | None:
        """As the port says."""
        del nbytes
        try:
            return bytes(await self._ask("get_blob", digest=digest))
        except (NotFoundError, ChunkMissingError, ChunkAlteredError):
            return None

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """As the port says."""
        origin = await self.origin(digest)
        return origin.signed if origin is not None else None

    async def origin(self, digest: Digest) -> Origin | None:
        """The same, and whether its code is trusted: asked at each load, since trust can be taken away."""
        try:
            answer = await self._ask("signed_manifest", digest=digest)
        except (NotFoundError, ChunkMissingError, ChunkAlteredError):
            return None
        data, signature = base64.b64decode(answer["manifest"]), bytes.fromhex(answer["signature"])
        return Origin(SignedManifest(data, str(answer["publisher"]), signature), code_trusted=bool(answer["code_trusted"]))

    async def model_key(self, digest: Digest) -> tuple[ModelKey, ModelContext] | None:
        """What opens a version; None: it is not encrypted. Raises: LockedModelError: the lab was given no key; ServiceUnavailableError."""
        answer = await self._ask("model_key", digest=digest)
        return None if answer is None else (ModelKey(bytes.fromhex(answer["key"])), ModelContext(answer["publisher"], answer["name"]))

    async def aclose(self) -> None:
        """Close the connections; a second call does nothing."""
        await self._close()
