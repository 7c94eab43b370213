"""What all runtimes do alike: names and dtypes of outputs, errors of a model, its files, its memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tether.errors import BadInputError, MissingDependencyError, ModelFailedError, TetherError
from tether.types import Array, Datatype, Tensors, TensorSpec, datatype_of, dtype_of

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "as_bytes",
    "batched",
    "conform",
    "failures",
    "first_line",
    "missing",
    "only_file",
    "release_memory",
    "trim_heap",
]


def conform(outputs: Mapping[str, Any], specs: Sequence[TensorSpec]) -> Tensors:
    """The declared outputs, in order, as contiguous arrays of the declared dtypes; without specs (yet) all of them as they are.

    Raises: ModelFailedError: one is missing, or its numbers do not fit its datatype.
    """
    if not specs:
        specs = [TensorSpec(name, _datatype(name, value), ()) for name, value in outputs.items()]
    return {spec.name: _conform_one(outputs, spec) for spec in specs}


def _datatype(name: str, value: Any) -> Datatype:
    try:
        return datatype_of(np.asarray(value).dtype)
    except BadInputError as error:
        raise ModelFailedError(f"the model's output {name!r}: {error}") from None


def _conform_one(outputs: Mapping[str, Any], spec: TensorSpec) -> Array:
    if spec.name not in outputs:
        raise ModelFailedError(
            f"the model did not answer its output {spec.name!r}; it answered {', '.join(map(str, outputs)) or 'nothing'}"
        )
    value = np.asarray(outputs[spec.name])
    if spec.datatype == "BYTES":
        return as_bytes(value)
    dtype = dtype_of(spec.datatype)
    if value.dtype != dtype:
        if value.dtype.kind not in "biufV" or not (value.dtype.kind == "V" or np.can_cast(value.dtype, dtype, "same_kind")):
            raise ModelFailedError(f"the model's output {spec.name!r} is {value.dtype}, declared as {spec.datatype}")
        value = value.astype(dtype)
    return np.asarray(value, order="C")  # not ascontiguousarray: it makes a scalar one-dimensional


def as_bytes(value: Array) -> Array:
    """Strings of any kind as an object array of `bytes` (datatype BYTES)."""
    out = np.empty(value.shape, dtype=object)
    flat = out.reshape(-1)
    for index, item in enumerate(value.reshape(-1).tolist()):
        flat[index] = item if isinstance(item, bytes) else str(item).encode()
    return out


def batched(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether every input and output has a first axis of any length."""
    return bool(inputs) and all(spec.shape and spec.shape[0] == -1 for spec in (*inputs, *outputs))


class failures:  # noqa: N801 (reads as a statement: `with failures(...)`)
    """Turns whatever a third party raises into `error("<what>: <type>: <first line>")`; our own errors pass."""

    def __init__(self, what: str, error: Callable[[str], TetherError] = ModelFailedError) -> None:
        self._what, self._error = what, error

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, raised: BaseException | None, _traceback: TracebackType | None) -> None:
        # SystemExit too: a custom model that calls sys.exit() must not end a worker.
        if isinstance(raised, (Exception, SystemExit)) and not isinstance(raised, TetherError):
            raise self._error(f"{self._what}: {type(raised).__name__}: {first_line(raised)}") from raised


def first_line(error: BaseException) -> str:
    """What an exception says, in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else "no message"


def missing(library: str, extra: str, error: ImportError) -> MissingDependencyError:
    """The error for a framework whose library is not there."""
    return MissingDependencyError(
        f"{library} is needed for this model and can't be imported ({first_line(error)}); pip install 'tether[{extra}]'"
    )


def only_file(path: Path, suffixes: Sequence[str]) -> Path | None:
    """`path`, or the one file directly in it, that has one of the suffixes; None where there is none, or more than one."""
    if path.is_dir():
        found = [entry for entry in path.iterdir() if entry.suffix.lower() in suffixes]
        return found[0] if len(found) == 1 else None
    return path if path.suffix.lower() in suffixes else None


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps it in its arenas until told (200 MB of a model stayed resident without)."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give back what the allocator keeps. 2 ms, where a collection costs a large process fifty."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim:
            trim(0)
