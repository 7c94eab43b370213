"""The contract of a source of blobs, as tests to inherit, and a source in memory that can be slow, forgetful, dishonest or cut off.

Subclass `BlobSourceSuite` and open your source over the store that it is given:

    class TestMine(BlobSourceSuite):
        @asynccontextmanager
        async def open_source(self, repository): ...

The tests are coroutines: run them with pytest-asyncio, `asyncio_mode = "auto"`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from tether.errors import ServiceUnavailableError, UnavailableError
from tether.ports import BlobSource, SignedManifest
from tether.security.identity import Identity
from tether.store import Manifest, Repository, encode, signed_message
from tether.store.replicas.replicated import Replicated
from tether.types import Digest, ModelInfo

__all__ = ["BlobSourceSuite", "MemoryBlobSource", "publish_bytes"]

_MIB = 1 << 20
_PATIENCE = 20.0
_PUBLISHER = Identity(bytes(range(7, 39)))
_INFO = ModelInfo("onnx", "onnx", (), (), batched=True, pure=True, code=False)


@dataclass(eq=False)
class MemoryBlobSource:
    """A source over dictionaries. Its switches may be turned at any time, by any thread."""

    blobs: dict[Digest, bytes] = field(default_factory=dict)
    manifests: dict[Digest, SignedManifest] = field(default_factory=dict)
    name: str = "memory"
    in_flight: int = 8
    delay: float = 0.0
    """Seconds before each answer."""
    nbytes_per_second: float = float("inf")
    """Of all answers together."""
    loses: Callable[[Digest], bool] = field(default=lambda _: False)
    """Which blobs it does not have after all."""
    lies: Callable[[Digest], bool] = field(default=lambda _: False)
    """Of which blobs it gives other bytes."""
    stalls: Callable[[Digest], bool] = field(default=lambda _: False)
    """For which blobs it never answers."""
    gone: bool = False
    """Whether nothing answers any more."""
    drops: int = 0
    """How many of the next answers break off in the middle."""
    asked: list[Digest] = field(default_factory=list)
    """Every blob that it was asked for, in order."""
    cancelled: int = 0
    """Calls that the other side took back."""
    given_nbytes: int = 0
    closed: bool = False
    _free: float = 0.0
    """When the line is free again."""

    @classmethod
    def of(cls, repository: Repository, name: str = "memory", in_flight: int = 8) -> MemoryBlobSource:
        """All versions of a store."""
        source = cls(name=name, in_flight=in_flight)
        for record in (version for model in repository.models() for version in model.versions):
            signature = repository.signature(record.digest, record.publisher) or b""
            source.manifests[record.digest] = SignedManifest(repository.manifest_bytes(record.digest), record.publisher, signature)
            for digest in repository.public_manifest(record.digest).blobs():
                source.blobs[digest] = repository.read_blob(digest)
        return source

    async def fetch(self, digest: Digest, nbytes: int) -> bytes | None:
        """As the switches say."""
        del nbytes
        self.asked.append(digest)
        try:
            return await self._fetched(digest)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _fetched(self, digest: Digest) -> bytes | None:
        await asyncio.sleep(self.delay)
        if self.gone:
            raise ServiceUnavailableError(f"{self.name} does not answer")
        if self.stalls(digest):
            await asyncio.get_running_loop().create_future()
        data = self.blobs.get(digest)
        if data is None or self.loses(digest):
            return None
        if self.drops:
            self.drops -= 1
            await self._sent(len(data) // 2)
            raise ServiceUnavailableError(f"the connection to {self.name} was lost in the middle of a blob")
        await self._sent(len(data))
        self.given_nbytes += len(data)
        return bytes([data[0] ^ 1]) + data[1:] if self.lies(digest) else data

    async def _sent(self, nbytes: int) -> None:
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now) + nbytes / self.nbytes_per_second
        if self._free > now:
            await asyncio.sleep(self._free - now)

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """The manifest, after the delay; one in bytes that differ where it lies of the digest."""
        await asyncio.sleep(self.delay)
        if self.gone:
            raise ServiceUnavailableError(f"{self.name} does not answer")
        if self.stalls(digest):
            await asyncio.get_running_loop().create_future()
        found = self.manifests.get(digest)
        if found is None or self.loses(digest):
            return None
        return SignedManifest(found.data + b" ", found.publisher, found.signature) if self.lies(digest) else found

    async def aclose(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def publish_bytes(repository: Repository, files: dict[str, bytes], name: str = "digits") -> Digest:
    """Make a version of files in memory; gives its manifest's digest. Its framework says ONNX, its bytes are whatever they are."""
    arrays = tuple(repository.add_bytes(path, data) for path, data in files.items())
    data = encode(Manifest(framework="onnx", entry=next(iter(files)), info=_INFO, arrays=arrays))
    return repository.publish(name, data, _PUBLISHER.public, _PUBLISHER.sign(signed_message(data))).digest


