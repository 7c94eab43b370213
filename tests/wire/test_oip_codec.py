"""Open Inference Protocol bodies: whatever goes in comes out, and whatever is wrong raises one of our errors and nothing else."""

import contextlib
import json
import math
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tether.errors import (
    BadInputError,
    InternalError,
    MalformedRequestError,
    MissingBlobsError,
    ModelFailedError,
    NotFoundError,
    RemoteError,
    RequestError,
    TetherError,
    UnknownModelError,
    UnsupportedError,
)
from tether.types import DATATYPES, InferRequest, ModelInfo, ModelVersion, RequestedOutput, TensorSpec
from tether.wire.oip import decode_error, decode_request, decode_response, encode_error, encode_request, encode_response

MODEL = ModelVersion("m", 3, "0" * 64)


def model(*inputs, outputs=(("y", "FP32", (-1,)),), batched=False):
    specs = [tuple(TensorSpec(*spec) for spec in side) for side in (inputs, outputs)]
    return ModelInfo("onnx", "onnx", *specs, batched=batched, pure=True, code=False)


X4 = model(("x", "FP32", (-1, 4)))


def body(data=None, info=None, **changed):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4] if data is None else data} | changed
    return json.dumps({"inputs": [{key: value for key, value in tensor.items() if value is not ...}]} | (info or {})).encode()


def binary(tensor, tail, **head):
    text = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4]} | tensor]} | head).encode()
    return text + tail, len(text)


# Round trips


def arrays(datatype):
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    if datatype == "BYTES":
        return shapes.flatmap(lambda shape: hnp.arrays(object, shape, elements=st.binary(max_size=20), fill=st.nothing()))
    if datatype == "BF16":
        return shapes.flatmap(lambda shape: hnp.arrays("u2", shape)).map(lambda bits: bits.view(ml_dtypes.bfloat16))
    return shapes.flatmap(lambda shape: hnp.arrays(DATATYPES[datatype], shape))


def same(left, right):
    if left.dtype == object:
        return left.shape == right.shape and left.tolist() == right.tolist()
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("as_binary", [True, False])
def test_a_request_arrives_as_it_was_sent(datatype, as_binary):
    @settings(max_examples=40, deadline=None)
    @given(arrays(datatype))
    def check(array):
        info = model(("x", datatype, array.shape))
        sent, head = encode_request({"x": array}, binary=as_binary, id="i", outputs=["y"])
        request = decode_request(sent, head, info)
        assert same(request.inputs["x"], array)
        assert request.id == "i"
        assert request.outputs == (RequestedOutput("y", as_binary),)

    check()


@pytest.mark.parametrize("datatype", DATATYPES)
def test_a_binary_answer_arrives_as_it_was_sent(datatype):
    @settings(max_examples=40, deadline=None)
    @given(arrays(datatype))
    def check(array):
        info = model(outputs=(("y", datatype, array.shape),))
        sent, head = encode_response({"y": array}, MODEL, InferRequest({}, binary=True, id="i"), info)
        answer = decode_response(sent, head)
        assert same(answer.outputs["y"], array)
        assert (answer.model, answer.version, answer.id) == ("m", 3, "i")

    check()


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
def test_a_json_answer_is_valid_json_and_the_same_but_for_infinities(datatype):
    @settings(max_examples=40, deadline=None)
    @given(arrays(datatype))
    def check(array):
        info = model(outputs=(("y", datatype, array.shape),))
        sent, head = encode_response({"y": array}, MODEL, InferRequest({}), info)
        assert head == 0
        json.loads(sent, parse_constant=pytest.fail)
        got = decode_response(sent, head).outputs["y"]
        finite = array if array.dtype.kind not in "fV" else np.where(np.isfinite(array.astype("f8")), array, np.array(np.nan, array.dtype))
        np.testing.assert_array_equal(got.astype("f8"), finite.astype("f8"))

    check()


