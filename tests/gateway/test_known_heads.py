"""A head that a connection has sent before is not parsed again: nobody can tell, except by the time it takes."""

import json
import socket
from time import sleep

import pytest
from gateway_rig import KEY, Wire, infer_body, post, running, until

from tether.config import Limits
from tether.gateway.admission import fingerprint
from tether.gateway.door import Settings
from tether.gateway.known_heads import candidate
from tether.gateway.protocol import FastProtocol
from tether.ports import HopReply


@pytest.fixture
def wire(gateway):
    with Wire(gateway) as wire:
        yield wire


@pytest.fixture
def parsed(monkeypatch):
    """What the parser was given, one by one."""
    seen, parse = [], FastProtocol._parse
    monkeypatch.setattr(FastProtocol, "_parse", lambda self, data: seen.append(data) or parse(self, data))
    return seen


def numbered(number):
    """Requests of equal length, so that their heads are equal."""
    return post(body=infer_body(id=f"{number:06}"))


def ids(wire, count):
    return [json.loads(wire.answer()[2])["id"] for _ in range(count)]


def test_the_parser_sees_a_head_once_however_what_follows_is_cut(wire, parsed):
    wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire.send(numbered(0))
    assert ids(wire, 1) == ["000000"]
    wire.send(numbered(1) + numbered(2) + numbered(3))
    assert ids(wire, 3) == ["000001", "000002", "000003"]
    for cut in (len(numbered(4)) - 1, numbered(4).index(b"\r\n\r\n") + 4, numbered(4).index(b"\r\n\r\n") + 9):
        wire.send(numbered(4)[:cut])
        sleep(0.02)  # so that it arrives by itself
        wire.send(numbered(4)[cut:] + numbered(5))
        assert ids(wire, 2) == ["000004", "000005"]
    assert parsed == [numbered(0)]


def test_a_head_that_comes_by_itself_is_known_too(wire, parsed):
    head, _, body = numbered(0).partition(b"\r\n\r\n")
    for number in range(3):
        wire.send(head + b"\r\n\r\n")
        sleep(0.02)
        wire.send(body)
        assert wire.answer()[0] == 200, number
    assert parsed == [head + b"\r\n\r\n", body]


def test_another_head_is_parsed_and_the_known_one_stays_known(wire, parsed):
    for _ in range(2):
        wire.send(numbered(0) + b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert [wire.answer()[0] for _ in range(2)] == [200, 200]
    wire.send(numbered(0)[:40])
    sleep(0.02)
    wire.send(numbered(0)[40:])  # cut in the head: the parser's
    assert wire.answer()[0] == 200
    wire.send(post(body=infer_body(rows=2)))
    assert len(json.loads(wire.answer()[2])["outputs"][0]["data"]) == 8
    assert all(not data.startswith(b"POST") or data != numbered(0) for data in parsed[1:])


@pytest.mark.parametrize(
    "extra",
    ["Transfer-Encoding: chunked\r\n", "Expect: 100-continue\r\n", "Connection: close\r\n", "Upgrade: h2c\r\nConnection: Upgrade\r\n"],
)
def test_heads_that_say_more_than_a_length_are_never_known(extra):
    names = dict(line.lower().split(": ") for line in extra.split("\r\n") if line)
    sent = {name.encode(): value.encode() for name, value in names.items()} | {b"content-length": b"5"}
    found = candidate(sent, b"/", ("m", None), None, 0)
    assert found is None or "transfer-encoding" not in names
    with running() as rig, Wire(rig) as wire:
        body = infer_body()
        if "chunked" in extra:
            request = (
                post(extra=extra)
                .replace(b"Content-Length: %d\r\n" % len(body), b"")
                .replace(body, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            )
        else:
            request = post(extra=extra)
        for _ in range(1 if "close" in extra else 3):
            wire.send(request)
            if "Expect" in extra:
                assert wire.head()[0] == 100
            assert wire.answer()[0] == 200


@pytest.mark.parametrize(
    ("data", "body_nbytes"),
    [
        (b"\r\n\r\nPOST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}", 2),
        (b"POST / HTTP/1.1\nhost: x\ncontent-length: 6\n\n{\r\n\r\n}", 6),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}GET", 2),
        (b"POST / HTTP/1.1\r\nhost: x\r\n", 0),
    ],
)
def test_a_head_is_known_only_where_the_parser_saw_it_end(data, body_nbytes):
    known = candidate({b"content-length": b"2"}, b"/", ("m", None), None, 0)
    assert known.found_in(data, body_nbytes) is None
    assert known.found_in(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{", 1).head.endswith(b"2\r\n\r\n")


def test_a_key_that_is_taken_away_admits_no_known_head():
    with running() as rig, Wire(rig) as wire:
        request = post(extra=f"Authorization: Bearer {KEY}\r\n")
        for _ in range(2):
            wire.send(request)
            assert wire.answer()[0] == 200
        rig.settings.keys.replace({fingerprint("tk_" + "n" * 43): "another"})
        wire.send(request)
        assert wire.answer()[0] == 401


def test_a_known_head_whose_body_does_not_come_is_answered_so_and_a_client_that_leaves_is_noticed():
    with running(Settings(limits=Limits(body_nbytes=100_000), patience=0.4, drain=1)) as rig:
        with Wire(rig) as wire:
            wire.send(numbered(0))
            assert wire.answer()[0] == 200
            wire.send(numbered(1)[:-5])
            assert wire.answer()[0] == 408
            assert wire.closed()
        with Wire(rig) as wire:
            held = post("/v2/models/held/infer")
            wire.send(held)
            until(lambda: rig.dispatcher.held)
            rig.call(rig.dispatcher.held.pop()[1], HopReply(200, b"{}"))
            assert wire.answer()[0] == 200
            wire.send(held)
            until(lambda: rig.dispatcher.held)
        until(lambda: len(rig.dispatcher.cancelled) == 1)
