"""What the tests of `Node` do in processes of their own, on a DHT of this machine: as engine_scenarios.py."""

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog
from blake3 import blake3
from engine_scenarios import SECONDS, engine, failure, ignore, main, say, told
from nacl.signing import SigningKey

from tether.errors import ForbiddenError, TetherError
from tether.manager.peering.neighbours import Neighbours
from tether.security.access import Access
from tether.security.access_file import AccessFile
from tether.security.identity import Identity
from tether.swarm.engine.engine import EngineSettings
from tether.swarm.engine.secure import StreamLimits
from tether.swarm.node.node import ConnectionLimits, Node, NodeSettings, Standing
from tether.swarm.records.records import Capabilities, Held, parse, topic
from tether.swarm.rpc.rpc import Call, Service
from tether.types import Digest

HOST = "127.0.0.1"
BLOB = bytes(range(256)) * 1000


def seed_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@contextlib.asynccontextmanager
async def local_dht(count: int = 5, port: int = 0) -> AsyncIterator[list[tuple[str, int]]]:
    """Nodes that know each other; no packet leaves this machine. hyperdht wants to hear from four what kind of NAT it is behind."""
    async with contextlib.AsyncExitStack() as stack:
        bootstrap: list[tuple[str, int]] = []
        for number in range(count):
            settings = {"host": HOST, "port": 0 if number else port, "ephemeral": False, "firewalled": False}
            node = await stack.enter_async_context(engine(200 + number, bootstrap[:1], **settings))
            local = (await node.status()).local
            bootstrap.append((HOST, local[1]))
        yield bootstrap


class Shelf:
    async def authorise(self, *_: Any) -> None:
        pass

    async def blob(self, digest: str) -> bytes | None:
        return BLOB if digest == blake3(BLOB).hexdigest() else None


class Lab:
    """A node, whom it knows, and what it answers."""

    node: Node

    def __init__(self) -> None:
        self.standings: dict[str, Standing] = {}
        self.asked: list[str] = []
        self.hold = asyncio.Event()
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.service = Service(self.authorise)
        self.service.respond("tether/1/echo", lambda _, value: value)
        self.service.respond("tether/1/ping", lambda _, value: value)
        self.service.respond("tether/1/held", self.held)
        self.service.respond("tether/1/enrol", self.enrol)

    def standing(self, peer: str) -> Standing:
        return self.standings.get(peer, Standing.KNOWN)

    def authorise(self, peer: str, method: str) -> None:
        self.asked.append(method)
        if self.standing(peer) is not Standing.KNOWN and method != "tether/1/enrol":
            raise ForbiddenError("this key is not enrolled: ask for an invitation")

    def enrol(self, call: Call, value: bytes) -> bytes:
        self.standings[call.peer] = Standing.KNOWN
        self.node.welcome(call.peer)
        return value

    async def held(self, _: Call, value: bytes) -> bytes:
        self.started.set()
        try:
            await self.hold.wait()
        finally:
            self.ended.set()
        return value


@contextlib.asynccontextmanager
async def lab(name: str, bootstrap: list, limits: ConnectionLimits | None = None, streams: StreamLimits | None = None, **settings: Any):
    made = Lab()
    engine_settings = EngineSettings(bootstrap=[(host, port) for host, port in bootstrap], limits=streams or StreamLimits())
    made.node = await Node.start(
        seed_of(name),
        made.service,
        Shelf(),
        made.standing,
        NodeSettings(engine=engine_settings, limits=limits or ConnectionLimits(), **settings),
    )
    try:
        await made.node.ready()
        yield made
    finally:
        await made.node.aclose()


