"""Pure: how files become blobs and paths: cutting, path rules, zarr names, chunk shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

__all__ = [
    "BLOB_NBYTES",
    "CONVERTED",
    "DTYPES",
    "FILES",
    "HIDDEN",
    "KEYS",
    "TENSORS",
    "Piece",
    "chunk_shape",
    "cut",
    "node_name",
    "path_problem",
    "slices",
]

BLOB_NBYTES = 4 * 1024 * 1024
"""Largest blob. A peer fetches, a reader verifies and a client uploads one at a time: 4 MiB is 1 ms of hashing and 1 s of a slow uplink."""
FILES = "files"
"""The group that holds the files of the model, one flat array each."""
TENSORS = "tensors"
"""The group that holds the weights, one typed array each, made of the same blobs as the files."""
KEYS = "keys"
"""The group of a version that was written as a zarr store: each key of it, verbatim. Not a part of any zarr path."""
HIDDEN = ".tether"
"""Folder inside `files` for what belongs to a version but not to the model's own files (the example): checked out, not exported."""
CONVERTED = f"{HIDDEN}/tensors.bin"
"""File for the tensors whose bytes do not lie in the model's files as zarr wants them: compressed, strided, varints."""
DTYPES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "int32": 4, "uint32": 4, "float32": 4,
    "int64": 8, "uint64": 8, "float64": 8,
    "complex64": 8, "complex128": 16, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
"""zarr's names of the element types → bytes an element."""

_SMALL = 64 * 1024
"""Smaller tensors share a blob with their neighbours, until it has this size: a blob costs 44 bytes of index, a seek and a request."""
_GAP = 4096
"""A stretch between tensors that is as long as this (a header, a table of contents) changes for its own reasons and gets its own blobs."""
_MAX_PART_NBYTES = 255
"""What file systems allow for one name."""
_MAX_PATH_NBYTES = 1024
"""Room for the data folder before it and still under PATH_MAX (4096), with any nesting a model needs."""
_FIRST_PRINTABLE = 0x20
_DELETE = 0x7F
_PLAIN_PART = r"[ !-\-0-\[\]-~][ -.0-\[\]-~]*"
"""Printable ASCII without slashes; not a dot at the start."""
_plain = re.compile(rf"{_PLAIN_PART}(?:/{_PLAIN_PART})*").fullmatch


class Piece(NamedTuple):
    """A range of a file."""

    offset: int
    nbytes: int


def cut(nbytes: int, tensors: Iterable[Piece] = (), step: int = BLOB_NBYTES) -> Iterator[Piece]:
    """The pieces of a file of `nbytes` bytes, in order; together they are the file; none of an empty one.

    A tensor of 64 KiB or more starts a piece, is cut every `step` bytes from its start and shares no piece with anything; smaller ones
    share one with what lies around them. So a tensor that stays the same gives the same blobs, wherever in the file it comes to lie.
    Tensors that overlap an earlier one or leave the file are not heeded: any cut is correct, good ones let versions share more.

    >>> list(cut(10, step=4))
    [Piece(offset=0, nbytes=4), Piece(offset=4, nbytes=4), Piece(offset=8, nbytes=2)]
    >>> list(cut(100_100, [Piece(50, 100_000)], step=65_536))
    [Piece(offset=0, nbytes=50), Piece(offset=50, nbytes=65536), Piece(offset=65586, nbytes=34464), Piece(offset=100050, nbytes=50)]
    """
    edges = _edges(nbytes, tensors)
    for start, stop in pairwise(sorted({0, *edges, nbytes})):
        for offset in range(start, stop, step):
            yield Piece(offset, min(step, stop - offset))


def _edges(nbytes: int, tensors: Iterable[Piece]) -> Iterator[int]:
    """Where pieces begin or end, besides the ends of the file and every `step` bytes."""
    begun = end = 0
    """Where the current run of small tensors and what lies between them began; where the last tensor ended."""
    for tensor in sorted(tensors):
        if tensor.offset < end or tensor.nbytes <= 0 or tensor.offset + tensor.nbytes > nbytes:
            continue
        large = tensor.nbytes >= _SMALL
        if tensor.offset - end >= _GAP:
            yield end
        if large or tensor.offset - end >= _GAP or tensor.offset - begun >= _SMALL:
            yield tensor.offset
            begun = tensor.offset
        end = tensor.offset + tensor.nbytes
        if large:
            yield end
            begun = end
    if nbytes - end >= _GAP:
        yield end


def slices(sizes: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, Piece]]:
    """Which parts of consecutive segments with these `sizes` cover the bytes [start, stop): (index of the segment, range in it).

    >>> list(slices([4, 4, 2], 3, 9))
    [(0, Piece(offset=3, nbytes=1)), (1, Piece(offset=0, nbytes=4)), (2, Piece(offset=0, nbytes=1))]
    """
    begin = 0
    for index, size in enumerate(sizes):
        end = begin + size
        low, high = max(start, begin), min(stop, end)
        if low < high:
            yield index, Piece(low - begin, high - low)
        if end >= stop:
            return
        begin = end


def path_problem(path: str) -> str | None:
    """Why `path` may not be a relative path of a version; None if it may.

    What is allowed must mean one file, the same on every file system and in zarr: so no `..`, no backslash (zarr reads it as a slash).
    """
    if len(path) <= _MAX_PART_NBYTES and _plain(path):
        return None  # as nearly all are: a version has thousands, and the rest of this takes ten times as long
    if len(path) > _MAX_PATH_NBYTES or len(path.encode("utf-8", "surrogatepass")) > _MAX_PATH_NBYTES:
        return f"is longer than {_MAX_PATH_NBYTES} bytes"
    if path.startswith("/"):
        return "is absolute"
    return next((problem for part in path.split("/") if (problem := _part_problem(part))), None)


def _part_problem(part: str) -> str | None:
    if part in {"", ".", ".."}:
        return f"has a part {part!r}"
    if any(ord(char) < _FIRST_PRINTABLE or ord(char) == _DELETE for char in part):
        return "has a control character"
    if "\\" in part:
        return "has a backslash"
    try:
        encoded = part.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    return f"has a part longer than {_MAX_PART_NBYTES} bytes" if len(encoded) > _MAX_PART_NBYTES else None


def node_name(path: str) -> str:
    """The zarr path of an array. It is `path` but for `%` and for files named `zarr.json`, whose name zarr needs for itself.

    >>> node_name("files/inner/zarr.json"), node_name("files/variables/v.index")
    ('files/inner/zarr%2Ejson', 'files/variables/v.index')
    """
    parts = (part.replace("%", "%25") for part in path.split("/"))
    return "/".join("zarr%2Ejson" if part == "zarr.json" else part for part in parts)


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Chunks along the first axis only, so that each is one contiguous range of at most 4 MiB (or one row, where a row is larger).

    >>> chunk_shape((10_000_000,), 1), chunk_shape((10,), 1), chunk_shape((5000, 1024), 4), chunk_shape((), 8)
    ((4194304,), (10,), (1024, 1024), ())
    """
    if not shape:
        return ()
    row = itemsize * prod(shape[1:])
    rows = max(1, min(shape[0], BLOB_NBYTES // max(1, row)))
    return rows, *(max(1, extent) for extent in shape[1:])
