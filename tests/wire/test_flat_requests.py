"""A request read in one pass is the same request, and what is wrong with one is told in the same words."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import TetherError
from tether.types import ModelInfo, TensorSpec
from tether.wire.flat import RequestReader
from tether.wire.oip import decode_request


def model(*inputs, batched=True):
    return ModelInfo("onnx", "onnx", tuple(TensorSpec(*each) for each in inputs), (TensorSpec("y", "FP32", (-1,)),), batched, True, False)


def tensor(name="x", datatype="FP32", shape=(2, 2), data=(1, 2, 3, 4), **more):
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": list(data)} | more


def outcome(read, body, *arguments):
    """The arrays with what tells them apart to the last bit, and all else of the request; or the error in its words."""
    try:
        request = read(body, 0, *arguments)
    except TetherError as error:
        return type(error), str(error)
    arrays = {name: (each.dtype, each.shape, each.tobytes(), each.flags.writeable) for name, each in request.inputs.items()}
    return arrays, request.outputs, request.id, request.binary, dict(request.parameters)


def assert_same(message, info):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    assert outcome(RequestReader(info).read, body) == outcome(decode_request, body, info)


NUMBERS = st.one_of(
    st.floats(), st.integers(-(2**70), 2**70), st.integers(-130, 260), st.sampled_from([3.4028235677973362e38, 3.402823567797337e38, -0.0])
)


@given(st.sampled_from(["FP32", "FP64", "INT8", "UINT8", "INT32", "UINT32", "INT64", "UINT64", "FP16", "BOOL", "BYTES"]), st.data())
def test_any_list_of_numbers_is_the_same_tensor_or_the_same_error(datatype, data):
    kind = st.integers(-(2**31), 2**64) if datatype.strip("U").startswith("INT") and data.draw(st.booleans()) else NUMBERS
    values = data.draw(st.lists(kind, max_size=6))
    shape = data.draw(st.sampled_from([(len(values), 1), (1, len(values)), (len(values),), (2, 3)]))
    info = model(("x", datatype, data.draw(st.sampled_from([(-1, -1), (-1, 1), (-1,)]))))
    assert_same(json.dumps({"inputs": [tensor(datatype=datatype, shape=shape, data=values)]}).encode(), info)


@pytest.mark.parametrize(
    "message",
    [
        {"inputs": [tensor(data=[[1, 2], [3, 4]])]},
        {"inputs": [tensor(data=[1, None, 3, 4])]},
        {"inputs": [tensor(data=[1, True, 3, 4])]},
        {"inputs": [tensor(data=["1", 2, 3, 4])]},
        {"inputs": [tensor(data=[1, 2, 3])]},
        {"inputs": [tensor(shape=[-2, -2])]},
        {"inputs": [tensor(shape=[0, 2], data=[])]},
        {"inputs": [tensor(name="z")]},
        {"inputs": [tensor(datatype="FP64")]},
        {"inputs": [tensor(), tensor()]},
        {"inputs": []},
        {"inputs": [tensor(parameters={"binary_data_size": 16})]},
        {"inputs": [tensor(parameters={"said": "by the client"})]},
        {"inputs": [tensor()], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]},
        {"inputs": [tensor()], "outputs": [{"name": "no such one"}]},
        {"inputs": [tensor()], "id": "7", "parameters": {"binary_data_output": True, "priority": 3}},
        {"inputs": [tensor()], "id": 7},
        {"inputs": [tensor()], "what": {"is": ["unknown"]}},
        b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[1e999]}]}',
        b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[1]}]',
        b'{"inputs":[{"name":"\xff","shape":[1,1],"datatype":"FP32","data":[1]}]}',
        b"[" * 100_000,
    ],
)
def test_whatever_is_unusual_or_wrong_is_told_as_ever(message):
    assert_same(message, model(("x", "FP32", (-1, 2))))


def test_inputs_come_in_any_order_and_must_agree_in_rows():
    pair = model(("a", "INT32", (-1,)), ("b", "INT64", (-1,)))
    a, b = tensor("a", "INT32", [2], [1, 2]), tensor("b", "INT64", [2], [3, 2**40])
    for inputs in ([a, b], [b, a], [a], [a, tensor("b", "INT64", [1], [3])]):
        assert_same({"inputs": inputs}, pair)


def test_floats_and_integers_of_one_model_are_read_too():
    mixed = model(("a", "INT32", (-1,)), ("b", "FP32", (-1,)))
    assert_same({"inputs": [tensor("a", "INT32", [1], [1]), tensor("b", "FP32", [1], [math.pi])]}, mixed)


@pytest.mark.parametrize("shape", [[-1, -1], [-1, -2], [-1, 1], [1, -1]])
def test_a_dimension_that_the_model_leaves_open_is_not_sent_open(shape):
    assert_same({"inputs": [tensor(shape=shape, data=[1])]}, model(("x", "FP32", (-1, -1))))


def test_a_large_body_is_read_too():
    assert_same({"inputs": [tensor(shape=[1, 300_000], data=[0.5] * 300_000)]}, model(("x", "FP32", (-1, -1))))


def test_the_array_is_its_own():
    body = json.dumps({"inputs": [tensor()]}).encode()
    reader = RequestReader(model(("x", "FP32", (-1, 2))))
    first = reader.read(body, 0).inputs["x"]
    first += 1
    np.testing.assert_array_equal(reader.read(body, 0).inputs["x"], [[1, 2], [3, 4]])
