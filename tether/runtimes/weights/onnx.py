"""The weights of an ONNX model (onnx.proto3): initializers of its graph, and constants of 1 KiB and more among its nodes.

Subgraphs and functions are not looked into: exporters keep weights in the graph itself. Strings and sparse tensors are left out.
Elements of less than a byte (int4, uint2, float4 …) are given as the bytes that hold them, and exponents alone (float8_e8m0) as theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.onnx_files import external_entry, external_file
from tether.runtimes.protobuf import BYTES, FIXED32, FIXED64, VARINT, Source, fields, varint
from tether.runtimes.weights.limits import DTYPES, MAX_NAME, MAX_RANK, tensor_nbytes
from tether.runtimes.weights.sinks import Sink
from tether.types import StoredTensor

__all__ = ["index"]

_FLOATS, _INT32S, _INT64S, _DOUBLES, _UINT64S = 4, 5, 7, 10, 11
"""Field numbers of TensorProto's typed data."""
_DATA = {_FLOATS: (BYTES, FIXED32), _DOUBLES: (BYTES, FIXED64), **dict.fromkeys((_INT32S, _INT64S, _UINT64S), (BYTES, VARINT))}
"""… and the wire types that each may have: packed, or one by one."""
_EXTERNAL = 1
"""`TensorProto.DataLocation.EXTERNAL`."""
_CONSTANT_NBYTES = 1024
"""Smaller constants are shapes, axes and scalars, not weights."""
_MAX_ATTRIBUTES = 16
"""A Constant has one."""
_STEP_NBYTES = 64 * 1024
"""Decoded at once."""
_MAX_DIGITS = 19
"""Of an offset or a length: those of 2^63."""


class _Element(NamedTuple):
    dtype: str
    data: int
    """The field that holds such elements where `raw_data` does not."""
    packed: int = 1
    """Elements in a byte."""


_ELEMENTS = {
    1: _Element("float32", _FLOATS), 2: _Element("uint8", _INT32S), 3: _Element("int8", _INT32S), 4: _Element("uint16", _INT32S),
    5: _Element("int16", _INT32S), 6: _Element("int32", _INT32S), 7: _Element("int64", _INT64S), 9: _Element("bool", _INT32S),
    10: _Element("float16", _INT32S), 11: _Element("float64", _DOUBLES), 12: _Element("uint32", _UINT64S), 13: _Element("uint64", _UINT64S),
    14: _Element("complex64", _FLOATS), 15: _Element("complex128", _DOUBLES), 16: _Element("bfloat16", _INT32S),
    17: _Element("float8_e4m3fn", _INT32S), 18: _Element("float8_e4m3fnuz", _INT32S), 19: _Element("float8_e5m2", _INT32S),
    20: _Element("float8_e5m2fnuz", _INT32S), 21: _Element("uint8", _INT32S, 2), 22: _Element("uint8", _INT32S, 2),
    23: _Element("uint8", _INT32S, 2), 24: _Element("uint8", _INT32S), 25: _Element("uint8", _INT32S, 4), 26: _Element("uint8", _INT32S, 4),
}  # fmt: skip
"""`TensorProto.DataType` → element. Without 8, strings."""


class _Tensor:
    """What a TensorProto says; ranges are of the file."""

    __slots__ = ("data", "data_number", "dims", "element", "entries", "external", "name", "range", "raw")

    def __init__(self, start: int, end: int) -> None:
        self.range = (start, end)
        self.name = ""
        self.element = 0
        self.dims: list[int] = []
        self.raw: tuple[int, int] | None = None
        self.data: tuple[int, int] | None = None
        """Of the last part of the typed data."""
        self.data_number = 0
        """Its field; 0 where there is more than one part."""
        self.external = False
        self.entries: list[tuple[int, int]] = []


def index(path: Path, name: str, sink: Sink) -> Iterator[StoredTensor]:
    """The tensors of a model, in the order of the file. Raises: BadModelError, HostileModelError."""
    with path.open("rb", buffering=0) as file:
        source = Source(path.name, file.fileno())
        places = _Places(source, path, name, sink)
        graphs = 0
        for number, wire_type, start, end in fields(source, 0, source.nbytes):
            if number == 7 and wire_type == BYTES:  # noqa: PLR2004 (ModelProto.graph)
                graphs += 1
                yield from _graph(source, start, end, places)
        if not graphs:
            raise BadModelError(f"{path.name} holds no ONNX graph; export the model again")


