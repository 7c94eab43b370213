"""The arrays of .npy and .npz files (numpy.lib.format, versions 1 to 3).

In place where they lie as zarr wants them; in Fortran order, big-endian or compressed they are converted. Pickled objects are refused;
structured types, text and times are left out.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.weights import zips
from tether.runtimes.weights.limits import MAX_RANK, tensor_nbytes
from tether.runtimes.weights.sinks import Sink
from tether.types import StoredTensor

__all__ = ["index"]

_MAGIC = b"\x93NUMPY"
_PREFIXES = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}
"""Version → bytes of the header's length."""
_MAX_HEADER_NBYTES = 10_000
"""As numpy itself takes; only structured types are longer than 128."""
_HEAD_NBYTES = len(_MAGIC) + 2 + 4 + _MAX_HEADER_NBYTES
_DTYPES = {
    "b1": "bool", "i1": "int8", "u1": "uint8", "i2": "int16", "u2": "uint16", "i4": "int32", "u4": "uint32", "i8": "int64", "u8": "uint64",
    "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128",
}  # fmt: skip
_ENTRY = re.compile(
    r"""\s*(?P<quote>['"])(?P<key>descr|fortran_order|shape)(?P=quote)\s*:\s*"""
    r"""(?:(?P<end>['"])(?P<text>[^'"\\]*)(?P=end)|(?P<flag>True|False)|\((?P<shape>[0-9L,\s]*)\)|(?P<structured>[\[(]))\s*,?\s*"""
)
"""One entry of the header: a Python literal, of which three keys may occur. Read by pattern: Python's parser can be made to overflow."""
_VALUES = {"descr": "text", "fortran_order": "flag", "shape": "shape"}
"""Key → the part of the pattern that has its value."""
_OBJECT = re.compile(r"""['"][|<>=]?O[0-9]*['"]""")
_MAX_DIGITS = 19
_STEP_NBYTES = 4 << 20
"""Converted at a time."""


@dataclass(frozen=True, slots=True)
class _Header:
    """What stands before an array."""

    nbytes: int
    descr: str
    fortran_order: bool
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str | None:
        """None for what is left out."""
        return _DTYPES.get(self.descr[1:]) if self.descr[:1] in ("<", ">", "|") else None

    @property
    def plain(self) -> bool:
        """Whether the bytes are what zarr wants. An array with one axis that is longer than 1 has both orders."""
        fortran = self.fortran_order and sum(extent != 1 for extent in self.shape) > 1
        return not fortran and not (self.descr[0] == ">" and self.descr[2:] != "1")


def index(path: Path, name: str, sink: Sink) -> Iterator[StoredTensor]:
    """The arrays: of an .npz by their names, of an .npy by the file's. Raises: BadModelError, HostileModelError."""
    found = _archived(path, name, sink) if zips.is_zip(path) else [_single(path, name, sink)]
    yield from (tensor for tensor in found if tensor is not None)


def _single(path: Path, name: str, sink: Sink) -> StoredTensor | None:
    with path.open("rb") as file:
        header = _header(file.read(_HEAD_NBYTES), path.name)
        return _placed(file, PurePosixPath(name).stem, header, _Place(name, 0, os.fstat(file.fileno()).st_size), sink)


def _archived(path: Path, name: str, sink: Sink) -> Iterator[StoredTensor | None]:
    with path.open("rb") as file:
        for member in zips.members(path):
            if not member.name.endswith(".npy"):
                continue
            key = member.name.removesuffix(".npy")
            label = f"{path.name}: {member.name[:200]!r}"
            if member.method == zips.STORED:
                file.seek(member.data_offset)
                header = _header(file.read(min(_HEAD_NBYTES, member.nbytes)), label)
                yield _placed(file, key, header, _Place(name, member.data_offset, member.nbytes), sink)
            elif sink.wanted:
                yield _unpacked(key, label, zips.chunks(path, member), sink)


