"""Which other files an ONNX model reads, found without the onnx package, and whether they may be read.

ONNX keeps large weights in external files, named by `TensorProto.external_data` (onnx.proto3, IR version 3 and later). The names come from
whoever wrote the model, and ONNX Runtime 1.32 follows hard links out of the folder, so they are checked before it sees the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.protobuf import BYTES, VARINT, Field, Source, fields, varint

__all__ = ["external_entry", "external_file", "external_files"]

_TREE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Messages that can lead to a tensor, with the numbers of the fields that lead on."""
_DEPTH = 100
"""protobuf's own limit on nesting: nothing deeper is readable for ONNX Runtime either."""
_MAX_TEXT_NBYTES = 4096
"""Of a key or value of `external_data`: the longest path there is."""
_SPARSE_DIMS = 3
"""`SparseTensorProto.dims`."""
_MAX_DIMS_NBYTES = 320
"""Packed, of 32 axes."""
_ELEMENT_NBYTES = 8
_SPARSE_FREE_NBYTES = 64 << 20
_SPARSE_RATIO = 200
"""Times its file that a sparse tensor may be: ONNX Runtime writes it out when it loads (86 bytes came to 1.5 GiB)."""


def external_files(path: Path) -> set[str]:
    """The names in `external_data`, as written in the file.

    Raises: BadModelError: the file is no protobuf, or nested too deep; HostileModelError: it unpacks to far more than it is.
    """
    with path.open("rb", buffering=0) as file:
        source = Source(path.name, file.fileno())
        pairs = (external_entry(source, entry) for entry in _entries(source))
        return {value for key, value in pairs if key == "location"}


def external_entry(source: Source, entry: tuple[int, int]) -> tuple[str, str]:
    """Key and value of one entry of `external_data` (a StringStringEntryProto, by its range). Raises: BadModelError: it is none."""
    texts = {1: b"", 2: b""}
    for number, wire_type, start, end in fields(source, *entry):
        if wire_type == BYTES and number in texts:
            if end - start > _MAX_TEXT_NBYTES:
                raise HostileModelError(f"{source.label}: the place of a weight in another file has over {_MAX_TEXT_NBYTES} characters")
            texts[number] = source.read(start, end)
    try:
        return texts[1].decode(), texts[2].decode()
    except UnicodeDecodeError:
        raise source.garbled() from None


def external_file(model: Path, name: str) -> Path:
    """The file of this name in `external_data`.

    Raises: HostileModelError: the name leads out of the model's folder, or is a link; BadModelError: no such file.
    """
    relative = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise HostileModelError(f"{model.name} keeps weights in {name[:200]!r}, outside its folder; save it again with a plain file name")
    path = model.parent
    for part in relative.parts:
        path /= part
        if path.is_symlink():
            raise HostileModelError(f"{model.name} keeps weights in {name!r}, a symbolic link; put the file itself in the folder")
    if not path.is_file():
        raise BadModelError(f"{model.name} keeps weights in {name!r}, which is not there; publish the folder that holds both")
    if path.stat().st_nlink > 1:
        raise HostileModelError(f"{model.name} keeps weights in {name!r}, a hard link to a file elsewhere; copy the file instead")
    return path


def _entries(source: Source) -> Iterator[tuple[int, int]]:
    """Where the key-value pairs of all tensors' `external_data` lie; of the graph no more is kept in memory than the way down to one."""
    way = [("model", fields(source, 0, source.nbytes))]
    while way:
        kind, start, end = _next_below(*way[-1])
        if not kind:
            way.pop()
        elif kind == "entry":
            yield start, end
        elif len(way) > _DEPTH:
            raise BadModelError(f"the ONNX graph is nested deeper than {_DEPTH} levels; flatten its subgraphs")
        else:
            if kind == "sparse":
                _check_sparse(source, start, end)
            way.append((kind, fields(source, start, end)))


def _next_below(kind: str, rest: Iterator[Field]) -> tuple[str, int, int]:
    """The next message that leads on, and its range; an empty kind at the end."""
    leads_on = _TREE[kind]
    below = ((leads_on[number], start, end) for number, wire_type, start, end in rest if wire_type == BYTES and number in leads_on)
    return next(below, ("", 0, 0))


def _check_sparse(source: Source, start: int, end: int) -> None:
    """Refuse a sparse tensor (by its range) that is gigabytes of zeros, before something writes them."""
    extents: list[int] = []
    for number, wire_type, first, last in fields(source, start, end):
        if number != _SPARSE_DIMS:
            continue
        if wire_type == VARINT:
            extents.append(first)
        elif last - first <= _MAX_DIMS_NBYTES:
            extents += _packed(source.read(first, last))
        if last - first > _MAX_DIMS_NBYTES or len(extents) > _MAX_DIMS_NBYTES:
            raise HostileModelError(f"{source.label} has a sparse tensor of more axes than there are; export the model again")
    nbytes = _ELEMENT_NBYTES * prod(extents)
    if nbytes > _SPARSE_FREE_NBYTES + _SPARSE_RATIO * source.nbytes:
        raise HostileModelError(
            f"{source.label} has a sparse tensor that unpacks to {nbytes} bytes, far more than its file has; export it with dense weights"
        )


def _packed(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        try:
            value, at = varint(data, at)
        except IndexError:
            raise BadModelError("a sparse tensor's shape is cut off; export the model again") from None
        yield value
