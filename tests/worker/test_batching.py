"""Which waiting requests run together."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tether.types import InferRequest, ModelInfo, TensorSpec
from tether.worker.batching import Rows, Waiting, join_inputs, rows_of, split_outputs


def info(*, batched=True):
    spec = TensorSpec("x", "FP32", (-1, 4))
    return ModelInfo("onnx", "onnx", (spec,), (spec,), batched=batched, pure=True, code=False)


def request(rows, columns=4):
    return InferRequest({"x": np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)})


KEYS = [((4,),), ((5,),), None]
ROWS = st.builds(Rows, st.integers(1, 40), st.sampled_from(KEYS))


@given(st.lists(ROWS, max_size=50), st.integers(1, 64))
def test_batches_are_of_one_shape_fit_keep_the_order_within_it_and_begin_with_who_waits_longest(arriving, most_rows):
    waiting, left = Waiting(), dict(enumerate(arriving))
    for number, rows in left.items():
        waiting.add(rows, number)
    while waiting:
        batch = waiting.take(most_rows)
        assert batch[0] == min(left)
        key = left[batch[0]].key
        of_this_shape = [number for number, rows in left.items() if rows.key == key]
        assert batch == of_this_shape[: len(batch)]
        rows = sum(left[number].count for number in batch)
        assert len(batch) == 1 or (key is not None and rows <= most_rows)
        if key is not None and len(batch) < len(of_this_shape):
            assert rows + left[of_this_shape[len(batch)]].count > most_rows
        for number in batch:
            del left[number]
        assert len(waiting) == len(left)
    assert left == {}
    assert waiting.take(most_rows) == []


@given(st.lists(ROWS, max_size=30), st.sets(st.integers(0, 29)))
def test_what_is_dropped_is_not_run_and_nothing_else_is_lost(arriving, unwanted):
    waiting = Waiting()
    for number, rows in enumerate(arriving):
        waiting.add(rows, number)
    dropped = waiting.drop(unwanted.__contains__)
    kept = []
    while waiting:
        kept += waiting.take(8)
    assert sorted(dropped) == sorted(unwanted & set(range(len(arriving))))
    assert sorted(dropped + kept) == list(range(len(arriving)))


def test_shapes_that_alternate_are_joined_with_their_own():
    waiting = Waiting()
    for number in range(10):
        waiting.add(Rows(1, KEYS[number % 2]), number)
    assert [waiting.take(32), waiting.take(32)] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


def test_a_model_without_a_batch_axis_runs_alone():
    assert rows_of(request(3), info(batched=False)) == Rows(1, None)
    waiting = Waiting()
    waiting.add(Rows(1, None), "first")
    waiting.add(Rows(1, None), "second")
    assert waiting.take(32) == ["first"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_each_request_gets_its_own_rows_back(counts):
    requests = [InferRequest({"x": np.random.default_rng(index).random((rows, 4))}) for index, rows in enumerate(counts)]
    joined = join_inputs(requests)
    for sent, got in zip(requests, split_outputs({"y": joined["x"] * 2}, counts), strict=True):
        np.testing.assert_array_equal(got["y"], sent.inputs["x"] * 2)
