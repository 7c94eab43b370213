"""Pure: the elements of one tensor ↔ a JSON list or raw little-endian bytes (OIP §2, §3)."""

from __future__ import annotations

import re
from functools import lru_cache
from struct import Struct
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from tether.errors import BadInputError
from tether.types import DATATYPES, Array, Datatype, datatype_of

__all__ = ["BINARY_ONLY", "datatype_name", "from_binary", "from_json", "to_binary", "to_json"]

BINARY_ONLY: frozenset[Datatype] = frozenset({"FP16", "BF16"})
"""Requests may send these in binary only: JSON has no faithful text for them (OIP §2)."""

_NESTED = re.compile(rb"\s*\[\s*\[").match
_U32 = Struct("<I")
_FP32_LIMIT = 3.4028235677973362e38
"""The largest double that rounds to a finite float32; beyond it the cast would give infinity. So for the two below."""
_FP16_LIMIT = 65519.99
_BF16_LIMIT = 3.3961775292304e38


def _real(limit: float) -> Any:
    return Annotated[float, Meta(ge=-limit, le=limit)]


def _integer(low: int, high: int) -> Any:
    return Annotated[int, Meta(ge=low, le=high)]


_ELEMENT: dict[Datatype, Any] = {
    "BOOL": bool,
    "UINT8": _integer(0, 2**8 - 1),
    "UINT16": _integer(0, 2**16 - 1),
    "UINT32": _integer(0, 2**32 - 1),
    "UINT64": Annotated[int, Meta(ge=0)],  # msgspec's bounds are int64: numpy checks the upper one
    "INT8": _integer(-(2**7), 2**7 - 1),
    "INT16": _integer(-(2**15), 2**15 - 1),
    "INT32": _integer(-(2**31), 2**31 - 1),
    "INT64": int,  # numpy checks the bounds
    "FP16": _real(_FP16_LIMIT),
    "BF16": _real(_BF16_LIMIT),
    "FP32": _real(_FP32_LIMIT),
    "FP64": float,
    "BYTES": str,
}
_FLOATS: frozenset[Datatype] = frozenset({"FP16", "BF16", "FP32", "FP64"})


@lru_cache(maxsize=1024)  # 14 datatypes × the ranks in use × 2
def _decoder(datatype: Datatype, depth: int, nullable: bool) -> msgspec.json.Decoder[Any]:
    kind: Any = _ELEMENT[datatype]
    if nullable and datatype in _FLOATS:
        kind = kind | None
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def from_json(raw: msgspec.Raw, datatype: Datatype, shape: tuple[int, ...], *, null_is_nan: bool = False) -> Array:
    """The tensor of a JSON list, flat or nested exactly as `shape`; the array owns its memory.

    Raises: BadInputError: an element of another type or out of range, null, ragged, or a count that is not the shape's;
        MalformedRequestError is the caller's to raise for bytes that are no JSON: `msgspec.DecodeError` passes through.
    """
    rank = len(shape)
    depth = rank if rank > 1 and _NESTED(raw) else 1
    try:
        values = _decoder(datatype, depth, null_is_nan).decode(raw)
        array = _array(values, datatype, depth)
    except (msgspec.ValidationError, UnicodeDecodeError, OverflowError, ValueError) as error:
        if isinstance(error, msgspec.DecodeError) and not isinstance(error, msgspec.ValidationError):
            raise
        raise BadInputError(f"its data does not fit {datatype} {list(shape)}: {error}") from None
    if array.shape == shape:
        return array
    if depth > 1 or array.size != _count(shape):
        raise BadInputError(f"its data has shape {list(array.shape)}, its declared shape is {list(shape)}: send as many elements as that")
    return _reshaped(array, shape)


def _reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):  # no elements, and another dimension that no machine can count to
        raise BadInputError(f"its shape {str(list(shape))[:200]} is too large") from None


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:  # Python's integers don't overflow; math.prod is slower for one or two
        count *= size
    return count


def _array(values: list[Any], datatype: Datatype, depth: int) -> Array:
    if datatype == "BF16":  # its own conversion knows no None
        return np.array(values, np.float32).astype(DATATYPES[datatype])
    if datatype != "BYTES":
        return np.array(values, DATATYPES[datatype])
    array = np.array(values, object)
    if array.ndim != depth:
        raise ValueError("the nested lists are ragged")
    flat = array.reshape(-1)
    for index, text in enumerate(flat):
        if not isinstance(text, str):
            raise ValueError("the nested lists are ragged")  # noqa: TRY004 (told as numpy tells it)
        flat[index] = text.encode()
    return array


def from_binary(view: memoryview, datatype: Datatype, shape: tuple[int, ...]) -> Array:
    """The tensor of raw bytes: a read-only view where the address is aligned, else a copy; BYTES elements are copies.

    Raises: BadInputError: the length is not the shape's, a BOOL other than 0 and 1, a broken length prefix.
    """
    if datatype == "BYTES":
        return _strings(view, shape)
    dtype = DATATYPES[datatype]
    expected = _count(shape) * dtype.itemsize
    if len(view) != expected:
        raise BadInputError(f"its binary data has {len(view)} bytes; {datatype} {list(shape)} takes {expected}")
    array = np.frombuffer(view, dtype)
    if datatype == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
        raise BadInputError("its binary data has a byte that is neither 0 nor 1; BOOL takes those only")
    if not array.flags.aligned:  # runtimes read through the pointer as it is
        array = array.copy()
    return _reshaped(array, shape)


def _strings(view: memoryview, shape: tuple[int, ...]) -> Array:
    count, position, end = _count(shape), 0, len(view)
    if count * 4 > end:  # each element has a length of 4 bytes: bounds the array before it is made
        raise BadInputError(f"its binary data has {end} bytes, too few for {count} BYTES elements")
    array = np.empty(count, object)
    for index in range(count):
        if position + 4 > end:
            raise BadInputError(f"its binary data ends in BYTES element {index} of {count}")
        start = position + 4
        position = start + _U32.unpack_from(view, position)[0]
        if position > end:
            raise BadInputError(f"BYTES element {index} is longer than the rest of its binary data")
        array[index] = bytes(view[start:position])
    if position != end:
        raise BadInputError(f"its binary data has {end - position} bytes after the last of {count} BYTES elements")
    return _reshaped(array, shape)


def to_json(array: Array, datatype: Datatype) -> Any:
    """What orjson prints as the flat list: an array, or a list of str for BYTES. NaN and infinities print as null.

    Raises: UnicodeDecodeError: BYTES elements that are not UTF-8.
    """
    if datatype == "BYTES":
        return [_text(element) for element in array.reshape(-1).tolist()]
    if datatype == "BF16":
        return array.astype(np.float32).reshape(-1)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.ravel()


def _text(element: Any) -> str:
    return element.decode() if isinstance(element, bytes) else str(element)


def to_binary(array: Array, datatype: Datatype) -> Any:
    """Raw little-endian bytes, row-major: a view of `array` where it lies so already (OIP §3)."""
    if datatype == "BYTES":
        return _packed(array)
    return np.ascontiguousarray(array, DATATYPES[datatype]).reshape(-1).view(np.uint8)


def _packed(array: Array) -> bytes:
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        data = element if isinstance(element, bytes) else str(element).encode()
        parts += (_U32.pack(len(data)), data)
    return b"".join(parts)


_KNOWN: dict[Any, Datatype] = {dtype: name for name, dtype in DATATYPES.items()}


def datatype_name(array: Array) -> Datatype:
    """As `types.datatype_of`, with a look-up first: this is on the path of every answer."""
    return _KNOWN.get(array.dtype) or datatype_of(array.dtype)
