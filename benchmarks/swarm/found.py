"""`python benchmarks/swarm/found.py`: how long until a lab that is known by its address only answers a peer that has just come.

A real lab on a DHT of this machine. Each round is a process that was never there: it starts a node, enters the DHT, and calls `ping` of the
lab. The aim is for that call: the lab found, connected to, answered. What comes before it is printed beside it, and a second call, for
which there is a connection.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import results
from nacl.signing import SigningKey

import tether
from tether.errors import PeerNotFoundError
from tether.security.addresses import public_key
from tether.testing.testnet import testnet

if TYPE_CHECKING:
    from tether.swarm.node.node import Node

AIM_MS = 100.0
PATIENCE = 30.0
PARTS = {
    "imports": "Python and Tether's modules",
    "start": "the engine: PythonMonkey, the bundle, sockets",
    "ready": "the DHT entered",
    "first": "found, connected, answered",
    "second": "a call more",
}


async def come(values: dict[str, Any]) -> dict[str, float]:
    """As the peer; milliseconds of each part."""
    from tether.swarm.engine.engine import EngineSettings
    from tether.swarm.node.node import Node, NodeSettings, Standing
    from tether.swarm.rpc.rpc import Service

    times = [values["began"], time.time()]
    settings, seed = NodeSettings(engine=EngineSettings(bootstrap=values["bootstrap"])), bytes.fromhex(values["seed"])
    node = await Node.start(seed, Service(lambda _peer, _method: None), None, lambda _: Standing.KNOWN, settings)
    times.append(time.time())
    if not values["at_once"]:
        await node.ready()
    times.append(time.time())
    for _ in range(2):
        await answer(node, values["lab"], time.time() + values.get("patience", 0.0))
        times.append(time.time())
    await node.aclose()
    return {name: 1e3 * (end - start) for name, (start, end) in zip(PARTS, itertools.pairwise(times), strict=True)}


async def answer(node: Node, lab: str, until: float) -> None:
    """Of `ping`; asked again until then, where the lab is not found."""
    while True:
        try:
            await node.request(lab, "ping", b"", PATIENCE)
        except PeerNotFoundError:
            if time.time() > until:
                raise
            await asyncio.sleep(0.1)
        else:
            return


def measure(rounds: int, *, at_once: bool) -> dict[str, list[float]]:
    """Milliseconds of each part, a figure a round."""
    seeds = [os.urandom(32) for _ in range(rounds + 1)]
    with testnet() as net, tempfile.TemporaryDirectory() as folder, tether.up(workers=1, data=folder, bootstrap=net.bootstrap) as lab:
        for seed in seeds:
            lab.allow(SigningKey(seed).verify_key.encode().hex(), "infer:*")
        values = {"bootstrap": net.nodes, "lab": public_key(lab.address), "at_once": at_once}
        peer(seeds.pop(), values | {"patience": PATIENCE})  # the lab itself comes to the DHT when somebody may call it
        came = [peer(seed, values) for seed in seeds]
    return {name: [each[name] for each in came] for name in PARTS}


def peer(seed: bytes, values: dict[str, Any]) -> dict[str, float]:
    """A process of its own; what it took."""
    command = [sys.executable, __file__, "--as-peer", json.dumps(values | {"seed": seed.hex(), "began": time.time()})]
    took: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    return took


def report(found: dict[str, list[float]], heading: str) -> None:
    """Median and 95th percentile of each part."""
    print(f"{heading:56}{'p50 ms':>8}{'p95 ms':>8}")
    for name, took in found.items():
        p95 = statistics.quantiles(took, n=20)[-1] if len(took) > 1 else took[0]
        aim = f"   aim ≤ {AIM_MS:g}" if name == "first" else ""
        print(f"  {PARTS[name]:54}{statistics.median(took):8.1f}{p95:8.1f}{aim}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--as-peer", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_peer:
        print(json.dumps(asyncio.run(come(json.loads(given.as_peer)))))
        return
    entered = measure(given.rounds, at_once=False)
    report(entered, "once the DHT was entered")
    at_once = measure(max(2, given.rounds // 4), at_once=True)
    report(at_once, "asked at once")
    results.write("found", milliseconds=entered, at_once_milliseconds=at_once)


if __name__ == "__main__":
    main()
