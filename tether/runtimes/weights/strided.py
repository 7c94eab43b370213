"""Tensors that are views: whether their elements lie in order, and if not, how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 and float8 by their names once it is imported)
import numpy as np

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.weights.limits import MAX_RANK
from tether.types import Array

__all__ = ["View", "elements"]

_PIECE_NBYTES = 4 << 20
"""Written at a time."""
_FREE_NBYTES = 64 << 20
"""What a view may make of any storage, however small."""
_MAX_EXPANSION = 4
"""Times its storage that a view may have: views that repeat their elements are rare and small."""


class View(NamedTuple):
    """Where the elements of a tensor lie in its storage; all in elements, not in bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, name: str, numbers: Sequence[object]) -> View:
        """From what a file has as (shape, strides, offset), which may be anything. Raises: BadModelError: they are not a tensor's."""
        shape, strides, offset = numbers
        if not (_are_sizes(shape) and _are_sizes(strides) and _are_sizes((offset,)) and len(shape) == len(strides)):  # type: ignore[arg-type]
            raise BadModelError(f"tensor {name[:200]!r} has a shape, strides or offset that are none: save the model again")
        return cls(tuple(shape), tuple(strides), offset)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def span(self) -> int:
        """From the first element to behind the last one."""
        if not self.size:
            return 0
        return 1 + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True))

    @property
    def in_order(self) -> bool:
        """C-contiguous."""
        step = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != step:
                return self.size == 0
            step *= extent
        return True

    def check(self, name: str, stored: int, itemsize: int) -> None:
        """That it fits in a storage of `stored` elements.

        Raises: HostileModelError: it leaves the storage, or repeats its elements beyond all use.
        """
        if self.offset + self.span > stored:
            raise HostileModelError(
                f"tensor {name[:200]!r} has elements that its storage of {stored} does not have: export the model again"
            )
        if self.size > _MAX_EXPANSION * stored and self.size * itemsize > _FREE_NBYTES:
            raise HostileModelError(
                f"tensor {name[:200]!r} makes {self.size} elements out of {stored}: call .contiguous() before it is saved"
            )


def _are_sizes(values: object) -> bool:
    if not isinstance(values, (tuple, list)) or len(values) > MAX_RANK:
        return False
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def elements(view: View, dtype: str, load: Callable[[], bytes]) -> Iterator[bytes]:
    """The elements in C order, in pieces; `load` gives the bytes of the view's span, when they are asked for."""
    element = np.dtype(dtype)
    data = np.frombuffer(load(), element)
    strides = tuple(stride * element.itemsize for stride in view.strides)
    return _pieces(np.lib.stride_tricks.as_strided(data, view.shape, strides, writeable=False))


def _pieces(array: Array) -> Iterator[bytes]:
    if array.nbytes <= _PIECE_NBYTES or not array.ndim:
        yield array.tobytes()
        return
    rows = _PIECE_NBYTES // (array.nbytes // len(array))
    if not rows:
        for row in array:
            yield from _pieces(row)
        return
    for start in range(0, len(array), rows):
        yield array[start : start + rows].tobytes()
