"""What two versions have in common: which files and tensors were added, removed, changed, and by how much. Reads only what differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from tether.store.format.layout import BLOB_NBYTES, DTYPES, FILES, HIDDEN
from tether.store.format.manifest import ArrayEntry, Manifest
from tether.store.format.weights import tensor_name

__all__ = ["Change", "VersionDiff", "diff", "numpy_dtype"]

Read = Callable[[ArrayEntry, int, int], bytes]
"""The bytes [start, stop) of an array."""


@dataclass(frozen=True, slots=True)
class Change:
    """One file or tensor that is not the same in both versions."""

    name: str
    kind: Literal["added", "removed", "retyped", "changed"]
    """retyped: another shape or element type, so that values can't be compared."""
    before: str = ""
    """`float32[64, 10]`; a file's is its size in bytes."""
    after: str = ""
    relative: float | None = None
    """‖after − before‖ / ‖before‖ (Frobenius norm), for a changed tensor. Infinite where all was zero before, None where NaN or infinity
    is among the values."""
    largest: float | None = None
    """max |after − before|."""
    share: float | None = None
    """Of the elements, how many differ: 0 to 1."""


@dataclass(frozen=True, slots=True)
class VersionDiff:
    """From one version to another, sorted by name."""

    files: tuple[Change, ...]
    """The model's own files."""
    tensors: tuple[Change, ...]
    unchanged: int
    """Tensors that are the same, byte for byte."""
    shared_nbytes: int
    """Of the second version's blobs, what the first one has too: the store keeps it once."""
    new_nbytes: int


def diff(before: Manifest, after: Manifest, read: Read) -> VersionDiff:
    """Compare two versions. `read` is asked for the tensors that are not the same blobs only, 4 MiB at a time.

    Raises: what `read` raises: ChunkMissingError, ChunkAlteredError.
    """
    old, new = _named(before.tensors()), _named(after.tensors())
    tensors = [change for name in sorted(old.keys() | new.keys()) for change in _tensor_change(name, old.get(name), new.get(name), read)]
    touched = {change.name for change in tensors}
    shared, added = _blob_nbytes(before, after)
    return VersionDiff(tuple(_file_changes(before, after)), tuple(tensors), sum(name not in touched for name in new), shared, added)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype, little-endian, for a zarr name of the format."""
    if name.startswith(("bfloat", "float8")):
        small: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return small
    return np.dtype(name).newbyteorder("<")


def _named(arrays: Iterable[ArrayEntry]) -> dict[str, ArrayEntry]:
    return {tensor_name(array): array for array in arrays}


def _file_changes(before: Manifest, after: Manifest) -> Iterator[Change]:
    old, new = _own_files(before), _own_files(after)
    for path in sorted(old.keys() | new.keys()):
        one, two = old.get(path), new.get(path)
        if one is None or two is None or one.segments != two.segments:
            kind = _kind(one, two)
            yield Change(path, kind, str(one.nbytes) if one else "", str(two.nbytes) if two else "")


def _own_files(manifest: Manifest) -> dict[str, ArrayEntry]:
    named = ((array.path.removeprefix(f"{FILES}/"), array) for array in manifest.files())
    return {path: array for path, array in named if not path.startswith(f"{HIDDEN}/")}


def _kind(before: ArrayEntry | None, after: ArrayEntry | None) -> Literal["added", "removed", "changed"]:
    if before is None:
        return "added"
    return "removed" if after is None else "changed"


def _tensor_change(name: str, before: ArrayEntry | None, after: ArrayEntry | None, read: Read) -> Iterator[Change]:
    texts = _text(before), _text(after)
    if before is None or after is None:
        yield Change(name, _kind(before, after), *texts)
    elif (before.dtype, before.shape) != (after.dtype, after.shape):
        yield Change(name, "retyped", *texts)
    elif before.segments != after.segments:
        distance = _Distance(before.dtype)
        for start in range(0, before.nbytes, BLOB_NBYTES):
            stop = min(start + BLOB_NBYTES, before.nbytes)
            distance.add(read(before, start, stop), read(after, start, stop))
        if distance.differing:
            yield Change(name, "changed", *texts, *distance.result(before.nbytes // DTYPES[before.dtype]))


def _text(array: ArrayEntry | None) -> str:
    return f"{array.dtype}{list(array.shape)}" if array else ""


class _Distance:
    """Sums over the pieces of two arrays of one type and shape."""

    def __init__(self, dtype: str) -> None:
        self._dtype = numpy_dtype(dtype)
        self._wide: type[np.generic] = np.complex128 if self._dtype.kind == "c" else np.float64
        self._squares = self._norm = self._largest = 0.0
        self.differing = 0

    def add(self, before: bytes, after: bytes) -> None:
        if before == after:
            self._norm += float(np.sum(np.square(np.abs(self._values(before)))))
            return
        one, two = self._values(before), self._values(after)
        raw = (np.frombuffer(data, np.uint8).reshape(-1, self._dtype.itemsize) for data in (before, after))
        self.differing += int(np.count_nonzero(np.any(np.not_equal(*raw), axis=1)))
        with np.errstate(invalid="ignore"):  # infinity less infinity: `result` says that there is no number
            change = np.abs(two - one)
        self._norm += float(np.sum(np.square(np.abs(one))))
        self._squares += float(np.sum(np.square(change)))
        self._largest = max(self._largest, float(np.max(change)))

    def _values(self, data: bytes) -> np.ndarray[Any, Any]:
        return np.frombuffer(data, self._dtype).astype(self._wide)

    def result(self, count: int) -> tuple[float | None, float | None, float]:
        share = self.differing / count
        if not math.isfinite(self._squares + self._norm):
            return None, None, share
        relative = math.sqrt(self._squares / self._norm) if self._norm else (math.inf if self._squares else 0.0)
        return relative, self._largest, share


def _blob_nbytes(before: Manifest, after: Manifest) -> tuple[int, int]:
    """Bytes of the second version's files that lie in blobs of the first, and that do not."""
    known = {segment.digest for array in before.arrays for segment in array.segments}
    sizes: Mapping[str, int] = {segment.digest: segment.nbytes for array in after.files() for segment in array.segments}
    shared = sum(nbytes for digest, nbytes in sizes.items() if digest in known)
    return shared, sum(sizes.values()) - shared
