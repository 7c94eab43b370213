"""Puts a version together while its blobs arrive: weights one after the other, files in a checkout that appears when it is whole."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from tether.errors import ChunkAlteredError
from tether.store.format.layout import FILES, TENSORS
from tether.store.format.manifest import ArrayEntry, Manifest, Segment
from tether.store.packing.disk import disk_errors, partial_of, write_at
from tether.store.replicas.fetching import Wanted
from tether.types import Array, Digest

__all__ = [
    "Assembly",
    "Part",
    "Watcher",
    "cut_out",
    "file_order",
    "flat",
    "in_file_order",
    "new_tensor",
    "parts_of",
    "smallest_first",
    "turns",
    "wanted_of",
    "wants",
]

_READ_ONLY = 0o444


class Watcher(Protocol):
    """Is told how far a checkout is that is written while it comes, on threads of the store: to be quick."""

    def begun(self, folder: Path) -> None:
        """The files are being written to `folder`, each with its final size already; it is renamed when all came."""
        ...

    def grew(self, file: str, nbytes: int) -> None:
        """The first `nbytes` of a file are there, verified."""
        ...


class Part(NamedTuple):
    """A segment of a tensor and where in it its bytes belong."""

    name: str
    array: ArrayEntry
    segment: Segment
    offset: int
    is_last: bool


def wants(arrays: Iterable[ArrayEntry]) -> list[Wanted]:
    """The blobs of the arrays, each once, in their order."""
    sizes: dict[Digest, int] = {}
    users: dict[Digest, str] = {}
    for array in arrays:
        for segment in array.segments:
            users.setdefault(segment.digest, array.path)
            sizes[segment.digest] = max(sizes.get(segment.digest, 0), segment.offset + segment.nbytes)
    return [Wanted(digest, sizes[digest], path) for digest, path in users.items()]


def wanted_of(manifest: Manifest) -> list[Wanted]:
    """Every blob of the version: those of its files in their order, then those of an encrypted one's private part."""
    private = manifest.encryption.private if manifest.encryption else ()
    found = {wanted.digest: wanted for wanted in wants(file_order(manifest))}
    found |= {wanted.digest: wanted for wanted in wants(manifest.tensors()) if wanted.digest not in found}
    found |= {seal.digest: Wanted(seal.digest, seal.nbytes, "the private part of the manifest") for seal in private}
    return list(found.values())


def smallest_first(manifest: Manifest, blobs: Iterable[Wanted]) -> list[Wanted]:
    """The blobs by the size of their files: what says what the large ones hold is small, and can be read while those come."""
    files = wants(sorted(manifest.files(), key=lambda array: array.nbytes))
    turn = {wanted.digest: number for number, wanted in enumerate(files)}
    return sorted(blobs, key=lambda wanted: turn.get(wanted.digest, len(turn)))


def file_order(manifest: Manifest) -> list[ArrayEntry]:
    """The arrays that hold all bytes of the version, as they lie in its files: what is written down, and what is fetched whole."""
    return [array for array in manifest.arrays if not array.path.startswith(f"{TENSORS}/")]


def in_file_order(manifest: Manifest, tensors: Mapping[str, ArrayEntry]) -> dict[str, ArrayEntry]:
    """The tensors by where they begin in the files; those of no bytes first."""
    begins: dict[Digest, int] = {}
    for array in file_order(manifest):
        for segment in array.segments:
            begins.setdefault(segment.digest, len(begins))

    def begin(array: ArrayEntry) -> tuple[int, int]:
        first = array.segments[0] if array.segments else None
        return (begins.get(first.digest, len(begins)), first.offset) if first else (-1, 0)

    return dict(sorted(tensors.items(), key=lambda item: begin(item[1])))


def parts_of(tensors: Mapping[str, ArrayEntry]) -> Iterator[Part]:
    """The segments of the tensors, one tensor after the other."""
    for name, array in tensors.items():
        offset = 0
        for index, segment in enumerate(array.segments, start=1):
            yield Part(name, array, segment, offset, index == len(array.segments))
            offset += segment.nbytes


