"""`python benchmarks/swarm/blobs.py`: bytes a second of verified blobs between two ends of a stream in memory, in one process."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass

from blake3 import blake3

from tether.ports import SignedManifest
from tether.swarm.blobs.blobs import BlobConnection, Kind
from tether.testing.streams import stream_pair
from tether.types import Digest


@dataclass
class _Shelf:
    blobs: dict[Digest, bytes]

    async def authorise(self, peer: str, kind: Kind, digest: Digest) -> None:
        del peer, kind, digest

    async def blob(self, digest: Digest) -> bytes | None:
        return self.blobs.get(digest)

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        del digest
        return None

    async def bitmap(self, digest: Digest) -> bytes | None:
        del digest
        return None


async def rate(nbytes: int, count: int) -> tuple[float, float]:
    """Bytes a CPU second, and a second of the clock."""
    contents = [index.to_bytes(8, "little") * (nbytes // 8) for index in range(8)]
    blobs = {Digest(blake3(data).hexdigest()): data for data in contents}
    first, second = stream_pair()
    first.scrub = second.scrub = False
    ours, _ = BlobConnection(first), BlobConnection(second, _Shelf(blobs))
    source, digests = ours.source(), list(blobs)

    async def some(number: int) -> None:
        for turn in range(number, count, source.in_flight):
            await source.fetch(digests[turn % len(digests)], nbytes)

    cpu, clock = time.process_time(), time.perf_counter()
    await asyncio.gather(*(some(number) for number in range(source.in_flight)))
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    ours.destroy()
    return nbytes * count / cpu, nbytes * count / clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=256)
    options = parser.parse_args()
    for nbytes in (4 << 20, 1 << 20, 64 << 10):
        rates = [asyncio.run(rate(nbytes, (options.mib << 20) // nbytes)) for _ in range(options.rounds)]
        cpu, clock = (statistics.median(each) / 1e6 for each in zip(*rates, strict=True))
        print(f"blobs of {nbytes >> 10:5} KiB: {cpu:6.0f} MB a CPU second, {clock:6.0f} MB/s")


if __name__ == "__main__":
    main()
