"""Pure: how files become blobs and paths: cutting, path rules, zarr names, chunk shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

__all__ = ["BLOB_NBYTES", "DTYPES", "FILES", "HIDDEN", "Piece", "chunk_shape", "cut", "node_name", "path_problem", "slices"]

BLOB_NBYTES = 4 * 1024 * 1024
"""Largest blob. A peer fetches, a reader verifies and a client uploads one at a time: 4 MiB is 1 ms of hashing and 1 s of a slow uplink."""
FILES = "files"
"""The group that holds the files of the model, one flat array each."""
HIDDEN = ".tether"
"""Folder inside `files` for what belongs to a version but not to the model's own files (the example): checked out, not exported."""
DTYPES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "int32": 4, "uint32": 4, "float32": 4,
    "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip
"""zarr's names of the element types → bytes an element."""

_MAX_PART_NBYTES = 255
"""What file systems allow for one name."""
_MAX_PATH_NBYTES = 1024
"""Room for the data folder before it and still under PATH_MAX (4096), with any nesting a model needs."""
_FIRST_PRINTABLE = 0x20
_DELETE = 0x7F


class Piece(NamedTuple):
    """A range of a file."""

    offset: int
    nbytes: int


def cut(nbytes: int, step: int = BLOB_NBYTES) -> Iterator[Piece]:
    """The pieces of a file of `nbytes` bytes, in order: `step` bytes each, the last shorter; none of an empty file.

    >>> list(cut(10, 4))
    [Piece(offset=0, nbytes=4), Piece(offset=4, nbytes=4), Piece(offset=8, nbytes=2)]
    """
    for offset in range(0, nbytes, step):
        yield Piece(offset, min(step, nbytes - offset))


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
