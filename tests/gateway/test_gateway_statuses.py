"""Status codes that clients see: a client's fault is always 4xx, every error is {"error", "code"} (OIP §4, "Tether can be better")."""

import gzip
import json

import numpy as np
import pytest
from gateway_rig import AUTH, ask, infer_body

INFER = "/v2/models/ident/infer"


def row(data, **changed):
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data} | changed]}


REFUSED = {
    "malformed JSON": (INFER, b'{"inputs": [', 400, "malformed_request"),
    "not an object": (INFER, b"[]", 400, "malformed_request"),
    "empty body": (INFER, b"", 400, "malformed_request"),
    "unknown model": ("/v2/models/nope/infer", row([1, 2, 3, 4]), 404, "unknown_model"),
    "unknown version": ("/v2/models/ident/versions/9/infer", row([1, 2, 3, 4]), 404, "unknown_version"),
    "version that is no number": ("/v2/models/ident/versions/x/infer", row([1, 2, 3, 4]), 404, "unknown_version"),
    "name that is not UTF-8": ("/v2/models/%ff%fe/infer", row([1, 2, 3, 4]), 404, "unknown_model"),
    "data shorter than its shape": (INFER, row([1, 2, 3]), 400, "bad_input"),
    "wrong datatype": (INFER, row([1, 2, 3, 4], datatype="INT32"), 400, "bad_input"),
    "unknown input": (INFER, row([1, 2, 3, 4], name="z"), 400, "bad_input"),
    "missing input": (INFER, {"inputs": []}, 400, "bad_input"),
    "unknown output": (INFER, row([1, 2, 3, 4]) | {"outputs": [{"name": "z"}]}, 400, "bad_input"),
    "wrong fixed dimension": (INFER, row([1, 2, 3], shape=[1, 3]), 400, "bad_input"),
    "shared memory": (INFER, row([], parameters={"shared_memory_region": "r"}), 501, "unsupported"),
    "unknown path": ("/v2/models/ident/nothing", row([1, 2, 3, 4]), 404, "not_found"),
    "the dispatcher itself fails": ("/v2/models/broken/infer", row([1, 2, 3, 4]), 500, "internal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_with_its_code(gateway, case):
    path, body, status, code = REFUSED[case]
    answered, headers, error = ask(gateway, "POST", path, body)
    assert (answered, error["code"]) == (status, code)
    assert error["error"]
    assert headers["x-request-id"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_another_verb_on_infer_is_405_with_the_allowed_one(gateway, method):
    status, headers, error = ask(gateway, method, INFER, infer_body() if method in {"PUT", "PATCH"} else None)
    assert (status, error["code"], headers["allow"]) == (405, "method_not_allowed", "POST")


def test_head_on_infer_has_no_body(gateway):
    status, headers, body = ask(gateway, "HEAD", INFER)
    assert (status, body) == (405, b"")
    assert int(headers["content-length"]) > 0


@pytest.mark.parametrize("text", ["x", "-1", "+5", "99999999999", "1e3", "400"])
def test_a_wrong_header_length_is_refused(gateway, text):
    status, _, error = ask(gateway, "POST", INFER, infer_body(), {"Inference-Header-Content-Length": text})
    assert (status, error["code"]) == (400, "malformed_request")


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_wrong_timeout_is_refused(gateway, text):
    status, _, error = ask(gateway, "POST", INFER, infer_body(), {"x-request-timeout": text})
    assert (status, error["code"]) == (400, "malformed_request")


def test_a_raw_request_is_a_bare_tensor(gateway):
    x = np.arange(8, dtype="f4").reshape(2, 4)
    status, headers, body = ask(gateway, "POST", INFER, x.tobytes(), {"Inference-Header-Content-Length": "0"})
    head = int(headers["inference-header-content-length"])
    assert status == 200
    assert json.loads(body[:head])["outputs"][0]["shape"] == [2, 4]
    assert body[head:] == x.tobytes()


def test_a_raw_string_has_no_length_prefix(gateway):
    status, headers, body = ask(gateway, "POST", "/v2/models/text/infer", b"hello", {"Inference-Header-Content-Length": "0"})
    assert (status, body[int(headers["inference-header-content-length"]) :]) == (200, b"\5\0\0\0hello")


@pytest.mark.parametrize(("model", "nbytes"), [("simple", 12), ("ident", 15), ("nope", 16)])
def test_a_raw_request_must_fit_the_model(gateway, model, nbytes):
    status, _, error = ask(gateway, "POST", f"/v2/models/{model}/infer", bytes(nbytes), {"Inference-Header-Content-Length": "0"})
    assert status == (404 if model == "nope" else 400)
    assert error["code"] == ("unknown_model" if model == "nope" else "bad_input")


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", gzip.compress(infer_body()), 200),
        ("identity", infer_body(), 200),
        ("gzip", infer_body(), 400),
        ("gzip", gzip.compress(infer_body())[:-5], 400),
        ("br", infer_body(), 400),
        ("gzip, gzip", gzip.compress(gzip.compress(infer_body())), 400),
        ("gzip", gzip.compress(bytes(65 << 20), 9), 413),
    ],
    ids=["gzip", "identity", "not gzip", "cut short", "brotli", "nested", "bomb"],
)
def test_compressed_bodies(gateway, encoding, body, status):
    answered, _, answer = ask(gateway, "POST", INFER, body, {"Content-Encoding": encoding})
    assert answered == status
    assert "outputs" in answer or set(answer) == {"error", "code"}


def test_the_short_form_of_an_inference(gateway):
    status, _, answer = ask(gateway, "POST", "/inference", {"model": "ident", "inputs": {"x": [[1, 2, 3, 4.5]]}})
    assert (status, answer) == (200, {"model": "ident", "version": 1, "outputs": {"y": [[1.0, 2.0, 3.0, 4.5]]}})
    listed = [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]
    status, _, answer = ask(gateway, "POST", "/inference", {"model": "ident", "version": 1, "inputs": listed})
    assert (status, answer["outputs"]) == (200, {"y": [[1.0, 2.0, 3.0, 4.0]]})
    status, _, answer = ask(gateway, "POST", "/inference", {"model": "half", "inputs": {"x": [[0.5, 2]]}})
    assert (status, answer["outputs"]) == (200, {"y": [[0.5, 2.0]]})
    status, _, answer = ask(gateway, "POST", "/inference", {"model": "text", "inputs": {"x": [["ä"], ["b"]]}})
    assert (status, answer["outputs"]) == (200, {"y": [["ä"], ["b"]]})


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "malformed_request"),
        (b"", "malformed_request"),
        (b'{"model": "ident"}', "malformed_request"),
        (b'{"model": "ident", "inputs": {"x": [[1, 2], [3]]}}', "bad_input"),
        (b'{"model": "ident", "inputs": {"x": [1, 2, 3, 4]}}', "bad_input"),
        (b'{"model": "ident", "inputs": {"x": {"a": 1}}}', "bad_input"),
        (b'{"model": "ident", "inputs": {"z": [1]}}', "bad_input"),
        (b'{"model": "ident", "inputs": {"x": 1}}', "bad_input"),
        (b'{"model": "nope", "inputs": {}}', "unknown_model"),
        (b'{"model": "ident", "inputs": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", "malformed_request"),
    ],
)
def test_the_short_form_refuses_as_the_long_one(gateway, body, code):
    status, _, error = ask(gateway, "POST", "/inference", body)
    assert (status, error["code"]) == (404 if code == "unknown_model" else 400, code)


