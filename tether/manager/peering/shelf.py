"""What this lab gives its peers: blobs, signed manifests and bitmaps of the versions that each of them may have."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import structlog

from tether.errors import (
    ChunkAlteredError,
    ChunkMissingError,
    ForbiddenError,
    MalformedManifestError,
    NotFoundError,
    ServiceUnavailableError,
    StoreError,
)
from tether.ports import SignedManifest
from tether.store import Repository, VersionRecord, decode
from tether.store.format.manifest import digest_of
from tether.swarm.blobs.blobs import Kind
from tether.swarm.wire.bandwidth import TokenBucket
from tether.types import Digest

__all__ = ["RepositoryShelf"]

log = structlog.get_logger("tether.manager")
P = ParamSpec("P")
T = TypeVar("T")
_METHOD = "blobs"
_THREADS = 4
"""Blobs that are read at a time for all peers together: of full ones that is 16 MiB, and the disk gains nothing from more."""
_FRESH = 0.25
"""Seconds in which the catalog is taken to be what it was: asking it costs a thread's turn, for each of thousands of blobs a second."""
_VERSIONS, _BLOBS = 64, 100_000
"""Of which is remembered for each peer, which blobs they name: more than anybody fetches at a time, and 10 MB."""
_LEAST_VERSIONS = 4
"""That are remembered however many blobs they have."""
_PEERS = 256
_SEARCHED_AT_ONCE = 64
_SEARCHED_PER_SECOND = 2.0
"""Manifests that are read for a peer that asks for blobs of versions it did not ask for before: 64 at once, then two a second. A small one
takes a millisecond, and one that asks at random has us read all that there are."""
_MOST_RECORDS = 10_000
"""Versions of which is remembered what the catalog says, those that there are not among them."""


class Permits(Protocol):
    """`security.access.Access`, as far as it is needed here."""

    def may(self, peer: str, method: str, model: str | None = None) -> bool:
        """Whether it may; waits for nobody."""
        ...


class Index(dict[bytes, None]):
    """The blobs that one version names, in its order. A class of its own, since a plain dictionary can't be held weakly."""

    __slots__ = ("__weakref__",)


