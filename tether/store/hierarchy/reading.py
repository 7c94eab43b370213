"""Reads a version by zarr's keys, verified, without zarr: for the store class, and for the manager's HTTP."""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from tether.errors import UnsupportedError
from tether.store.format.manifest import ArrayEntry, Manifest
from tether.store.format.weights import tensor_name
from tether.store.hierarchy.zarr_keys import DOCUMENT, Chunk, VersionKeys, node_of, with_attribute
from tether.store.repository import Repository
from tether.types import Digest

__all__ = ["LocalVersions", "Span", "VersionReader", "Versions", "whole"]

Span = Callable[[int], tuple[int, int]]
"""From a value's size to the range of it that is wanted: 0 ≤ start ≤ stop ≤ size."""


class Versions(Hashable, Protocol):
    """Where versions come from: this disk, the manager, peers. Equal ones read the same; they pickle; any thread may call them."""

    def manifest(self, digest: Digest) -> Manifest:
        """What a version is made of. Raises: ChunkMissingError, ChunkAlteredError."""
        ...

    def read_array(self, array: ArrayEntry, start: int, stop: int) -> bytes:
        """The verified bytes [start, stop) of an array, reading no blobs but those that hold them.

        Raises: ChunkMissingError, ChunkAlteredError.
        """
        ...


class LocalVersions:
    """The versions of a repository on this disk. Equal where the folder is the same; what is unpickled opens it for reading only."""

    def __init__(self, repository: Repository) -> None:
        self.root = repository.root
        self.manifest = repository.manifest
        self.read_array = repository.read_array

    def __eq__(self, value: object) -> bool:
        return isinstance(value, LocalVersions) and self.root == value.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __reduce__(self) -> tuple[Callable[[Path], LocalVersions], tuple[Path]]:
        return _reopen, (self.root,)

    def __repr__(self) -> str:
        return f"LocalVersions({str(self.root)!r})"


_reopened: weakref.WeakValueDictionary[tuple[int, Path], LocalVersions] = weakref.WeakValueDictionary()
_reopening = threading.Lock()


def _reopen(root: Path) -> LocalVersions:
    """One opening for all that a process unpickles (Dask does for each task); it ends with the last of them."""
    where = os.getpid(), root
    with _reopening:
        versions = _reopened.get(where)
        if versions is None:
            repository = Repository.open(root, read_only=True)
            versions = _reopened[where] = LocalVersions(repository)
            weakref.finalize(versions, repository.close)
        return versions


class VersionReader:
    """One version's values, for any thread."""

    def __init__(self, versions: Versions, digest: Digest) -> None:
        """Raises: ChunkMissingError, ChunkAlteredError: of the manifest; UnsupportedError: `versions` gives it encrypted."""
        self.versions = versions
        self.digest = digest
        self.manifest = versions.manifest(digest)
        if self.manifest.encryption is not None:  # its arrays are ciphertext, and would be read as if they were weights
            raise UnsupportedError(f"version {digest[:12]} is encrypted and its key is not here: read it where the key is")
        self.keys = VersionKeys(self.manifest)
        self.nbytes_read = 0
        """Bytes of files, weights and written keys that were asked for."""
        self._lock = threading.Lock()

    @cached_property
    def weights(self) -> dict[str, str]:
        """Name of each weight → its zarr path."""
        return {tensor_name(array): node_of(array.path) for array in self.manifest.tensors()}

    def read(self, key: str, span: Span | None = None) -> bytes | None:
        """The value, or a part of it; None: the version has no such key. Raises: ChunkMissingError, ChunkAlteredError."""
        value = self._value(key)
        if value is None:
            return None
        start, stop = (span or whole)(_size(value))
        return value[start:stop] if isinstance(value, bytes) else self._bytes(value, start, stop)

    def read_many(self, key: str, spans: Sequence[Span]) -> list[bytes] | None:
        """Several parts of one value: a blob that more than one of them touches is read once, one that none touches is not read."""
        value = self._value(key)
        if value is None:
            return None
        ranges = [span(_size(value)) for span in spans]
        if isinstance(value, bytes):
            return [value[start:stop] for start, stop in ranges]
        parts: list[bytes] = [b""] * len(ranges)
        for start, stop, members in _together(value, ranges):
            data = self._bytes(value, start, stop)
            for index in members:
                low, high = ranges[index]
                parts[index] = data[low - start : high - start]
        return parts

    def size(self, key: str) -> int | None:
        """Bytes of the value; None: no such key."""
        value = self._value(key)
        return None if value is None else _size(value)

    def _value(self, key: str) -> bytes | Chunk | None:
        value = self.keys.find(key)
        if key == DOCUMENT and isinstance(value, Chunk):
            return with_attribute(self._bytes(value, value.start, value.stop), self.keys.root())
        return value

    def _bytes(self, chunk: Chunk, start: int, stop: int) -> bytes:
        first, last = min(chunk.start + start, chunk.stop), min(chunk.start + stop, chunk.stop)
        data = self.versions.read_array(chunk.array, first, last) if first < last else b""
        with self._lock:
            self.nbytes_read += len(data)
        return data.ljust(stop - start, b"\0")


def whole(size: int) -> tuple[int, int]:
    """All of a value."""
    return 0, size


def _size(value: bytes | Chunk) -> int:
    return len(value) if isinstance(value, bytes) else value.nbytes


def _together(chunk: Chunk, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, list[int]]]:
    """Ranges of which one touches a segment that the next touches too, joined: start, stop, and which they are."""
    ends = list(accumulate(segment.nbytes for segment in chunk.array.segments))
    members: list[int] = []
    start = stop = touched = 0
    for index in sorted(range(len(ranges)), key=ranges.__getitem__):
        low, high = ranges[index]
        if members and bisect_right(ends, chunk.start + low) > touched:
            yield start, stop, members
            members = []
        start, stop = (start, max(stop, high)) if members else (low, high)
        touched = bisect_left(ends, chunk.start + stop)
        members.append(index)
    if members:
        yield start, stop, members