def test_health_says_503_where_no_worker_runs(gateway):
    table = gateway.dispatcher.table
    gateway.dispatcher.table = type(table)(2, table.models)
    try:
        assert ask(gateway, "GET", "/v2/health/live")[0] == 200
        assert ask(gateway, "GET", "/v2/health/ready")[0] == 503
        assert ask(gateway, "GET", "/healthz")[2] == {"status": "starting"}
        status, headers, error = ask(gateway, "GET", "/v2/models/ident/ready")
        assert (status, error["code"], headers["retry-after"]) == (503, "service_unavailable", "1")
    finally:
        gateway.dispatcher.table = table


def test_readiness_of_a_model(gateway):
    assert ask(gateway, "GET", "/v2/models/ident/ready")[2] == {"name": "ident", "ready": True}
    assert ask(gateway, "GET", "/v2/models/nope/ready")[0] == 404
    assert ask(gateway, "GET", "/v2/models/ident/versions/7")[0] == 404
    status, _, error = ask(gateway, "GET", "/v2/models/bad/ready")
    assert status == 503
    assert "no space" in error["error"]


def test_the_index_filters_and_checks_its_body(gateway):
    states = {entry["state"] for entry in ask(gateway, "POST", "/v2/repository/index", {"ready": True})[2]}
    assert states == {"READY"}
    assert ask(gateway, "POST", "/v2/repository/index", {"ready": 1})[0] == 400
    assert ask(gateway, "POST", "/v2/repository/index", b"{")[0] == 400


def test_the_documents_name_every_endpoint(gateway):
    status, _, document = ask(gateway, "GET", "/openapi.json")
    assert (status, document["openapi"]) == (200, "3.1.0")
    assert {"/v2/models/{model}/infer", "/inference", "/tether/v1/blobs/{digest}"} <= set(document["paths"])
    status, headers, page = ask(gateway, "GET", "/docs")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"/v2/models/{model}/infer" in page
    assert b"http" not in page  # nothing is fetched from elsewhere


