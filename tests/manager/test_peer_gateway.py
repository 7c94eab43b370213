"""Inferences of peers at a gateway of the lab, over real HTTP: passed on as they come, refused and broken off in the middle."""

import asyncio
import contextlib

import pytest
from aiohttp import web

from tether.errors import DeadlineExceededError, PayloadTooLargeError, ServiceUnavailableError, UnauthenticatedError
from tether.manager.peering.gateway import Gateway
from tether.swarm.rpc.rpc import Incoming
from tether.wire.faults import encode_error

MIB = 1 << 20
PATIENCE = 20.0
KEY = "tk_test"


class Door:
    """A gateway that does as it is told."""

    def __init__(self):
        self.heads, self.came, self.ended = [], 0, 0
        self.go_on = asyncio.Event()

    async def infer(self, request):
        self.heads.append(dict(request.headers))
        match request.match_info["model"]:
            case "refuses":
                await request.content.read(MIB)
                return refusal(PayloadTooLargeError("too much"))
            case "sleeps":
                await self.go_on.wait()
            case "hesitates":
                return await in_two(request, encode_error(PayloadTooLargeError("too much")))
        try:
            async for chunk in request.content.iter_any():
                self.came += len(chunk)
        finally:
            self.ended += 1
        nbytes = int(request.match_info.get("version") or 10)
        answer = web.StreamResponse(headers={"Content-Length": str(nbytes), "Inference-Header-Content-Length": "3"})
        await answer.prepare(request)
        for at in range(0, nbytes, MIB):
            if request.match_info["model"] == "breaks" and at:
                request.transport.abort()
                break
            await answer.write(bytes(min(MIB, nbytes - at)))
        return answer

    async def events(self, request):
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return refusal(UnauthenticatedError("a key is needed"))
        return web.json_response({"events": [], "seq": int(request.query.get("after", 7)), "wait": request.query["wait"]})


def refusal(error):
    return web.Response(status=error.http_status, body=encode_error(error), content_type="application/json")


async def in_two(request, body):
    answer = web.StreamResponse(status=413, headers={"Content-Length": str(len(body))})
    await answer.prepare(request)
    for part in (body[:5], body[5:]):
        await answer.write(part)
        await asyncio.sleep(0.05)
    return answer


@contextlib.asynccontextmanager
async def served(door, key=KEY):
    app = web.Application()
    for path in ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"):
        app.router.add_post(path, door.infer)
    app.router.add_get("/tether/v1/events", door.events)
    runner = web.AppRunner(app, shutdown_timeout=0.1, lingering_time=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    gateway = Gateway(f"http://127.0.0.1:{runner.addresses[0][1]}", key)
    try:
        yield gateway
    finally:
        await gateway.aclose()
        await runner.cleanup()


@pytest.fixture
async def door():
    return Door()


class Upload:
    """A body that comes in pieces, as fast as it is taken."""

    def __init__(self, nbytes, until=None):
        self.sent, self.most = 0, nbytes if until is None else until
        self.body = Incoming(nbytes, self.grant)
        self.body.open()

    def grant(self, nbytes):
        asyncio.get_running_loop().call_soon(self.send, nbytes)

    def send(self, nbytes):
        end = min(self.sent + nbytes, self.most)
        while self.sent < end:
            piece = bytes(min(1 << 17, end - self.sent))
            self.sent += len(piece)
            self.body.feed(memoryview(piece))


async def test_a_large_body_is_passed_on_with_its_size_and_the_answer_too(door):
    async with served(door) as gateway, gateway.infer(("digits", "5000000"), b'{"a": 1}', Upload(20 * MIB).body, PATIENCE) as answer:
        assert (answer.nbytes, answer.header_nbytes) == (5_000_000, 3)
        assert sum([len(chunk) async for chunk in answer.chunks]) == 5_000_000
    (head,) = door.heads
    assert (head["Content-Length"], head["Inference-Header-Content-Length"]) == (str(20 * MIB + 8), "8")
    assert "Transfer-Encoding" not in head
    assert 0 < float(head["X-Request-Timeout"]) <= PATIENCE
    assert door.came == 20 * MIB + 8


async def test_a_small_one_goes_at_once(door):
    async with served(door) as gateway, gateway.infer(("digits", ""), b"{}", Incoming.whole(b"xyz"), None) as answer:
        assert b"".join([chunk async for chunk in answer.chunks]) == bytes(10)
    assert door.came == 5
    assert "X-Request-Timeout" not in door.heads[0]


async def test_a_refusal_comes_before_the_body_is_through(door):
    upload = Upload(40 * MIB, until=12 * MIB)
    async with served(door) as gateway:
        with pytest.raises(PayloadTooLargeError, match="too much"):
            async with asyncio.timeout(PATIENCE), gateway.infer(("refuses", ""), b"{}", upload.body, None):
                pass
    assert upload.sent <= 12 * MIB


async def test_a_refusal_that_comes_in_parts_is_the_same(door):
    async with served(door) as gateway:
        with pytest.raises(PayloadTooLargeError, match=r"^too much$"):
            async with gateway.infer(("hesitates", ""), b"{}", Incoming.whole(b""), PATIENCE):
                pass


async def test_an_answer_that_breaks_off_is_said(door):
    async with served(door) as gateway:
        with pytest.raises(ServiceUnavailableError, match="does not answer"):  # noqa: PT012 (it begins, and then breaks off)
            async with gateway.infer(("breaks", str(10 * MIB)), b"{}", Incoming.whole(b""), None) as answer:
                async for _ in answer.chunks:
                    pass


async def test_a_deadline_while_the_body_comes_ends_the_request(door):
    upload = Upload(40 * MIB, until=3 * MIB)
    async with served(door) as gateway:
        with pytest.raises(DeadlineExceededError, match=r"within 0\.3 s"):
            async with gateway.infer(("digits", ""), b"{}", upload.body, 0.3):
                pass
        async with asyncio.timeout(PATIENCE):
            while not door.ended:  # noqa: ASYNC110 (nothing says when the server has seen it)
                await asyncio.sleep(0.01)


async def test_a_deadline_while_nothing_is_answered(door):
    async with served(door) as gateway:
        with pytest.raises(DeadlineExceededError):
            async with gateway.infer(("sleeps", ""), b"{}", Incoming.whole(b""), 0.2):
                pass
        door.go_on.set()


async def test_events_are_asked_for_with_the_labs_key(door):
    async with served(door) as gateway:
        assert await gateway.events(None, 0.0) == {"events": [], "seq": 7, "wait": "0"}
        assert await gateway.events(1732376543123456, 2.5) == {"events": [], "seq": 1732376543123456, "wait": "2.5"}
    async with served(door, key=None) as gateway:
        with pytest.raises(UnauthenticatedError):
            await gateway.events(None, 0.0)
    with pytest.raises(ServiceUnavailableError, match="without a gateway"):
        await Gateway(None).events(None, 0.0)