def turns(parts: Iterable[Part]) -> Iterator[Wanted]:
    """The blobs that the parts need, in their turn; one that several parts in a row share comes once."""
    before = None
    for part in parts:
        if part.segment.digest != before:
            yield Wanted(part.segment.digest, part.segment.offset + part.segment.nbytes, part.array.path)
        before = part.segment.digest


def cut_out(data: bytes, segment: Segment, path: str) -> memoryview:
    """The segment's part of its blob. Raises: ChunkAlteredError: the blob is shorter than the manifest says."""
    part = memoryview(data)[segment.offset : segment.offset + segment.nbytes]
    if len(part) != segment.nbytes:
        message = f"blob {segment.digest} is shorter than {path} needs: its publisher made a wrong manifest"
        raise ChunkAlteredError(message, segment.digest, path)
    return part


def new_tensor(array: ArrayEntry) -> Array:
    """Memory for a tensor, to be filled through `flat`."""
    return np.empty(array.shape, np.dtype(getattr(ml_dtypes, array.dtype, array.dtype)))


def flat(tensor: Array) -> memoryview:
    """Its bytes."""
    return tensor.reshape(-1).view(np.uint8).data if tensor.size else memoryview(bytearray())


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    offset: int
    segment: Segment
    path: str


class Assembly:
    """A checkout that grows in a folder beside its place. Blobs may come in any order; they were verified by who gives them."""

    def __init__(self, target: Path, files: Sequence[ArrayEntry], watcher: Watcher | None = None) -> None:
        self._target, self._files, self._watcher = target, files, watcher
        self._reached: dict[str, int] = defaultdict(int)
        self._beyond: dict[str, dict[int, int]] = defaultdict(dict)
        """Of each file what is written behind a gap: where it begins → where it ends."""
        self._partial = partial_of(target)
        self._places: dict[Digest, list[_Place]] = defaultdict(list)
        for array in files:
            offset, file = 0, self._partial / array.path.removeprefix(f"{FILES}/")
            for segment in array.segments:
                self._places[segment.digest].append(_Place(file, offset, segment, array.path))
                offset += segment.nbytes

    def begin(self) -> None:
        """Make the files, empty but of their size. Raises: NoSpaceError, StoreError."""
        with disk_errors(self._partial):
            self._partial.mkdir()
            for array in self._files:
                file = self._partial / array.path.removeprefix(f"{FILES}/")
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("xb") as opened:
                    opened.truncate(array.nbytes)
        if self._watcher is not None:
            self._watcher.begun(self._partial)

    def write(self, digest: Digest, data: bytes) -> None:
        """Put a blob wherever it belongs. Raises: ChunkAlteredError, NoSpaceError, StoreError."""
        with disk_errors(self._partial):
            for place in self._places.get(digest, ()):
                descriptor = os.open(place.file, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    write_at(descriptor, place.offset, cut_out(data, place.segment, place.path))
                finally:
                    os.close(descriptor)
                if self._watcher is not None:
                    self._tell(self._watcher, place)

    def _tell(self, watcher: Watcher, place: _Place) -> None:
        file = place.path.removeprefix(f"{FILES}/")
        beyond = self._beyond[file]
        beyond[place.offset] = place.offset + place.segment.nbytes
        if place.offset == self._reached[file]:
            while self._reached[file] in beyond:
                self._reached[file] = beyond.pop(self._reached[file])
            watcher.grew(file, self._reached[file])

    def finish(self) -> bool:
        """Make it the checkout; False: there is one already, and this one is gone. Raises: StoreError."""
        with disk_errors(self._partial):
            for array in self._files:
                (self._partial / array.path.removeprefix(f"{FILES}/")).chmod(_READ_ONLY)
            try:
                self._partial.rename(self._target)
            except OSError:
                if not self._target.is_dir():
                    raise
                self.abandon()
                return False
        return True

    def abandon(self) -> None:
        """Remove what was written, if it did not become the checkout."""
        shutil.rmtree(self._partial, ignore_errors=True)
