"""Which other files an ONNX model reads, found without the onnx package, and whether they may be read.

ONNX keeps large weights in external files, named by `TensorProto.external_data` (onnx.proto3, IR version 3 and later). The names come from
whoever wrote the model, and ONNX Runtime 1.32 follows hard links out of the folder, so they are checked before it sees the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tether.errors import BadModelError

__all__ = ["check_external_files", "external_files"]

_TREE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
"""Messages that can lead to a tensor, with the numbers of the fields that lead on."""
_DEPTH = 100
"""protobuf's own limit on nesting: nothing deeper is readable for ONNX Runtime either."""
_VARINT_NBYTES = 10
_Span = tuple[int, int]


def check_external_files(path: Path) -> None:
    """Refuse a model that reads outside its folder.

    Raises: BadModelError: a name that leads out, a link, a missing file; or the file is no protobuf.
    """
    for name in sorted(external_files(path)):
        _check(path, name)


def external_files(path: Path) -> set[str]:
    """The names in `external_data`, as written in the file.

    Raises: BadModelError: the file is no protobuf, or nested too deep.
    """
    names = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for start, end in _entries(data):
                fields = {number: bytes(data[slice(*span)]) for number, span in _fields(data, start, end)}
                if fields.get(1) == b"location":
                    names.add(fields.get(2, b"").decode())
        except (IndexError, UnicodeDecodeError):
            raise BadModelError(
                f"{path.name}: not an ONNX file, or a damaged one: its protobuf is cut off or garbled; export it again"
            ) from None
    return names


def _entries(data: mmap.mmap) -> Iterator[_Span]:
    """Where the key-value pairs of all tensors' `external_data` lie."""
    open_messages = [("model", 0, len(data), 0)]
    while open_messages:
        kind, start, end, depth = open_messages.pop()
        if depth > _DEPTH:
            raise BadModelError(f"the ONNX graph is nested deeper than {_DEPTH} levels; flatten its subgraphs")
        if kind == "entry":
            yield start, end
            continue
        leads_on = _TREE[kind]
        for number, (first, last) in _fields(data, start, end):
            if number in leads_on:
                open_messages.append((leads_on[number], first, last, depth + 1))


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, _Span]]:
    """The length-delimited fields of one message; IndexError where the bytes are no protobuf."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        match tag & 7:
            case 0:
                _, at = _varint(data, at, end)
            case 1:
                at += 8
            case 5:
                at += 4
            case 2:
                nbytes, at = _varint(data, at, end)
                if nbytes > end - at:
                    raise IndexError
                yield tag >> 3, (at, at + nbytes)
                at += nbytes
            case _:
                raise IndexError
    if at != end:
        raise IndexError


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for count in range(_VARINT_NBYTES):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:  # noqa: PLR2004 (the continuation bit)
            return value, at
    raise IndexError


def _check(model: Path, name: str) -> None:
    relative = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise BadModelError(f"{model.name} keeps weights in {name[:200]!r}, outside its folder; save it again with a plain file name")
    path = model.parent
    for part in relative.parts:
        path /= part
        if path.is_symlink():
            raise BadModelError(f"{model.name} keeps weights in {name!r}, a symbolic link; put the file itself in the folder")
    if not path.is_file():
        raise BadModelError(f"{model.name} keeps weights in {name!r}, which is not there; publish the folder that holds both")
    if path.stat().st_nlink > 1:
        raise BadModelError(f"{model.name} keeps weights in {name!r}, a hard link to a file elsewhere; copy the file instead")
