"""Pure: what a user passes as tensors → arrays as the model wants them; example tensors ↔ `.npz`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tether.errors import BadInputError
from tether.types import Array, Tensors, TensorSpec, dtype_of
from tether.wire import npz

__all__ = ["cast", "named_arrays", "to_array", "to_npz"]

_ONLY: Final = "arr_0"
"""numpy's own name in a `.npz` for an array without one: the example of a model with a single input."""


def to_array(value: Any) -> Array:
    """Arrays of numpy as they are; lists, scalars, pandas objects, tensors of PyTorch (any device) and TensorFlow by their own conversion.

    Text becomes an object array of `bytes`, UTF-8.

    Raises: BadInputError: no array can be made of it.
    """
    if hasattr(value, "detach"):  # PyTorch: off the graph and off the GPU, or numpy can't have it
        value = value.detach().cpu()
    try:
        array: Array = np.asarray(value)
        if array.dtype.kind in "SU" and not isinstance(value, np.ndarray):
            array = np.asarray(value, dtype=object)  # fixed-width text has lost zero bytes at the end, and numbers among it
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInputError(f"no array can be made of this {type(value).__name__}: {error}") from error
    if array.dtype.kind in "SUO":
        return _bytes_array(array)
    return array


def _bytes_array(array: npt.NDArray[Any]) -> Array:
    texts = np.empty(array.shape, dtype=object)
    flat = texts.reshape(-1)
    for index, element in enumerate(array.reshape(-1)):
        if isinstance(element, str):
            flat[index] = element.encode()
        elif isinstance(element, bytes):
            flat[index] = bytes(element)
        else:
            raise BadInputError(
                f"an array of Python objects may hold text or bytes only, not {type(element).__name__}; give it a numeric dtype"
            )
    return texts


def named_arrays(inputs: Any, specs: Sequence[TensorSpec]) -> Tensors:
    """The request's tensors: `inputs` is a mapping of names, or one array for a model with a single input.

    Raises: BadInputError: one array for a model with several inputs, or what is no array.
    """
    if isinstance(inputs, Mapping):
        given = {str(name): to_array(value) for name, value in inputs.items()}
    elif len(specs) == 1:
        given = {specs[0].name: to_array(inputs)}
    else:
        names = ", ".join(repr(spec.name) for spec in specs)
        raise BadInputError(f"the model has {len(specs)} inputs; pass a dict of arrays with the names {names}")
    by_name = {spec.name: spec for spec in specs}
    return {name: cast(array, by_name[name]) if name in by_name else array for name, array in given.items()}


def cast(array: Array, spec: TensorSpec) -> Array:
    """`array` in the model's datatype where nothing but precision can be lost; else as it is, and the lab's answer says what it expects.

    >>> spec = TensorSpec("x", "FP32", (-1,))
    >>> cast(np.arange(3), spec).dtype, cast(np.array([1 + 2j]), spec).dtype
    (dtype('float32'), dtype('complex128'))
    """
    wanted = dtype_of(spec.datatype)
    if array.dtype == wanted or "O" in {wanted.kind, array.dtype.kind}:
        return array
    if spec.datatype == "BF16":
        return array.astype(wanted) if array.dtype.kind in "fiu" else array
    if np.can_cast(array.dtype, wanted, "safe"):
        return array.astype(wanted)
    return _narrowed(array, wanted) if np.can_cast(array.dtype, wanted, "same_kind") else array


def _narrowed(array: Array, wanted: np.dtype[np.generic]) -> Array:
    """To a narrower type of the same kind, unless a value would wrap around or become infinite."""
    if wanted.kind in "iu" and array.size:
        limits = np.iinfo(wanted)  # type: ignore[type-var]
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            return array
    try:
        with np.errstate(over="raise"):
            return array.astype(wanted)
    except FloatingPointError:
        return array


def to_npz(tensors: Any) -> bytes:
    """Tensors, or one without a name, as `.npz`.

    Raises: BadInputError: what is no array, or text that ends in NUL, which `.npz` can't keep.
    """
    given = tensors if isinstance(tensors, Mapping) else {_ONLY: tensors}
    if not given:
        raise BadInputError("the example is empty; pass an array for each input of the model")
    arrays = {str(name): to_array(value) for name, value in given.items()}
    for array in arrays.values():
        if array.dtype.kind == "O" and any(element.endswith(b"\0") for element in array.reshape(-1)):  # type: ignore[attr-defined]
            raise BadInputError("text in an example may not end in NUL; leave the trailing zero bytes out")
    return npz.to_npz(arrays)
