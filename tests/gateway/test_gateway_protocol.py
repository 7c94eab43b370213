"""HTTP at its edges, on raw sockets: order, sizes, stalls, endings. The gateway answers rightly or refuses cleanly, and goes on serving."""

import errno
import json
import socket
import struct
import threading
import zlib
from time import monotonic, sleep

import httptools
import pytest
import uvicorn
from gateway_rig import KEY, Wire, ask, infer_body, post, running, until
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tether.config import Limits
from tether.gateway.door import Settings
from tether.gateway.protocol import UVICORN_USES
from tether.ports import HopReply

GET = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def wire(gateway):
    with Wire(gateway) as wire:
        yield wire


@pytest.fixture(scope="module")
def strict():
    """A gateway with little patience and small limits."""
    with running(Settings(limits=Limits(body_nbytes=100_000), patience=0.4, keep_alive=0.6, drain=1)) as rig:
        yield rig


def error_of(answer):
    status, headers, body = answer
    assert headers["content-type"] == "application/json"
    assert "x-request-id" in headers
    return status, json.loads(body)["code"]


def test_the_attributes_of_uvicorn_that_we_use_are_there():
    assert uvicorn.__version__.startswith("0.54.")
    protocol = HttpToolsProtocol(uvicorn.Config(app=None, lifespan="off", ws="none"), ServerState(), {}, None)
    assert not UVICORN_USES - set(dir(protocol))
    for name in ("feed_data", "get_method", "get_http_version", "should_keep_alive"):
        assert hasattr(httptools.HttpRequestParser, name)


@pytest.fixture(autouse=True, scope="module")
def _event_loop_for_uvicorn():
    """HttpToolsProtocol asks for the current loop when it is made outside of one."""
    import asyncio

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


def test_one_connection_carries_both_lanes_in_turn(wire):
    for _ in range(3):
        wire.send(post())
        assert wire.answer()[0] == 200
        wire.send(GET)
        assert wire.answer()[0] == 200


def test_pipelined_requests_are_answered_in_order_across_lanes(wire):
    wire.send(b"".join(post(body=infer_body(id=str(i))) + GET for i in range(50)))
    for i in range(50):
        assert json.loads(wire.answer()[2])["id"] == str(i)
        assert json.loads(wire.answer()[2]) == {"live": True}


def test_a_slow_request_holds_back_the_ones_behind_it(gateway, wire):
    wire.send(post("/v2/models/held/infer", extra="x-request-id: first\r\n") + GET + post(extra="x-request-id: third\r\n"))
    until(lambda: gateway.dispatcher.held)
    assert ask(gateway, "GET", "/v2")[0] == 200  # others are not held back
    _hop, done = gateway.dispatcher.held.pop()
    gateway.call(done, HopReply(200, b'{"outputs":[]}'))
    assert wire.answer()[1]["x-request-id"] == "first"
    assert json.loads(wire.answer()[2]) == {"live": True}
    assert wire.answer()[1]["x-request-id"] == "third"


def test_ten_thousand_pipelined_requests(wire):
    sender = threading.Thread(target=wire.send, args=(post() * 10_000,))
    sender.start()
    for _ in range(10_000):
        assert wire.answer()[0] == 200
    sender.join()


def test_a_refusal_comes_in_its_turn(gateway, wire):
    wire.send(post("/v2/models/held/infer") + b"BROKEN\r\n\r\n")
    until(lambda: gateway.dispatcher.held)
    gateway.call(gateway.dispatcher.held.pop()[1], HopReply(200, b"{}"))
    assert wire.answer()[0] == 200
    assert error_of(wire.answer()) == (400, "malformed_request")
    assert wire.closed()


def test_a_request_in_single_bytes(wire):
    wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in post():
        wire.send(bytes((byte,)))
    assert wire.answer()[0] == 200


