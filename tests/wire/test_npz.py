"""Example tensors as files."""

import io

import ml_dtypes
import numpy as np
import pytest

from tether.errors import BadInputError
from tether.wire.npz import from_npz, to_npz


def test_tensors_of_every_kind_survive_and_have_the_same_bytes_each_time():
    words = np.array([["ä".encode(), b""], [b"long enough", b"x"]], object)
    given = {"w": words, "b": np.ones(3, ml_dtypes.bfloat16), "f": np.float32(2), "t": np.zeros((0, 2), bool)}
    data = to_npz(given)
    found = from_npz(data)
    for name, array in given.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert to_npz(dict(reversed(given.items()))) == data


def test_text_that_numpy_wrote_is_bytes():
    out = io.BytesIO()
    np.savez(out, x=np.array(["grüße", ""]))
    assert from_npz(out.getvalue())["x"].tolist() == ["grüße".encode(), b""]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no zip", b"\x80\x04."])
def test_bytes_that_hold_no_tensors_are_an_error_that_says_how_to_make_some(content):
    with pytest.raises(BadInputError, match=r"numpy\.savez"):
        from_npz(content)


def test_a_pickle_is_not_opened():
    out = io.BytesIO()
    np.savez(out, x=np.array([object()]))
    with pytest.raises(BadInputError, match="can't be read"):
        from_npz(out.getvalue())
