"""Weights in memory: read-only arrays over the pack itself, each blob verified in this call; the model is not copied.

A tensor whose bytes are one range of one pack is mapped in place; any other is copied to anonymous memory, while it is verified. An
encrypted one is decrypted there: its tags are checked in place of the digests.
"""

from __future__ import annotations

import mmap
import resource
from collections import Counter, deque
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tether.errors import NotFoundError
from tether.store.format import packs
from tether.store.format.encrypted import vault_of
from tether.store.format.layout import FILES
from tether.store.format.manifest import ArrayEntry, Manifest
from tether.store.format.packs import Location
from tether.store.format.weights import tensor_name
from tether.store.packing.blobs import Blobs, plain_into, too_short
from tether.store.packing.disk import disk_errors
from tether.store.packing.pack_files import mapped
from tether.store.packing.parallel import buffer, in_batches, new_memory, threads_for
from tether.types import Array, Digest

__all__ = ["file_array", "tensor_arrays", "tensors_of"]

Bytes = npt.NDArray[np.uint8]
_HUGE = 1 << 21
"""Bytes from which memory is taken from the system for one array alone, in large pages."""


def tensors_of(manifest: Manifest, names: Iterable[str] | None) -> dict[str, ArrayEntry]:
    """The arrays of the named tensors, of all of them for None. Raises: NotFoundError."""
    known = {tensor_name(array): array for array in manifest.tensors()}
    if names is None:
        return known
    chosen = {}
    for name in names:
        if name not in known:
            raise NotFoundError(f"this version has no tensor {name[:200]!r}; it has {len(known)}: {', '.join(list(known)[:5])[:500]} …")
        chosen[name] = known[name]
    return chosen


def tensor_arrays(blobs: Blobs, tensors: dict[str, ArrayEntry], threads: int | None = None) -> Generator[tuple[str, Array]]:
    """The tensors as read-only arrays, in the order of their bytes on the disk, each as soon as all of it was verified.

    Several threads verify ahead of the consumer, by a few blobs: what it gets is still in the processor's cache. The arrays stay valid
    after this ends, and when the pack is deleted; they hold its mapping. Stop it with `close`.

    Raises: ChunkMissingError, ChunkAlteredError: naming the blob and the array; StoreError.
    """
    names = {array.path: name for name, array in tensors.items()}
    for entry, flat in _loaded(blobs, list(tensors.values()), threads):
        yield names[entry.path], _typed(entry, flat)


def file_array(blobs: Blobs, manifest: Manifest, path: str, threads: int | None = None) -> Bytes:
    """A file's bytes, by its path in the model. Raises: NotFoundError; otherwise as `tensor_arrays`."""
    entry = next((array for array in manifest.files() if array.path == f"{FILES}/{path}"), None)
    if entry is None:
        raise NotFoundError(f"this version has no file {path[:200]!r}")
    ((_, flat),) = _loaded(blobs, [entry], threads)
    return flat


def _typed(entry: ArrayEntry, flat: Bytes) -> Array:
    return flat.view(_dtype(entry.dtype)).reshape(entry.shape)


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


# --- where arrays lie


class _Part(NamedTuple):
    """A range of a blob that an array in anonymous memory wants."""

    target: Bytes
    offset: int
    """In the blob."""


@dataclass(slots=True)
class _Blob:
    """What is to be verified, once, and who waits for its bytes."""

    digest: Digest
    location: Location
    array: ArrayEntry
    """The first that needs it."""
    number: int
    """Which one it is; they are verified in this order."""
    parts: list[_Part] = field(default_factory=list)


@dataclass(slots=True)
class _Wanted:
    """An array and what is known of it."""

    entry: ArrayEntry
    last: int
    """How many blobs are verified when all of it is."""
    place: Location | Bytes
    """The range of a pack to map, or memory that the blobs are copied to."""


class _Plan:
    """Which blobs are verified in which order, and what becomes of their bytes."""

    def __init__(self, arrays: Sequence[ArrayEntry], located: Mapping[Digest, Location], held: Container[str]) -> None:
        """`held`: the packs that are kept open and may be mapped."""
        self._located, self._held = located, held
        self._blobs: dict[Digest, _Blob] = {}
        self.wanted = deque(self._want(array) for array in sorted(arrays, key=self._begin))
        self.blobs = list(self._blobs.values())
        self.nbytes = sum(blob.location.nbytes for blob in self.blobs)

    def _begin(self, array: ArrayEntry) -> tuple[str, int]:
        if not array.segments:
            return "", 0
        location = self._located[array.segments[0].digest]
        return location.pack, location.offset + array.segments[0].offset

    def _want(self, array: ArrayEntry) -> _Wanted:
        for segment in array.segments:
            blob = _Blob(segment.digest, self._located[segment.digest], array, len(self._blobs))
            blob = self._blobs.setdefault(segment.digest, blob)
            if segment.offset + segment.nbytes > blob.location.nbytes:
                raise too_short(segment.digest, array.path)
        last = max((self._blobs[segment.digest].number + 1 for segment in array.segments), default=0)
        return _Wanted(array, last, self._range(array) or self._copy(array))

    def _range(self, array: ArrayEntry) -> Location | None:
        """The one range of one pack that is the array.

        None: it is encrypted, in pieces, begins where its type may not, or is empty; or its pack is not held.
        """
        pack, start = self._begin(array)
        if vault_of(array) or pack not in self._held or start % _dtype(array.dtype).alignment:
            return None
        end = start
        for segment in array.segments:
            location = self._located[segment.digest]
            if (location.pack, location.offset + segment.offset) != (pack, end):
                return None
            end += segment.nbytes
        return Location(pack, start, end - start)

    def _copy(self, array: ArrayEntry) -> Bytes:
        """Anonymous memory for the array, which is filled when the blobs are verified."""
        flat = _memory(array.nbytes)
        offset = 0
        for segment in array.segments:
            self._blobs[segment.digest].parts.append(_Part(flat[offset : offset + segment.nbytes], segment.offset))
            offset += segment.nbytes
        return flat


