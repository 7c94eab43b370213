"""NaN in the answers of a version that is being rolled out."""

import ml_dtypes
import numpy as np
import pytest

from tether.errors import NotANumberError
from tether.worker.soundness import check_numbers, has_nan


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_nan_is_found_in_every_type_that_has_it(dtype):
    array = np.zeros((3, 4), dtype)
    assert not has_nan({"y": array})
    array[1, 2] = np.nan
    assert has_nan({"y": array})


def test_what_has_no_nan_is_not_asked():
    assert not has_nan({"text": np.array([b"nan"], object), "n": np.zeros(2, np.int64), "flag": np.zeros(2, bool), "none": np.zeros(0)})


def test_nan_for_nan_is_an_answer_and_for_anything_else_is_none():
    good, bad = {"x": np.zeros(2)}, {"y": np.array([0, np.nan])}
    check_numbers({"x": np.array([np.nan])}, bad, 1)
    check_numbers(good, {"y": np.array([np.inf])}, 1)
    with pytest.raises(NotANumberError):
        check_numbers(good, bad, 1)


def test_of_several_requests_each_is_looked_at_alone():
    nan = {"x": np.array([np.nan])}
    with pytest.raises(NotANumberError):
        check_numbers(nan, nan, 2)