async def until(condition: Any) -> float:
    """Seconds that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(2 * SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return loop.time() - began


async def two_labs() -> dict:
    """Calls both ways and blobs; how many connections it took."""
    async with local_dht() as bootstrap, lab("one", bootstrap) as one, lab("two", bootstrap) as two:
        many = await asyncio.gather(*(one.node.request(two.node.key, "echo", b"%d" % number) for number in range(50)))
        back = await two.node.request(one.node.key, "echo", bytes(1 << 20), 5.0)
        blobs = await one.node.blobs(two.node.key)
        same = await blobs.fetch(blake3(BLOB).hexdigest(), len(BLOB)) == BLOB
        shown = [[each.purpose, each.is_initiator, each.peer == two.node.key, each.route] for each in one.node.connections()]
        rtt = min(each.round_trip for each in one.node.connections())
        await one.node.put_record(b"what I have", 3)
        record = await two.node.get_record(one.node.key)
        nobody = await two.node.get_record(two.node.key)
        await one.node.announce(bytes(32))
        found = await two.node.lookup(bytes(32)) == [one.node.key]
        await one.node.unannounce(bytes(32))
        gone = await two.node.lookup(bytes(32))
        nobodys = [
            await failure(one.node.request(SigningKey(seed_of("nobody")).verify_key.encode().hex(), "echo", b"", 5.0)),
            await failure(one.node.request(SigningKey(seed_of("nobody")).verify_key.encode().hex(), "echo", b"", 0.0)),
            await failure(one.node.request("00" * 32, "echo")),
        ]
        weight = one.node.weight()
        status = await one.node.status()
        return {
            "many": many == [b"%d" % number for number in range(50)],
            "back": len(back),
            "blobs": same,
            "shown": shown,
            "rtt": rtt,
            "record": [record[0].decode(), record[1], nobody],
            "found": [found, gone],
            "weight": [weight.nbytes, weight.is_heavy],
            "announced": status.announced,
            "nobodys": [error[0] for error in nobodys],
        }


async def cancelled() -> list[int]:
    """Streams that are left when who connects is cancelled in each of the turns about the one in which the stream comes."""
    left = []
    async with local_dht() as bootstrap, engine(240, bootstrap, host=HOST) as one, engine(241, bootstrap, host=HOST) as two:
        await two.listen(lambda stream: stream.start(ignore, ignore, ignore))
        for turns in range(6):
            connecting = asyncio.create_task(one.connect(two.public_key))
            while not one.streams:  # noqa: ASYNC110 (turn by turn)
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await connecting).destroy()
            await until(lambda: not two.streams)
            left.append(len(one.streams))
    return left


async def strangers() -> dict:
    """An unknown key is cut when its time is over, unless it was admitted; a banned one gets nothing; what nobody uses is closed."""
    limits = ConnectionLimits(unknown_patience=1.5, idle=1.0)
    async with (
        local_dht() as bootstrap,
        lab("host", bootstrap, limits, interval=0.1) as host,
        lab("guest", bootstrap) as guest,
        lab("member", bootstrap) as member,
        lab("banned", bootstrap) as banned,
    ):
        quiet()
        host.standings |= {
            guest.node.key: Standing.UNKNOWN,
            member.node.key: Standing.UNKNOWN,
            banned.node.key: Standing.BANNED,
        }
        refused = await failure(guest.node.request(host.node.key, "echo", b"", 5.0))
        too_large = await failure(guest.node.request(host.node.key, "enrol", bytes(5000), 5.0))
        outsized = await failure(guest.node.request(host.node.key, "enrol", bytes(100_000), 5.0))
        await failure(guest.node.request(host.node.key, "echo", b"", 5.0))
        await member.node.request(host.node.key, "enrol", b"secret", 5.0)
        large = len(await member.node.request(host.node.key, "echo", bytes(1 << 20), 5.0))
        began = asyncio.get_running_loop().time()
        kept_out = await failure(banned.node.request(host.node.key, "enrol", b"", 1.0))
        kept_out_in = asyncio.get_running_loop().time() - began
        cut_in = await until(lambda: not any(each.peer == guest.node.key for each in host.node.connections()))
        held = [each.peer == member.node.key for each in host.node.connections()]
        ours = await failure(host.node.request(banned.node.key, "echo", b"", 5.0))
        await host.node.blobs(member.node.key)
        await until(lambda: [each.purpose for each in host.node.connections()] == ["rpc"])
        return {
            "refused": refused[0],
            "sizes": [too_large[0], outsized[0], large],
            "kept_out": [kept_out[0], kept_out_in, ours[0]],
            "cut_in": cut_in,
            "held": held,
        }


async def revoked() -> dict:
    """Seconds until a call that is being worked on has ended on both sides, once its caller was cut."""
    async with local_dht() as bootstrap, lab("one", bootstrap) as one, lab("two", bootstrap) as two:
        call = asyncio.create_task(failure(one.node.request(two.node.key, "held", b"", 30.0)))
        await two.started.wait()
        began = asyncio.get_running_loop().time()
        two.standings[one.node.key] = Standing.BANNED
        two.node.cut(one.node.key)
        await two.ended.wait()
        error = await call
        seconds = asyncio.get_running_loop().time() - began
        again = await failure(one.node.request(two.node.key, "echo", b"", 1.0))
        return {"error": error[0], "seconds": seconds, "again": again[0], "left": len(two.node.connections())}


async def caller(streams: dict | None = None) -> None:
    """A DHT and a lab on it, which does as it is told and says what came of it."""
    async with local_dht() as bootstrap, lab("caller", bootstrap, streams=StreamLimits(**streams) if streams else None) as one:
        quiet()
        say({"bootstrap": bootstrap, "key": one.node.key})
        while (asked := await told()) is not None:
            say(await (lost(one.node, **asked["lost"]) if "lost" in asked else called(one.node, **asked["call"])))


async def called(node: Node, peer: str, timeout: float = 5.0, method: str = "echo") -> dict:  # noqa: ASYNC109 (it is the request's)
    """Until it answers."""
    loop = asyncio.get_running_loop()
    began, tries, answer = loop.time(), 0, b""
    while not answer and loop.time() - began < 2 * SECONDS:
        tries += 1
        with contextlib.suppress(TetherError):
            answer = await node.request(peer, method, b"hello", timeout)
    return {"answer": answer.decode(), "tries": tries, "seconds": loop.time() - began}


async def lost(node: Node, at_least: float) -> float:
    """Until nothing is open any more, and so many seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    return await until(lambda: not node.connections() and loop.time() - began >= at_least)


