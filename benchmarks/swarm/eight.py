"""`python benchmarks/swarm/eight.py`: eight labs fetch a model from one at once; what that one sends, and how long it takes.

Real stores, access and nodes, real encrypted streams on a DHT of this machine; only that all of them live in one process on one loop is not
as it is. `benchmarks/swarm_scale` simulates many more.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import results
import structlog

from tether.security.identity import Identity
from tether.swarm.blobs.blobs import PeerBlobs
from tether.swarm.engine.engine import EngineSettings
from tether.swarm.node.node import Node, NodeSettings, Standing
from tether.swarm.rpc.rpc import Service
from tether.testing.testnet import testnet

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "manager"))
import peering_labs  # of the tests: a lab but for its services

if TYPE_CHECKING:
    from tether.types import Digest

MIB = 1 << 20
AIM = 1.1
"""Copies that the origin sends."""


class Lab(peering_labs.Lab):  # type: ignore[misc]  # tests are not typed
    """With a node in place of streams in memory."""

    node: Node
    read_nbytes = 0
    """Of blobs, for peers."""

    async def enter(self, bootstrap: Any) -> None:
        """The DHT."""
        settings = NodeSettings(engine=EngineSettings(bootstrap=bootstrap))
        self.node = await Node.start(self.identity.seed, Service(lambda _peer, _method: None), self, lambda _: Standing.KNOWN, settings)
        self.node.on_have.append(self.pulling.gained)
        self.authorise, self.manifest, self.bitmap = self.shelf.authorise, self.shelf.manifest, self.shelf.bitmap
        await self.node.ready()

    async def blob(self, digest: Digest) -> bytes | None:
        """As the shelf, counted."""
        data: bytes | None = await self.shelf.blob(digest)
        self.read_nbytes += len(data or b"")
        return data

    async def connect(self, peer: str) -> PeerBlobs:
        """As `Presence` does."""
        return (await self.node.blobs(peer)).unchecked()

    def announce(self, digest: Digest, indices: Any) -> None:
        """Likewise."""
        self.node.have(digest, tuple(indices))


async def fetch(bootstrap: Any, folder: Path, nbytes: int, count: int) -> dict[str, Any]:
    """Copies that the origin and each of the others gave, and seconds."""
    others: dict[str, Any] = {}
    labs = [Lab(folder / str(number), Identity(os.urandom(32)), others) for number in range(count + 1)]
    origin, *takers = labs
    try:
        for lab in labs:
            await lab.enter(bootstrap)
            lab.allow(*(other for other in labs if other is not lab))
        origin.give("large", {"model.onnx": peering_labs.model_bytes(), "weights.bin": os.urandom(nbytes)})
        wish, keys, began = origin.wish(), [lab.key for lab in labs], time.perf_counter()
        await asyncio.gather(*(taker.pulling.pull(wish, [key for key in keys if key != taker.key]) for taker in takers))
        seconds = time.perf_counter() - began
    finally:
        for lab in labs:
            await lab.node.aclose()
            lab.close()
    return {"origin": origin.read_nbytes / nbytes, "others": [taker.read_nbytes / nbytes for taker in takers], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=32)
    parser.add_argument("--peers", type=int, default=8)
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with testnet() as net, tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(fetch(net.nodes, Path(folder), given.mib * MIB, given.peers))
    print(f"{given.peers} labs fetched {given.mib} MiB in {found['seconds']:.1f} s")
    least, most = min(found["others"]), max(found["others"])
    print(f"the origin sent {found['origin']:.2f} copies (aim ≤ {AIM}), the others {least:.2f} to {most:.2f} each")
    results.write("eight", mib=given.mib, peers=given.peers, **found)


if __name__ == "__main__":
    main()