# --- reading them


def _loaded(blobs: Blobs, arrays: Sequence[ArrayEntry], threads: int | None) -> Generator[tuple[ArrayEntry, Bytes]]:
    users = {segment.digest: array.path for array in reversed(arrays) for segment in array.segments}
    with ExitStack() as stack:
        stack.callback(blobs.files.close)  # a worker that idles from here on keeps no pack from being deleted, but for those it has mapped
        located, files = _open(blobs, users, stack)
        plan = _Plan(arrays, located, files)
        verify = partial(_verify, blobs, files)
        verified = stack.enter_context(closing(in_batches(verify, plan.blobs, _nbytes, threads or threads_for(plan.nbytes))))
        maps: dict[str, mmap.mmap] = {}
        done = 0
        while plan.wanted:
            wanted = plan.wanted.popleft()
            while done < wanted.last:
                next(verified)
                done += 1
            place = wanted.place
            flat = place if isinstance(place, np.ndarray) else _mapped(place, files[place.pack], maps, wanted.entry)
            flat.flags.writeable = False
            entry = wanted.entry
            del wanted, place
            yield entry, flat
            del flat


def _open(
    blobs: Blobs, users: Mapping[Digest, str], stack: ExitStack, *, again: bool = True
) -> tuple[dict[Digest, Location], dict[str, int]]:
    """Where the blobs lie, and descriptors of packs until `stack` ends: what is verified is the very file that is mapped.

    Of more packs than there are descriptors for, those that give most: what lies in the others is copied.
    """
    located = blobs.locate(users)
    for digest, path in users.items():
        if digest not in located:
            raise packs.missing(digest, path)
    files: dict[str, int] = {}
    for pack, digest in _largest(located)[: _descriptors()]:
        with disk_errors(blobs.files.folder / pack):
            try:
                files[pack] = stack.enter_context(blobs.files.opened(pack))
            except FileNotFoundError:
                if again:  # perhaps the pack was rewritten since the catalog was asked
                    return _open(blobs, users, stack, again=False)
                raise packs.missing(digest, users[digest]) from None
    return located, files


def _largest(located: Mapping[Digest, Location]) -> list[tuple[str, Digest]]:
    """The packs, those first of which most is wanted, each with a blob that lies in it."""
    shares: Counter[str] = Counter()
    for location in located.values():
        shares[location.pack] += location.nbytes
    members = {location.pack: digest for digest, location in located.items()}
    return [(pack, members[pack]) for pack, _ in shares.most_common()]


def _descriptors() -> int:
    """How many packs are kept open: a quarter of what the process may have, half of that for their mappings, which have one each."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)


def _verify(blobs: Blobs, files: Mapping[str, int], blob: _Blob) -> None:
    """Hash or decrypt a blob, and copy what is wanted of it. Raises: ChunkMissingError, ChunkAlteredError, StoreError."""
    pack = blob.location.pack
    with disk_errors(blobs.files.folder / pack), _room(blob) as view:
        if pack in files:
            data = plain_into(files[pack], blob.location, blob.digest, view, blob.array)
        else:
            data = blobs.open_into(blob.array, blob.digest, view, blob.location)
        for part in () if _is_direct(blob) else blob.parts:
            part.target[:] = np.frombuffer(data, np.uint8, len(part.target), part.offset)
    blob.parts.clear()  # who drops a tensor gives its memory back while the rest comes


@contextmanager
def _room(blob: _Blob) -> Iterator[memoryview]:
    """Memory for its plain bytes: their place in the array itself, or a buffer to copy from."""
    if _is_direct(blob):
        yield blob.parts[0].target.data
        return
    with buffer() as view:
        yield view


def _is_direct(blob: _Blob) -> bool:
    """Whether it is decrypted straight to its place: an encrypted one that is, whole, a part of one array."""
    return vault_of(blob.array) is not None and len(blob.parts) == 1 and len(blob.parts[0].target) == blob.location.nbytes


def _memory(nbytes: int) -> Bytes:
    if nbytes < _HUGE:
        return np.empty(nbytes, np.uint8)
    return np.frombuffer(new_memory(nbytes), np.uint8)


def _nbytes(blob: _Blob) -> int:
    return blob.location.nbytes


def _mapped(place: Location, descriptor: int, maps: dict[str, mmap.mmap], entry: ArrayEntry) -> Bytes:
    """The range of the pack. It was read a moment ago; still, a file that is shorter by now must not end the process."""
    if place.pack not in maps:
        maps[place.pack] = mapped(descriptor)
    if len(maps[place.pack]) < place.offset + place.nbytes:
        raise packs.altered(entry.segments[-1].digest, entry.path)
    return np.frombuffer(maps[place.pack], np.uint8, place.nbytes, place.offset)
