import asyncio
import socket

import numpy as np
import pytest
from fake_gateway import KEY, rows

from tether.client.http import HttpClient
from tether.errors import (
    BadInputError,
    DeadlineExceededError,
    DigestMismatchError,
    MissingBlobsError,
    NotFoundError,
    RemoteError,
    ServiceUnavailableError,
    TetherError,
    UnauthenticatedError,
    UnknownModelError,
    UnsupportedError,
)

DRAFT = {"framework": None, "entry": "m", "files": [{"path": "m", "nbytes": 1, "segments": [["0" * 64, 0, 1]]}], "aliases": [], "tags": {}}
EMPTY = DRAFT | {"files": []}


async def published(client, name="digits"):
    return await client.publish(name, EMPTY)


async def test_an_inference_goes_and_comes_in_binary(client):
    await published(client)
    answer = await client.infer("digits", {"x": rows()})
    np.testing.assert_array_equal(answer.outputs["y"], rows())
    assert (answer.model, answer.version) == ("digits", 1)


async def test_an_inference_names_its_version_or_alias_in_the_url(client, gateway):
    await published(client)
    await client.set_alias("digits", "prod", 1)
    await client.infer("digits@prod", {"x": rows()})
    await client.infer("digits", {"x": rows()}, version=1)
    assert gateway.calls[-2:] == ["POST /v2/models/digits@prod/infer", "POST /v2/models/digits/versions/1/infer"]


async def test_an_error_of_the_gateway_is_the_same_error_here(client):
    with pytest.raises(UnknownModelError, match="'nope' is not found"):
        await client.infer("nope", {"x": rows()})
    await published(client)
    with pytest.raises(BadInputError, match="expects"):
        await client.infer("digits", {"z": rows()})


async def test_a_model_name_can_not_lead_to_another_path(client):
    with pytest.raises(NotFoundError):
        await client.metadata("../../tether/v1/models")


async def test_missing_blobs_are_listed(client):
    with pytest.raises(MissingBlobsError) as caught:
        await client.publish("digits", DRAFT)
    assert caught.value.args[1] == ["0" * 64]


async def test_a_blob_under_a_wrong_digest_is_refused(client):
    with pytest.raises(DigestMismatchError):
        await client.put_blob("0" * 64, b"something")


async def test_without_a_key_management_is_refused_and_the_key_never_shown(gateway):
    async with HttpClient(gateway.url) as client:
        with pytest.raises(UnauthenticatedError):
            await client.models()
    assert KEY not in repr(HttpClient(gateway.url, KEY))


@pytest.fixture
def brief_pauses(monkeypatch):
    monkeypatch.setattr("tether.client.http._PAUSES", (0.0, 0.0))


@pytest.mark.usefixtures("brief_pauses")
async def test_where_nothing_listens_the_error_says_how_to_start_a_lab():
    with socket.socket() as taken:  # bound, so that nobody else comes to listen there meanwhile
        taken.bind(("127.0.0.1", 0))
        async with HttpClient(f"http://127.0.0.1:{taken.getsockname()[1]}") as client:
            with pytest.raises(ServiceUnavailableError, match="tether up"):
                await client.status()


@pytest.mark.usefixtures("brief_pauses")
async def test_a_read_is_repeated_when_the_connection_breaks(client, gateway):
    gateway.drop = 2
    assert await client.models() == []


@pytest.mark.usefixtures("brief_pauses")
async def test_an_inference_that_may_have_run_is_not_repeated(client, gateway):
    await published(client)
    gateway.drop = 1
    with pytest.raises(ServiceUnavailableError, match="was lost"):
        await client.infer("digits", {"x": rows()})
    assert sum("infer" in call for call in gateway.calls) == 1


@pytest.mark.usefixtures("brief_pauses")
async def test_a_rollback_is_not_repeated(client, gateway):
    await published(client)
    gateway.drop = 1
    with pytest.raises(ServiceUnavailableError):
        await client.rollback("digits")
    assert sum("rollback" in call for call in gateway.calls) == 1


