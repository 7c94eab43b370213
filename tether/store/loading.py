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
from functools import cache, partial
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tether.errors import ChunkAlteredError, NotFoundError
from tether.store.format import packs
from tether.store.format.encrypted import vault_of
from tether.store.format.layout import BLOB_NBYTES, FILES
from tether.store.format.manifest import ArrayEntry, Manifest, digest_of
from tether.store.format.packs import Location
from tether.store.format.weights import tensor_name
from tether.store.packing.blobs import Blobs, plain_into, too_short
from tether.store.packing.disk import disk_errors, read_at
from tether.store.packing.memory import APART, TOGETHER, ArrayMemory
from tether.store.packing.pack_files import mapped
from tether.store.packing.parallel import buffer, in_order, threads_for
from tether.types import Array, Digest

__all__ = ["file_array", "tensor_arrays", "tensors_of"]

Bytes = npt.NDArray[np.uint8]
_RUN = 1 << 20
"""Bytes of small blobs that are read at once: a read and a hand-over to a thread cost as much as hashing 100 KiB."""
_GAP = 64
"""Bytes between two of them that are read for nothing: what the alignment of a pack leaves."""


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


def tensor_arrays(
    blobs: Blobs, tensors: dict[str, ArrayEntry], threads: int | None = None, *, together: bool = False
) -> Generator[tuple[str, Array]]:
    """The tensors as read-only arrays, in the order of their bytes on the disk, each as soon as all of it was verified.

    Several threads verify ahead of the consumer, by a few blobs: what it gets is still in the processor's cache. The arrays stay valid
    after this ends, and when the pack is deleted; they hold its mapping. What is not mapped has memory of its own, which a later array gets
    once nothing is left of the earlier. `together`: the consumer keeps all of them, so small ones may share more. Stop it with `close`.

    Raises: ChunkMissingError, ChunkAlteredError: naming the blob and the array; StoreError.
    """
    names = {array.path: name for name, array in tensors.items()}
    for entry, array in _loaded(blobs, list(tensors.values()), threads, TOGETHER if together else APART):
        yield names[entry.path], array
        del array


def file_array(blobs: Blobs, manifest: Manifest, path: str, threads: int | None = None) -> Bytes:
    """A file's bytes, by its path in the model. Raises: NotFoundError; otherwise as `tensor_arrays`."""
    entry = next((array for array in manifest.files() if array.path == f"{FILES}/{path}"), None)
    if entry is None:
        raise NotFoundError(f"this version has no file {path[:200]!r}")
    ((_, flat),) = _loaded(blobs, [entry], threads, APART)
    return cast("Bytes", flat)


@cache
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
    begins: list[_Copy] = field(default_factory=list)
    """The arrays that want memory by the time it is read."""
    parts: list[_Part] = field(default_factory=list)


@dataclass(slots=True)
class _Copy:
    """An array that is not mapped, and its memory once its first blob is about to be read."""

    entry: ArrayEntry
    flat: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))


class _Wanted(NamedTuple):
    """An array and what is known of it."""

    entry: ArrayEntry
    last: int
    """How many blobs are verified when all of it is."""
    place: Location | _Copy
    """The range of a pack to map; or what the blobs are copied to: where the array is encrypted, in pieces or empty, begins where
    its type may not, or lies in a pack that is not held."""


