"""A version as a read-only zarr v3 store: zarr's keys to verified bytes. The only module that imports zarr."""

from __future__ import annotations

import asyncio
import json
import math
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from tether.store.layout import DTYPES, chunk_shape, node_name
from tether.store.manifest import ArrayEntry, Manifest
from tether.store.repository import Repository
from tether.types import Digest

if TYPE_CHECKING:
    from typing import Self

__all__ = ["VersionStore", "open_array", "open_group"]


class _Chunk(NamedTuple):
    """A range of an array's bytes; zarr wants the last chunk as long as the others."""

    array: ArrayEntry
    start: int
    stop: int
    nbytes: int


_Value = bytes | _Chunk


class VersionStore(Store):
    """One version, opened by its manifest's digest. Pickles as (folder, digest); equal where these are.

    A chunk that is missing or altered raises ChunkMissingError or ChunkAlteredError, naming the blob and the path; zarr's `None`, which it
    would fill with zeros, is only the answer for keys that the version does not have. A chunk's blobs are verified at each read.
    """

    supports_writes = False
    supports_deletes = False
    supports_partial_writes = False
    supports_listing = True

    def __init__(self, repository: Repository, digest: Digest) -> None:
        """Raises: ChunkMissingError, ChunkAlteredError: of the manifest."""
        super().__init__(read_only=True)
        self._repository = repository
        self._digest = digest
        self._values = _values(repository.manifest(digest))

    def __eq__(self, value: object) -> bool:
        return isinstance(value, VersionStore) and (self._repository.root, self._digest) == (value._repository.root, value._digest)

    def __hash__(self) -> int:
        return hash((self._repository.root, self._digest))

    def __reduce__(self) -> tuple[Callable[[Path, Digest], VersionStore], tuple[Path, Digest]]:
        return _reopen, (self._repository.root, self._digest)

    def __repr__(self) -> str:
        return f"VersionStore({str(self._repository.root)!r}, {self._digest[:12]})"

    def with_read_only(self, read_only: bool = False) -> Self:
        """Another one, not open yet. Raises: ValueError: for `read_only=False`; a version never changes."""
        if not read_only:
            raise ValueError("a version is read-only: publish a new one")
        return type(self)(self._repository, self._digest)

    # --- reading

    def get_sync(self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value, or the range of it, verified; None where the version has no such key. Raises: ChunkMissingError, ChunkAlteredError."""
        value = self._values.get(key)
        if value is None:
            return None
        start, stop = _range(len(value) if isinstance(value, bytes) else value.nbytes, byte_range)
        data = value[start:stop] if isinstance(value, bytes) else self._read(value, start, stop)
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    def _read(self, chunk: _Chunk, start: int, stop: int) -> bytes:
        data = self._repository.read_array(chunk.array, min(chunk.start + start, chunk.stop), min(chunk.start + stop, chunk.stop))
        return data.ljust(stop - start, b"\0")

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """As `get_sync`, in a thread: reading and hashing 4 MiB takes milliseconds."""
        if not self._is_open:
            await self._open()
        if isinstance(self._values.get(key), _Chunk):
            return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)
        return self.get_sync(key, prototype=prototype, byte_range=byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self._values

    async def getsize(self, key: str) -> int:
        """Raises: FileNotFoundError: no such key (zarr's contract)."""
        value = self._values.get(key)
        if value is None:
            raise FileNotFoundError(key)
        return len(value) if isinstance(value, bytes) else value.nbytes

    # --- listing

    async def list(self) -> AsyncIterator[str]:
        for key in self._values:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._values:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
        for name in dict.fromkeys(key.removeprefix(folder).partition("/")[0] for key in self._values if key.startswith(folder)):
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


def open_group(repository: Repository, digest: Digest) -> zarr.Group:
    """The version as a zarr group; its attributes hold framework, entry, info and the manifest's own attributes."""
    return zarr.open_group(VersionStore(repository, digest), mode="r", zarr_format=3)


def open_array(repository: Repository, digest: Digest, path: str) -> zarr.Array[Any]:
    """One array of a version by the manifest's path: `files/model.onnx`. Reading it reads nothing else."""
    return zarr.open_array(VersionStore(repository, digest), path=node_name(path), mode="r", zarr_format=3)


def _reopen(root: Path, digest: Digest) -> VersionStore:
    repository = Repository.open(root, read_only=True)
    # Nobody else knows this opening: it ends with the last store and array that use it.
    store = VersionStore(repository, digest)
    weakref.finalize(store, repository.close)
    return store


def _range(size: int, byte_range: ByteRequest | None) -> tuple[int, int]:
    match byte_range:
        case None:
            return 0, size
        case RangeByteRequest(start, end):
            return min(start, size), max(min(start, size), min(end, size))
        case OffsetByteRequest(offset):
            return min(offset, size), size
        case SuffixByteRequest(suffix):
            return max(0, size - suffix), size
    raise ValueError(f"Unexpected byte_range, got {byte_range}.")


def _values(manifest: Manifest) -> dict[str, _Value]:
    """Every key of the version: groups, arrays, chunks."""
    described = {name: msgspec.to_builtins(getattr(manifest, name)) for name in ("framework", "entry", "info", "attributes")}
    values: dict[str, _Value] = {"zarr.json": _group(described)}
    for array in manifest.arrays:
        node = node_name(array.path)
        parents = node.split("/")[:-1]
        for depth in range(len(parents)):
            values.setdefault("/".join([*parents[: depth + 1], "zarr.json"]), _group({}))
        values |= _array_values(node, array)
    return values


def _group(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def _array_values(node: str, array: ArrayEntry) -> dict[str, _Value]:
    chunks = chunk_shape(array.shape, DTYPES[array.dtype])
    values: dict[str, _Value] = {f"{node}/zarr.json": _array(array, chunks)}
    nbytes = DTYPES[array.dtype] * math.prod(chunks)
    counts = [math.ceil(extent / chunk) for extent, chunk in zip(array.shape, chunks, strict=True)]
    for index in product(*map(range, counts)):
        start = nbytes * (index[0] if index else 0)
        key = "/".join([node, "c", *map(str, index)])
        values[key] = _Chunk(array, start, min(start + nbytes, array.nbytes), nbytes)
    return values


def _array(array: ArrayEntry, chunks: tuple[int, ...]) -> bytes:
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if array.dtype == "bool" else 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}} if DTYPES[array.dtype] > 1 else {"name": "bytes"}],
        "attributes": {},
    }
    return json.dumps(document).encode()
