"""`python benchmarks/swarm/calls.py`: many RPC calls of a peer to a real lab, 100 in flight, and what the lab's memory does meanwhile.

The lab is `tether.up()` with one worker, on a DHT of this machine; the peer is a node in a process of its own that was allowed to call.
The method is `ping`, which every peer may call, so each call is authorised and answered by the manager. The lab's memory is the PSS of
all its processes, read from outside. Then blobs' sort of traffic: an encrypted stream, and what its two processes grow by.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import results
import streams
from nacl.signing import SigningKey

import tether
from tether.security.addresses import public_key
from tether.testing.testnet import Testnet, testnet

MIB = 1 << 20
PEER = bytes(range(32))
"""The seed of its key."""
WARM = 10_000
"""Calls after which the memory is what growth is measured from."""
AIM_GROWTH, AIM_STREAM, AIM_SECONDS, AIM_REPLACEMENTS, AIM_MICROSECONDS = 300 * MIB, 5 * MIB, 1.0, 6, 35.0


async def call(bootstrap: list[tuple[str, int]], lab: str, calls: int, in_flight: int) -> None:
    """As a peer: say each `WARM` calls how it goes."""
    from tether.swarm.engine.engine import EngineSettings
    from tether.swarm.node.node import Node, NodeSettings, Standing
    from tether.swarm.rpc.rpc import Service

    settings = NodeSettings(engine=EngineSettings(bootstrap=bootstrap))
    node = await Node.start(PEER, Service(lambda _peer, _method: None), None, lambda _: Standing.KNOWN, settings)
    await node.ready()
    left, done, failed, slowest = calls, 0, 0, 0.0

    async def some() -> None:
        nonlocal left, done, failed, slowest
        while left > 0:
            left -= 1
            began = time.perf_counter()
            try:
                await node.request(lab, "ping", b"", 60.0)
            except Exception as error:  # counted, whatever it is
                failed += 1
                print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            slowest = max(slowest, time.perf_counter() - began)
            done += 1
            if done % WARM == 0:
                print(json.dumps({"calls": done, "failed": failed, "slowest": slowest, "cpu": time.process_time()}), flush=True)

    await asyncio.gather(*(some() for _ in range(in_flight)))
    await node.aclose()


@dataclass
class Watch:
    """A lab's processes, from outside."""

    lab: tether.Lab
    managers: list[int] = field(default_factory=list)
    """Those that were it, in turn."""

    def look(self) -> int:
        """PSS of all of them; notes another process in the manager's place."""
        services = self.lab.status().services
        manager = next(each.pid for each in services if each.role == "manager")
        if manager not in self.managers[-1:]:
            self.managers.append(manager)
        return sum(map(pss, services_and_children(each.pid for each in services)))

    def cpu(self) -> float:
        """Seconds of the manager that is there now."""
        times = psutil.Process(self.managers[-1]).cpu_times()
        return float(times.user + times.system)


def services_and_children(pids: Iterator[int]) -> set[int]:
    """Runner processes and sandboxes are a service's children."""
    found: set[int] = set()
    for pid in pids:
        try:
            found |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return found


def pss(pid: int) -> int:
    """Bytes; shared pages by halves, thirds …; 0: it is gone."""
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


