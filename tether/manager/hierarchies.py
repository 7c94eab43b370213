"""Versions as zarr hierarchies for those who read over HTTP: resolved, verified, a few megabytes at a time. Imports no zarr."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from tether.errors import NotFoundError
from tether.store import BLOB_NBYTES, ArrayEntry, LocalVersions, Repository
from tether.store.hierarchy.reading import VersionReader
from tether.store.hierarchy.zarr_keys import DOCUMENT, consolidated
from tether.types import Digest, ModelRef

__all__ = ["Hierarchies"]

T = TypeVar("T")
_READERS = 16
"""Versions whose manifests are kept parsed: one of 65,536 tensors has some 60 MB and takes 0.7 s."""
_DOCUMENTS = 16
"""Groups' descriptions with all that is below them that are kept: megabytes each at most, asked for in pieces."""


class Hierarchies:
    """Reads the zarr paths of one repository's versions. Any thread may call."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._versions = LocalVersions(repository)
        self._readers: _Recent[VersionReader] = _Recent(_READERS)
        self._documents: _Recent[bytes] = _Recent(_DOCUMENTS)
        self._users: _Recent[dict[Digest, ArrayEntry]] = _Recent(_READERS)

    def read(self, ref: str, path: str, start: int | None, nbytes: int) -> dict[str, Any]:
        """`nbytes` of a value, at most 4 MiB of them at once: from `start`, or the last ones (None); 0 gives its size only.

        The answer's `digest` is the version's, `nbytes` the whole value's, `start` where `data` begins in it.

        Raises: BadNameError, UnknownModelError and its kin: of the reference; NotFoundError: the version has no such path;
        ChunkMissingError, ChunkAlteredError.
        """
        reader = self._reader(ref)
        digest = reader.digest
        group = self._group(reader, path)
        size = len(group) if group is not None else reader.size(path)
        if size is None:
            raise NotFoundError(f"{ref} has nothing at {path[:200]!r}; its root's {DOCUMENT} lists its arrays", path)
        first = max(0, size - nbytes) if start is None else min(start, size)
        last = min(first + min(nbytes, BLOB_NBYTES), size)
        data = group[first:last] if group is not None else reader.read(path, lambda _: (first, last))
        return {"digest": digest, "nbytes": size, "start": first, "data": data}

    def blob(self, ref: str, digest: Digest) -> bytes:
        """A blob of a version, decrypted where the version is encrypted.

        Raises: BadNameError, UnknownModelError and its kin: of the reference; NotFoundError: the version has no such blob;
        LockedModelError, ChunkMissingError, ChunkAlteredError.
        """
        reader = self._reader(ref)
        array = self._users.get(reader.digest, lambda: _users(reader)).get(digest)
        if array is None:
            raise NotFoundError(f"{ref} has no blob {digest[:64]}; its manifest lists those that it has", digest[:64])
        return self._repository.read_plain_blob(array, digest)

    def _reader(self, ref: str) -> VersionReader:
        digest = self._repository.resolve(ModelRef.parse(ref)).digest
        return self._readers.get(digest, lambda: VersionReader(self._versions, digest))

    def _group(self, reader: VersionReader, path: str) -> bytes | None:
        """A group's description, if this is the path of one that follows from the files and tensors: with those of all below it."""
        folder, _, name = path.rpartition("/")
        if name != DOCUMENT or not reader.keys.is_group(folder):
            return None
        plain = reader.keys.find(path)
        if not isinstance(plain, bytes):  # the root that somebody wrote
            return None
        return self._documents.get((reader.digest, folder), lambda: consolidated(reader.keys, folder, plain))


def _users(reader: VersionReader) -> dict[Digest, ArrayEntry]:
    return {segment.digest: array for array in reader.manifest.arrays for segment in array.segments}


class _Recent(Generic[T]):
    """The values that were used last. Made outside of the lock: two who ask at once may make the same one twice."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            self._values[key] = made
            while len(self._values) > self._count:
                self._values.popitem(last=False)
        return made