def test_strings_in_a_json_answer():
    info = model(outputs=(("y", "BYTES", (-1,)),))
    words = np.array(["ä".encode(), b"", b"a\0b"], object)
    sent, head = encode_response({"y": words}, MODEL, InferRequest({}), info)
    assert decode_response(sent, head).outputs["y"].tolist() == words.tolist()
    assert encode_response({"y": np.array(["ä", "b"])}, MODEL, InferRequest({}), info)[0].count(b'"BYTES"') == 1
    with pytest.raises(RequestError, match="binary_data"):
        encode_response({"y": np.array([b"\xff"], object)}, MODEL, InferRequest({}), info)


def test_mixed_bodies_and_outputs_one_by_one():
    info = model(("a", "INT8", (2,)), ("b", "BYTES", (1,)), ("c", "BOOL", (1,)), outputs=(("y", "FP32", (1,)), ("z", "BYTES", (1,))))
    tensors = [
        {"name": "c", "datatype": "BOOL", "shape": [1], "parameters": {"binary_data_size": 1}},
        {"name": "a", "datatype": "INT8", "shape": [2], "data": [-128, 127]},
        {"name": "b", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}},
    ]
    outputs = [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}]
    head = json.dumps({"inputs": tensors, "outputs": outputs}).encode()
    request = decode_request(head + b"\1" + b"\2\0\0\0hi", len(head), info)
    assert request.inputs["a"].tolist() == [-128, 127]
    assert request.inputs["b"].tolist() == [b"hi"]
    assert request.inputs["c"].tolist() == [True]
    sent, nbytes = encode_response({"y": np.ones(1, "f4"), "z": np.array([b"\xff"], object)}, MODEL, request, info)
    assert [output["name"] for output in json.loads(sent[:nbytes])["outputs"]] == ["z", "y"]
    assert sent[nbytes:] == b"\1\0\0\0\xff"


def test_binary_arrays_are_views_where_aligned_and_json_ones_are_their_own():
    sent, head = encode_request({"x": np.ones((1, 4), "f4")})
    for shift in range(4):
        space = bytearray(shift + len(sent))
        space[shift:] = sent
        array = decode_request(memoryview(space)[shift:], head, X4).inputs["x"]
        assert array.flags.aligned
        space[-16:] = bytes(16)
        assert array.sum() in {0.0, 4.0}
        del array
    assert decode_request(body(), 0, X4).inputs["x"].flags.owndata or decode_request(body(), 0, X4).inputs["x"].base.flags.owndata


def test_what_json_cannot_carry_goes_binary_even_in_a_json_request():
    for array in (np.array([np.nan], "f4"), np.array([np.inf]), np.ones(1, "f2"), np.array([b"\xff"], object)):
        assert encode_request({"x": array}, binary=False)[1] > 0
    assert encode_request({"x": np.array(["a"])}, binary=False)[1] == 0
    with pytest.raises(BadInputError, match="complex"):
        encode_request({"x": np.ones(1, complex)})


def test_arrays_of_any_layout_are_sent_row_major():
    array = np.arange(12, dtype=">i4").reshape(3, 4).T
    info = model(("x", "INT32", (4, 3)))
    for as_binary in (True, False):
        np.testing.assert_array_equal(decode_request(*encode_request({"x": array}, binary=as_binary), info).inputs["x"], array)


# What does not fit (rows 77–87 of the fault list)

