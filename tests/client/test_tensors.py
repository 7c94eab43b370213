import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tether.errors import BadInputError
from tether.lab.tensors import cast, named_arrays, to_array, to_npz
from tether.testing.requirements import needs
from tether.types import DATATYPES, TensorSpec
from tether.wire.npz import from_npz


def spec(datatype, name="x"):
    return TensorSpec(name, datatype, (-1,))


@pytest.mark.parametrize(
    ("value", "datatype", "cast_to"),
    [
        (np.ones(2), "FP32", "float32"),
        (np.ones(2, "f4"), "FP16", "float16"),
        (np.ones(2), "BF16", "bfloat16"),
        (np.ones(2, "i4"), "INT64", "int64"),
        (np.ones(2, "i8"), "INT32", "int32"),
        (np.ones(2, "u1"), "FP32", "float32"),
        (np.ones(2, bool), "INT64", "int64"),
        (np.ones(2, ">f4"), "FP32", "float32"),
        (np.ones(2), "INT64", "float64"),  # would lose fractions
        (np.array([300]), "UINT8", "int64"),  # would wrap around
        (np.array([-1]), "UINT64", "int64"),
        (np.array([1e300]), "FP32", "float64"),  # would become infinite
        (np.ones(2, "f4"), "BYTES", "float32"),
        (np.array(["a"]), "FP32", "object"),
    ],
)
def test_numbers_are_cast_where_only_precision_is_lost(value, datatype, cast_to):
    result = cast(to_array(value), spec(datatype))
    assert result.dtype == np.dtype(DATATYPES["BF16"] if cast_to == "bfloat16" else cast_to)


@given(arrays.arrays(st.sampled_from(["i1", "u2", "i4", "i8", "u8"]), 5), st.sampled_from(["INT8", "UINT16", "INT32", "INT64", "UINT64"]))
def test_a_cast_of_whole_numbers_never_changes_one(array, datatype):
    assert cast(array, spec(datatype)).tolist() == array.tolist()


def test_nan_and_infinity_survive_a_cast():
    assert cast(np.array([np.nan, np.inf]), spec("FP32")).dtype == np.float32


@needs("torch")
def test_a_torch_tensor_leaves_its_graph():
    import torch  # seconds, which the other tests of this file need not pay

    assert to_array(torch.ones(3, requires_grad=True)).dtype == np.float32


def test_lists_and_text_become_arrays():
    assert to_array([[1, 2], [3, 4]]).shape == (2, 2)
    assert to_array(["a", "é"]).tolist() == [b"a", "é".encode()]
    assert to_array(np.array([b"a"])).dtype == object


@pytest.mark.parametrize("value", [[[1, 2], [3]], [object()], [None], np.array([1, "a"], dtype=object)])
def test_what_is_no_tensor_is_refused(value):
    with pytest.raises(BadInputError):
        to_array(value)


def test_one_array_is_enough_for_one_input_and_only_for_one():
    assert list(named_arrays([1.0], [spec("FP32")])) == ["x"]
    with pytest.raises(BadInputError, match="'a', 'b'"):
        named_arrays([1.0], [spec("FP32", "a"), spec("FP32", "b")])


def test_an_input_that_the_model_lacks_is_left_for_the_lab_to_refuse():
    assert named_arrays({"z": np.ones(1)}, [spec("FP32")])["z"].dtype == np.float64


def test_one_array_as_example_has_numpy_s_name_for_it():
    assert list(from_npz(to_npz([1.0]))) == ["arr_0"]


def test_an_example_that_can_not_be_kept_is_refused():
    for example in ({}, {"x": [b"ends\0"]}, {"x": [object()]}):
        with pytest.raises(BadInputError):
            to_npz(example)
