"""Who may call what: the rules as values, the rules on real sockets."""

import asyncio
import contextlib
import os
import socket

import pytest
from gateway_rig import AUTH, KEY, Wire, ask, infer_body, post, running
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import ForbiddenError, MalformedRequestError, UnauthenticatedError
from tether.gateway.admission import Admission, Keys, Peer, fingerprint, new_key, timeout_of
from tether.gateway.door import Settings
from tether.gateway.peers import peer_of

INFER = "/v2/models/ident/infer"
ME = Peer("127.0.0.1", loopback=True, same_user=True)
OTHER_USER = Peer("127.0.0.1", loopback=True)
REMOTE = Peer("192.0.2.7")
SENT = {b"authorization": f"Bearer {KEY}".encode()}


@pytest.fixture
def admission():
    return Admission(Keys({fingerprint(KEY): "tester"}))


def test_a_key_is_random_and_kept_as_its_fingerprint_only():
    first, second = new_key(), new_key()
    assert first != second
    assert len(first) > 40
    assert repr(Keys({fingerprint(first): "n"})) == "Keys(['n'])"
    assert Keys({fingerprint(first): "n"}).name(f"Bearer {first}".encode()) == "n"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        KEY,
        "Bearer tk_" + "x" * 9999,
        f"Basic {KEY}",
        *(f"Bearer {key}" for key in ("", KEY[:-1], KEY + "x", KEY[3:], f"{KEY} {KEY}")),
    ],
    ids=lambda header: header[:12] + str(len(header)),
)
def test_what_is_no_valid_key_is_refused(admission, header):
    with pytest.raises(UnauthenticatedError) as refusal:
        admission.keys.name(header.encode())
    assert KEY not in str(refusal.value)


@given(st.binary(max_size=200))
def test_no_bytes_but_the_key_are_the_key(header):
    with pytest.raises(UnauthenticatedError):
        Keys({fingerprint(KEY): "tester"}).name(header)


@pytest.mark.parametrize(
    ("peer", "need", "free"),
    [
        (ME, "infer", True),
        (ME, "metrics", True),
        (ME, "manage", False),
        (OTHER_USER, "infer", False),
        (OTHER_USER, "metrics", True),
        (REMOTE, "open", True),
        (REMOTE, "infer", False),
        (REMOTE, "metrics", False),
    ],
)
def test_who_needs_a_key(admission, peer, need, free):
    assert admission.caller(SENT, peer, need) in {"tester", None}
    if free:
        assert admission.caller({}, peer, need) is None
    else:
        with pytest.raises(UnauthenticatedError):
            admission.caller({}, peer, need)


@pytest.mark.parametrize("header", [b"x-forwarded-for", b"forwarded", b"via", b"x-real-ip"])
def test_what_a_proxy_on_this_host_passes_on_needs_a_key(admission, header):
    with pytest.raises(UnauthenticatedError):
        admission.caller({header: b"127.0.0.1"}, ME, "infer")


def test_a_wrong_key_is_refused_even_where_none_is_needed(admission):
    with pytest.raises(UnauthenticatedError):
        admission.caller({b"authorization": b"Bearer tk_" + b"w" * 43}, ME, "infer")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_hosts_that_are_loopback(admission, host):
    admission.check_site({b"host": host.encode()}, ME)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "x@localhost",
        "localhost/x",
        "localhost:a",
        "localhost:0",
        "[::1",
        "::1",
    ],
)
def test_hosts_that_are_not(admission, host):
    with pytest.raises(ForbiddenError):
        admission.check_site({b"host": host.encode()}, ME)


def test_a_gateway_on_another_address_may_name_its_hosts():
    Admission(Keys()).check_site({b"host": b"anything"}, REMOTE)
    named = Admission(Keys(), allow_hosts=frozenset({"lab.example"}))
    named.check_site({b"host": b"lab.example:8000"}, REMOTE)
    with pytest.raises(ForbiddenError):
        named.check_site({b"host": b"evil.example"}, REMOTE)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:8000", True),
        ("https://app.example", True),
        ("http://app.example", False),
        ("http://localhost:8001", False),
        ("http://evil.example", False),
        ("null", False),
        ("", False),
        ("file://", False),
        ("localhost:8000", False),
    ],
)
def test_pages_that_may_call(origin, allowed):
    admission = Admission(Keys(), frozenset({"https://app.example"}))
    headers = {b"host": b"localhost:8000", b"origin": origin.encode()}
    if allowed:
        admission.check_site(headers, ME)
    else:
        with pytest.raises(ForbiddenError):
            admission.check_site(headers, ME)


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({}, b"{}", 60.0),
        ({b"x-request-timeout": b"1.5"}, b'{"parameters":{"timeout":7000000}}', 1.5),
        ({}, b'{"parameters":{"timeout":7000000},"inputs":[]}', 7.0),
        ({}, b'{"inputs":[' + b" " * 9000 + b'], "parameters": { "timeout" : 250000 }}', 0.25),
        ({}, b'{"parameters":{"timeout":0}}', 60.0),
        ({}, b'{"parameters":{"timeout":999999999999999}}', 3600.0),
        ({}, b'{"parameters":{"timeout":"1000"}}', 60.0),
        ({}, b'{"inputs":[{"name":"timeout","data":[1000000]}]}', 60.0),
        ({b"x-request-timeout": b"1e9"}, b"", 3600.0),
    ],
)
def test_the_deadline_of_a_request(headers, body, seconds):
    assert timeout_of(headers, body, 0, 60.0) == seconds