BAD_INPUT = {
    "1e39 in FP32": body([1e39, 0, 0, 0]),
    "null": body([None, 0, 0, 0]),
    "strings of numbers": body(["1", "2", "3", "4"]),
    "booleans as numbers": body([True, False, True, True]),
    "number beyond any float": body().replace(b"[1, 2", b"[1e999, 2"),
    "a million digits": body().replace(b"[1, 2", b"[" + b"1" * 1_000_000 + b", 2"),
    "too few": body([1, 2, 3]),
    "too many": body([1, 2, 3, 4, 5]),
    "ragged": body([[1, 2], [3]], shape=[2, 2]),
    "nested otherwise than its shape": body([[1, 2], [3, 4]]),
    "nested too deeply for its rank": body([[[1, 2, 3, 4]]]),
    "data that is no list": body({"a": 1}),
    "data null": body().replace(b"[1, 2, 3, 4]", b"null"),
    "data a scalar": body().replace(b"[1, 2, 3, 4]", b"1"),
    "rank 1": body(shape=[4]),
    "rank 65": body(shape=[1] * 65),
    "no shape at all": body(shape=[]),
    "negative shape": body(shape=[-1, 4]),
    "shape of 2^70": body(shape=[2**70, 4]),
    "product over 2^64": body(shape=[2**62, 4]),
    "wrong fixed dimension": body(shape=[1, 3], data=[1, 2, 3]),
    "zero rows, other width": body(shape=[0, 5], data=[]),
    "datatype of the model's neighbour": body(datatype="FP64"),
    "datatype of nobody": body(datatype="COMPLEX64"),
    "datatype object": body(datatype="object"),
    "name of nobody": body(name="z"),
    "name empty": body(name=""),
    "name __proto__": body(name="__proto__"),
    "no inputs": b'{"inputs":[]}',
    "twice the same": json.dumps({"inputs": json.loads(body())["inputs"] * 2}).encode(),
    "10^5 inputs": json.dumps({"inputs": [{"name": f"{i}", "datatype": "FP32", "shape": [], "data": []} for i in range(100_000)]}).encode(),
    "output of nobody": body(info={"outputs": [{"name": "z"}]}),
    "output twice": body(info={"outputs": [{"name": "y"}, {"name": "y"}]}),
}
MALFORMED = {
    "nothing": b"",
    "no JSON": b"hello",
    "cut short": body()[:-3],
    "two documents": body() + body(),
    "NaN": body().replace(b"[1, 2", b"[NaN, 2"),
    "Infinity": body().replace(b"[1, 2", b"[-Infinity, 2"),
    "byte order mark": b"\xef\xbb\xbf" + body(),
    "not UTF-8": body(name="x").replace(b'"x"', b'"\xff"'),
    "UTF-16": body().decode().encode("utf-16"),
    "lone surrogate": body(name="x").replace(b'"x"', b'"\\ud800"'),
    "100 000 deep": b"[" * 100_000 + b"]" * 100_000,
    "100 000 deep inside": body().replace(b"[1, 2, 3, 4]", b"[" * 100_000 + b"]" * 100_000),
    "100 000 deep aside": body(info={"aside": 0}).replace(b'"aside": 0', b'"aside": ' + b'{"a":' * 100_000 + b"0" + b"}" * 100_000),
    "an array": b"[]",
    "no inputs key": b"{}",
    "inputs an object": b'{"inputs":{}}',
    "shape of text": body(shape="1,4"),
    "shape of floats": body(shape=[1.5, 4]),
    "no name": body(name=...),
    "no datatype": body(datatype=...),
    "no data": body(data=...),
    "id a number": body(info={"id": 1}),
    "parameters a list": body(info={"parameters": []}),
    "parameter an object": body(info={"parameters": {"a": {}}}),
    "binary_data a word": body(info={"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]}),
    "size without header": body(data=..., parameters={"binary_data_size": 16}),
}
BINARY = {
    "too short for its shape": (binary({"parameters": {"binary_data_size": 12}}, bytes(12)), BadInputError),
    "too long for its shape": (binary({"parameters": {"binary_data_size": 20}}, bytes(20)), BadInputError),
    "size beyond the body": (binary({"parameters": {"binary_data_size": 16}}, bytes(15)), MalformedRequestError),
    "bytes left over": (binary({"parameters": {"binary_data_size": 16}}, bytes(17)), MalformedRequestError),
    "size negative": (binary({"parameters": {"binary_data_size": -16}}, bytes(16)), MalformedRequestError),
    "size a word": (binary({"parameters": {"binary_data_size": "16"}}, bytes(16)), MalformedRequestError),
    "size true": (binary({"parameters": {"binary_data_size": True}}, bytes(1)), MalformedRequestError),
    "size of 2^64": (binary({"parameters": {"binary_data_size": 2**64}}, bytes(16)), MalformedRequestError),
    "both data and size": (binary({"parameters": {"binary_data_size": 16}, "data": [1, 2, 3, 4]}, bytes(16)), MalformedRequestError),
    "shape that overflows": (binary({"shape": [2**62, 4], "parameters": {"binary_data_size": 0}}, b""), BadInputError),
    "shared memory": (binary({"parameters": {"shared_memory_region": "r"}}, b""), UnsupportedError),
    "classification": (
        binary({"data": [1, 2, 3, 4]}, b"", outputs=[{"name": "y", "parameters": {"classification": 3}}]),
        UnsupportedError,
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_what_does_not_fit_the_model_says_what_it_expects(case):
    started = time.perf_counter()
    with pytest.raises(BadInputError) as refusal:
        decode_request(BAD_INPUT[case], 0, X4)
    assert len(str(refusal.value)) < 600
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_inference_request_is_refused(case):
    with pytest.raises(MalformedRequestError) as refusal:
        decode_request(MALFORMED[case], 0, X4)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("case", BINARY)
def test_binary_that_does_not_add_up(case):
    (sent, head), error = BINARY[case]
    with pytest.raises(error):
        decode_request(sent, head, X4)


@pytest.mark.parametrize("head", [-1, 10_000])
def test_a_header_length_outside_the_body(head):
    with pytest.raises(MalformedRequestError):
        decode_request(body(), head, X4)


@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [
        ("BOOL", [True, False], [1, "true", None]),
        ("UINT8", [0, 255], [-1, 256, 1.0, True, "1"]),
        ("INT8", [-128, 127], [-129, 128]),
        ("UINT16", [0, 65535], [-1, 65536]),
        ("INT16", [-32768, 32767], [-32769, 32768]),
        ("UINT32", [0, 2**32 - 1], [-1, 2**32]),
        ("INT32", [-(2**31), 2**31 - 1], [-(2**31) - 1, 2**31]),
        ("UINT64", [0, 2**64 - 1], [-1, 2**64, 10**100]),
        ("INT64", [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63, 10**100]),
        ("FP32", [0, -0.0, 3.4028234e38, 1e-45], [3.5e38, "1"]),
        ("FP64", [1.7976931348623157e308, 5e-324, 10**300], [10**400]),
        ("BYTES", ["", "grüße\0", "😀"], [1, None, ["a"]]),
        ("FP16", [], [1.0]),
        ("BF16", [], [1.0]),
    ],
)
def test_the_range_of_each_datatype_in_json(datatype, good, bad):
    info = model(("x", datatype, (1,)))
    for value in good:
        array = decode_request(body([value], shape=[1], datatype=datatype), 0, info).inputs["x"]
        expected = value.encode() if datatype == "BYTES" else value
        assert array[0] == np.array([expected], DATATYPES[datatype])[0]
    for value in bad:
        with pytest.raises(BadInputError):
            decode_request(body([value], shape=[1], datatype=datatype), 0, info)


def test_minus_zero_keeps_its_sign():
    assert math.copysign(1, decode_request(body([-0.0, 0, 0, 0]), 0, X4).inputs["x"][0, 0]) == -1


def test_zero_rows_and_scalars_are_tensors_too():
    assert decode_request(body([], shape=[0, 4]), 0, X4).inputs["x"].shape == (0, 4)
    assert decode_request(body([7], shape=[]), 0, model(("x", "FP32", ()))).inputs["x"].shape == ()
    sent, head = binary({"shape": [0, 4], "parameters": {"binary_data_size": 0}}, b"")
    assert decode_request(sent, head, X4).inputs["x"].shape == (0, 4)


def test_no_elements_times_a_huge_dimension_is_refused():
    for shape in ([0, 2**70], [0, 2**62, 2**62]):
        with pytest.raises(BadInputError, match="too large"):
            decode_request(body([], shape=shape), 0, model(("x", "FP32", (-1,) * len(shape))))


def test_rows_of_a_batched_model_agree_over_its_inputs():
    info = model(("a", "FP32", (-1,)), ("b", "FP32", (-1,)), batched=True)
    sent, head = encode_request({"a": np.ones(2, "f4"), "b": np.ones(3, "f4")})
    with pytest.raises(BadInputError, match="batch"):
        decode_request(sent, head, info)


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"\5\0\0\0abc\0",
        b"\xff\xff\xff\xff" + bytes(8),
        struct.pack("<I", 2) + b"ab",
        struct.pack("<I", 1) + b"a" + struct.pack("<I", 1) + b"b" + b"c",
        struct.pack("<I", 1) + b"a" + struct.pack("<I", 2) + b"b",
    ],
)
def test_length_prefixes_that_do_not_add_up(tail):
    info = model(("x", "BYTES", (2,)))
    sent, head = binary({"datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(tail)}}, tail)
    with pytest.raises(BadInputError):
        decode_request(sent, head, info)


def test_a_shape_of_a_billion_strings_reserves_nothing():
    info = model(("x", "BYTES", (-1,)))
    sent, head = binary({"datatype": "BYTES", "shape": [2**40], "parameters": {"binary_data_size": 4}}, bytes(4))
    with pytest.raises(BadInputError):
        decode_request(sent, head, info)


def test_booleans_in_binary_are_zero_or_one():
    info = model(("x", "BOOL", (2,)))
    sent, head = binary({"datatype": "BOOL", "shape": [2], "parameters": {"binary_data_size": 2}}, b"\1\2")
    with pytest.raises(BadInputError):
        decode_request(sent, head, info)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_bodies_raise_only_our_errors(data):
    sent, head = encode_request({"x": np.ones((2, 4), "f4")}, binary=data.draw(st.booleans()), outputs=["y"])
    space = bytearray(sent)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(space) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                space[at] = data.draw(st.integers(0, 255))
            case "cut":
                del space[at : at + data.draw(st.integers(1, 9))]
            case _:
                space[at:at] = data.draw(st.sampled_from([b"[", b"{", b'"', b",", b"-", b"1e9", b"null", b"\0", b"\xff"]))
        if not space:
            break
    with contextlib.suppress(RequestError):
        request = decode_request(bytes(space), head + data.draw(st.integers(-2, 2)) if head else 0, X4)
        assert request.inputs["x"].dtype == np.float32
        assert request.inputs["x"].shape[1:] == (4,)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 300))
def test_random_bytes_raise_only_our_errors(data, head):
    with pytest.raises(RequestError):
        decode_request(data, head, X4)
    with pytest.raises(RemoteError):
        decode_response(data, head)
    assert isinstance(decode_error(500, data), TetherError)


# Answers and errors


def test_an_answer_that_lacks_an_output_is_our_bug():
    with pytest.raises(InternalError):
        encode_response({}, MODEL, InferRequest({}), X4)


def test_an_output_that_the_protocol_has_no_type_for_is_the_models_fault():
    with pytest.raises(ModelFailedError):
        encode_response({"y": np.ones(1, complex)}, MODEL, InferRequest({}), X4)


@pytest.mark.parametrize(
    "answer",
    [
        {"model_name": "m", "model_version": "x", "outputs": []},
        {"model_name": "m", "model_version": "1", "outputs": [{"name": "y", "datatype": "NONE", "shape": [1], "data": [1]}]},
        {"model_name": "m", "model_version": "1", "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1], "data": [1]}]},
        {"model_name": "m", "model_version": "1", "outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1]}]},
        {"outputs": []},
    ],
)
def test_an_answer_that_is_none_is_the_servers_fault(answer):
    with pytest.raises(RemoteError):
        decode_response(json.dumps(answer).encode(), 0)


def test_errors_travel_with_code_text_and_data():
    for error in (UnknownModelError("no such model"), MissingBlobsError("upload them", ["ab", "cd"]), BadInputError("x", 1, "two")):
        back = decode_error(error.http_status, encode_error(error))
        assert type(back) is type(error)
        assert list(back.args) == list(error.args)
    assert json.loads(encode_error(MissingBlobsError("m", ["ab"])))["missing"] == ["ab"]


def test_errors_of_other_servers_become_the_nearest_of_ours():
    assert isinstance(decode_error(404, b'{"error":"Request for unknown model"}'), NotFoundError)
    assert isinstance(decode_error(502, b"<html>"), RemoteError)
    assert str(decode_error(400, b'{"error":"text","code":"a_new_code"}')) == "text"
    assert isinstance(decode_error(503, b""), TetherError)