async def answerer(bootstrap: list, peer: str = "", streams: dict | None = None) -> dict:
    """A lab that answers until told to stop; how often it was back."""
    async with lab("answerer", bootstrap, streams=StreamLimits(**streams) if streams else None) as one:
        quiet()
        back: list[bool] = []
        one.node.on_back.append(lambda: back.append(True))
        if peer:
            await one.node.request(peer, "echo", b"", 5.0)
        say(one.node.key)
        if await told():
            await until(lambda: back)
        return {"back": len(back)}


async def early() -> dict:
    """A lab that starts before there is a network. Then there is one, here a DHT: seconds until it was told so, and who finds it."""
    quiet()
    async with local_dht(1) as [(_, port)]:
        pass
    made, loop = Lab(), asyncio.get_running_loop()
    settings = NodeSettings(engine=EngineSettings(bootstrap=[(HOST, port)]), interval=0.2)
    began = loop.time()
    made.node = await Node.start(seed_of("early"), made.service, None, made.standing, settings)
    started = loop.time() - began
    back: list[bool] = []
    made.node.on_back.append(lambda: back.append(True))
    try:
        await made.node.ready()
        ready = loop.time() - began
        alone = (await made.node.status()).announced
        async with local_dht(port=port) as bootstrap, lab("late", bootstrap) as other:
            seconds = await until(lambda: back)
            answer = await other.node.request(made.node.key, "echo", b"found", 5.0)
            return {"started": started, "ready": ready, "alone": alone, "seconds": seconds, "answer": answer.decode()}
    finally:
        await made.node.aclose()


async def leaving() -> dict:
    """A lab that has models of another one takes leave: nobody who looks for either finds it, before its node is closed."""
    identity, publisher = Identity(seed_of("one")), Identity(seed_of("publisher")).public
    offered = Capabilities((Held(publisher, "digits", 1, Digest("a" * 64), 10, loaded=False),), serves=True)
    topics = [topic(publisher), topic(identity.public)]
    async with local_dht() as bootstrap, lab("one", bootstrap) as one, lab("two", bootstrap) as two:
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(AccessFile.open(Path(folder) / "access.sqlite")) as file:
            neighbours = Neighbours(one.node, identity, Access(file), lambda: offered, lambda _: False)
            running = asyncio.create_task(neighbours.run())
            async with asyncio.timeout(2 * SECONDS):
                while not all([await two.node.lookup(each) for each in topics]):  # noqa: ASYNC110 (nodes of the DHT tell nobody)
                    await asyncio.sleep(0.05)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            began = asyncio.get_running_loop().time()
            await neighbours.leave()
            seconds = asyncio.get_running_loop().time() - began
        record = parse((await two.node.get_record(one.node.key))[0])
        return {"seconds": seconds, "found": [await two.node.lookup(each) for each in topics], "says": [record.count, record.lifetime]}


def quiet() -> None:
    """What is logged is expected: it fails no test."""
    structlog.configure(processors=[lambda *_: ""], logger_factory=structlog.ReturnLoggerFactory())


if __name__ == "__main__":
    main(globals())
