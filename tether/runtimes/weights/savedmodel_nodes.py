"""`saved_model.pb` as nodes: a SavedModel's protobuf (tensorflow/core/protobuf/saved_model.proto, graph.proto), read field by field.

What is large, the bytes of constants, is jumped over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.protobuf import BYTES, VARINT, Source, fields
from tether.runtimes.weights.limits import MAX_RANK

__all__ = [
    "TF_DTYPES",
    "Node",
    "Part",
    "all_nodes",
    "check_plain_file",
    "nested",
    "node_name",
    "nodes_of",
    "parts",
    "shape_of",
    "signed",
    "text",
]

TF_DTYPES = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 8: "complex64", 9: "int64", 10: "bool", 14: "bfloat16",
    17: "uint16", 18: "complex128", 19: "float16", 22: "uint32", 23: "uint64",
    24: "float8_e5m2", 25: "float8_e4m3fn", 26: "float8_e4m3fnuz", 28: "float8_e5m2fnuz",
}  # fmt: skip
"""tensorflow.DataType → zarr's names."""
_MAX_TEXT_NBYTES = 64 * 1024


class Part(NamedTuple):
    """A field of a message; a VARINT has its value, all else where its bytes are."""

    number: int
    wire_type: int
    value: int
    end: int


class Node(NamedTuple):
    name: str
    op: str
    inputs: tuple[str, ...]
    calls: tuple[str, ...]
    """Functions that its attributes name."""
    texts: tuple[bytes, ...]
    """Strings in its attributes."""
    constant: Part | None
    """Where its `value` is, of a `Const`."""


def check_plain_file(folder: Path, name: str) -> None:
    """Raises: HostileModelError: the file, or a folder on the way, is a link; BadModelError: it is not there."""
    path = folder
    for part in PurePosixPath(name).parts:
        path /= part
        if path.is_symlink():
            raise HostileModelError(f"{folder.name}: {name!r} is a symbolic link; put the file itself in the folder")
    if not path.is_file():
        raise BadModelError(f"{folder.name}: {name!r} is not there; publish the whole folder of the SavedModel")


def parts(source: Source, start: int, end: int) -> Iterator[Part]:
    """The fields of a message, by names. Raises: BadModelError: the bytes are no protobuf."""
    return map(Part._make, fields(source, start, end))


def signed(value: int) -> int:
    """A varint as int64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shape_of(source: Source, message: Part) -> tuple[int, ...] | None:
    """Of a `TensorShapeProto`; None where it is not known, or has too many axes to be one."""
    extents: list[int] = []
    for part in parts(source, message.value, message.end):
        if part.number == 3 and part.wire_type == VARINT and part.value:  # noqa: PLR2004 (unknown_rank)
            return None
        if part.number == 2 and part.wire_type == BYTES:  # noqa: PLR2004 (dim)
            size = [signed(each.value) for each in parts(source, part.value, part.end) if each.number == 1 and each.wire_type == VARINT]
            extents.append(size[-1] if size else 0)
            if len(extents) > MAX_RANK:
                return None
    return tuple(extents) if min(extents, default=0) >= 0 else None


def nested(source: Source, start: int, end: int, number: int) -> Iterator[Part]:
    """The messages in one field of a message."""
    return (part for part in parts(source, start, end) if part.number == number and part.wire_type == BYTES)


def text(source: Source, part: Part) -> str:
    """A string, at most 64 KiB of it."""
    return _bytes(source, part).decode("utf-8", "replace")


def _bytes(source: Source, part: Part) -> bytes:
    return source.read(part.value, min(part.end, part.value + _MAX_TEXT_NBYTES))


def all_nodes(source: Source) -> Iterator[tuple[str, Node]]:
    """Each node with the name of the function that it is in, `""` for the main graph."""
    for graph in nested(source, 0, source.nbytes, 2):
        for definition in nested(source, graph.value, graph.end, 2):
            yield from nodes_of(source, definition)


def nodes_of(source: Source, definition: Part) -> Iterator[tuple[str, Node]]:
    """Of a `GraphDef`."""
    for part in parts(source, definition.value, definition.end):
        if part.wire_type != BYTES:
            continue
        if part.number == 1:
            yield "", _node(source, part)
        elif part.number == 2:  # noqa: PLR2004 (library)
            for function in nested(source, part.value, part.end, 1):
                name = _function_name(source, function)
                yield name, Node("", "", (), (), (), None)  # a function without nodes is one as well
                for node in nested(source, function.value, function.end, 3):
                    yield name, _node(source, node)


def _function_name(source: Source, function: Part) -> str:
    for signature in nested(source, function.value, function.end, 1):
        for name in nested(source, signature.value, signature.end, 1):
            return text(source, name)
    return "?"


def _node(source: Source, message: Part) -> Node:
    name = op = ""
    inputs: list[str] = []
    calls: list[str] = []
    texts: list[bytes] = []
    constant: Part | None = None
    for part in parts(source, message.value, message.end):
        if part.wire_type != BYTES:
            continue
        if part.number == 1:
            name = text(source, part)
        elif part.number == 2:  # noqa: PLR2004 (op)
            op = text(source, part)
        elif part.number == 3:  # noqa: PLR2004 (input)
            inputs.append(text(source, part))
        elif part.number == 5:  # noqa: PLR2004 (attr)
            key, value = _attribute(source, part)
            for found in value:
                _read_value(source, found, calls, texts)
                if found.number == 8 and key == "value":  # noqa: PLR2004 (tensor)
                    constant = found
    return Node(name, op, tuple(inputs), tuple(calls), tuple(texts), constant)


def _attribute(source: Source, entry: Part) -> tuple[str, list[Part]]:
    key, value = "", []
    for part in parts(source, entry.value, entry.end):
        if part.wire_type == BYTES and part.number == 1:
            key = text(source, part)
        elif part.wire_type == BYTES and part.number == 2:  # noqa: PLR2004 (AttrValue)
            value = [found for found in parts(source, part.value, part.end) if found.wire_type == BYTES]
    return key, value


def _read_value(source: Source, value: Part, calls: list[str], texts: list[bytes]) -> None:
    """Functions and strings in an `AttrValue`."""
    match value.number:
        case 1:  # list
            for part in parts(source, value.value, value.end):
                if part.wire_type == BYTES and part.number == 9:  # noqa: PLR2004 (func)
                    _read_value(source, part._replace(number=10), calls, texts)
                elif part.wire_type == BYTES and part.number == 2:  # noqa: PLR2004 (s)
                    texts.append(_bytes(source, part))
        case 2:  # s
            texts.append(_bytes(source, value))
        case 8:  # tensor
            texts += [_bytes(source, part) for part in nested(source, value.value, value.end, 8)]
        case 10:  # func
            calls += [text(source, part) for part in nested(source, value.value, value.end, 1)]


def node_name(text: str) -> str:
    """Of a tensor (`node:0`, `node:output:0`) or a control input (`^node`)."""
    return text.removeprefix("^").partition(":")[0]