class _Plan:
    """Which blobs are verified in which order, and what becomes of their bytes."""

    def __init__(self, arrays: Sequence[ArrayEntry], located: Mapping[Digest, Location], held: Container[str]) -> None:
        """`located`: in the order of the disk. `held`: the packs that are kept open and may be mapped."""
        self._located, self._held = located, held
        self._blobs: dict[Digest, _Blob] = {}
        self.copied_nbytes = 0
        self.wanted = deque(self._want(array) for array in self._ordered(arrays))
        self.blobs = list(self._blobs.values())
        self.nbytes = sum(blob.location.nbytes for blob in self.blobs)

    def _ordered(self, arrays: Sequence[ArrayEntry]) -> list[ArrayEntry]:
        """As they begin on the disk, those without bytes first."""
        places = {digest: number * BLOB_NBYTES for number, digest in enumerate(self._located, start=1)}
        begins = [places[array.segments[0].digest] + array.segments[0].offset if array.segments else 0 for array in arrays]
        return [arrays[index] for index in sorted(range(len(arrays)), key=begins.__getitem__)]

    def _want(self, array: ArrayEntry) -> _Wanted:
        # A model may have thousands of small tensors: this goes over their segments once, and asks no more of them than it must.
        last, pieces, pack, begin, end = 0, 0, "", 0, 0
        for segment in array.segments:
            digest, offset, nbytes = segment.digest, segment.offset, segment.nbytes
            blob = self._blobs.get(digest) or self._blob(digest, array)
            location = blob.location
            if offset + nbytes > location.nbytes:
                raise too_short(digest, array.path)
            if blob.number >= last:
                last = blob.number + 1
            offset += location.offset
            if offset != end or location.pack != pack:
                pieces, pack, begin = pieces + 1, location.pack, offset
            end = offset + nbytes
        may_map = pieces == 1 and pack in self._held and begin % _dtype(array.dtype).alignment == 0 and vault_of(array) is None
        return _Wanted(array, last, Location(pack, begin, end - begin) if may_map else self._copy(array))

    def _blob(self, digest: Digest, array: ArrayEntry) -> _Blob:
        blob = self._blobs[digest] = _Blob(digest, self._located[digest], array, len(self._blobs))
        return blob

    def _copy(self, array: ArrayEntry) -> _Copy:
        copy = _Copy(array)
        if array.segments:
            min((self._blobs[segment.digest] for segment in array.segments), key=_number).begins.append(copy)
            self.copied_nbytes += array.nbytes
        return copy

    def begun(self, memory: ArrayMemory) -> Iterator[_Blob]:
        """The blobs in their order, each with memory for what begins with it: taken no sooner, so that what was dropped is there again."""
        for blob in self.blobs:
            while blob.begins:
                self._begin(blob.begins.pop(), memory)
            yield blob

    def _begin(self, copy: _Copy, memory: ArrayMemory) -> None:
        copy.flat = memory.take(copy.entry.nbytes)
        offset = 0
        for segment in copy.entry.segments:
            self._blobs[segment.digest].parts.append(_Part(copy.flat[offset : offset + segment.nbytes], segment.offset))
            offset += segment.nbytes


def _number(blob: _Blob) -> int:
    return blob.number


# --- reading them


def _loaded(blobs: Blobs, arrays: Sequence[ArrayEntry], threads: int | None, shared: int) -> Generator[tuple[ArrayEntry, Array]]:
    """`shared`: as `ArrayMemory` has it."""
    with ExitStack() as stack:
        stack.callback(blobs.files.close)  # a worker that idles from here on keeps no pack from being deleted, but for those it has mapped
        located, files = _open(blobs, arrays, stack)
        plan = _Plan(arrays, located, files)
        memory = stack.enter_context(closing(ArrayMemory(shared, plan.copied_nbytes)))
        runs = _runs(plan.begun(memory), files)
        verified = stack.enter_context(closing(in_order(partial(_verify_run, blobs, files), runs, threads or threads_for(plan.nbytes))))
        maps: dict[str, mmap.mmap] = {}
        done = 0
        while plan.wanted:
            entry, last, place = plan.wanted.popleft()
            while done < last:
                done += next(verified)
            array = _mapped(place, files[place.pack], maps, entry) if isinstance(place, Location) else _typed(place.flat, entry)
            del place
            yield entry, array
            del array


def _open(
    blobs: Blobs, arrays: Sequence[ArrayEntry], stack: ExitStack, *, again: bool = True
) -> tuple[dict[Digest, Location], dict[str, int]]:
    """Where the blobs lie, and descriptors of packs until `stack` ends: what is verified is the very file that is mapped.

    Of more packs than there are descriptors for, those that give most: what lies in the others is copied.
    """
    wanted = dict.fromkeys(segment.digest for array in arrays for segment in array.segments)
    located = blobs.locate(wanted)
    if len(located) < len(wanted):
        digest = next(digest for digest in wanted if digest not in located)
        raise packs.missing(digest, _user(arrays, digest))
    files: dict[str, int] = {}
    for pack, digest in _largest(located)[: _descriptors()]:
        with disk_errors(blobs.files.folder / pack):
            try:
                files[pack] = stack.enter_context(blobs.files.opened(pack))
            except FileNotFoundError:
                if again:  # perhaps the pack was rewritten since the catalog was asked
                    return _open(blobs, arrays, stack, again=False)
                raise packs.missing(digest, _user(arrays, digest)) from None
    return located, files