def _header(head: bytes, label: str) -> _Header:
    width = _PREFIXES.get(head[6:8])
    if not head.startswith(_MAGIC) or width is None:
        raise BadModelError(f"{label} is no array that numpy saved, or a damaged one; save it again")
    start = len(_MAGIC) + 2 + width
    length = int.from_bytes(head[start - width : start], "little")
    text = head[start : start + length]
    if length > _MAX_HEADER_NBYTES or len(text) != length:
        raise BadModelError(f"{label}: its header is cut off, or has more than {_MAX_HEADER_NBYTES} bytes; save the array again")
    said = _entries(text.decode("latin-1").strip())
    extents = re.findall("[0-9]+", said.get("shape", ""))
    if said.keys() != _VALUES.keys() or len(extents) > MAX_RANK or max(map(len, extents), default=0) > _MAX_DIGITS:
        raise BadModelError(f"{label}: its header is damaged; save the array again")
    if said["descr"][:2].endswith("O"):
        raise HostileModelError(f"{label} is an array of pickled objects, which can run code; save it with allow_pickle=False")
    return _Header(start + length, said["descr"], said["fortran_order"] == "True", tuple(map(int, extents)))


def _entries(text: str) -> dict[str, str]:
    """The header's values by key; without some where it is none. Of a structured type: whether a field of it is an object."""
    said: dict[str, str] = {}
    at = 1
    while at < len(text) - 1:
        entry = _ENTRY.match(text, at)
        if entry is None or entry["key"] in said:
            return {}
        if entry["key"] == "descr" and entry["structured"]:
            return {"descr": "|O" if _OBJECT.search(text, at) else "|V", "fortran_order": "False", "shape": ""}
        value = entry[_VALUES[entry["key"]]]
        if value is None:
            return {}
        said[entry["key"]] = value
        at = entry.end()
    return said if text[:1] == "{" and text[-1:] == "}" else {}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an .npy lies."""

    file: str
    offset: int
    nbytes: int


def _placed(file: IO[bytes], key: str, header: _Header, place: _Place, sink: Sink) -> StoredTensor | None:
    """An array that lies in a file as it is."""
    if header.dtype is None:
        return None
    nbytes = tensor_nbytes(key, header.dtype, header.shape)
    if header.nbytes + nbytes > place.nbytes:
        raise BadModelError(f"array {key[:200]!r} of {place.file[:200]!r} is cut off; save it again")
    start = place.offset + header.nbytes
    if header.plain:
        return StoredTensor(key, header.dtype, header.shape, place.file, start, nbytes)
    return sink.put(key, header.dtype, header.shape, _rearranged(file, start, header))


def _unpacked(key: str, label: str, chunks: Iterator[bytes], sink: Sink) -> StoredTensor | None:
    """An array that lies compressed in an archive."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _HEAD_NBYTES:
            break
    header = _header(head, label)
    if header.dtype is None:
        return None
    data: Iterable[bytes] = chain([head[header.nbytes :]], chunks)
    if not header.plain:
        data = _spooled(data, tensor_nbytes(key, header.dtype, header.shape), header)
    return sink.put(key, header.dtype, header.shape, data)


def _spooled(chunks: Iterable[bytes], nbytes: int, header: _Header) -> Iterator[bytes]:
    """Rearranged by way of a temporary file: any order of reading, without the array in memory. Yields nothing where bytes are missing."""
    with tempfile.TemporaryFile() as file:
        for chunk in chunks:
            file.write(chunk)
        if file.tell() == nbytes:
            yield from _rearranged(file, 0, header)


def _rearranged(file: IO[bytes], start: int, header: _Header) -> Iterator[bytes]:
    if 0 in header.shape:
        return
    file.flush()
    order: Any = "F" if header.fortran_order else "C"
    dtype = np.dtype(header.descr)
    array = np.memmap(file, dtype, "r", start, header.shape, order)
    yield from _c_order(np.asarray(array), dtype.newbyteorder("<"))


def _c_order(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> Iterator[bytes]:
    """The elements, little-endian, the last axis fastest; a few megabytes at a time."""
    if array.nbytes <= _STEP_NBYTES:
        yield np.asarray(array, dtype, order="C").tobytes()
        return
    row_nbytes = array.nbytes // len(array)
    if row_nbytes > _STEP_NBYTES:
        for row in array:
            yield from _c_order(row, dtype)
        return
    rows = _STEP_NBYTES // row_nbytes
    for start in range(0, len(array), rows):
        yield np.asarray(array[start : start + rows], dtype, order="C").tobytes()
