"""A version as a read-only zarr v3 store, its weights as zarr arrays. Importing it imports zarr and makes it know bfloat16 and float8."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from tether.store.format.manifest import Manifest
from tether.store.hierarchy import dtypes
from tether.store.hierarchy.reading import LocalVersions, Span, VersionReader, Versions
from tether.store.hierarchy.zarr_keys import Chunk, node_of
from tether.store.repository import Repository
from tether.types import Digest

if TYPE_CHECKING:
    from typing import Self

__all__ = ["VersionStore", "Weights", "open_array", "open_group", "span_of"]

dtypes.register()


class VersionStore(Store):
    """One version, opened by its manifest's digest. Pickles as (where it is read from, digest); equal where these are.

    A chunk that is missing or altered raises ChunkMissingError or ChunkAlteredError, naming the blob and the path; zarr's `None`, which it
    would fill with zeros, is only the answer for keys that the version does not have. A chunk's blobs are verified at each read.
    """

    supports_writes = False
    supports_deletes = False
    supports_partial_writes = False
    supports_listing = True
    supports_consolidated_metadata = False  # zarr would look for it; every description is at hand here

    def __init__(self, versions: Versions | Repository, digest: Digest) -> None:
        """Raises: ChunkMissingError, ChunkAlteredError: of the manifest."""
        super().__init__(read_only=True)
        self._reader = VersionReader(LocalVersions(versions) if isinstance(versions, Repository) else versions, digest)

    def __eq__(self, value: object) -> bool:
        return isinstance(value, VersionStore) and self._identity == value._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __reduce__(self) -> tuple[Callable[..., VersionStore], tuple[Versions, Digest]]:
        return type(self), self._identity

    def __repr__(self) -> str:
        return f"VersionStore({self._reader.versions!r}, {self.digest[:12]})"

    @property
    def _identity(self) -> tuple[Versions, Digest]:
        return self._reader.versions, self._reader.digest

    @property
    def digest(self) -> Digest:
        """Of the manifest."""
        return self._reader.digest

    @property
    def manifest(self) -> Manifest:
        return self._reader.manifest

    @property
    def nbytes_read(self) -> int:
        """Bytes of files and weights that were read through this store."""
        return self._reader.nbytes_read

    @property
    def weights(self) -> Weights:
        """The weights by the names that the framework gave them; opening one reads none of its values."""
        return Weights(self)

    def with_read_only(self, read_only: bool = False) -> Self:
        """Another one, not open yet. Raises: ValueError: for `read_only=False`; a version never changes."""
        if not read_only:
            raise ValueError("a version is read-only: publish a new one")
        return type(self)(*self._identity)

    # --- reading

    def get_sync(self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value, or the range of it, verified; None where the version has no such key. Raises: ChunkMissingError, ChunkAlteredError."""
        data = self._reader.read(key, span_of(byte_range))
        return None if data is None else (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """As `get_sync`, in a thread: reading and hashing 4 MiB takes milliseconds."""
        if not self._is_open:
            await self._open()
        if isinstance(self._reader.keys.find(key), Chunk):
            return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)
        return self.get_sync(key, prototype=prototype, byte_range=byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    def get_ranges_sync(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        *,
        prototype: BufferPrototype,
        **_limits: int,
    ) -> Sequence[tuple[int, Buffer | None]]:
        """Several ranges of one value, as zarr ≥ 3.3 asks for them: no blob is read twice, none for the gap between two ranges.

        Raises: BaseExceptionGroup: around FileNotFoundError: no such key (zarr's contract).
        """
        parts = self._reader.read_many(key, [span_of(byte_range) for byte_range in byte_ranges])
        if parts is None:
            raise BaseExceptionGroup("no such key", [FileNotFoundError(key)])
        return [(index, prototype.buffer.from_bytes(part)) for index, part in enumerate(parts)]

    async def get_ranges(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        *,
        prototype: BufferPrototype,
        **limits: int,
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """As `get_ranges_sync`, in a thread, all in one batch."""
        yield await asyncio.to_thread(self.get_ranges_sync, key, byte_ranges, prototype=prototype, **limits)

    async def exists(self, key: str) -> bool:
        return key in self._reader.keys

    async def getsize(self, key: str) -> int:
        """Raises: FileNotFoundError: no such key (zarr's contract)."""
        size = self._reader.size(key)
        if size is None:
            raise FileNotFoundError(key)
        return size

    # --- listing

    async def list(self) -> AsyncIterator[str]:
        for key in self._reader.keys.under(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        folder, _, name = prefix.rpartition("/")
        for key in self._reader.keys.under(folder, name):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in self._reader.keys.children(prefix.rstrip("/")):
            yield name

    # --- writing, which a version does not allow

    def _refuse(self) -> NoReturn:
        raise ValueError("store was opened in read-only mode and does not support writing")

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002 (zarr's signature)
        self._refuse()

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:  # noqa: ARG002
        self._refuse()

    async def delete(self, key: str) -> None:  # noqa: ARG002
        self._refuse()

    async def delete_dir(self, prefix: str) -> None:  # noqa: ARG002
        self._refuse()

    async def clear(self) -> None:
        self._refuse()


class Weights(Mapping[str, zarr.Array[Any]]):
    """A version's weights: name → zarr array, made when it is asked for. `repr` tells how many there are, iterating gives their names."""

    def __init__(self, store: VersionStore) -> None:
        self.store = store
        self._nodes = store._reader.weights  # noqa: SLF001 (its other half)

    def __getitem__(self, name: str) -> zarr.Array[Any]:
        """Raises: KeyError: the version has no such weight."""
        return zarr.open_array(self.store, path=self._nodes[name], mode="r", zarr_format=3)

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        return f"Weights({len(self)} of {self.store.digest[:12]})"

    @property
    def nbytes_read(self) -> int:
        """Bytes that were read through the store of these."""
        return self.store.nbytes_read


def open_group(versions: Versions | Repository, digest: Digest) -> zarr.Group:
    """The version as a zarr group; its attribute `tether` holds framework, entry, info and the manifest's own attributes."""
    return zarr.open_group(VersionStore(versions, digest), mode="r", zarr_format=3)


def open_array(versions: Versions | Repository, digest: Digest, path: str) -> zarr.Array[Any]:
    """One array of a version by the manifest's path: `files/model.onnx`. Reading it reads nothing else."""
    return zarr.open_array(VersionStore(versions, digest), path=node_of(path), mode="r", zarr_format=3)


def span_of(byte_range: ByteRequest | None) -> Span:
    """What zarr means by a range. Raises: ValueError: it is none of zarr's."""
    match byte_range:
        case None:
            return lambda size: (0, size)
        case RangeByteRequest(start, end):
            return lambda size: (min(start, size), max(min(start, size), min(end, size)))
        case OffsetByteRequest(offset):
            return lambda size: (min(offset, size), size)
        case SuffixByteRequest(suffix):
            return lambda size: (max(0, size - suffix), size)
    raise ValueError(f"Unexpected byte_range, got {byte_range}.")
