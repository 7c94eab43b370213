"""Tensors in memory that two processes share: one writes, the other reads."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from tether.errors import InternalError
from tether.types import Array, Datatype, Tensors, datatype_of, dtype_of

__all__ = ["Arena", "Place"]

_ALIGN = 64
"""Bytes: a cache line, and what any vector instruction wants."""
_FIRST_NBYTES = 1 << 20
"""A new arena's size; untouched pages take no memory."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where one tensor lies. BYTES: the lengths as `<u4`, then the strings."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Arena:
    """A mapped file without a name, whose writer lets it grow. Both sides take turns, so nothing in it is locked."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = mmap.mmap(fd, os.fstat(fd).st_size)

    @classmethod
    def new(cls) -> Arena:
        """An empty one; the other process gets its descriptor."""
        fd = _nameless_file()
        os.ftruncate(fd, _FIRST_NBYTES)
        return cls(fd)

    def write(self, tensors: Mapping[str, Array]) -> list[Place]:
        """Copy the tensors in, over what was there."""
        places, sources, end = [], [], 0
        for name, array in tensors.items():
            source = _packed(array) if array.dtype.kind == "O" else np.ascontiguousarray(array)
            places.append(Place(name, datatype_of(array.dtype), array.shape, end, source.nbytes))
            sources.append(source)
            end = -(-(end + source.nbytes) // _ALIGN) * _ALIGN
        mapped = self._reaching(end, grow=True)
        for place, source in zip(places, sources, strict=True):
            if place.nbytes:
                np.frombuffer(mapped, np.uint8, place.nbytes, place.offset)[:] = source.reshape(-1).view(np.uint8)
        return places

    def read(self, places: Sequence[Place], *, copy: bool) -> Tensors:
        """The tensors: copies, or views that hold until the next write."""
        mapped = self._reaching(max((place.offset + place.nbytes for place in places), default=0), grow=False)
        return {place.name: _read_one(mapped, place, copy=copy) for place in places}

    def close(self) -> None:
        """Give it up; the memory goes with the last array that looks into it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd, self._map = -1, None

    def _reaching(self, end: int, *, grow: bool) -> mmap.mmap:
        """The mapping, renewed where it is shorter than `end`. An old one lives on as long as arrays look into it."""
        if self._map is None:
            raise InternalError("the shared memory is closed; load the model again")
        if end > len(self._map):
            if grow:
                os.ftruncate(self.fd, 1 << (end - 1).bit_length())
            self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        return self._map


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tether-tensors")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _read_one(mapped: mmap.mmap, place: Place, *, copy: bool) -> Array:
    if place.datatype == "BYTES":
        return _unpacked(mapped[place.offset : place.offset + place.nbytes], place.shape)
    dtype = dtype_of(place.datatype)
    if not place.nbytes:
        return np.empty(place.shape, dtype)
    array: Array = np.frombuffer(mapped, dtype, place.nbytes // dtype.itemsize, place.offset).reshape(place.shape)
    return array.copy() if copy else array


def _packed(array: Array) -> Array:
    items = [item if isinstance(item, bytes) else str(item).encode() for item in array.reshape(-1).tolist()]
    lengths = np.array([len(item) for item in items], "<u4")
    return np.frombuffer(lengths.tobytes() + b"".join(items), np.uint8)


def _unpacked(data: bytes, shape: tuple[int, ...]) -> Array:
    out = np.empty(shape, object)
    flat, at = out.reshape(-1), 4 * out.size
    for index, length in enumerate(np.frombuffer(data, "<u4", out.size).tolist()):
        flat[index] = data[at : at + length]
        at += length
    return out