class BlobSourceSuite:
    """What every source promises (`tether.ports.BlobSource`)."""

    files: ClassVar[dict[str, bytes]] = {
        "model.onnx": bytes(range(251)) * 400,
        "weights/small.bin": b"small",
        "weights/big.bin": b"\x07" * (4 * _MIB) + b"end",
    }
    """The model that the source is opened over: several blobs, the largest of them full ones of 4 MiB."""

    def open_source(self, repository: Repository) -> AbstractAsyncContextManager[BlobSource]:
        """Your source over the versions of the repository; when it ends, what serves it may end too."""
        raise NotImplementedError

    async def cut_off(self, source: BlobSource) -> None:
        """End what answers the source, so that its next calls find nobody."""
        raise NotImplementedError

    @pytest.fixture
    def origin(self, tmp_path: Path) -> Iterator[Repository]:
        """A store with one version."""
        with Repository.open(tmp_path / "origin", own=_PUBLISHER.public) as repository:
            publish_bytes(repository, self.files)
            yield repository

    @pytest.fixture
    async def source(self, origin: Repository) -> AsyncIterator[BlobSource]:
        """The source over it."""
        async with self.open_source(origin) as source:
            yield source
            await source.aclose()

    @pytest.fixture
    def version(self, origin: Repository) -> Digest:
        """The digest of its manifest."""
        ((record,),) = (model.versions for model in origin.models())
        return record.digest

    async def test_every_blob_comes_with_its_bytes(self, source: BlobSource, origin: Repository, version: Digest) -> None:
        """Small ones and the largest."""
        for digest in origin.manifest(version).blobs():
            expected = origin.read_blob(digest)
            assert await source.fetch(digest, len(expected)) == expected

    async def test_a_blob_and_a_version_that_it_lacks_are_none_and_no_error(self, source: BlobSource) -> None:
        """So the next source is asked at once."""
        assert await source.fetch(Digest("0" * 64), 1) is None
        assert await source.manifest(Digest("0" * 64)) is None

    async def test_a_version_comes_as_it_was_signed(self, source: BlobSource, origin: Repository, version: Digest) -> None:
        """Byte for byte, with publisher and signature."""
        found = await source.manifest(version)
        assert found is not None
        assert (found.data, found.publisher) == (origin.manifest_bytes(version), _PUBLISHER.public)
        assert found.signature == origin.signature(version, _PUBLISHER.public)

    async def test_calls_at_the_same_time_each_get_their_own(self, source: BlobSource, origin: Repository, version: Digest) -> None:
        """As many as it says it takes, and more."""
        digests = [digest for digest in origin.manifest(version).blobs() for _ in range(source.in_flight)]
        found = await asyncio.gather(*(source.fetch(digest, 1) for digest in digests))
        assert [len(data or b"") for data in found] == [len(origin.read_blob(digest)) for digest in digests]

    async def test_a_call_that_is_cancelled_disturbs_no_other(self, source: BlobSource, origin: Repository, version: Digest) -> None:
        """It is taken back, and the source goes on."""
        digest = origin.manifest(version).blobs()[0]
        calls = [asyncio.create_task(source.fetch(digest, 1)) for _ in range(4)]
        await asyncio.sleep(0)
        calls[0].cancel()
        calls[2].cancel()
        first, second, third, fourth = await asyncio.gather(*calls, return_exceptions=True)
        assert second == fourth == origin.read_blob(digest)
        assert isinstance(first, asyncio.CancelledError)
        assert isinstance(third, asyncio.CancelledError)

    async def test_it_has_a_name_and_takes_at_least_one_call(self, source: BlobSource) -> None:
        """For errors and for who plans."""
        assert source.name.strip()
        assert source.in_flight >= 1

    async def test_a_source_that_is_cut_off_says_that_it_does_not_answer(
        self, source: BlobSource, origin: Repository, version: Digest
    ) -> None:
        """With an error that means: try again. Never None, which means that it lacks the blob."""
        digest = origin.manifest(version).blobs()[0]
        assert await source.fetch(digest, 1)
        await self.cut_off(source)
        async with asyncio.timeout(_PATIENCE):
            answers = await asyncio.gather(source.fetch(digest, 1), source.manifest(version), return_exceptions=True)
        assert [isinstance(answer, UnavailableError) for answer in answers] == [True, True], answers

    async def test_closing_twice_does_nothing(self, source: BlobSource) -> None:
        """Nor does closing what was never used."""
        await source.aclose()
        await source.aclose()

    async def test_a_replica_is_made_of_it(self, source: BlobSource, version: Digest, tmp_path: Path) -> None:
        """Through `Replicated`, which uses it on a loop of its own."""
        with Repository.open(tmp_path / "replica") as replica, Replicated(replica, [source]) as replicated:
            await replicated.areplicate(version, "digits")
            folder = await replicated.acheckout(version)
            assert {name: (folder / name).read_bytes() for name in self.files} == self.files
            assert not replica.verify().problems
