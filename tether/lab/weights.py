"""A version's weights through a gateway: fetched when values are asked for, each blob checked against the manifest's digests.

Those of an encrypted version come decrypted, checked by the lab: of them the manifest has the digests of the ciphertext.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tether.client.exporting import checked_segment, is_encrypted
from tether.client.http import HttpClient
from tether.client.lab_client import LabClient
from tether.client.together import together
from tether.config import DataFolder
from tether.errors import ChunkAlteredError, MalformedManifestError
from tether.lab import loop
from tether.security.addresses import SCHEME
from tether.store.format.layout import slices
from tether.store.format.manifest import ArrayEntry, Manifest, Segment, digest_of, encode
from tether.types import Digest

if TYPE_CHECKING:
    from tether.store.hierarchy.zarr import Weights

__all__ = ["GatewayVersions", "open_weights"]

KEY_ENV: Final = "TETHER_API_KEY"
_AT_ONCE: Final = 4
"""Blobs under way: 16 MiB of memory."""
_KEPT_NBYTES: Final = 64 << 20
"""Blobs that are remembered: zarr's chunks and ours need not begin at the same bytes, and small tensors share a blob."""


def open_weights(client: LabClient, name: str, number: int, digest: Digest) -> Weights:
    """The weights of a version that a gateway has. Raises: what its manifest's fetching raises."""
    from tether.store.hierarchy.zarr import VersionStore  # zarr: 0.4 s, not for those who only call models

    return VersionStore(GatewayVersions(client, name, number), digest).weights


class GatewayVersions:
    """One version of a lab, as `tether.store.hierarchy.reading.Versions`.

    It pickles without the API key: where it is opened again, TETHER_API_KEY has to hold one if the gateway wants one; a lab elsewhere in
    the swarm is then reached with the identity of that machine's own data folder.
    """

    def __init__(self, client: LabClient, name: str, number: int) -> None:
        self._client, self._name, self._number = client, name, number
        self._sealed = False
        """Whether it is encrypted, as its manifest says, which is asked for first."""
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._nbytes_kept = 0
        self._lock = threading.Lock()

    @property
    def _identity(self) -> tuple[str, str, int]:
        return self._client.url, self._name, self._number

    def __eq__(self, value: object) -> bool:
        return isinstance(value, GatewayVersions) and self._identity == value._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __reduce__(self) -> tuple[Callable[..., GatewayVersions], tuple[str, str, int]]:
        return _reopen, self._identity

    def __repr__(self) -> str:
        return f"GatewayVersions({self._client.url!r}, '{self._name}:{self._number}')"

    def manifest(self, digest: Digest) -> Manifest:
        """Raises: ChunkAlteredError: the gateway's manifest is not the one of this digest; MalformedManifestError, LockedModelError."""
        answer = loop.run(self._client.manifest(self._name, self._number))
        self._sealed = is_encrypted(answer, digest)
        try:
            manifest = msgspec.convert(answer.get("manifest"), Manifest)
        except msgspec.ValidationError as error:
            raise MalformedManifestError(f"the gateway's manifest of {self._name}:{self._number} is not valid: {error}") from error
        if not self._sealed and digest_of(encode(manifest)) != digest:
            message = f"the gateway sent another manifest than that of {self._name}:{self._number}; `tether verify` finds the cause"
            raise ChunkAlteredError(message, digest, "manifest")
        return manifest

    def read_array(self, array: ArrayEntry, start: int, stop: int) -> bytes:
        """Raises: ChunkMissingError, ChunkAlteredError."""
        wanted = [(array.segments[index], piece) for index, piece in slices([each.nbytes for each in array.segments], start, stop)]
        parts = []
        for first in range(0, len(wanted), _AT_ONCE):
            window = wanted[first : first + _AT_ONCE]
            whole = loop.run(together(self._segment(segment, array.path) for segment, _ in window))
            parts += [data[piece.offset : piece.offset + piece.nbytes] for data, (_, piece) in zip(whole, window, strict=True)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _segment(self, segment: Segment, path: str) -> bytes:
        blob = self._recalled(segment.digest)
        if blob is None:
            blob = await self._client.get_blob(segment.digest, f"{self._name}:{self._number}" if self._sealed else None)
            self._keep(segment.digest, blob)
        return checked_segment(blob, segment, path, sealed=self._sealed)

    def _recalled(self, digest: str) -> bytes | None:
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
            return self._kept.get(digest)

    def _keep(self, digest: str, blob: bytes) -> None:
        with self._lock:
            self._nbytes_kept += len(blob) - len(self._kept.pop(digest, b""))
            self._kept[digest] = blob
            while self._nbytes_kept > _KEPT_NBYTES:
                self._nbytes_kept -= len(self._kept.popitem(last=False)[1])


def _reopen(url: str, name: str, number: int) -> Any:
    return GatewayVersions(_client_for(url), name, number)


def _client_for(url: str) -> LabClient:
    if url.startswith(SCHEME):
        from tether.client.peer import PeerClient  # the wire of the swarm: 30 ms, not for those who have a gateway

        return PeerClient(DataFolder.locate(), url)
    return HttpClient(url, os.environ.get(KEY_ENV))
