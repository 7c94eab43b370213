"""`python benchmarks/swarm/streams.py`: MB/s of an encrypted stream, Python and Node each to each, in one sitting on one loopback.

Real processes, a DHT of Node, 64 KiB a message; the receiver counts and answers with the count. Needs Node and npm. JSON goes to
benchmarks/results/streams.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import results

HERE = Path(__file__).parent
TESTS = HERE.parents[1] / "tests" / "swarm"
MESSAGE_NBYTES = 65_536
AIM = 2.5
"""Python to Python, in multiples of Node to Node."""

NODE_CLIENT = """
const DHT = require('hyperdht'); const b4a = require('b4a')
const { bootstrap, key, seconds, size } = JSON.parse(process.argv[1])
const node = new DHT({ bootstrap: bootstrap.map(([host, port]) => ({ host, port })) })
const stream = node.connect(b4a.from(key, 'hex'))
stream.once('open', () => {
  const piece = b4a.alloc(size, 7); const began = process.hrtime.bigint(); const until = Date.now() + seconds * 1000; let answer = ''
  const go = () => { while (Date.now() < until) if (!stream.write(piece)) return stream.once('drain', go); stream.end() }
  stream.on('data', data => { answer += b4a.toString(data) })
  stream.on('end', () => {
    console.log(JSON.stringify({ nbytes: Number(answer), seconds: Number(process.hrtime.bigint() - began) / 1e9 }))
    process.exit(0)
  })
  go()
})
"""


async def serve(bootstrap: list[tuple[str, int]], keep_seconds: float) -> None:
    """Count what comes on each stream."""
    from tether.swarm.engine.engine import Engine, EngineSettings

    node = await Engine.start(os.urandom(32), EngineSettings(bootstrap=bootstrap))
    await node.ready()

    def on_connection(stream: Any) -> None:
        nbytes = 0

        def take(message: memoryview) -> None:
            nonlocal nbytes
            nbytes += len(message)

        def answer() -> None:
            stream.send(str(nbytes).encode())
            stream.end()

        stream.start(take, answer, lambda _: None)

    await node.listen(on_connection)
    print(node.public_key.hex(), flush=True)
    await asyncio.sleep(keep_seconds)


async def send(bootstrap: list[tuple[str, int]], key: str, seconds: float) -> dict[str, float]:
    """As fast as the stream takes it."""
    from tether.swarm.engine.engine import Engine, EngineSettings

    node = await Engine.start(os.urandom(32), EngineSettings(bootstrap=bootstrap))
    stream = await node.connect(bytes.fromhex(key))
    answer, ended = bytearray(), asyncio.Event()
    stream.start(answer.extend, ended.set, lambda _: ended.set())
    message = bytes(MESSAGE_NBYTES)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        if not stream.send(message):
            await stream.drained()
    stream.end()
    await ended.wait()
    figures = {"nbytes": int(answer), "seconds": time.perf_counter() - began}
    await node.close()
    return figures


@contextmanager
def serving(bootstrap: Sequence[tuple[str, int]], keep_seconds: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that counts what comes, and its key."""
    arguments = json.dumps({"bootstrap": bootstrap, "keep_seconds": keep_seconds})
    with subprocess.Popen([sys.executable, __file__, "--as-server", arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, next(iter(process.stdout or [])).strip()
        finally:
            process.terminate()


def client_command(bootstrap: Sequence[tuple[str, int]], key: str, seconds: float) -> list[str]:
    """A process that sends to this key and prints its figures."""
    return [sys.executable, __file__, "--as-client", json.dumps({"bootstrap": bootstrap, "key": key, "seconds": seconds})]


def python_client(bootstrap: list[tuple[str, int]], key: str, seconds: float) -> dict[str, float]:
    """A process of its own."""
    return _figures(client_command(bootstrap, key, seconds))


def node_client(bootstrap: list[tuple[str, int]], key: str, seconds: float) -> dict[str, float]:
    """The same in Node, by Holepunch's own packages."""
    arguments = json.dumps({"bootstrap": bootstrap, "key": key, "seconds": seconds, "size": MESSAGE_NBYTES})
    return _figures(["node", "-e", NODE_CLIENT, arguments])


def _figures(command: list[str]) -> dict[str, float]:
    from node_packages import node_folder

    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=node_folder(), timeout=120)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(rounds: int, seconds: float) -> dict[str, list[float]]:
    """MB/s by way, a figure a round; the ways alternate."""
    from engine_harness import Testnet

    found: dict[str, list[float]] = {}
    with Testnet() as net, serving(net.bootstrap, 600 + 10 * rounds * seconds) as (_, key_of_python):
        keys = {"Python": key_of_python, "Node": net.keys["sink"]}
        for _ in range(rounds):
            for sender, client in (("Python", python_client), ("Node", node_client)):
                for receiver, key in keys.items():
                    figures = client(net.bootstrap, key, seconds)
                    found.setdefault(f"{sender} → {receiver}", []).append(figures["nbytes"] / 1e6 / figures["seconds"])
    return found


def report(found: dict[str, list[float]]) -> None:
    """A table, and the same as JSON."""
    reference = statistics.median(found["Node → Node"])
    rows = {way: statistics.median(rates) for way, rates in found.items()}
    for way, rate in rows.items():
        print(f"{way:18} {rate:8.1f} MB/s   {rate / reference:5.2f} × Node → Node")
    print(f"aim: Python → Python ≥ {AIM} × Node → Node")
    results.write("streams", **{"MB/s": found, "median": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--as-server", help=argparse.SUPPRESS)
    parser.add_argument("--as-client", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_server:
        asyncio.run(serve(**json.loads(given.as_server)))
    elif given.as_client:
        print(json.dumps(asyncio.run(send(**json.loads(given.as_client)))))
    else:
        sys.path.insert(0, str(TESTS))
        report(measure(given.rounds, given.seconds))


if __name__ == "__main__":
    main()
