"""`python benchmarks/swarm/rpc.py`: what a call costs, caller and answerer in one process, over a stream in memory."""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import statistics
import time

from tether.swarm.rpc.rpc import Call, RpcConnection, Service
from tether.testing.streams import INITIATOR, RESPONDER, stream_pair


async def _async(_: Call, value: bytes) -> bytes:
    return value


def _service() -> Service:
    service = Service(lambda _peer, _method: None)
    service.respond("echo", lambda _, value: value)
    service.respond("async", _async)
    return service


async def calls(method: str, count: int, in_flight: int, timeout: float | None) -> float:  # noqa: ASYNC109 (as in the API)
    """CPU seconds a call."""
    first, second = stream_pair()
    first.scrub = second.scrub = False
    caller, _ = RpcConnection(first, INITIATOR), RpcConnection(second, RESPONDER, _service())
    value = bytes(64)

    async def some() -> None:
        for _ in range(count // in_flight):
            await caller.request(method, value, timeout)

    await caller.request(method, value)
    begun = time.process_time()
    await asyncio.gather(*(some() for _ in range(in_flight)))
    seconds = time.process_time() - begun
    caller.destroy()
    return seconds / count


async def replies(nbytes: int, count: int) -> float:
    """Bytes a CPU second of large answers."""
    first, second = stream_pair()
    first.scrub = second.scrub = False
    service, data = Service(lambda _peer, _method: None), bytes(nbytes)
    service.respond("large", lambda *_: data)
    caller, _ = RpcConnection(first, INITIATOR), RpcConnection(second, RESPONDER, service)
    begun = time.process_time()
    await asyncio.gather(*(caller.request("large") for _ in range(count)))
    seconds = time.process_time() - begun
    caller.destroy()
    return nbytes * count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    cases = [("echo", 100, None), ("async", 100, None), ("echo", 100, 5.0), ("async", 100, 5.0), ("echo", 1, None)]
    for method, in_flight, timeout in cases:
        seconds = [asyncio.run(calls(method, options.calls, in_flight, timeout)) for _ in range(options.rounds)]
        print(f"{method:6} {in_flight:4} in flight, timeout {timeout}: {statistics.median(seconds) * 1e6:6.1f} µs a call (CPU)")
    rates = [asyncio.run(replies(4 << 20, 64)) for _ in range(options.rounds)]
    print(f"answers of 4 MiB: {statistics.median(rates) / 1e6:.0f} MB a CPU second")
    if options.profile:
        with cProfile.Profile() as profile:
            asyncio.run(calls("async", options.calls, 100, 5.0))
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()