def _user(arrays: Iterable[ArrayEntry], digest: Digest) -> str:
    """The first array that needs the blob."""
    return next(array.path for array in arrays if any(segment.digest == digest for segment in array.segments))


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


def _runs(wanted: Iterable[_Blob], files: Container[str]) -> Iterator[list[_Blob]]:
    """Blobs that are verified as one job: small ones that lie side by side are read at once; any other alone."""
    run: list[_Blob] = []
    pack, end, limit = "", 0, 0
    for blob in wanted:
        place = blob.location
        follows = place.pack == pack and end <= place.offset <= end + _GAP and place.offset + place.nbytes <= limit
        if not follows:
            if run:
                yield run
            run, pack = [], place.pack
            limit = place.offset + _RUN if pack in files else 0
        run.append(blob)
        end = place.offset + place.nbytes
    if run:
        yield run


def _verify_run(blobs: Blobs, files: Mapping[str, int], run: Sequence[_Blob]) -> int:
    """As `_verify`, for all of a run; gives how many they are. What is wrong with one of them is told as if it had been read alone."""
    if len(run) == 1 or not _is_verified(files[run[0].location.pack], run):
        for blob in run:
            _verify(blobs, files, blob)
    return len(run)


def _is_verified(descriptor: int, run: Sequence[_Blob]) -> bool:
    start, last = run[0].location.offset, run[-1].location
    with buffer() as view:
        try:
            read = read_at(descriptor, start, view[: last.offset + last.nbytes - start])
        except OSError:
            return False
        data = view[:read]
        for blob in run:
            begin = blob.location.offset - start
            if not _is_taken(blob, data[begin : begin + blob.location.nbytes]):
                return False
    return True


def _is_taken(blob: _Blob, stored: memoryview) -> bool:
    """Whether these are the blob's bytes; then those who wait for it have theirs."""
    vault = vault_of(blob.array)
    if vault is None:
        if digest_of(stored) != blob.digest:
            return False
        _hand_out(blob, stored)
        return True
    with _room(blob) as view:
        try:
            data = vault.open_into(blob.digest, stored, view, blob.array.path)
        except ChunkAlteredError:
            return False
        _hand_out(blob, data)
    return True


def _verify(blobs: Blobs, files: Mapping[str, int], blob: _Blob) -> None:
    """Hash or decrypt a blob, and copy what is wanted of it. Raises: ChunkMissingError, ChunkAlteredError, StoreError."""
    pack = blob.location.pack
    with disk_errors(blobs.files.folder / pack), _room(blob) as view:
        if pack in files:
            data = plain_into(files[pack], blob.location, blob.digest, view, blob.array)
        else:
            data = blobs.open_into(blob.array, blob.digest, view, blob.location)
        _hand_out(blob, data)


def _hand_out(blob: _Blob, data: memoryview) -> None:
    """Verified bytes to the arrays that want them, unless they are there already."""
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


def _mapped(place: Location, descriptor: int, maps: dict[str, mmap.mmap], entry: ArrayEntry) -> Array:
    """The range of the pack. It was read a moment ago; still, a file that is shorter by now must not end the process."""
    if place.pack not in maps:
        maps[place.pack] = mapped(descriptor)
    if len(maps[place.pack]) < place.offset + place.nbytes:
        raise packs.altered(entry.segments[-1].digest, entry.path)
    return np.ndarray(entry.shape, _dtype(entry.dtype), maps[place.pack], place.offset)


def _typed(flat: Bytes, entry: ArrayEntry) -> Array:
    flat.flags.writeable = False
    return flat.view(_dtype(entry.dtype)).reshape(entry.shape)
