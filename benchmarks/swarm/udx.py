"""`python benchmarks/swarm/udx.py`: raw UDX over loopback, two processes, Python and Node in turns.

Bytes of the stream a second, and CPU seconds a GB of each end, which a busy machine disturbs less: in Python or Node, and in the kernel,
from the stream's beginning on. Nothing is encrypted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import results

from tether.swarm.udx import Udx, UdxStream

HERE = Path(__file__).resolve().parent
NODE_TESTS = HERE.parents[1] / "tests" / "swarm"
BLOCK_NBYTES = 1 << 16


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def cpu_times() -> tuple[float, float]:
    """Seconds of this process: its own, the kernel's for it."""
    times = os.times()
    return times.user, times.system


async def receive(udx: Udx, port: int) -> None:
    closed, began, nbytes, before = asyncio.get_running_loop().create_future(), 0.0, 0, cpu_times()

    def take(data: bytes) -> None:
        nonlocal began, nbytes
        began = began or time.perf_counter()
        nbytes += len(data)

    def end() -> None:
        say(nbytes=nbytes, seconds=time.perf_counter() - began, before=before, after=cpu_times())
        stream.write_end()

    stream = UdxStream(udx, 1, on_data=take, on_end=end, on_close=closed.set_result)
    stream.connect(next(iter(udx.sockets)), 2, port, "127.0.0.1")
    await closed


async def send(udx: Udx, port: int, seconds: float) -> None:
    closed, block, before = asyncio.get_running_loop().create_future(), os.urandom(BLOCK_NBYTES), cpu_times()
    end = time.perf_counter() + seconds

    def write() -> None:
        while time.perf_counter() < end:
            if not stream.write(block):
                return
        stream.on_drain = None
        stream.write_end()

    stream = UdxStream(udx, 2, on_drain=write, on_close=closed.set_result)
    stream.connect(next(iter(udx.sockets)), 1, port, "127.0.0.1")
    write()
    await closed
    say(before=before, after=cpu_times(), **stream.stats)


async def end_of_stream(role: str, seconds: float, *, batches: bool) -> None:
    """One of the two processes."""
    udx = Udx(gso=batches, gro=batches)
    say(port=udx.socket().bind(0, "127.0.0.1"))
    port = int(await asyncio.to_thread(sys.stdin.readline))
    await (receive(udx, port) if role == "receive" else send(udx, port, seconds))
    udx.close()


def start(kind: str, role: str, seconds: float) -> subprocess.Popen[str]:
    if kind == "node":
        command = ["node", str(HERE / "udx_node.js"), role, str(seconds)]
    else:
        command = [
            sys.executable,
            __file__,
            "--end",
            role,
            "--seconds",
            str(seconds),
            *(["--no-batches"] if kind == "python, no GSO" else []),
        ]
    environment = os.environ | {"NODE_PATH": str(NODE_TESTS / "node" / "node_modules")}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def measure(sender: str, receiver: str, seconds: float) -> list[float]:
    """MB/s, and CPU seconds a GB: of the sender, in the kernel for it, of the receiver, in the kernel for it."""
    ends = start(receiver, "receive", seconds), start(sender, "send", seconds)
    ports = [json.loads(end.stdout.readline())["port"] for end in ends if end.stdout]
    for end, port in zip(ends, reversed(ports), strict=True):
        if end.stdin:
            end.stdin.write(f"{port}\n")
            end.stdin.flush()
    came, left = (json.loads(end.stdout.readline()) for end in ends if end.stdout)
    for end in ends:
        end.communicate()
    spent = [after - before for end in (left, came) for before, after in zip(end["before"], end["after"], strict=True)]
    return [came["nbytes"] / 1e6 / came["seconds"], *(seconds / came["nbytes"] * 1e9 for seconds in spent)]


def pairs() -> list[tuple[str, str]]:
    found = [("python", "python"), ("python, no GSO", "python, no GSO")]
    if not (shutil.which("node") and shutil.which("npm")):
        print("Node is not here: its rows are left out (apt install nodejs npm)")
        return found
    sys.path.insert(0, str(NODE_TESTS))
    import node_packages  # of the tests; brings udx-native

    node_packages.node_folder()
    return [*found, ("node", "node"), ("python", "node"), ("node", "python")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python-only", action="store_true")
    parser.add_argument("--end", choices=["send", "receive"], help=argparse.SUPPRESS)
    parser.add_argument("--no-batches", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.end:
        asyncio.run(end_of_stream(arguments.end, arguments.seconds, batches=not arguments.no_batches))
        return
    kinds = [("python", "python")] if arguments.python_only else pairs()
    found: dict[tuple[str, str], list[list[float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind in kinds:
            found[kind].append(measure(*kind, arguments.seconds))
    columns = ("MB/s", "sends: own", "kernel", "takes: own", "kernel")
    print(f"{'sender':16}{'receiver':16}{''.join(f'{name:>12}' for name in columns)}   CPU s/GB; medians of {arguments.rounds}")
    medians = {kind: [statistics.median(column) for column in zip(*rows, strict=True)] for kind, rows in found.items()}
    for (sender, receiver), (rate, *cpu) in medians.items():
        print(f"{sender:16}{receiver:16}{rate:12.0f}{''.join(f'{each:12.2f}' for each in cpu)}")
    results.write("udx", columns=columns, rounds={" → ".join(kind): rows for kind, rows in found.items()})


if __name__ == "__main__":
    main()
