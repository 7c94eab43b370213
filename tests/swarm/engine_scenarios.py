"""What the tests of the engine do in a process of its own: `python engine_scenarios.py NAME JSON` prints what the scenario returned."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog

from tether.errors import TetherError
from tether.swarm.engine import engine as engine_module
from tether.swarm.engine import interpreter
from tether.swarm.engine.engine import Engine, EngineSettings
from tether.swarm.engine.secure import SecureStream, StreamLimits
from tether.swarm.feeds.hyperbee import Hyperbee, serve

SECONDS = 10


def say(value: Any) -> None:
    print(json.dumps({"said": value}), flush=True)


async def told() -> Any:
    """Wait until the test says `go_on`, and with what."""
    return json.loads(await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline))


@contextlib.asynccontextmanager
async def engine(number: int, bootstrap: list[tuple[str, int]], **settings: Any) -> AsyncIterator[Engine]:
    started = await Engine.start(bytes([number]) * 32, EngineSettings(bootstrap=[(host, port) for host, port in bootstrap], **settings))
    try:
        await started.ready()
        yield started
    finally:
        await started.close()


class Reader:
    """Awaits what a stream delivers."""

    def __init__(self, stream: SecureStream) -> None:
        self.stream = stream
        self.messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        stream.start(
            lambda message: self.messages.put_nowait(bytes(message)), lambda: self.messages.put_nowait(None), self.closed.set_result
        )

    async def message(self) -> bytes | None:
        return await asyncio.wait_for(self.messages.get(), SECONDS)

    async def rest(self) -> bytes:
        parts = []
        while (message := await self.message()) is not None:
            parts.append(message)
        return b"".join(parts)

    async def close(self) -> Exception | None:
        return await asyncio.wait_for(self.closed, SECONDS)


def ignore(*_: object) -> None:
    pass


def echo(stream: SecureStream) -> None:
    stream.start(lambda message: stream.send(bytes(message)) or None, stream.end, ignore)


async def exchange(stream: SecureStream, data: bytes, piece: int = 65_536) -> bytes:
    """Send it all, end, and give what came back."""
    reader = Reader(stream)
    for at in range(0, len(data), piece):
        if not stream.send(data[at : at + piece]):
            await stream.drained()
    stream.end()
    back = await reader.rest()
    assert await reader.close() is None
    return back


def described(error: BaseException) -> list[str]:
    return [type(error).__name__, str(error), *(str(arg) for arg in error.args[1:2])]


async def failure(work: Any) -> list[str] | None:
    try:
        await work
    except TetherError as error:
        return described(error)
    return None


async def connect_to_node(bootstrap: list, keys: dict, nbytes: int) -> dict:
    async with engine(101, bootstrap) as node:
        stream = await node.connect(bytes.fromhex(keys["echo"]))
        told_by_stream = [
            stream.peer == keys["echo"],
            stream.is_initiator,
            len(stream.handshake_hash),
            stream.route,
            stream.remote_address[0],
        ]
        data = os.urandom(nbytes)
        equal = await exchange(stream, data) == data
        return {"equal": equal, "stream": told_by_stream, "rtt": stream.rtt, "left": len(node.streams)}


async def serve_node(bootstrap: list) -> dict:
    """Echo until told; whom it met, and which of them the firewall refused."""
    async with engine(102, bootstrap) as node:
        peers, refused = [], []

        def on_connection(stream: SecureStream) -> None:
            peers.append(stream.peer)
            echo(stream)

        def firewall(key: bytes, address: tuple[str, int]) -> bool:
            refused.append([key.hex(), address[0]])
            return refusing[0]

        refusing = [False]
        await node.listen(on_connection, firewall)
        say(node.public_key.hex())
        await told()
        refusing[0] = True
        say("refusing")
        await told()
        return {"peers": len(peers), "asked": len(refused)}


async def two_engines(bootstrap: list, nbytes: int) -> dict:
    async with engine(103, bootstrap) as one, engine(104, bootstrap) as other:
        met = asyncio.get_running_loop().create_future()

        def on_connection(stream: SecureStream) -> None:
            met.set_result(stream)
            echo(stream)

        await other.listen(on_connection)
        stream = await one.connect(other.public_key)
        data = os.urandom(nbytes)
        there = await met
        same = [stream.handshake_hash == there.handshake_hash, there.peer == one.public_key.hex(), there.is_initiator]
        back = await exchange(stream, data, 16 << 20)
        return {"equal": back == data, "same": same}


async def frames(bootstrap: list, sizes: list[int]) -> list[int]:
    """Sizes of the messages that came back."""
    async with engine(105, bootstrap) as one, engine(106, bootstrap) as other:
        await other.listen(echo)
        stream = await one.connect(other.public_key)
        reader = Reader(stream)
        got = []
        for size in sizes:
            stream.send(bytes(size))
            got.append(len(await reader.message()))
        return got


async def too_large(bootstrap: list, keys: dict) -> list:
    async with engine(107, bootstrap) as node:
        stream = await node.connect(bytes.fromhex(keys["echo"]))
        try:
            stream.send(bytes(16 << 20))
        except TetherError as error:
            refused = described(error)
        # The stream is as it was.
        return [refused, (await exchange(stream, b"small")).decode()]


async def records(bootstrap: list) -> dict:
    async with engine(108, bootstrap) as node:
        nodes = await node.mutable_put(b"first", 1)
        await node.mutable_put(b"second", 2)
        await node.mutable_put(b"too late", 1)
        latest = await node.mutable_get(node.public_key)
        say({"key": node.public_key.hex(), "hash": (await node.immutable_put(b"for ever")).hex(), "nodes": nodes})
        from_node = await node.mutable_get(bytes.fromhex((await told())["key"]))
        absent = [await node.mutable_get(bytes(31) + b"\1"), await node.immutable_get(bytes(32))]
        refused = [await failure(node.mutable_put(bytes(1001), 3)), await failure(node.immutable_put(bytes(1001)))]
        return {
            "latest": [latest.value.decode(), latest.seq],
            "node": [from_node.value.decode(), from_node.seq],
            "absent": absent,
            "refused": refused,
        }


async def topics(bootstrap: list, topic: str, known: str) -> dict:
    async with engine(109, bootstrap) as node:
        before = [peer.public_key.hex() for peer in await node.lookup(bytes.fromhex(topic))]
        await node.announce(bytes.fromhex(topic))
        say(node.public_key.hex())
        await told()
        found = await node.lookup(bytes.fromhex(topic))
        await node.unannounce(bytes.fromhex(topic))
        after = [peer.public_key.hex() for peer in await node.lookup(bytes.fromhex(topic))]
        return {"before": before == [known], "both": sorted(peer.public_key.hex() for peer in found), "after": after == [known]}


async def nobody_there(bootstrap: list) -> list:
    async with engine(110, bootstrap) as node:
        return [
            await failure(node.connect(bytes([7]) * 32)),
            await failure(node.connect(bytes(32))),
            await failure(node.connect(b"short")),
            await failure(node.lookup(b"short")),
        ]


async def no_network() -> dict:
    """Bootstrap nodes that do not answer: the node starts, and says that it is alone."""
    settings = EngineSettings(bootstrap=[("127.0.0.1", 9), ("no.such.host.invalid", 49737)])
    node = await Engine.start(bytes([111]) * 32, settings)
    try:
        status = await node.status()
        return {"known": status.known, "ready": status.bootstrapped, "connect": await failure(node.connect(bytes([7]) * 32, 0.5))}
    finally:
        await node.close()


async def given_up(bootstrap: list, seconds: float) -> list:
    """A peer that is announced and does not answer: connecting ends at the deadline, or by cancellation, and leaves nothing."""
    async with engine(112, bootstrap) as node, engine(113, bootstrap) as other:
        await other.listen(echo, lambda *_: True)
        late = await failure(node.connect(other.public_key, seconds))
        task = asyncio.create_task(node.connect(other.public_key))
        await asyncio.sleep(0)
        task.cancel()
        done = await asyncio.gather(task, return_exceptions=True)
        return [late, isinstance(done[0], asyncio.CancelledError), len(node.streams)]


async def rude_peers(bootstrap: list, keys: dict) -> dict:
    async with engine(114, bootstrap) as node:
        closed = {}
        for name in ("rude", "garbling"):
            stream = await node.connect(bytes.fromhex(keys[name]))
            reader = Reader(stream)
            stream.send(b"anything")
            closed[name] = described(await reader.close())
        return closed


async def garbage_arrives(bootstrap: list, count: int) -> list:
    """How each of the streams that Node opened was closed."""
    async with engine(115, bootstrap) as node:
        closed: asyncio.Queue[Exception | None] = asyncio.Queue()
        await node.listen(lambda stream: stream.start(ignore, ignore, closed.put_nowait))
        say(node.public_key.hex())
        return [described(await asyncio.wait_for(closed.get(), SECONDS)) for _ in range(count)]


async def silence(bootstrap: list) -> dict:
    """A peer that is gone without a word is given up at the idle limit; one that keeps alive is not."""
    limits = StreamLimits(idle=1.5, keepalive=0.2)
    async with engine(116, bootstrap, limits=limits) as one, engine(117, bootstrap, limits=limits) as other:
        met = asyncio.get_running_loop().create_future()
        await other.listen(met.set_result)
        stream = await one.connect(other.public_key)
        reader = Reader(stream)
        await asyncio.sleep(2 * limits.idle)
        alive = not stream.closed
        there = await met
        there.start(ignore, ignore, ignore)
        there.send = ignore  # it says nothing any more
        return {"alive": alive, "error": described(await reader.close())}


async def backpressure(bootstrap: list, nbytes: int) -> dict:
    """A receiver that takes nothing: the sender is stopped at what windows and queue hold, and all arrives once it takes it."""
    async with engine(118, bootstrap) as one, engine(119, bootstrap) as other:
        got, ended = [0], asyncio.Event()

        def on_connection(stream: SecureStream) -> None:
            held.set_result(stream)
            stream.start(lambda message: got.__setitem__(0, got[0] + len(message)), ended.set, ignore)
            stream.pause()

        held: asyncio.Future[SecureStream] = asyncio.get_running_loop().create_future()
        await other.listen(on_connection)
        stream = await one.connect(other.public_key)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < nbytes:
                sent += 65_536
                if not stream.send(bytes(65_536)):
                    await asyncio.wait_for(stream.drained(), 0.5)
        stopped, received = sent, got[0]
        (await held).resume()
        while sent < nbytes:
            sent += 65_536
            if not stream.send(bytes(65_536)):
                await stream.drained()
        stream.end()
        await asyncio.wait_for(ended.wait(), SECONDS)
        return {"stopped": stopped, "received": received, "sent": sent, "got": got[0]}


async def closing(bootstrap: list) -> dict:
    """What is open when an engine is closed ends; a closed one says so; another can be started after it."""
    async with engine(120, bootstrap) as one, engine(121, bootstrap) as other:
        met = asyncio.get_running_loop().create_future()
        await other.listen(met.set_result)
        reader = Reader(await one.connect(other.public_key))
        there = await met
        await other.close()
        reached = described(await reader.close())
        refused = await failure(other.lookup(bytes(32)))
        # What was announced was taken back.
        gone = await failure(one.connect(other.public_key))
    async with engine(122, bootstrap) as again:
        return {"reached": reached, "there": there.closed, "refused": refused, "gone": gone, "again": (await again.status()).known > 0}


async def sleeping(bootstrap: list, keys: dict) -> dict:
    async with engine(123, bootstrap) as node:
        await node.listen(echo)
        stream = await node.connect(bytes.fromhex(keys["silent"]))
        reader = Reader(stream)
        await node.suspend()
        cut = described(await reader.close())
        asleep = await failure(node.connect(bytes.fromhex(keys["echo"])))
        began = asyncio.get_running_loop().time()
        await node.resume()
        back = await exchange(await node.connect(bytes.fromhex(keys["echo"])), b"awake")
        say(node.public_key.hex())
        await told()
        return {"cut": cut, "asleep": asleep, "back": back.decode(), "seconds": asyncio.get_running_loop().time() - began}


async def many(bootstrap: list, count: int) -> dict:
    async with engine(124, bootstrap) as one, engine(125, bootstrap) as other:
        await other.listen(echo)
        streams = await asyncio.gather(*(one.connect(other.public_key) for _ in range(count)))
        data = [os.urandom(10_000) for _ in streams]
        back = await asyncio.gather(*(exchange(stream, each) for stream, each in zip(streams, data, strict=True)))
        return {"equal": back == data, "left": len(one.streams)}


async def feed(bootstrap: list, folder: str) -> dict:
    """A feed is written, read at each of its lengths, opened again, and given to Node and to a follower here."""
    async with engine(140, bootstrap) as one, engine(141, bootstrap) as other:
        bee = await Hyperbee.open(one, Path(folder) / "own", seed=bytes([42]) * 32)
        await bee.put([("models/digits/versions/1", '{"manifest": "aa"}'), ("aliases/digits/prod", "1")])
        before = await bee.head()
        await bee.put([("models/digits/versions/2", '{"manifest": "bb"}'), ("aliases/digits/prod", "2"), ("gone", "x")])
        await bee.put([("gone", None)])
        await bee.close()
        bee = await Hyperbee.open(one, Path(folder) / "own", seed=bytes([42]) * 32)
        publisher = await serve(one, bytes([43]) * 32, [bee])
        changes: asyncio.Queue[str] = asyncio.Queue()
        copy = await Hyperbee.open(other, Path(folder) / "copy", key=bee.key, on_change=changes.put_nowait)
        followed = await copy.follow(publisher)
        same = followed == await bee.head()
        say({"key": bee.key.hex(), "publisher": publisher.hex(), "topic": bee.topic.hex()})
        await told()
        while not changes.empty():
            changes.get_nowait()
        began = asyncio.get_running_loop().time()
        await bee.put([("aliases/digits/prod", "1")])
        change = await asyncio.wait_for(changes.get(), SECONDS)
        moved = await copy.get("aliases/digits/prod")
        seconds = asyncio.get_running_loop().time() - began
        return {
            "writable": [bee.writable, copy.writable],
            "same": same,
            "change": [change, moved, seconds],
            "old": await copy.get("aliases/digits/prod", before.length),
            "range": [[entry.key, entry.value] for entry in await copy.range("models/", "models0")],
            "history": [[entry.kind, entry.key] for entry in await copy.history()],
            "known": publisher.hex() in [peer.public_key.hex() for peer in await other.lookup(bee.topic)],
            "files": sorted(path.name for path in (Path(folder) / "own").iterdir()),
        }


async def torn_feed(bootstrap: list, folder: str) -> list:
    """The log loses what was written last, as after a power cut that a disk lied about: it opens, shorter."""
    async with engine(142, bootstrap) as node:
        bee = await Hyperbee.open(node, Path(folder), seed=bytes([44]) * 32)
        await bee.put([("a", "1")])
        await bee.put([("b", "2")])
        length = (await bee.head()).length
        await bee.close()
        log = Path(folder) / "oplog"
        with log.open("r+b") as file:
            file.truncate(log.stat().st_size - 3)
        bee = await Hyperbee.open(node, Path(folder), seed=bytes([44]) * 32)
        return [length, (await bee.head()).length, await bee.get("a")]


async def large_answer(bootstrap: list, folder: str) -> list:
    """More than crosses at once: said, and the feed goes on."""
    async with engine(143, bootstrap) as node:
        bee = await Hyperbee.open(node, Path(folder), seed=bytes([45]) * 32)
        for name in "ab":
            await bee.put([(name, "x" * (9 << 20))])
        refused = await failure(asyncio.wait_for(bee.range("a", "c"), SECONDS))
        one = await bee.get("a")
        await bee.close()
        return [refused, len(one or "")]


async def hostile_neighbours() -> list:
    """A node that names neighbours which can't be: who asks it goes on without them."""

    class Hostile(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
            if data[0] != REQUEST:
                return
            asker = socket.inet_aton(address[0]) + address[1].to_bytes(2, "little")
            nowhere = socket.inet_aton("127.0.0.1") + bytes(2)
            self.transport.sendto(bytes([RESPONSE, WITH_NEIGHBOURS]) + data[2:4] + asker + bytes([1]) + nowhere, address)

    REQUEST, RESPONSE, WITH_NEIGHBOURS = 0x03, 0x13, 4  # noqa: N806 (dht-rpc's)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Hostile, local_addr=("127.0.0.1", 0))
    node = await Engine.start(bytes([144]) * 32, EngineSettings(bootstrap=[transport.get_extra_info("sockname")]))
    try:
        return [peer.public_key.hex() for peer in await asyncio.wait_for(node.lookup(bytes(32)), 2 * SECONDS)]
    finally:
        await node.close()
        transport.close()


async def no_such_names() -> int:
    """Names that no resolver takes: as those that nobody has."""
    settings = EngineSettings(bootstrap=[("no..such.host", 49737), ("x" * 64 + ".invalid", 49737)])
    node = await Engine.start(bytes([145]) * 32, settings)
    try:
        await asyncio.wait_for(node.ready(), SECONDS)
        return (await node.status()).known
    finally:
        await node.close()


async def impatient() -> list:
    """A network that does not answer goodbyes: the sockets are closed without them, and who waits for something hears of it."""
    engine_module._GOODBYE = 0.2
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        async with engine(146, []) as other:  # so that the loop goes on
            node = await Engine.start(bytes([147]) * 32, EngineSettings(bootstrap=[silent.getsockname()]))
            local = (await node.status()).local
            listening = asyncio.create_task(failure(node.listen(ignore)))
            await asyncio.sleep(0.05)
            await node.close()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                again.bind(("127.0.0.1", local[1]))
            await asyncio.wait_for(listening, SECONDS)
            return [(await other.status()).known]


async def one_ends_as_another_begins(turns: int) -> list[bool]:
    """The last node is closed while the next one starts, some turns of the loop later."""
    node = await Engine.start(bytes([148]) * 32, EngineSettings(bootstrap=()))
    alive = []
    for number in range(turns):

        async def start(number: int = number) -> Engine:
            for _ in range(number):
                await asyncio.sleep(0)
            return await Engine.start(bytes([149 + number]) * 32, EngineSettings(bootstrap=()))

        _, node = await asyncio.gather(node.close(), start())
        await asyncio.wait_for(node.ready(), SECONDS)
        alive.append((await node.status()).local is not None)
    await node.close()
    return alive


def other_thread() -> list[str]:
    """Nothing of the engine but on the main thread."""
    return _in_thread(lambda: asyncio.run(Engine.start(bytes(32), EngineSettings(bootstrap=()))))


def second_thread() -> list[str]:
    async def main() -> list[str]:
        async with engine(126, []):
            return await asyncio.get_running_loop().run_in_executor(None, other_thread)

    return asyncio.run(main())


def _in_thread(work: Any) -> list[str]:
    raised: list[list[str]] = []

    def run() -> None:
        try:
            work()
        except TetherError as error:
            raised.append(described(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0]


def after_fork() -> list[str]:
    asyncio.run(_start_and_close(127))
    readable, writable = os.pipe()
    if os.fork() == 0:
        try:
            asyncio.run(_start_and_close(128))
        except TetherError as error:
            os.write(writable, json.dumps(described(error)).encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        return json.loads(pipe.read())


async def _start_and_close(number: int) -> None:
    async with engine(number, []):
        pass


def loop_after_loop() -> list[str]:
    """One event loop after another works; two at once do not."""
    asyncio.run(_start_and_close(129))
    asyncio.run(_start_and_close(130))
    first = asyncio.new_event_loop()
    node = first.run_until_complete(Engine.start(bytes([131]) * 32, EngineSettings(bootstrap=())))
    try:
        asyncio.run(_start_and_close(132))
    except TetherError as error:
        return described(error)
    finally:
        first.run_until_complete(node.close())
        first.close()
    return []


def imported_before() -> list[str]:
    import pythonmonkey  # noqa: F401

    try:
        asyncio.run(_start_and_close(133))
    except TetherError as error:
        return described(error)
    return []


def no_bundle() -> list[str]:
    interpreter._BUNDLE = interpreter._BUNDLE.with_name("no-such-bundle.js")
    try:
        asyncio.run(_start_and_close(134))
    except TetherError as error:
        return described(error)
    return []


def no_pythonmonkey() -> list[str]:
    sys.meta_path.insert(0, _Hidden())
    try:
        asyncio.run(_start_and_close(135))
    except TetherError as error:
        return described(error)
    return []


class _Hidden:
    """As on a machine where PythonMonkey is not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "pythonmonkey":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def main(scenarios: dict[str, Any]) -> None:
    """Run the one that the command line names."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # what is logged unexpectedly fails the test
    found = scenarios[sys.argv[1]](**json.loads(sys.argv[2]))
    if asyncio.iscoroutine(found):
        found = asyncio.run(found)
    print(json.dumps({"returned": found}), flush=True)


if __name__ == "__main__":
    main(globals())
