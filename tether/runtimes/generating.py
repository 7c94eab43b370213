"""Answers in parts: which method of a class gives them, and what they are together."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, Final

import numpy as np

from tether.errors import BadModelError, ModelFailedError
from tether.types import Array, Tensors, TensorSpec, dtype_of

__all__ = ["each_part", "first_parts", "joined", "streaming_method"]

_MOST_NBYTES: Final = 1 << 30
"""Of parts that are joined: a generator may never end, and its process has to live."""
_FIRST: Final = 16
"""Parts of a self-test: enough to see what they are."""


def streaming_method(cls: type) -> str | None:
    """The method whose answer comes in parts: `generate`, or a `predict` that is a generator; None: there is none.

    Raises: BadModelError: it is asynchronous.
    """
    for name in ("generate", "predict"):
        method = getattr(cls, name, None)
        if inspect.isasyncgenfunction(method) or inspect.iscoroutinefunction(method):
            raise BadModelError(f"{cls.__name__}.{name} is asynchronous; write it with plain def and yield")
        if callable(method) and (name == "generate" or inspect.isgeneratorfunction(method)):
            return name
    return None


def each_part(answer: Any) -> Iterator[Any]:
    """What the method gave, part by part: what is no iterable of them, or an array of any library, is the only one."""
    single = isinstance(answer, Mapping | tuple | str | bytes) or hasattr(answer, "__array__") or not isinstance(answer, Iterable)
    return iter((answer,) if single else answer)


def first_parts(parts: Generator[Tensors]) -> Tensors:
    """A few of them, joined; the rest is not asked for."""
    with closing(parts):
        return joined(islice(parts, _FIRST), ())


def joined(parts: Iterable[Tensors], specs: Sequence[TensorSpec]) -> Tensors:
    """All parts as one answer: one after the other along the first axis, single numbers as one row each.

    Raises: ModelFailedError: they don't fit together, are too much for it, or there is none and no spec to say of what.
    """
    collected: dict[str, list[Array]] = {}
    nbytes = 0
    for part in parts:
        nbytes += sum(map(_nbytes, part.values()))
        if nbytes > _MOST_NBYTES:
            raise ModelFailedError(f"the answer is over {_MOST_NBYTES >> 20} MiB; ask for its parts one by one (lab.stream)")
        for name, array in part.items():
            collected.setdefault(name, []).append(np.atleast_1d(array))
    if not collected and not specs:
        raise ModelFailedError("the model gave no part; it has to yield at least one on its example")
    return {name: _concatenated(name, arrays) for name, arrays in collected.items()} or {spec.name: _empty(spec) for spec in specs}


def _concatenated(name: str, arrays: list[Array]) -> Array:
    try:
        return np.concatenate(arrays)
    except ValueError:
        shapes = sorted({str(list(array.shape)) for array in arrays})[:4]
        raise ModelFailedError(
            f"parts of the output {name!r} don't fit together ({', '.join(shapes)}); ask for them one by one (lab.stream)"
        ) from None


def _nbytes(array: Array) -> int:
    return array.nbytes + (sum(len(item) for item in array.tolist()) if array.dtype.kind == "O" and array.ndim == 1 else 0)


def _empty(spec: TensorSpec) -> Array:
    return np.empty((0, *(max(size, 0) for size in spec.shape[1:])), dtype_of(spec.datatype))