@contextmanager
def caller(**values: Any) -> Iterator[subprocess.Popen[str]]:
    """The peer."""
    with subprocess.Popen([sys.executable, __file__, "--as-caller", json.dumps(values)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def measure_calls(net: Testnet, calls: int, in_flight: int) -> dict[str, Any]:
    """A row for each `WARM` calls, while they are made."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, tether.up(workers=1, data=folder, bootstrap=net.bootstrap) as lab:
        lab.allow(SigningKey(PEER).verify_key.encode().hex(), "infer:*")
        watch = Watch(lab)
        before, began = watch.look(), time.perf_counter()
        key = public_key(lab.address)
        with caller(bootstrap=net.nodes, lab=key, calls=calls, in_flight=in_flight) as peer:
            for line in peer.stdout or []:
                row = json.loads(line)
                if "error" in row:
                    print(f"failed: {row['error']}", flush=True)
                    continue
                seconds = time.perf_counter() - began
                memory = {"pss": watch.look(), "replacements": len(watch.managers) - 1}
                rows.append({**row, **memory, "seconds": seconds, "manager_cpu": watch.cpu()})
                show(rows)
    return {"before": before, "rows": rows}


def show(rows: list[dict[str, Any]]) -> None:
    """At 1, 2, 5, 10, 20 … times `WARM`: a line."""
    row, count = rows[-1], rows[-1]["calls"] // WARM
    if str(count).rstrip("0") in {"1", "2", "5"}:
        grown = (row["pss"] - rows[0]["pss"]) / MIB
        print(
            f"{row['calls']:>9,} calls  {row['seconds']:7.1f} s  lab {row['pss'] / MIB:6.0f} MiB ({grown:+.0f})  "
            f"slowest {row['slowest'] * 1e3:6.0f} ms  failed {row['failed']}  replaced {row['replacements']}",
            flush=True,
        )


def measure_stream(net: Testnet, seconds: float) -> dict[str, int]:
    """What the process of each end grows by while a stream runs, after the first second of it."""
    samples: list[tuple[int, int]] = []
    with streams.serving(net.nodes, seconds + 60) as (receiver, key):
        command = streams.client_command(net.nodes, key, seconds)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
            while sender.poll() is None:
                samples.append((pss(sender.pid), pss(receiver.pid)))
                time.sleep(0.1)
            said = sender.stdout.read() if sender.stdout else ""
    nbytes, took = (json.loads(said)[name] for name in ("nbytes", "seconds"))
    begun = max(0, len(samples) - round(0.8 * took / 0.1))  # the process' own start, and the stream's first fifth, are before this
    settled = samples[begun:-5] or samples
    grown = [last - first for first, last in zip(settled[0], settled[-1], strict=True)]
    return {"nbytes": nbytes, "sender": grown[0], "receiver": grown[1]}


def report(calls: dict[str, Any], stream: dict[str, int]) -> None:
    """What was asked for, beside what came."""
    first, last = calls["rows"][0], calls["rows"][-1]
    most = max(row["pss"] for row in calls["rows"])
    grown = (most - first["pss"]) / MIB
    print(f"the lab's PSS over its value after {first['calls']:,} calls: {grown:+.0f} MiB (aim < {AIM_GROWTH // MIB})")
    print(f"replacements of the manager: {last['replacements']} (aim ≤ {AIM_REPLACEMENTS}); failed: {last['failed']} (aim 0)")
    print(f"slowest call: {last['slowest'] * 1e3:.0f} ms (aim < {AIM_SECONDS * 1e3:.0f})")
    pace, peer, manager = (
        (last[what] - first[what]) / max(last["calls"] - first["calls"], 1) * 1e6 for what in ("seconds", "cpu", "manager_cpu")
    )
    print(f"{pace:.1f} µs a call (aim ≤ {AIM_MICROSECONDS:g}); CPU: the peer {peer:.1f} µs, the manager {manager:.1f} µs")
    ends = ", ".join(f"{end} {stream[end] / MIB:+.1f} MiB" for end in ("sender", "receiver"))
    print(f"{stream['nbytes'] / 1e9:.1f} GB over a stream: {ends} (aim < {AIM_STREAM // MIB})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--in-flight", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the stream")
    parser.add_argument("--as-caller", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_caller:
        asyncio.run(call(**json.loads(given.as_caller)))
    else:
        with testnet() as net:
            calls = measure_calls(net, max(WARM, given.calls), given.in_flight)
            stream = measure_stream(net, given.seconds)
        report(calls, stream)
        results.write("calls", calls=calls, stream=stream)


if __name__ == "__main__":
    main()
