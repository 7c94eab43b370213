"""The whole way through HTTP with clients that know nothing of Tether: urllib and tritonclient, good input and bad."""

import http.client
import json
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.http as triton
from conftest import WEIGHTS, write_model

HEARTBEATS = 60.0
"""Seconds in which workers have told how they are."""
X = np.random.default_rng(5).random((3, 16), dtype=np.float32)


@pytest.fixture(scope="module")
def served(lab, tmp_path_factory):
    lab.publish("wire", write_model(tmp_path_factory.mktemp("wire") / "model.onnx"), example=X[:1])
    lab.infer("wire", X)
    return lab


def ask(lab, path, body=None, method=None, headers=None):
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(lab.gateway + path, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def error_of(answer):
    status, body = answer
    return status, json.loads(body)["code"]


def tensor(data=None, **changes):
    return {"name": "x", "shape": [3, 16], "datatype": "FP32", "data": X.ravel().tolist() if data is None else data} | changes


def test_json_over_plain_http(served):
    status, body = ask(served, "/v2/models/wire/infer", {"id": "7", "inputs": [tensor()]})
    answer = json.loads(body)
    assert (status, answer["id"], answer["model_version"]) == (200, "7", "1")
    np.testing.assert_allclose(np.array(answer["outputs"][0]["data"]).reshape(3, 4), X @ WEIGHTS, rtol=1e-5)


def test_the_short_form(served):
    status, body = ask(served, "/inference", {"model": "wire", "inputs": {"x": X.tolist()}})
    assert status == 200
    np.testing.assert_allclose(json.loads(body)["outputs"]["y"], X @ WEIGHTS, rtol=1e-5)


@pytest.mark.parametrize("binary", [False, True])
def test_tritonclient(served, binary):
    with triton.InferenceServerClient(served.gateway.removeprefix("http://")) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("wire")
        assert client.get_model_metadata("wire")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}]
        value = triton.InferInput("x", [3, 16], "FP32")
        value.set_data_from_numpy(X, binary_data=binary)
        answer = client.infer("wire", [value], outputs=[triton.InferRequestedOutput("y", binary_data=binary)])
        np.testing.assert_allclose(answer.as_numpy("y"), X @ WEIGHTS, rtol=1e-5)


async def test_tritonclient_aio(served):
    from tritonclient.http import aio

    client = aio.InferenceServerClient(served.gateway.removeprefix("http://"))
    try:
        value = aio.InferInput("x", [3, 16], "FP32")
        value.set_data_from_numpy(X)
        answer = await client.infer("wire", [value])
        np.testing.assert_allclose(answer.as_numpy("y"), X @ WEIGHTS, rtol=1e-5)
    finally:
        await client.close()


def test_a_body_that_goes_through_the_ring(served):
    rows = np.random.default_rng(1).random((20_000, 16), dtype=np.float32)
    np.testing.assert_allclose(served.infer("wire", rows), rows @ WEIGHTS, rtol=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v2/models/wire/infer", b"{", (400, "malformed_request")),
        ("/v2/models/wire/infer", b"", (400, "malformed_request")),
        ("/v2/models/wire/infer", {"inputs": []}, (400, "bad_input")),
        ("/v2/models/wire/infer", {"inputs": [tensor(name="z")]}, (400, "bad_input")),
        ("/v2/models/wire/infer", {"inputs": [tensor(datatype="INT32")]}, (400, "bad_input")),
        ("/v2/models/wire/infer", {"inputs": [tensor(shape=[48])]}, (400, "bad_input")),
        ("/v2/models/wire/infer", {"inputs": [tensor(data=[1, 2])]}, (400, "bad_input")),
        ("/v2/models/wire/infer", {"inputs": [tensor(shape=[2**40, 16])]}, (400, "bad_input")),
        ("/v2/models/nobody/infer", {"inputs": [tensor()]}, (404, "unknown_model")),
        ("/v2/models/wire/versions/9/infer", {"inputs": [tensor()]}, (404, "unknown_version")),
        ("/v2/nothing", None, (404, "not_found")),
    ],
)
def test_bad_input_is_the_callers_and_the_service_goes_on(served, path, body, expected):
    assert error_of(ask(served, path, body)) == expected
    assert ask(served, "/v2/models/wire/infer", {"inputs": [tensor()]})[0] == 200


def test_a_hundred_megabytes_of_json_are_refused_before_they_are_read(served):
    connection = http.client.HTTPConnection(served.gateway.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v2/models/wire/infer")
    connection.putheader("Content-Length", str(100 << 20))
    connection.endheaders()
    answer = connection.getresponse()
    assert error_of((answer.status, answer.read())) == (413, "payload_too_large")
    connection.close()
    assert ask(served, "/v2/health/ready")[0] == 200


def test_management_needs_the_key(served):
    assert error_of(ask(served, "/tether/v1/models")) == (401, "unauthenticated")
    assert error_of(ask(served, "/tether/v1/models", headers={"Authorization": "Bearer tk_" + "x" * 43})) == (401, "unauthenticated")


def test_metrics_count_what_was_asked(served):
    ask(served, "/v2/models/wire/infer", {"inputs": [tensor()]})
    _, text = ask(served, "/metrics")
    (line,) = [
        line
        for line in text.decode().splitlines()
        if line.startswith("tether_requests_total") and 'model="wire"' in line and '"200"' in line
    ]
    assert float(line.split()[-1]) >= 1
    assert "tether_request_duration_seconds_bucket{" in text.decode()


def test_metrics_tell_what_workers_did_and_use(served):
    ask(served, "/v2/models/wire/infer", {"inputs": [tensor()]})

    def told():
        """The most that any worker tells."""
        values = {}
        for line in ask(served, "/metrics")[1].decode().splitlines():
            if 'worker="' in line:
                name = line.partition("{")[0]
                values[name] = max(values.get(name, 0.0), float(line.split()[-1]))
        return values if values.get("tether_model_rows_total") and values.get("tether_worker_memory_bytes") else None

    deadline = time.monotonic() + HEARTBEATS
    while (found := told()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found, "no heartbeat told of it"
    assert found["tether_worker_memory_bytes"] > 20 << 20
    assert found["tether_worker_cpu_seconds_total"] > 0
    assert found["tether_model_inference_seconds_total"] > 0
