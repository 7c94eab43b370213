"""A peer in a process of its own, told what to do by lines of JSON: `nat_peer.py`; node/nat_peer.js is the same in Node.

A request is {"id", "op", …}; its answer has the same id. Who is listened for takes bytes until the end, and answers with their digest.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import random
import sys
import time
from typing import Any

import structlog

from tether.errors import TetherError
from tether.store.format.manifest import digest_of
from tether.swarm.blobs.blobs import BlobConnection
from tether.swarm.engine.engine import Engine, EngineSettings
from tether.swarm.engine.secure import SecureStream
from tether.swarm.relaying.relay import Relay, RelayLimits
from tether.swarm.udx import Udx, UdxStream
from tether.types import Digest

PIECE = 1 << 18
BLOB = 1 << 20
AT_ONCE = 6
"""Blobs that are asked of one holder at a time: so many are on their way while the path is 40 ms long."""


class Peer:
    """Its methods are what may be asked for; nodes are known by a name, which decides their key, streams by a number."""

    def __init__(self) -> None:
        self.nodes: dict[str, Engine] = {}
        self.pushes: list[Push] = []
        self.accepted: list[SecureStream] = []
        self.given: list[BlobConnection] = []
        self.gathered: dict[str, int] = {}
        self.relay: Any = None
        self.plain: Any = None

    async def forget(self) -> None:
        """Be as at the beginning."""
        nodes = list(self.nodes.values())
        vars(self).update(vars(Peer()))
        for node in nodes:
            await node.close()

    async def start(self, name: str, bootstrap: list[list[Any]], relay_through: str | None = None, **settings: Any) -> str:
        """The node's public key."""
        relays = () if relay_through is None else (bytes.fromhex(relay_through),)
        nodes = EngineSettings(bootstrap=[(host, port) for host, port in bootstrap], relays=relays, **settings)
        node = self.nodes[name] = await Engine.start(hashlib.sha256(name.encode()).digest(), nodes)
        await node.ready()
        return node.public_key.hex()

    async def listen(self, name: str) -> None:
        await self.nodes[name].listen(self.arrived)

    async def begin_relay(self, name: str, admit: list[str] | None = None, **limits: Any) -> None:
        """A blind relay under this node's key, for these peers, or all."""
        self.relay = Relay(lambda peer: admit is None or peer in admit, RelayLimits(**limits))
        await self.nodes[name].listen(lambda stream: self.relay.accept(stream, stream.carrier))

    async def relayed(self) -> dict[str, int]:
        return dataclasses.asdict(self.relay.status)

    async def cut(self, key: str) -> None:
        self.relay.cut(key)

    async def address(self, name: str) -> tuple[str, int]:
        return (await self.nodes[name].status()).local

    async def probe(self, name: str) -> bool:
        return await self.nodes[name].probe()

    async def status(self, name: str) -> dict[str, Any]:
        found = await self.nodes[name].status()
        return {"address": found.address, "firewalled": found.firewalled, "randomized": found.randomized, "known": found.known}

    async def connect(self, name: str, key: str, within: float = 30.0) -> dict[str, Any]:
        began = time.monotonic()
        stream = await self.nodes[name].connect(bytes.fromhex(key), within)
        self.pushes.append(Push(stream))
        seconds = time.monotonic() - began
        return {"stream": len(self.pushes) - 1, "seconds": seconds, "route": stream.route, "address": stream.remote_address}

    async def push(self, stream: int, nbytes: int) -> dict[str, Any]:
        return await self.pushes[stream].push(nbytes)

    async def route(self, stream: int) -> str:
        return self.pushes[stream].stream.route

    async def seen(self) -> list[dict[str, Any]]:
        """Who connected, and how."""
        return [{"peer": stream.peer, "route": stream.route, "address": stream.remote_address} for stream in self.accepted]

    async def hold(self, name: str, count: int) -> None:
        """Be a holder of so many blobs."""
        shelf = Shelf(count)
        await self.nodes[name].listen(lambda stream: self.given.append(BlobConnection(stream, shelf)))

    async def gather(self, name: str, keys: list[str], count: int) -> dict[str, Any]:
        """Fetch all blobs from these holders, as each can; how many came from whom, and the routes. What comes is checked on arrival."""
        began = time.monotonic()
        streams = [await self.nodes[name].connect(bytes.fromhex(key)) for key in keys]
        routes = [stream.route for stream in streams]
        self.gathered = dict.fromkeys(keys, 0)
        missing = {digest_of(blob(number)): set[str]() for number in range(count)}
        connections = [BlobConnection(stream) for stream in streams]
        async with asyncio.TaskGroup() as fetching:
            tasks = [fetching.create_task(self._fetch(connection, missing)) for connection in connections for _ in range(AT_ONCE)]
            while missing:
                await asyncio.wait(tasks, timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
            for connection in connections:
                connection.destroy()  # what is still asked of one that is gone is here since
        return {"from": list(self.gathered.values()), "routes": routes, "seconds": time.monotonic() - began}

    async def so_far(self) -> int:
        return sum(self.gathered.values())

    async def _fetch(self, connection: BlobConnection, missing: dict[Digest, set[str]]) -> None:
        """What nobody was asked for goes first; then what another was asked for, who may be gone."""
        while wanted := [digest for digest, asked in missing.items() if connection.peer not in asked]:
            digest = min(wanted, key=lambda digest: len(missing[digest]))
            missing[digest].add(connection.peer)
            try:
                found = await connection.blob(digest)
            except TetherError:
                return
            assert found is not None
            if missing.pop(digest, None) is not None:
                self.gathered[connection.peer] += 1

    async def bind(self, host: str) -> int:
        """A bare UDX stream, number 1, from this address; its port."""
        udx = Udx()
        socket, self.plain = udx.socket(), UdxStream(udx, 1)
        self.plain.received = hashlib.blake2b()
        self.plain.on_data, self.plain.closed = self.plain.received.update, asyncio.get_running_loop().create_future()
        self.plain.on_end, self.plain.on_close = self.plain.write_end, self.plain.closed.set_result
        port = socket.bind(0, host)
        self.plain.through = socket
        return port

    async def join(self, host: str, port: int) -> None:
        self.plain.connect(self.plain.through, 1, port, host)

    async def bare(self, nbytes: int) -> dict[str, Any]:
        """Send so much over the bare stream, and end it."""
        data = os.urandom(nbytes)
        self.plain.write(data)
        self.plain.write_end()
        mtus = [self.plain.mtu]
        while not self.plain.closed.done():
            await asyncio.wait([self.plain.closed], timeout=0.02)
            mtus.append(self.plain.mtu)
        return {"digest": hashlib.blake2b(data).hexdigest(), "mtu": max(mtus), "code": self.plain.closed.result()}

    async def received(self) -> str:
        return self.plain.received.hexdigest()

    def arrived(self, stream: SecureStream) -> None:
        self.accepted.append(stream)
        digest = hashlib.blake2b()

        def ended() -> None:
            stream.send(digest.digest())
            stream.end()

        stream.start(digest.update, ended, lambda _: None)


def blob(number: int) -> bytes:
    return random.Random(f"blob {number}").randbytes(BLOB)


class Shelf:
    """Blobs that are made when they are asked for."""

    def __init__(self, count: int) -> None:
        self._numbers = {digest_of(blob(number)): number for number in range(count)}

    async def authorise(self, *_: object) -> None:
        pass

    async def blob(self, digest: Digest) -> bytes | None:
        return blob(self._numbers[digest])

    async def manifest(self, _: Digest) -> None:
        return None

    async def bitmap(self, _: Digest) -> None:
        return None


class Push:
    """A stream to a peer, which is sent bytes at most once."""

    def __init__(self, stream: SecureStream) -> None:
        self.stream = stream
        self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def push(self, nbytes: int) -> dict[str, Any]:
        """Send so many bytes; whether they are what the other side got, and how long it took until it said so."""
        self.stream.start(self._on_message, lambda: None, self._on_close)
        own, template, began = hashlib.blake2b(), os.urandom(PIECE - 8), time.monotonic()
        for at in range(0, nbytes, PIECE):
            piece = (at.to_bytes(8, "little") + template)[: nbytes - at]
            own.update(piece)
            if not self.stream.send(piece):
                await self.stream.drained()
        self.stream.end()
        equal = await self._answer == own.digest()
        return {"equal": equal, "seconds": time.monotonic() - began, "route": self.stream.route}

    def _on_message(self, message: memoryview) -> None:
        if not self._answer.done():
            self._answer.set_result(bytes(message))

    def _on_close(self, error: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(error or ConnectionError("closed before the answer"))
            self._answer.exception()  # nobody may be waiting


async def answer(peer: Peer, number: int, op: str, values: dict[str, Any]) -> None:
    try:
        said = {"id": number, "ok": await getattr(peer, op)(**values)}
    except (TetherError, ConnectionError) as error:
        said = {"id": number, "error": type(error).__name__, "message": str(error), "code": str(next(iter(error.args[1:]), ""))}
    print(json.dumps(said), flush=True)


async def main() -> None:
    peer, loop = Peer(), asyncio.get_running_loop()
    tasks = set()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        values = json.loads(line)
        tasks.add(loop.create_task(answer(peer, values.pop("id"), values.pop("op"), values)))
    for task in tasks:
        task.cancel()
    for node in peer.nodes.values():
        await node.close()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main())