def test_a_path_with_a_slash_too_many_is_no_redirect(gateway):
    assert ask(gateway, "GET", "/v2/")[0] == 404
    assert ask(gateway, "GET", "//v2")[0] == 404
    assert ask(gateway, "GET", "/v2/models/../models/ident")[0] == 404


def test_management_needs_a_key_even_here(gateway):
    status, headers, error = ask(gateway, "GET", "/tether/v1/models")
    assert (status, error["code"], headers["www-authenticate"]) == (401, "unauthenticated", "Bearer")
    assert ask(gateway, "GET", "/tether/v1/models", headers=AUTH)[2] == {"models": [{"name": "ident"}]}


def test_management_is_mapped_one_to_one(gateway):
    calls = gateway.dispatcher.management.calls
    root = "/tether/v1/models/ident"
    ask(gateway, "GET", f"{root}/versions/3", headers=AUTH)
    ask(gateway, "DELETE", f"{root}/versions/3", headers=AUTH)
    ask(gateway, "PUT", f"{root}/aliases/prod", {"version": 2}, AUTH)
    ask(gateway, "DELETE", f"{root}/aliases/prod", headers=AUTH)
    ask(gateway, "POST", f"{root}/rollback", {"alias": None}, AUTH)
    ask(gateway, "POST", f"{root}/verify", {"version": 1}, AUTH)
    assert calls[-6:] == [
        ("manifest", "ident", 3),
        ("delete_version", "ident", 3),
        ("set_alias", "ident", "prod", 2),
        ("delete_alias", "ident", "prod"),
        ("rollback", "ident", None),
        ("verify", "ident", 1),
    ]
    assert ask(gateway, "GET", "/tether/v1/status", headers=AUTH)[2] == {"services": []}
    (worker,) = ask(gateway, "GET", "/tether/v1/workers", headers=AUTH)[2]["workers"]
    assert (worker["id"], worker["transport"], worker["slots"], worker["peer"]) == ("worker-1", "unix", None, None)
    assert ask(gateway, "PUT", "/tether/v1/trust/alice", {"scopes": ["code"]}, AUTH)[2] == {"publisher": "alice", "scopes": ["code"]}


def test_who_is_let_in_is_mapped_one_to_one_and_asks_for_a_key(gateway):
    calls, root, peer, scopes = gateway.dispatcher.management.calls, "/tether/v1", f"/tether/v1/peers/{'b' * 64}", ["infer:ident"]
    assert ask(gateway, "POST", f"{root}/invitations", {"scopes": scopes}, AUTH)[0] == 201
    for method, path, body in (
        ("POST", f"{root}/invitations", {"scopes": scopes, "expires": 60, "uses": 3, "label": "for alice"}),
        ("GET", f"{root}/invitations", None),
        ("DELETE", f"{root}/invitations/12ab34cd", None),
        ("GET", f"{root}/address", None),
        ("GET", f"{root}/peers", None),
        ("PUT", peer, {"scopes": scopes}),
        ("PUT", peer, {"scopes": scopes, "label": "alice"}),
        ("POST", f"{peer}/disallow", {"scopes": scopes}),
        ("POST", f"{peer}/disallow", {"scopes": None}),
        ("PUT", f"{peer}/ban", {"reason": "shouted"}),
        ("DELETE", f"{peer}/ban", None),
        ("PUT", f"{root}/peers/alice/petname", {"petname": "al"}),
        ("GET", f"{root}/audit?most=7", None),
    ):
        assert ask(gateway, method, path, body, AUTH)[0] in {200, 201}
        assert ask(gateway, method, path, body)[0] == 401
    assert calls[-14:] == [
        ("invite", scopes, "30d", 1, ""),
        ("invite", scopes, 60, 3, "for alice"),
        ("invitations",),
        ("revoke_invitation", "12ab34cd"),
        ("address",),
        ("peers",),
        ("allow", "b" * 64, scopes, None),
        ("allow", "b" * 64, scopes, "alice"),
        ("disallow", "b" * 64, scopes),
        ("disallow", "b" * 64, None),
        ("ban", "b" * 64, "shouted"),
        ("unban", "b" * 64),
        ("name_peer", "alice", "al"),
        ("audit", 7),
    ]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "invitations", {}),
        ("POST", "invitations", {"scopes": "infer"}),
        ("POST", "invitations", {"scopes": ["infer"], "uses": "1"}),
        ("POST", "invitations", {"scopes": ["infer"], "uses": True}),
        ("POST", "invitations", {"scopes": ["infer"], "expires": None}),
        ("POST", "invitations", {"scopes": ["infer"], "label": 1}),
        ("PUT", "peers/x", {"scopes": [1]}),
        ("PUT", "peers/x", {"scopes": ["infer"], "label": 1}),
        ("POST", "peers/x/disallow", {}),
        ("POST", "peers/x/disallow", {"scope": ["infer"]}),
        ("PUT", "peers/x/ban", {"reason": 1}),
        ("PUT", "peers/x/petname", {}),
        ("GET", "audit?most=-1", None),
        ("GET", "audit?most=many", None),
    ],
)
def test_a_body_that_is_none_takes_and_gives_nothing(gateway, method, path, body):
    before = len(gateway.dispatcher.management.calls)
    status, _, error = ask(gateway, method, f"/tether/v1/{path}", body, AUTH)
    assert (status, error["code"]) == (400, "malformed_request")
    assert len(gateway.dispatcher.management.calls) == before


