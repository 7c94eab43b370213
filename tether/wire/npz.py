"""Pure: tensors ↔ `.npz` bytes: how a version keeps its example, how the sandbox hands tensors over, how users write them to files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tether.errors import BadInputError
from tether.types import Array, Tensors

__all__ = ["from_npz", "to_npz"]


def to_npz(tensors: Mapping[str, Array]) -> bytes:
    """The same bytes for the same tensors, in whatever order. BYTES as fixed-width bytes, which lose zero bytes at an element's end."""
    out = io.BytesIO()
    arrays: dict[str, Any] = {name: _plain(tensors[name]) for name in sorted(tensors)}
    np.savez(out, allow_pickle=False, **arrays)
    return out.getvalue()


def _plain(array: Array) -> Array:
    if array.dtype.kind != "O":
        return array
    return np.asarray(array.tolist(), dtype=np.bytes_).reshape(array.shape) if array.size else np.empty(array.shape, "S1")


def from_npz(data: bytes) -> Tensors:
    """The arrays of an `.npz`; text and bytes as BYTES arrays, two opaque bytes as bfloat16. Nothing in it is unpickled.

    Raises: BadInputError: the bytes are something else, or hold pickled objects.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: _typed(archive[name]) for name in archive.files}
    except Exception as error:  # zipfile, zlib, struct and numpy each raise their own
        reason = str(error).partition("\n")[0]
        raise BadInputError(f"the tensors can't be read as .npz ({reason}); write them with numpy.savez") from error


def _typed(array: Array) -> Array:
    if array.dtype == np.dtype("V2"):
        return array.view(ml_dtypes.bfloat16)  # numpy.savez forgets what the two bytes were
    if array.dtype.kind == "S":
        return array.astype(object)
    if array.dtype.kind == "U":
        return np.char.encode(array.astype(np.str_), "utf-8").astype(object)
    return array