class RepositoryShelf:
    """`swarm.blobs.Shelf` over a repository. Access is asked each time, so that what is taken away ends at once. Belongs to one loop.

    A version is there under the names that the catalog has for it; one that is still coming (`arriving`), under the name that it will have.
    """

    def __init__(self, repository: Repository, access: Permits) -> None:
        self._repository, self._access = repository, access
        self._threads = ThreadPoolExecutor(_THREADS, "shelf")
        self._records: dict[Digest, list[VersionRecord]] = {}
        """What the catalog says of versions that were asked for, as of `_change`."""
        self._all: list[Digest] | None = None
        """All of them, the newest first, where it was asked for that."""
        self._change, self._looked = -1, float("-inf")
        self._arriving: dict[Digest, tuple[str, SignedManifest]] = {}
        self._indices: WeakValueDictionary[Digest, Index] = WeakValueDictionary()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        """Peer → what it asked for, the latest last."""

    def close(self) -> None:
        """End the threads, once they have read what they read now."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def arriving(self, name: str, signed: SignedManifest) -> Iterator[None]:
        """A version that comes in: what came of it is given to others who fetch it, too. `name`: of the model, as in a URL."""
        digest = digest_of(signed.data)
        mine = self._arriving[digest] = (name, signed)
        try:
            yield
        finally:
            if self._arriving.get(digest) is mine:
                del self._arriving[digest]

    # --- swarm.blobs.Shelf

    async def authorise(self, peer: str, kind: Kind, digest: Digest) -> None:
        """As the protocol says. Raises: NotFoundError: it is not here, or not for this key; ForbiddenError: nothing is."""
        if not self._access.may(peer, _METHOD):
            raise ForbiddenError("this key may have no model: ask the lab to allow it (`tether allow KEY --scope replicate:NAME`)")
        if not await self._may(peer, kind, digest):
            raise NotFoundError("there is nothing of this digest that this key may have")

    async def blob(self, digest: Digest) -> bytes | None:
        """As the protocol says; of an encrypted version the ciphertext."""
        return await self._in_thread(self._read, digest)

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """As the protocol says."""
        coming = self._arriving.get(digest)
        return coming[1] if coming else await self._in_thread(self._signed, digest)

    async def bitmap(self, digest: Digest) -> bytes | None:
        """As the protocol says; of a version that is coming, what came."""
        index = await self._index(digest)
        return None if index is None else await self._in_thread(self._bitmap, index, staged=digest in self._arriving)

    # --- who may have what

    async def _may(self, peer: str, kind: Kind, digest: Digest) -> bool:
        await self._refresh()
        if kind is not Kind.BLOB:
            if not await self._may_have(peer, digest):
                return False
            await self._remember(peer, digest)
            return True
        raw, known = bytes.fromhex(digest), self._known_to(peer)
        for version in [version for version, index in known.versions.items() if raw in index]:
            if await self._may_have(peer, version):
                known.versions.move_to_end(version)
                return True
        return await self._search(peer, known, raw, digest)

    async def _may_have(self, peer: str, version: Digest) -> bool:
        """Whether a version is here under a name that opens it for the peer."""
        coming = self._arriving.get(version)
        if coming is not None and self._access.may(peer, _METHOD, coming[0]):
            return True
        known = self._records  # of this state of the catalog: there may be another one when the answer is here
        records = known.get(version)
        if records is None:
            records = await self._in_thread(self._repository.versions_of, version)
            if len(known) >= _MOST_RECORDS:
                known.clear()
            known[version] = records
        return any(self._access.may(peer, _METHOD, record.name) for record in records)

    async def _refresh(self) -> None:
        """Forget what the catalog said if it says something else now."""
        now = asyncio.get_running_loop().time()
        if now - self._looked < _FRESH:
            return
        change = await self._in_thread(self._repository.change_count)
        if change != self._change:
            self._records, self._all = {}, None
        self._change, self._looked = change, now

    def _known_to(self, peer: str) -> _Known:
        known = self._known.pop(peer, None) or _Known()
        self._known[peer] = known
        if len(self._known) > _PEERS:
            self._known.popitem(last=False)
        return known

    async def _remember(self, peer: str, version: Digest) -> None:
        """The peer will ask for blobs of this version."""
        known = self._known_to(peer)
        if version in known.versions:
            known.versions.move_to_end(version)
            return
        index = await self._index(version)
        if index is not None:
            known.add(version, index)

    async def _index(self, version: Digest) -> Index | None:
        """The blobs that a version names; None: its manifest is not whole."""
        index = self._indices.get(version)
        if index is None:
            coming = self._arriving.get(version)
            index = await self._in_thread(self._indexed, version, coming[1].data if coming else None)
            if index is not None:
                self._indices[version] = index
        return index

    async def _search(self, peer: str, known: _Known, raw: bytes, digest: Digest) -> bool:
        """Look for a blob in what else the peer may have: it may go on where it stopped, before we were started again.

        Few ask so, none of ours: nothing is read for what is not here at all, and little for one who does it often.
        """
        if not await self._in_thread(self._repository.stored, [digest]) or not known.may_search():
            return False
        for version in await self._newest():
            index = known.versions.get(version)
            if index is None and await self._may_have(peer, version):
                if not known.may_search():
                    return False
                index = await self._index(version)
                if index is not None:
                    known.add(version, index)
            if index is not None and raw in index and await self._may_have(peer, version):
                return True
        return False

    async def _newest(self) -> list[Digest]:
        """All versions. What the catalog says of them is known then."""
        if self._all is None:
            models = await self._in_thread(self._repository.models)
            records = sorted((version for model in models for version in model.versions), key=lambda record: -record.created)
            found: dict[Digest, list[VersionRecord]] = {}
            for record in records:
                found.setdefault(record.digest, []).append(record)
            self._records, self._all = found, list(found)
        return self._all

    # --- in threads

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **kwargs))
        except StoreError as error:  # it names folders of this host, which are no peer's business
            log.warning("what a peer asked for can't be read", error=str(error))
            raise ServiceUnavailableError("it can't be read now: ask another peer") from error

    def _read(self, digest: Digest) -> bytes | None:
        try:
            return self._repository.read_blob(digest)
        except ChunkMissingError:
            return self._repository.staged_blob(digest)
        except ChunkAlteredError as error:
            log.warning("a damaged blob is not given to peers: `tether repair` mends it", blob=digest, error=str(error))
            return None

    def _signed(self, digest: Digest) -> SignedManifest | None:
        data = self._manifest(digest)
        for record in self._repository.versions_of(digest) if data is not None else ():
            signature = self._repository.signature(digest, record.publisher)
            if data is not None and signature is not None:
                return SignedManifest(data, record.publisher, signature)
        return None

    def _bitmap(self, index: Index, *, staged: bool) -> bytes:
        blobs = [Digest(raw.hex()) for raw in index]
        here = set(blobs).difference(self._repository.missing(blobs)) if staged else self._repository.stored(blobs)
        flags = np.fromiter((digest in here for digest in blobs), np.bool_, len(blobs))
        return np.packbits(flags, bitorder="little").tobytes()

    def _manifest(self, digest: Digest) -> bytes | None:
        """Its bytes, if they are here and whole."""
        try:
            return self._repository.manifest_bytes(digest)
        except ChunkMissingError:
            return None
        except ChunkAlteredError as error:
            log.warning("a damaged manifest is not given to peers: `tether repair` mends it", digest=digest, error=str(error))
            return None

    def _indexed(self, digest: Digest, coming: bytes | None) -> Index | None:
        data = self._manifest(digest) if coming is None else coming
        try:
            return None if data is None else Index(dict.fromkeys(map(bytes.fromhex, decode(data).blobs())))
        except MalformedManifestError:  # of an earlier time, or a later one
            return None


class _Known:
    """The versions that one peer asked for, the latest last."""

    def __init__(self) -> None:
        self.versions: OrderedDict[Digest, Index] = OrderedDict()
        self._searching = TokenBucket(_SEARCHED_PER_SECOND, _SEARCHED_AT_ONCE)
        self._nblobs = 0

    def add(self, version: Digest, index: Index) -> None:
        if version not in self.versions:
            self.versions[version] = index
            self._nblobs += len(index)
        while len(self.versions) > _VERSIONS or (self._nblobs > _BLOBS and len(self.versions) > _LEAST_VERSIONS):
            self._nblobs -= len(self.versions.popitem(last=False)[1])

    def may_search(self) -> bool:
        """Whether one more manifest is read for it now."""
        if self._searching.take(1, asyncio.get_running_loop().time()) > 0:
            self._searching.give_back(1)
            return False
        return True