def test_what_encrypted_models_need_is_mapped_one_to_one(gateway):
    calls, root = gateway.dispatcher.management.calls, "/tether/v1"
    ask(gateway, "POST", f"{root}/envelopes", {"envelope": "AAAA"}, AUTH)
    ask(gateway, "POST", f"{root}/cluster-key/rotate", {}, AUTH)
    assert calls[-2:] == [("accept", "AAAA"), ("rotate",)]
    assert ask(gateway, "POST", f"{root}/envelopes", {"envelope": 1}, AUTH)[0] == 400
    blob = f"{root}/blobs/{'a' * 64}"
    assert ask(gateway, "PUT", f"{blob}?encrypt=ident", b"1", AUTH)[2] == {"digest": "a" * 64, "encrypt": "ident"}
    assert ask(gateway, "GET", f"{blob}?version=ident%3A2", headers=AUTH)[2] == b"ident:2"


def test_publishing_says_created_or_known_or_what_is_missing(gateway):
    versions = "/tether/v1/models/ident/versions"
    assert ask(gateway, "POST", versions, {"created": True}, AUTH)[0] == 201
    assert ask(gateway, "POST", versions, {"created": False}, AUTH)[0] == 200
    status, _, error = ask(gateway, "POST", versions, {"missing": ["ab"]}, AUTH)
    assert (status, error["code"], error["missing"]) == (409, "missing_blobs", ["ab"])


def test_blobs_are_bytes_of_at_most_four_mebibytes(gateway):
    path = f"/tether/v1/blobs/{'a' * 64}"
    assert ask(gateway, "PUT", path, bytes(4 << 20), AUTH)[0] == 200
    assert ask(gateway, "GET", path, headers=AUTH)[2] == bytes(4 << 20)
    status, _, error = ask(gateway, "PUT", path, bytes((4 << 20) + 1), AUTH)
    assert (status, error["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/tether/v1/blobs/xyz", b"1"),
        ("GET", "/tether/v1/models/UPPER", None),
        ("GET", "/tether/v1/models/ident@prod", None),
        ("GET", "/tether/v1/models/ident/versions/0", None),
        ("PUT", "/tether/v1/models/ident/aliases/prod", {"version": True}),
        ("PUT", "/tether/v1/models/ident/aliases/prod", b"{"),
        ("POST", "/tether/v1/models/ident/versions", b"[]"),
        ("POST", "/tether/v1/models/ident/rollback", {"alias": 1}),
        ("POST", "/tether/v1/models/ident/verify", {"version": "1"}),
        ("PUT", "/tether/v1/trust/alice", {"scopes": "code"}),
    ],
)
def test_management_refuses_what_is_not_in_form(gateway, method, path, body):
    status, _, error = ask(gateway, method, path, body, AUTH)
    assert status == 400
    assert error["code"] in {"bad_name", "malformed_request"}


def test_a_failing_manager_is_our_error_and_named_as_such(gateway, caplog):
    status, _, error = ask(gateway, "GET", f"/tether/v1/blobs/{'b' * 64}", headers=AUTH)
    assert (status, error["code"]) == (500, "internal")
    assert "KeyError" in caplog.text
    assert "Traceback" not in error["error"]


def test_request_ids_are_echoed_or_made_on_both_lanes(gateway):
    for method, path, body in (("POST", INFER, infer_body()), ("GET", "/v2", None), ("GET", "/nowhere", None)):
        assert ask(gateway, method, path, body, {"x-request-id": "abc-1"})[1]["x-request-id"] == "abc-1"
        made = {ask(gateway, method, path, body)[1]["x-request-id"] for _ in range(3)}
        assert len(made) == 3
        assert ask(gateway, method, path, body, {"x-request-id": "a b"})[1]["x-request-id"] != "a b"