def test_a_timeout_in_binary_data_is_no_parameter():
    head = b'{"inputs":[]}'
    assert timeout_of({}, head + b'"timeout":1000000}', len(head), 60.0) == 60.0
    with pytest.raises(MalformedRequestError):
        timeout_of({b"x-request-timeout": b"-1"}, head, 0, 60.0)


HEADERS = st.dictionaries(st.sampled_from([b"host", b"origin", b"authorization", b"via"]), st.binary(max_size=40))


@given(HEADERS, st.sampled_from(["infer", "manage"]))
def test_no_headers_make_it_fail_otherwise(headers, need):
    admission = Admission(Keys({fingerprint(KEY): "tester"}))
    with contextlib.suppress(ForbiddenError):
        admission.check_site(headers, ME)
    with pytest.raises(UnauthenticatedError):
        admission.caller(headers, OTHER_USER, need)


async def _peers(family, address):
    """Both ends' views of one real connection."""
    seen = asyncio.get_running_loop().create_future()

    class Server(asyncio.Protocol):
        def connection_made(self, transport):
            seen.set_result(peer_of(transport, ask_user=True))
            transport.close()

    loop = asyncio.get_running_loop()
    if family == socket.AF_UNIX:
        server = await loop.create_unix_server(Server, address)
        reader = await asyncio.open_unix_connection(address)
    else:
        server = await loop.create_server(Server, address, 0, family=family)
        reader = await asyncio.open_connection(address, server.sockets[0].getsockname()[1])
    peer = await seen
    reader[1].close()
    await reader[1].wait_closed()
    server.close()
    await server.wait_closed()
    return peer


async def test_our_own_sockets_are_known_as_ours(tmp_path):
    assert await _peers(socket.AF_INET, "127.0.0.1") == ME
    assert await _peers(socket.AF_UNIX, str(tmp_path / "s")) == Peer(None, loopback=True, same_user=True)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no IPv6")
async def test_our_own_sockets_are_known_over_ipv6_too():
    assert await _peers(socket.AF_INET6, "::1") == Peer("::1", loopback=True, same_user=True)


async def test_another_users_socket_is_not_ours(monkeypatch):
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 4321)
    peer = await _peers(socket.AF_INET, "127.0.0.1")
    assert peer.loopback
    assert peer.same_user is (uid == 0)  # root's sockets may always


def test_both_lanes_check_the_site_and_the_key(gateway):
    for method, path, body in (("POST", INFER, infer_body()), ("GET", "/v2", None)):
        for headers, status in (
            ({"Host": "evil.example"}, 403),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": f"http://localhost:{gateway.port}", "Host": f"localhost:{gateway.port}"}, 200),
            ({"Authorization": "Bearer tk_wrong"}, 401),
            ({"X-Forwarded-For": "10.0.0.1"}, 401),
            (AUTH | {"X-Forwarded-For": "10.0.0.1"}, 200),
        ):
            answered, _, answer = ask(gateway, method, path, body, headers)
            assert answered == status, (path, headers)
            assert status == 200 or set(answer) == {"error", "code"}


def test_a_key_in_the_url_is_no_key(gateway):
    assert ask(gateway, "GET", f"/tether/v1/models?key={KEY}&authorization=Bearer%20{KEY}")[0] == 401


def test_a_refused_small_request_keeps_its_connection_and_a_large_one_does_not(gateway):
    with Wire(gateway) as wire:
        wire.send(post(extra="Origin: null\r\n"))
        assert wire.answer()[0] == 403
        wire.send(post())
        assert wire.answer()[0] == 200
        wire.send(post(body=bytes(1 << 20), extra="Origin: null\r\n"))
        assert wire.answer()[0] == 403
        assert wire.closed()


def test_a_revoked_key_ends_on_open_connections_too():
    with running() as rig, Wire(rig) as wire:
        request = post(extra=f"Authorization: Bearer {KEY}\r\n")
        wire.send(request)
        assert wire.answer()[0] == 200
        rig.settings.keys.replace({})
        wire.send(request)
        assert wire.answer()[0] == 401


def test_an_allowed_page_may_read_answers_of_both_lanes():
    with running(Settings(allow_origins=frozenset({"https://app.example"}))) as rig:
        origin = {"Origin": "https://app.example"}
        for method, path, body in (("POST", INFER, infer_body()), ("GET", "/v2", None), ("GET", "/nowhere", None)):
            assert ask(rig, method, path, body, origin)[1]["access-control-allow-origin"] == "https://app.example"
        preflight = origin | {"Access-Control-Request-Method": "POST"}
        status, headers, _ = ask(rig, "OPTIONS", INFER, headers=preflight)
        assert (status, headers["access-control-allow-methods"]) == (204, "GET, POST, PUT, DELETE")
        assert ask(rig, "OPTIONS", INFER, headers=preflight | {"Origin": "https://evil.example"})[0] == 403