async def test_a_late_answer_is_a_deadline_error(client, gateway):
    await published(client)
    gateway.delay = 5
    with pytest.raises(DeadlineExceededError, match=r"within 0\.3 s"):
        await client.infer("digits", {"x": rows()}, timeout=0.05)
    gateway.delay = 0


async def test_cancelling_a_call_passes_through(client, gateway):
    gateway.delay = 5
    call = asyncio.create_task(client.models())
    await asyncio.to_thread(gateway.called.wait, 10)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gateway.delay = 0


@pytest.mark.parametrize("url", ["tether://abc", "127.0.0.1:8000", "http://", "ftp://host"])
async def test_only_http_addresses_are_taken(url):
    with pytest.raises(UnsupportedError, match="http://host:port"):
        HttpClient(url)


async def answering(raw: bytes):
    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(handle, "127.0.0.1", 0)


def http(status: str, body: bytes, *headers: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers])
    return head.encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (http("200 OK", b"<html>"), RemoteError),
        (http("200 OK", b"[1]"), RemoteError),
        (http("200 OK", b'{"models": 3}'), RemoteError),
        (http("502 Bad Gateway", b"<html>"), RemoteError),
        (http("404 Not Found", b"<html>"), NotFoundError),
        (http("302 Found", b"", "Location: http://elsewhere/"), RemoteError),
        (http("200 OK", b"{}", "Inference-Header-Content-Length: -1"), RemoteError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", ServiceUnavailableError),
    ],
)
@pytest.mark.usefixtures("brief_pauses")
async def test_what_is_no_answer_of_a_gateway_is_an_error_of_ours(raw, error):
    server = await answering(raw)
    port = server.sockets[0].getsockname()[1]
    async with server, HttpClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(error):
            await client.models()


async def full_twice(seconds):
    """Of a gateway that has no room twice: what the client is told in the end, and the deadlines that it sent."""
    refusal = http("503 Service Unavailable", b'{"error": "full", "code": "queue_full"}', "Retry-After: 1")
    answers, told = [refusal, refusal, http("422 Unprocessable Entity", b'{"error": "it ran", "code": "model_failed"}')], []

    async def handle(reader, writer):
        told.append(float((await reader.readuntil(b"\r\n\r\n")).decode().lower().partition("x-request-timeout: ")[2].partition("\r")[0]))
        writer.write(answers[len(told) - 1])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server, HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(TetherError) as caught:
            await client.infer("m", {"x": rows()}, timeout=seconds)
    return caught.value.code, told


async def test_an_inference_for_which_there_is_no_room_comes_again_while_its_time_allows(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda *_: 0.05)
    code, told = await full_twice(30.0)
    assert (code, len(told)) == ("model_failed", 3)
    assert told[0] == 30.0 > told[1] > told[2] > 0


async def test_one_without_the_time_for_that_is_told_at_once():
    code, told = await full_twice(1.0)
    assert (code, told) == ("queue_full", [1.0])


async def test_an_answer_over_its_limit_is_not_read(gateway, client):
    gateway.blobs["a" * 64] = bytes((4 << 20) + 1)
    with pytest.raises(RemoteError, match="over 4194304 bytes"):
        await client.get_blob("a" * 64)


async def test_the_rest_of_management_arrives(client, gateway):
    await published(client)
    assert (await client.manifest("digits", 1))["version"] == 1
    await client.set_alias("digits", "blue", 1)
    await client.delete_alias("digits", "blue")
    assert "blue" not in (await client.model("digits"))["aliases"]
    await client.trust("ab" * 32, ["code"])
    assert gateway.trusted == {"ab" * 32: ["code"]}
    await client.delete_version("digits", 1)
    assert (await client.model("digits"))["versions"] == []
    assert [worker["id"] for worker in await client.workers()] == ["worker-1"]
