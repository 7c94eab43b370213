"""@hyperswarm/rpc of npm, in Node, calls us and is called, errors included. Over TCP in place of a secure stream."""

import asyncio
import json
from contextlib import asynccontextmanager

import framed_streams
import node_packages
import pytest

from tether.errors import (
    DeadlineExceededError,
    ForbiddenError,
    PayloadTooLargeError,
    PeerFailedError,
    ServiceUnavailableError,
    UnknownMethodError,
    UnknownModelError,
)
from tether.swarm.rpc.rpc import RpcConnection, RpcLimits, Service
from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("node"), needs("npm")]
PATIENCE = 30.0


@pytest.fixture(scope="module")
def programs():
    return node_packages.node_folder()


@asynccontextmanager
async def node(programs, *arguments):
    process = await asyncio.create_subprocess_exec(
        "node", "rpc_peer.js", *arguments, cwd=programs, stdout=asyncio.subprocess.PIPE, limit=1 << 24
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()


@pytest.fixture
async def server(programs):
    """A connection to a Node program that answers."""
    async with node(programs, "serve") as process, asyncio.timeout(PATIENCE):
        port = int(await process.stdout.readline())
        service = Service(lambda _peer, _method: None)
        service.respond("echo", lambda _, value: b"python says " + value)
        connection = RpcConnection(await framed_streams.connect(port), framed_streams.INITIATOR, service)
        yield connection
        await connection.aclose()


async def test_node_answers(server):
    assert await server.request("echo", b"x") == b"x"
    assert await server.request("nothing", b"x") == b""
    assert await server.request("late", b"x", timeout=10) == b"x"
    assert await asyncio.gather(*(server.request("echo", b"%d" % i) for i in range(300))) == [b"%d" % i for i in range(300)]


async def test_large_values_go_whole_to_a_peer_that_takes_no_pieces(server):
    value = bytes(range(256)) * (12 << 12)
    assert await server.request("echo", value) == value
    assert await server.request("large", b"16000000") == b"\x07" * 16_000_000
    with pytest.raises(PayloadTooLargeError):
        await server.request("echo", bytes(17 << 20))
    assert await server.request("echo", b"still there") == b"still there"


async def test_errors_of_node_are_ours_by_their_code_and_else_name_the_peer(server):
    with pytest.raises(UnknownMethodError, match="Unknown method 'nowhere'"):
        await server.request("nowhere")
    with pytest.raises(UnknownModelError) as told:
        await server.request("coded")
    assert told.value.args == ("no model of this name", "digits")
    with pytest.raises(PeerFailedError, match=r"22222222….*it broke") as failed:
        await server.request("boom")
    assert failed.value.args[1] == "REQUEST_ERROR"
    with pytest.raises(PeerFailedError, match="strange") as failed:
        await server.request("strange")
    assert failed.value.args[1] == "ESTRANGE"


async def test_events_reach_node_and_a_late_answer_is_not_waited_for(server):
    await server.event("say", b"one")
    await server.event("say", b"two")
    assert await server.request("said") == b"one,two"
    with pytest.raises(DeadlineExceededError):
        await server.request("late", b"x", timeout=0.001)
    assert await server.request("late", b"y") == b"y"
    assert server.in_flight == 0


async def test_node_calls_back_on_the_same_connection(server):
    assert await server.request("callback", b"hello") == b"python says hello"


async def test_closing_ends_it_on_both_sides(server):
    await server.aclose()
    with pytest.raises(ServiceUnavailableError):
        await server.request("echo")


class Answering:
    """What the Node program calls."""

    def __init__(self):
        self.said, self.connections, self.cancelled = [], [], 0
        self.service = service = Service(self.authorise)
        service.respond("echo", lambda _, value: value)
        service.respond("slow", self.slow)
        service.respond("say", self.say)
        service.respond("said", lambda *_: ",".join(self.said).encode())
        service.respond("broken", lambda *_: 1 / 0)
        service.respond("error", self.error)
        service.respond("enormous", lambda *_: bytes(5 << 20))
        service.respond("never", self.never)
        service.respond("call me", self.call)

    def authorise(self, _peer, method):
        if method == "secret":
            raise ForbiddenError("ask for an invitation")

    async def slow(self, _, value):
        await asyncio.sleep(0)
        return value * 2

    def say(self, _, value):
        self.said.append(value.decode())
        return b""

    def error(self, *_):
        raise UnknownModelError("no model digits here: publish it", "digits")

    async def never(self, *_):
        await asyncio.Event().wait()

    async def call(self, _, value):
        return await self.connections[0].request("greet", value)

    def accept(self, stream):
        limits = RpcLimits(max_request_nbytes=4 << 20, max_reply_nbytes=4 << 20)
        self.connections.append(RpcConnection(stream, framed_streams.RESPONDER, self.service, limits))


async def test_node_calls(programs):
    answering = Answering()
    listener, port = await framed_streams.listen(answering.accept)
    async with node(programs, "call", str(port)) as process, asyncio.timeout(PATIENCE):
        results = json.loads(await process.stdout.readline())
        await answering.connections[0].wait_closed()
    listener.close()
    assert results["first"] == {"value": "early"}
    assert results["many"] == [str(i) for i in range(300)]
    assert results["slow"] == {"value": "xx"}
    assert results["empty"] == {"value": None}
    assert results["megabytes"] == {"value": 3 << 20}
    assert results["unknown"] == {"message": "UNKNOWN_METHOD: Unknown method 'nowhere'", "code": "UNKNOWN_METHOD"}
    refused = {"message": "ask for an invitation", "code": "forbidden"}
    assert results["forbidden"] == {"message": "REQUEST_ERROR: Request failed", "code": "REQUEST_ERROR", "cause": refused}
    assert results["broken"]["cause"]["code"] == "internal"
    assert "division" not in json.dumps(results["broken"])
    told = {"message": "no model digits here: publish it", "code": "unknown_model", "context": '["digits"]'}
    assert results["error"]["cause"] == told
    assert results["oversized"]["cause"]["code"] == results["toolarge"]["cause"]["code"] == "payload_too_large"
    assert results["timeout"]["code"] == "TIMEOUT_EXCEEDED"
    assert results["corked"] == ["a", "bb", "UNKNOWN_METHOD"]
    assert results["heard"] == {"value": "from node"}
    assert results["called"] == {"value": "hello node"}
    assert answering.connections[0].working == 0
