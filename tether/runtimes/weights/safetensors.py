"""The weights of a safetensors file: a length, a JSON table, the bytes (github.com/huggingface/safetensors, "Format").

The format's rules are kept to the letter, since files that break them are written to be read in two ways: no name twice, no byte
between the tensors that belongs to none or to two, nothing behind the last one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.weights.limits import MAX_METADATA_NBYTES, MAX_RANK, MAX_TENSORS, tensor_nbytes
from tether.runtimes.weights.sinks import Sink
from tether.types import StoredTensor

__all__ = ["index"]

_LENGTH_NBYTES = 8
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64",
    "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "uint8",
}  # fmt: skip
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Elements that share bytes: given as those bytes."""
_METADATA = "__metadata__"
_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_MAX_BRACKETS = 16 * MAX_TENSORS
"""Three for a tensor, and what names and metadata have. Every pair becomes an object: 64 MiB of `[]` would take a gigabyte."""
_MAX_COMMAS = (MAX_RANK + 16) * MAX_TENSORS
"""Likewise for numbers and keys."""


def index(path: Path, name: str, sink: Sink) -> Iterator[StoredTensor]:
    """The tensors in the order of their bytes. Raises: BadModelError, HostileModelError."""
    del sink  # everything lies in place
    with path.open("rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        header = _header(file, path.name, nbytes)
    start = _LENGTH_NBYTES + len(header)
    table = _table(header, path.name)
    _check_metadata(table.pop(_METADATA, {}), path.name)
    if len(table) > MAX_TENSORS:
        raise BadModelError(f"{path.name} has {len(table)} tensors; at most {MAX_TENSORS} are taken: merge small ones")
    found = [_tensor(key, entry, start, name) for key, entry in table.items()]
    found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(found, start, nbytes, path.name)
    yield from found


def _header(file: BinaryIO, label: str, file_nbytes: int) -> bytes:
    length = int.from_bytes(file.read(_LENGTH_NBYTES), "little")
    if file_nbytes < _LENGTH_NBYTES or length > file_nbytes - _LENGTH_NBYTES:
        raise BadModelError(f"{label}: its header does not fit into it, so it is no safetensors file, or was cut off: save it again")
    if length > MAX_METADATA_NBYTES:
        raise BadModelError(f"{label}: its header has {length} bytes; at most {MAX_METADATA_NBYTES} are taken: merge small tensors")
    header = file.read(length)
    if len(header) != length or not header.startswith(b"{"):
        raise BadModelError(f"{label}: no safetensors file, or a damaged one; save it again")
    if header.count(b"[") + header.count(b"{") > _MAX_BRACKETS or header.count(b",") > _MAX_COMMAS:
        raise BadModelError(f"{label}: its header describes more than {MAX_TENSORS} tensors can have; merge small ones")
    return header


def _table(header: bytes, label: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise HostileModelError(f"{label}: its header has one name twice; save the file again")
        return found

    try:
        table = json.loads(header.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise HostileModelError(f"{label}: its header is nested without end; save the file again") from None
    except HostileModelError:
        raise
    except ValueError as error:  # no JSON, no UTF-8, a number of 5,000 digits
        raise BadModelError(f"{label}: its header is damaged ({str(error)[:200]}); save the file again") from None
    if not isinstance(table, dict):
        raise BadModelError(f"{label}: its header is no table; save the file again")
    return table


def _check_metadata(metadata: object, label: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadModelError(f"{label}: its metadata has to be text by name; save the file again")


def _tensor(key: str, entry: object, start: int, file: str) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != _KEYS or not isinstance(entry["dtype"], str):
        raise BadModelError(f"tensor {key[:200]!r} needs dtype, shape and data_offsets, and nothing else; save the file again")
    extents, offsets = _numbers(key, entry["shape"]), _numbers(key, entry["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004 (begin and end)
        raise BadModelError(f"tensor {key[:200]!r} has no place in the file; save it again")
    begin, end = offsets
    dtype, shape = _stored_as(key, entry["dtype"], extents)
    if end - begin != tensor_nbytes(key, dtype, shape):
        raise BadModelError(
            f"tensor {key[:200]!r}: {end - begin} bytes are not {entry['dtype']} of shape {list(extents)}; save the file again"
        )
    return StoredTensor(key, dtype, shape, file, start + begin, end - begin)


def _numbers(key: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_RANK or not all(type(number) is int and number >= 0 for number in value):
        raise BadModelError(f"tensor {key[:200]!r}: its shape and place have to be at most {MAX_RANK} numbers from 0; save the file again")
    return tuple(value)


def _stored_as(key: str, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    if dtype in _BITS:
        return "uint8", (-(-prod(shape) * _BITS[dtype] // 8),)
    if dtype not in _DTYPES:
        raise BadModelError(f"tensor {key[:200]!r} has element type {dtype[:40]!r}, which safetensors does not have; save the file again")
    return _DTYPES[dtype], shape


def _check_cover(tensors: list[StoredTensor], start: int, end: int, label: str) -> None:
    """Every byte behind the header has one tensor."""
    at = start
    for tensor in tensors:
        if tensor.offset != at:
            what = "overlap" if tensor.offset < at else "leave a gap"
            raise HostileModelError(f"{label}: tensors {what} at {tensor.name[:200]!r}; save the file again")
        at += tensor.nbytes
    if at > end:
        raise BadModelError(f"{label} was cut off: {at - end} bytes of its tensors are missing; copy or save it again")
    if at < end:
        raise HostileModelError(f"{label} has {end - at} bytes behind its last tensor; save the file again")
