"""An ONNX model without its weights: it names them as ranges of the very file that they lie in.

ONNX Runtime parses a model's file whole and copies every weight (3 s for 1 GiB); of external data it maps the file. So the outline is made
of the file's own bytes, less the large `raw_data`, and says that those are external data, of this same file. A session is then ready in
1.4 s, most of which it packs the weights anew for its kernels; with `session.disable_prepacking` in 0.03 s, and half as fast in batches
(`onnx_sessions` has it both ways).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tether.runtimes.protobuf import BYTES, VARINT, Field, Source, fields

__all__ = ["outline"]

_LARGE = 64 * 1024
"""Bytes from which on a weight is left where it is; smaller ones cost more to name than to copy."""
_GRAPH = 7
"""`ModelProto.graph`."""
_INITIALIZER = 5
"""`GraphProto.initializer`."""
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14
"""Of TensorProto."""
_EXTERNAL = 1


def outline(path: Path) -> bytes | None:
    """What to give to ONNX Runtime, with the file's folder as `session.model_external_initializers_file_folder_path`.

    The file has to stay as it is while the session lives: its weights are mapped. None: it has no large weight of its own.

    Raises: BadModelError: it is no protobuf.
    """
    with path.open("rb", buffering=0) as file:
        source = Source(path.name, file.fileno())
        count, parts = 0, []
        for field, before in _with_tags(source, 0, source.nbytes):
            if field[0] != _GRAPH or field[1] != BYTES:
                parts.append(source.read(before, field[3]))
                continue
            body, found = _graph(source, field, path.name)
            count += found
            parts.append(_message(_GRAPH, body))
    return b"".join(parts) if count else None


def _with_tags(source: Source, start: int, end: int) -> Iterator[tuple[Field, int]]:
    """The fields and where each begins, its tag included: where the one before it ended."""
    before = start
    for field in fields(source, start, end):
        yield field, before
        before = field[3]


def _graph(source: Source, graph: Field, name: str) -> tuple[bytes, int]:
    """The graph's outline, and how many weights were left out of it."""
    parts, count = [], 0
    for field, before in _with_tags(source, graph[2], graph[3]):
        weight = _weight(source, field, name) if field[0] == _INITIALIZER and field[1] == BYTES and field[3] - field[2] >= _LARGE else None
        count += weight is not None
        parts.append(source.read(before, field[3]) if weight is None else _message(_INITIALIZER, weight))
    return b"".join(parts), count


def _weight(source: Source, tensor: Field, name: str) -> bytes | None:
    """A TensorProto whose bytes are named; None: they are few, typed, or lie elsewhere already."""
    parts, raw = [], None
    for field, before in _with_tags(source, tensor[2], tensor[3]):
        number, wire_type, start, end = field
        if number in {_EXTERNAL_DATA, _DATA_LOCATION} or (number == _RAW_DATA and (raw is not None or wire_type != BYTES)):
            return None
        if number == _RAW_DATA and end - start >= _LARGE:
            raw = (start, end - start)
        elif end - before >= _LARGE:
            return None
        else:
            parts.append(source.read(before, end))
    if raw is None:
        return None
    entries = {"location": name, "offset": str(raw[0]), "length": str(raw[1])}
    parts += [_message(_EXTERNAL_DATA, _message(1, key.encode()) + _message(2, value.encode())) for key, value in entries.items()]
    return b"".join([*parts, _varint(_DATA_LOCATION << 3 | VARINT), _varint(_EXTERNAL)])


def _message(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 (seven bits a byte)
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
