"""A request for a lent worker and its answer, as bytes."""

import json
import struct

import msgspec
import numpy as np
import pytest

from tether.errors import (
    BadInputError,
    DeadlineExceededError,
    ForbiddenError,
    MalformedRequestError,
    ManagerLeavingError,
    NoWorkerError,
    PeerLeavingError,
    PeerUnreachableError,
    ProtocolError,
    QueueFullError,
    ServiceUnavailableError,
    StreamLostError,
    UnknownModelError,
    WorkerLostError,
)
from tether.manager.peering.lent_hops import asked, failed, replied
from tether.ports import Hop, HopReply, Undelivered
from tether.types import Digest, InferRequest, ModelInfo, ModelVersion, TensorSpec
from tether.wire.oip import decode_request, decode_response, encode_request, encode_response

OWN = "a" * 64
MODEL = ModelVersion("digits", 3, Digest("d" * 64))
INFO = ModelInfo(
    "onnx", "onnx", (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),), batched=True, pure=True, code=False
)
NAME = f"{OWN}~digits:sha-{'d' * 64}"


class Named(msgspec.Struct):
    model_name: str


def parted(value):
    (nbytes,) = struct.unpack_from("<I", value)
    return value[4 : 4 + nbytes], value[4 + nbytes :]


@pytest.mark.parametrize("binary", [True, False])
def test_a_request_says_the_same_with_the_name_in_it(binary):
    body, header_nbytes = encode_request({"x": np.ones((3, 2), np.float32)}, binary=binary)
    text, tail = parted(asked(Hop(body, header_nbytes, 1.0), OWN, MODEL))
    assert json.loads(text)["model_name"] == NAME
    request = decode_request(text + tail, len(text), INFO)
    np.testing.assert_array_equal(request.inputs["x"], np.ones((3, 2), np.float32))


@pytest.mark.parametrize("body", [b'{"model_name":"other","inputs":[]}', b' {"model\\u005fname" : "other"\n} \r\n', b"{}", b"{ }\n"])
def test_a_name_that_the_caller_wrote_does_not_count(body):
    text, tail = parted(asked(Hop(body, 0, 1.0), OWN, MODEL))
    assert msgspec.json.decode(text, type=Named).model_name == NAME
    assert tail == b""


@pytest.mark.parametrize("hop", [Hop(b"", 0, 1), Hop(b"[1]", 0, 1), Hop(b"}", 0, 1), Hop(b"{}", 3, 1), Hop(b"nothing", 4, 1)])
def test_what_is_no_object_is_refused_here(hop):
    with pytest.raises(MalformedRequestError):
        asked(hop, OWN, MODEL)


@pytest.mark.parametrize(("binary", "rows"), [(True, 2), (False, 2), (True, 0)])
def test_an_answer_comes_by_the_name_that_the_model_has_here(binary, rows):
    theirs = ModelVersion("b0b0~digits", 3, MODEL.digest)
    outputs = {"y": np.full((rows, 2), 0.5, np.float32)}
    body, header_nbytes = encode_response(outputs, theirs, InferRequest({}, binary=binary), INFO)
    reply = replied(struct.pack("<I", header_nbytes or len(body)) + body, MODEL)
    assert (reply.status, reply.header_nbytes > 0) == (200, binary)
    response = decode_response(reply.body, reply.header_nbytes)
    assert (response.model, response.version) == ("digits", 3)
    np.testing.assert_array_equal(response.outputs["y"], outputs["y"])


@pytest.mark.parametrize("answer", [b"", b"\x01", struct.pack("<I", 0), struct.pack("<I", 5) + b"{}"])
def test_an_answer_that_is_none_is_the_other_labs_fault(answer):
    with pytest.raises(ProtocolError):
        replied(answer, MODEL)


def test_an_answer_in_other_words_goes_on_as_it_is():
    for text in (b'{"outputs":[]}', b'{"model_name":"never ends'):
        assert replied(struct.pack("<I", len(text)) + text, MODEL) == HopReply(200, text, 0)


def test_only_what_surely_did_not_run_is_not_sent():
    for error in (PeerUnreachableError("x"), NoWorkerError("x"), QueueFullError("x"), UnknownModelError("x"), ForbiddenError("x")):
        assert failed(error) is Undelivered.NOT_SENT
    for error in (PeerLeavingError("x"), ManagerLeavingError("x")):
        assert failed(error) is Undelivered.NOT_SENT, "though it is a ServiceUnavailableError"
    for error in (StreamLostError("x", "ECONNRESET"), ServiceUnavailableError("x"), WorkerLostError("x")):
        assert failed(error) is Undelivered.LOST
    for error, status in ((BadInputError("x"), 400), (DeadlineExceededError("x"), 504), (ProtocolError("x"), 502)):
        reply = failed(error)
        assert isinstance(reply, HopReply)
        assert (reply.status, json.loads(reply.body)["code"]) == (status, error.code)