def _graph(source: Source, start: int, end: int, places: _Places) -> Iterator[StoredTensor]:
    for number, wire_type, first, last in fields(source, start, end):
        if wire_type != BYTES:
            continue
        if number == 5:  # noqa: PLR2004 (GraphProto.initializer)
            found = places.find(_read(source, first, last))
        elif number == 1 and last - first >= _CONSTANT_NBYTES:  # GraphProto.node
            found = _constant(source, first, last, places)
        else:
            continue
        if found is not None:
            yield found


def _constant(source: Source, start: int, end: int, places: _Places) -> StoredTensor | None:
    """The value of a node, if it is a Constant that is large enough; its name is that of its output."""
    output, operator, tensor, attributes = "", "", None, 0
    for number, wire_type, first, last in fields(source, start, end):
        if wire_type != BYTES:
            continue
        match number:
            case 2:
                output = output or _text(source, first, last)
            case 4:
                operator = _text(source, first, last)
            case 5:
                attributes += 1
                tensor = _value(source, first, last) or tensor
                if attributes > _MAX_ATTRIBUTES:
                    return None
            case _:
                pass
    if operator != "Constant" or tensor is None:
        return None
    tensor.name = output
    return places.find(tensor, _CONSTANT_NBYTES)


def _value(source: Source, start: int, end: int) -> _Tensor | None:
    """The tensor of the attribute `value`."""
    name, tensor = "", None
    for number, wire_type, first, last in fields(source, start, end):
        if wire_type == BYTES and number == 1:
            name = _text(source, first, last)
        elif wire_type == BYTES and number == 5:  # noqa: PLR2004 (AttributeProto.t)
            tensor = _read(source, first, last)
    return tensor if name == "value" else None


def _read(source: Source, start: int, end: int) -> _Tensor:  # noqa: C901, PLR0912 (one branch for each field of TensorProto)
    tensor = _Tensor(start, end)
    dims = tensor.dims
    for number, wire_type, value, last in fields(source, start, end):
        if wire_type == BYTES:
            match number:
                case 1:
                    dims += _packed_dims(source, value, last)
                case 8:
                    tensor.name = _text(source, value, last)
                case 9:
                    tensor.raw = (value, last)
                case 13:
                    tensor.entries.append((value, last))
                case _:
                    pass
        elif wire_type == VARINT:
            match number:
                case 1:
                    dims.append(value)
                case 2:
                    tensor.element = value
                case 14:
                    tensor.external = value == _EXTERNAL
                case _:
                    pass
        if number in _DATA and wire_type in _DATA[number]:
            tensor.data_number = 0 if tensor.data or wire_type != BYTES else number
            tensor.data = (value, last)
        if len(dims) > MAX_RANK or len(tensor.entries) > _MAX_ATTRIBUTES:
            raise BadModelError(f"{source.label}: a tensor has more than {MAX_RANK} axes, or too many keys; export the model again")
    return tensor


def _packed_dims(source: Source, start: int, end: int) -> list[int]:
    if end - start > MAX_RANK * 10:
        raise BadModelError(f"{source.label}: a tensor has more than {MAX_RANK} axes; reshape it")
    data, at, dims = source.read(start, end), 0, []
    try:
        while at < len(data):
            extent, at = varint(data, at)
            dims.append(extent)
    except IndexError:
        raise source.garbled() from None
    return dims


def _text(source: Source, start: int, end: int) -> str:
    if end - start > 4 * MAX_NAME:
        raise BadModelError(f"{source.label}: a name has more than {MAX_NAME} characters; rename it")
    try:
        return source.read(start, end).decode()
    except UnicodeDecodeError:
        raise source.garbled() from None


