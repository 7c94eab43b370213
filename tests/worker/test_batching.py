"""Which waiting requests run together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import BadInputError
from tether.types import InferRequest, ModelInfo, TensorSpec
from tether.worker.batching import Rows, join_inputs, next_batch, rows_of, split_outputs


def info(*, batched=True):
    spec = TensorSpec("x", "FP32", (-1, 4))
    return ModelInfo("onnx", "onnx", (spec,), (spec,), batched=batched, pure=True, code=False)


def request(rows, columns=4):
    return InferRequest({"x": np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)})


KEYS = [(("x", "<f4", (4,)),), (("x", "<f4", (5,)),), None]


@given(st.lists(st.builds(Rows, st.integers(1, 40), st.sampled_from(KEYS)), max_size=50), st.integers(1, 64))
def test_a_batch_is_a_run_of_one_key_that_fits(waiting, max_rows):
    count = next_batch(waiting, max_rows)
    batch = waiting[:count]
    assert (count == 0) == (not waiting)
    if count > 1:
        assert {rows.key for rows in batch} == {batch[0].key}
        assert batch[0].key is not None
        assert sum(rows.count for rows in batch) <= max_rows
    if waiting and count < len(waiting) and batch[0].key is not None:
        following = waiting[count]
        assert following.key != batch[0].key or sum(rows.count for rows in batch) + following.count > max_rows


def test_a_model_without_a_batch_axis_runs_alone():
    assert rows_of(request(3), info(batched=False)) == Rows(1, None)
    assert next_batch([Rows(1, None), Rows(1, None)], 32) == 1


def test_inputs_that_disagree_about_the_batch_are_refused():
    wrong = InferRequest({"x": np.zeros((2, 4), np.float32), "y": np.zeros((3, 4), np.float32)})
    with pytest.raises(BadInputError, match="x 2, y 3"):
        rows_of(wrong, info())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_each_request_gets_its_own_rows_back(counts):
    requests = [InferRequest({"x": np.random.default_rng(index).random((rows, 4))}) for index, rows in enumerate(counts)]
    joined = join_inputs(requests)
    for sent, got in zip(requests, split_outputs({"y": joined["x"] * 2}, counts), strict=True):
        np.testing.assert_array_equal(got["y"], sent.inputs["x"] * 2)