def test_chunked_bodies_of_any_cut(wire):
    body = infer_body()
    for size in (1, 7, len(body)):
        pieces = [body[i : i + size] for i in range(0, len(body), size)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        wire.send(b"POST /v2/models/ident/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        assert wire.answer()[0] == 200


def test_many_tiny_chunks_are_one_body(gateway, wire):
    text = infer_body()
    padded = text[:-1] + b" " * 20_000 + b"}"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in padded) + b"0\r\n\r\n"
    wire.send(b"POST /v2/models/ident/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert wire.answer()[0] == 200
    assert gateway.dispatcher.hops[-1].body == padded


def test_expect_continue_is_answered_before_the_body(wire):
    request = post(extra="Expect: 100-continue\r\n")
    head, _, body = request.partition(b"\r\n\r\n")
    wire.send(head + b"\r\n\r\n")
    assert wire.head()[0] == 100
    wire.send(body)
    assert wire.answer()[0] == 200


def test_expect_continue_on_the_normal_way(wire):
    body = b'{"model":"ident","inputs":{"x":[[1,2,3,4]]}}'
    wire.send(b"POST /inference HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
    assert wire.head()[0] == 100
    wire.send(body)
    assert wire.answer()[0] == 200


def test_expect_continue_of_a_body_over_the_limit_is_refused_before_it(strict):
    with Wire(strict) as wire:
        wire.send(b"POST /v2/models/ident/infer HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 100001\r\n\r\n")
        assert error_of(wire.answer()) == (413, "payload_too_large")
        assert wire.closed()


@pytest.mark.parametrize("path", ["/v2/models/ident/infer", "/inference"])
def test_content_length_over_the_limit_is_refused_at_once_and_the_answer_arrives(strict, path):
    with Wire(strict) as wire:
        wire.send(post(path, bytes(3_000_000)))  # all of it is sent: the answer must survive that
        status, headers, body = wire.answer()
        assert error_of((status, headers, body)) == (413, "payload_too_large")
        assert headers["connection"] == "close"


@pytest.mark.parametrize("path", ["/v2/models/ident/infer", "/inference"])
def test_a_chunked_body_that_grows_over_the_limit_is_refused(strict, path):
    with Wire(strict) as wire:
        wire.send(b"POST %b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % path.encode())
        for _ in range(11):
            wire.send(b"2710\r\n" + bytes(10_000) + b"\r\n")
        assert error_of(wire.answer()) == (413, "payload_too_large")
        assert wire.closed()
    assert ask(strict, "GET", "/v2")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [b"X-A: " + b"a" * 17_000 + b"\r\n", b"".join(b"X-%d: 1\r\n" % i for i in range(120)), b"X-A: " + b"a" * 1_000_000],
    ids=["17 KB", "120 lines", "1 MB without end"],
)
@pytest.mark.parametrize("line", [b"POST /v2/models/ident/infer HTTP/1.1\r\n", b"GET /v2 HTTP/1.1\r\n"])
def test_headers_over_the_limit_are_refused(wire, line, headers):
    wire.send(line + b"Host: localhost\r\n" + headers + b"\r\n")
    assert error_of(wire.answer()) == (431, "headers_too_large")
    assert wire.closed()


def test_a_url_of_64_kilobytes_is_too_large(wire):
    wire.send(b"GET /" + b"a" * 65_536 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert error_of(wire.answer()) == (431, "headers_too_large")


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "length negative": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    "length with plus": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n",
    "length of 2^64": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551616\r\n\r\n",
    "length list": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n",
    "length twice": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
    "length and chunked": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "another transfer encoding": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "chunked not last": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
    "chunk size in C": post(body=b"0x4\r\nabcd\r\n0\r\n\r\n").replace(b"Content-Length: 16", b"Transfer-Encoding: chunked"),
    "bare line feeds": b"GET /v2 HTTP/1.1\nHost: localhost\n\n",
    "folded header": b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\n 2\r\n\r\n",
    "NUL in a header": b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX-A: 1\x002\r\n\r\n",
    "host twice": b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "host missing": b"GET /v2 HTTP/1.1\r\n\r\n",
    "key twice": post(extra=f"Authorization: Bearer {KEY}\r\nAuthorization: Bearer x\r\n"),
    "URL that is none": b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_http_is_refused_in_json_and_the_connection_closed(wire, case):
    wire.send(MALFORMED[case])
    assert error_of(wire.answer()) == (400, "malformed_request")
    assert wire.closed()


def test_connection_close_and_http_1_0(gateway):
    for request in (post(extra="Connection: close\r\n"), post(version="1.0"), post(version="1.0", extra="Connection: keep-alive\r\n")):
        with Wire(gateway) as wire:
            wire.send(request)
            status, headers, _body = wire.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert wire.closed()


@pytest.mark.parametrize("path", ["/v2/models/ident/infer", "/inference"])
def test_an_upgrade_is_ignored_and_the_request_answered(wire, path):
    """As Java's HttpClient sends it with every request."""
    asks = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    body = infer_body() if path.endswith("infer") else b'{"model":"ident","inputs":{"x":[[1,2,3,4]]}}'
    wire.send((post(path, body, asks) + GET) * 2)
    for _ in range(2):
        assert wire.answer()[0] == 200
        assert json.loads(wire.answer()[2]) == {"live": True}
    for byte in post(path, body, asks):
        wire.send(bytes((byte,)))
    assert wire.answer()[0] == 200
    wire.send(GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n") + GET)
    for _ in range(2):
        assert json.loads(wire.answer()[2]) == {"live": True}


def test_the_absolute_form_of_a_url_is_understood(gateway, wire):
    wire.send(post(f"http://localhost:{gateway.port}/v2/models/ident/infer"))
    assert wire.answer()[0] == 200


def test_a_query_after_infer_is_ignored(wire):
    wire.send(post("/v2/models/ident/infer?trace=1"))
    assert wire.answer()[0] == 200


@pytest.mark.parametrize("path", ["/v2/models/held/infer", "/v2/models/held/infer#slow"])
def test_a_client_that_goes_away_cancels_its_request(gateway, path):
    before = len(gateway.dispatcher.cancelled)
    with Wire(gateway) as wire:
        if path.endswith("slow"):  # a compressed one takes the normal way
            wire.send(post("/v2/models/held/infer", zlib.compress(infer_body()), "Content-Encoding: deflate\r\n"))
        else:
            wire.send(post(path))
        until(lambda: gateway.dispatcher.held)
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    until(lambda: len(gateway.dispatcher.cancelled) == before + 1)
    gateway.dispatcher.held.pop()


def test_a_client_that_goes_away_in_its_body_leaves_nothing(gateway):
    with Wire(gateway) as wire:
        wire.send(post()[:-10])
    assert ask(gateway, "GET", "/v2")[0] == 200


def test_a_client_that_does_not_read_holds_back_only_itself(gateway, wire):
    before = len(gateway.dispatcher.hops)
    wire.send(post("/v2/models/big/infer") * 5)
    until(lambda: len(gateway.dispatcher.hops) > before)
    assert ask(gateway, "POST", "/v2/models/ident/infer", infer_body())[0] == 200
    assert len(gateway.dispatcher.hops) == before + 2  # the four behind wait until it has read
    for _ in range(5):
        assert len(wire.answer()[2]) == (8 << 20) + 3


@pytest.mark.parametrize(
    "start", [b"POST /v2/mod", post()[:-10], GET[:-4], b"PUT /tether/v1/blobs/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1"]
)
def test_a_request_that_stops_coming_is_timed_out(strict, start):
    with Wire(strict) as wire:
        wire.send(start)
        status, code = error_of(wire.answer())
        if not start.startswith(b"PUT"):
            assert (status, code) == (408, "request_timeout")
        else:
            assert status in {401, 408}  # refused by the endpoint, or before it
        assert wire.closed()


def test_a_body_in_drops_is_timed_out_though_it_never_stops(strict):
    with Wire(strict) as wire:
        wire.socket.settimeout(0.02)
        wire.send(b"POST /v2/models/ident/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\n")
        for _ in range(300):
            wire.send(b"x")
            try:
                assert wire.answer()[0] == 408
                return
            except TimeoutError:
                continue
        pytest.fail("drops went on for 6 s")


def test_a_reader_that_stops_is_cut_off(strict):
    with Wire(strict) as wire:
        wire.send(post("/v2/models/big/infer") * 2)
        until(lambda: wire.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET)


def test_a_slow_reader_is_not(strict):
    with Wire(strict) as wire:
        wire.send(post("/v2/models/big/infer"))
        deadline = monotonic() + 1.5  # several times its patience
        while monotonic() < deadline:
            wire.socket.recv(1 << 16)
            sleep(0.02)
        assert len(wire.socket.recv(1 << 16)) > 0


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(strict):
    with Wire(strict) as idle, Wire(strict) as busy:
        busy.send(post("/v2/models/held/infer"))
        until(lambda: strict.dispatcher.held)
        assert idle.closed()
        strict.call(strict.dispatcher.held.pop()[1], HopReply(200, b"{}"))
        assert busy.answer()[0] == 200


@pytest.mark.parametrize("path", ["/v2/models/held/infer", "http://127.0.0.1/v2/models/held/infer"])
def test_answers_carry_a_date_and_failures_a_retry_after(gateway, wire, path):
    wire.send(post(path))
    until(lambda: gateway.dispatcher.held)
    gateway.call(gateway.dispatcher.held.pop()[1], HopReply(503, b'{"error":"full","code":"queue_full"}', retry_after=9))
    status, headers, _body = wire.answer()
    assert (status, headers["retry-after"]) == (503, "9")
    assert "gmt" in headers["date"]


def test_the_end_lets_open_requests_finish_and_closes_idle_connections():
    with running() as rig, Wire(rig) as open_one, Wire(rig) as idle:
        idle.send(GET)
        idle.answer()
        open_one.send(post("/v2/models/held/infer"))
        until(lambda: rig.dispatcher.held)
        rig.call(rig.stop.set)
        assert idle.closed()
        assert rig.thread.is_alive()
        rig.call(rig.dispatcher.held.pop()[1], HopReply(200, b"{}"))
        assert open_one.answer()[0] == 200
        assert open_one.closed()
        rig.thread.join(30)
        assert not rig.thread.is_alive()


def test_the_end_does_not_wait_for_ever():
    with running(Settings(drain=1)) as rig, Wire(rig) as wire:
        wire.send(post("/v2/models/held/infer"))
        until(lambda: rig.dispatcher.held)
        rig.call(rig.stop.set)
        rig.thread.join(30)
        assert not rig.thread.is_alive()
        with pytest.raises((EOFError, ConnectionError)):
            wire.answer()