class _Places:
    """Finds where the tensors of one model lie."""

    def __init__(self, source: Source, path: Path, name: str, sink: Sink) -> None:
        self._source = source
        self._path = path
        self._name = name
        self._sink = sink
        self._external: dict[str, int] = {}
        """Name of a file in `external_data` that was checked → its size."""

    def find(self, tensor: _Tensor, least_nbytes: int = 0) -> StoredTensor | None:
        """None for what is left out."""
        element = _ELEMENTS.get(tensor.element)
        if element is None:
            return None
        name, dtype = tensor.name, element.dtype
        shape, nbytes = _shape(tensor, element)
        if nbytes < least_nbytes:
            return None
        if tensor.external:
            return self._outside(tensor, dtype, shape, nbytes)
        if tensor.raw is None and tensor.data and not (tensor.data_number == element.data and element.data in (_FLOATS, _DOUBLES)):
            return self._sink.put(name, dtype, shape, _decoded(self._source, tensor.range, element))
        start, end = tensor.raw or tensor.data or (0, 0)  # nowhere is right for an empty one: the size is checked
        return StoredTensor(name, dtype, shape, self._name, start, end - start)

    def _outside(self, tensor: _Tensor, dtype: str, shape: tuple[int, ...], nbytes: int) -> StoredTensor:
        said = dict(external_entry(self._source, entry) for entry in tensor.entries)
        location = said.get("location", "")
        if location not in self._external:
            self._external[location] = external_file(self._path, location).stat().st_size
        offset = self._number(tensor, said.get("offset", "0"))
        length = self._number(tensor, said.get("length", str(nbytes)))
        if offset + length > self._external[location]:
            raise BadModelError(f"tensor {tensor.name[:200]!r} should lie in bytes that {location!r} does not have: was the file cut off?")
        file = (PurePosixPath(self._name).parent / location).as_posix()
        return StoredTensor(tensor.name, dtype, shape, file, offset, length)

    def _number(self, tensor: _Tensor, text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > _MAX_DIGITS:
            raise HostileModelError(
                f"{self._path.name}: tensor {tensor.name[:200]!r} should lie at {text[:40]!r} of its file: no such place"
            )
        return int(text)


def _shape(tensor: _Tensor, element: _Element) -> tuple[tuple[int, ...], int]:
    """As it is stored, and its bytes."""
    shape = tuple(extent - (1 << 64) if extent >> 63 else extent for extent in tensor.dims)
    nbytes = tensor_nbytes(tensor.name, element.dtype, shape)
    if element.packed == 1:
        return shape, nbytes
    nbytes = -(-prod(shape) // element.packed)
    return (nbytes,), nbytes


def _decoded(source: Source, place: tuple[int, int], element: _Element) -> Iterator[bytes]:
    """The typed data of a tensor as raw data: all parts, in order."""
    for number, wire_type, start, end in fields(source, *place):
        if number != element.data or wire_type not in _DATA[number]:
            continue
        if wire_type == VARINT:
            yield _stored(np.array([start], np.uint64), element.dtype)
        elif number in (_FLOATS, _DOUBLES):
            for at in range(start, end, _STEP_NBYTES):
                yield source.read(at, min(at + _STEP_NBYTES, end))
        else:
            for values in _varints(source, start, end):
                yield _stored(values, element.dtype)


def _stored(values: npt.NDArray[np.uint64], dtype: str) -> bytes:
    """The low bits of each, as a cast to the element type keeps them."""
    data: bytes = ((values != 0) if dtype == "bool" else values.astype(f"<u{DTYPES[dtype]}")).tobytes()
    return data


def _varints(source: Source, start: int, end: int) -> Iterator[npt.NDArray[np.uint64]]:
    while start < end:
        data = np.frombuffer(source.read(start, min(start + _STEP_NBYTES, end)), np.uint8)
        ends = np.flatnonzero(data < 0x80)  # noqa: PLR2004 (without the continuation bit)
        if not ends.size:
            raise source.garbled()
        begins = np.concatenate([ends[:1] * 0, ends[:-1] + 1])
        lengths = ends - begins + 1
        longest = int(lengths.max())
        if longest > 10:  # noqa: PLR2004 (bytes of 64 bits)
            raise source.garbled()
        values = np.zeros(ends.size, np.uint64)
        for place in range(longest):
            has = lengths > place
            values[has] |= (data[begins[has] + place] & 0x7F).astype(np.uint64) << np.uint64(7 * place)
        yield values
        start += int(ends[-1]) + 1
