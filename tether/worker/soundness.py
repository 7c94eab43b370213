"""Pure: whether a version that is being rolled out answers with numbers."""

from __future__ import annotations

import numpy as np

from tether.errors import NotANumberError
from tether.types import Tensors

__all__ = ["check_numbers", "has_nan"]


def has_nan(tensors: Tensors) -> bool:
    """Whether a float among them is NaN. bfloat16 and the like are no floats to numpy, but it knows what NaN is among them."""
    return any(array.dtype.kind in "fcV" and bool(np.isnan(array).any()) for array in tensors.values())


def check_numbers(inputs: Tensors, outputs: Tensors, requests: int) -> None:
    """Of a run for so many requests. Of several it is not looked whose the NaN is: they run again, one by one.

    Raises: NotANumberError: an output has NaN, and no input.
    """
    if has_nan(outputs) and (requests > 1 or not has_nan(inputs)):
        raise NotANumberError("the model answered NaN to an input that has none; its version is being rolled out, and is not to do that")
