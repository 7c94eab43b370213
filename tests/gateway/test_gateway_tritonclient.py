"""The client that everybody uses, against a real gateway: whatever it can do without extensions we don't offer, works."""

import numpy as np
import pytest
import tritonclient.http as sync
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

X = np.array([[1.5, 2.0, -3.25, np.pi]], dtype="f4")


@pytest.fixture
def client(gateway):
    with sync.InferenceServerClient(f"127.0.0.1:{gateway.port}") as client:
        yield client


def tensor(binary, name="x", array=X, datatype="FP32"):
    made = sync.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ident")
    assert client.is_model_ready("ident", "1")
    assert not client.is_model_ready("nope")
    assert not client.is_model_ready("bad")
    assert client.get_server_metadata()["name"] == "tether"
    metadata = client.get_model_metadata("ident")
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]


def test_the_repository_index_takes_the_clients_empty_body(client):
    states = {row["name"]: row["state"] for row in client.get_model_repository_index()}
    assert states["ident"] == "READY"
    assert states["held"] == "LOADING"
    assert states["bad"] == "UNAVAILABLE"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_inference_in_json_and_in_binary(client, binary_in, binary_out):
    outputs = [sync.InferRequestedOutput("y", binary_data=binary_out)]
    result = client.infer("ident", [tensor(binary_in)], outputs=outputs, request_id="17")
    np.testing.assert_array_equal(result.as_numpy("y"), X)
    assert result.get_response()["id"] == "17"
    assert result.get_response()["model_version"] == "1"


def test_two_inputs_one_in_json_one_in_binary(client):
    a, b = np.array([[1, 2, 3]], "i4"), np.array([[10, 20, 30]], "i4")
    result = client.infer("simple", [tensor(True, "a", a, "INT32"), tensor(False, "b", b, "INT32")])
    np.testing.assert_array_equal(result.as_numpy("sum"), a + b)
    np.testing.assert_array_equal(result.as_numpy("difference"), a - b)


@pytest.mark.parametrize("binary", [True, False])
def test_strings_travel_whole(client, binary):
    words = np.array([["grüße 0"], [""], ["ab" * 5000]], dtype=object)
    result = client.infer("text", [tensor(binary, "x", words, "BYTES")])
    assert [word.decode() for word in result.as_numpy("y").ravel()] == list(words.ravel())


def test_half_precision_is_binary_in_and_either_out(client):
    halves = np.array([[1.5, 65504.0]], "f2")
    binary = client.infer("half", [tensor(True, "x", halves, "FP16")])
    np.testing.assert_array_equal(binary.as_numpy("y"), halves)
    outputs = [sync.InferRequestedOutput("y", binary_data=False)]
    text = client.infer("half", [tensor(True, "x", halves, "FP16")], outputs=outputs)
    assert text.get_response()["outputs"][0]["data"] == [1.5, 65504.0]


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_requests_are_understood(client, compression):
    result = client.infer("ident", [tensor(True)], request_compression_algorithm=compression)
    np.testing.assert_array_equal(result.as_numpy("y"), X)


def test_names_are_quoted_by_the_client_and_unquoted_by_us(client):
    np.testing.assert_array_equal(client.infer("my~model+x", [tensor(True)]).as_numpy("y"), X)
    np.testing.assert_array_equal(client.infer("ident@prod", [tensor(True)]).as_numpy("y"), X)


def test_the_timeout_parameter_becomes_the_deadline(gateway, client):
    client.infer("ident", [tensor(True)], timeout=2_500_000)
    assert gateway.dispatcher.hops[-1].timeout == 2.5
    client.infer("ident", [tensor(False)], headers={"x-request-timeout": "7"})
    assert gateway.dispatcher.hops[-1].timeout == 7.0
    client.infer("ident", [tensor(False)])
    assert gateway.dispatcher.hops[-1].timeout == 60.0


def test_errors_reach_the_client_as_text(client):
    with pytest.raises(InferenceServerException, match="model 'nope' is not found"):
        client.infer("nope", [tensor(True)])
    with pytest.raises(InferenceServerException, match="the model expects 'x' FP32"):
        client.infer("ident", [tensor(True, "x", X.astype("f8"), "FP64")])


async def test_the_asynchronous_client(gateway):
    async with aio.InferenceServerClient(f"127.0.0.1:{gateway.port}") as client:
        assert await client.is_server_ready()
        for binary in (True, False):
            made = aio.InferInput("x", [1, 4], "FP32")
            made.set_data_from_numpy(X, binary_data=binary)
            result = await client.infer("ident", [made], "1")
            np.testing.assert_array_equal(result.as_numpy("y"), X)


def test_golden_bytes_of_the_client(gateway):
    """What tritonclient 2.73 sends, without Content-Type and without id (OIP §3)."""
    tensor_part = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","parameters":{"binary_data_size":16}}],'
    head = tensor_part + b'"parameters":{"binary_data_output":true}}'
    with sync.InferenceServerClient(f"127.0.0.1:{gateway.port}") as client:
        client.infer("ident", [tensor(True)])
    hop = gateway.dispatcher.hops[-1]
    assert hop.body == head + X.tobytes()
    assert hop.header_nbytes == len(head)
