"""A small DHT on this machine, for tests and for trying things: no packet leaves it. Nodes of the real engine, in a process of their own.

Give its `bootstrap` to each lab that is to be on it: `with testnet() as net, tether.up(data=one, bootstrap=net.bootstrap) as lab: ...`
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tether.errors import StartFailedError
from tether.swarm.engine.engine import Engine, EngineSettings

__all__ = ["Testnet", "testnet"]

_HOST = "127.0.0.1"
_NODES = 5
"""With fewer than four hyperdht can't tell behind what kind of NAT it is, and the holes that it punches lead nowhere (measured)."""
_END = 10.0
"""Seconds that the nodes have to say goodbye."""


@dataclass(frozen=True, slots=True)
class Testnet:
    """Nodes that know each other."""

    __test__ = False  # pytest would take it for a test

    nodes: tuple[tuple[str, int], ...]
    """Host and UDP port of each."""
    pid: int

    @property
    def bootstrap(self) -> str:
        """As `--bootstrap` and `TETHER_BOOTSTRAP` take it."""
        return ",".join(f"{host}:{port}" for host, port in self.nodes)


@contextmanager
def testnet(nodes: int = _NODES, host: str = _HOST) -> Iterator[Testnet]:  # noqa: PT028 (it is no test)
    """A DHT of so many nodes, until the block ends; or this process does, however it ends.

    Raises: StartFailedError: it did not start; the error has its output.
    """
    command = [sys.executable, "-m", "tether.testing.testnet", str(nodes), host]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        try:
            line = process.stdout.readline() if process.stdout else b""
            if not line:
                _, said = process.communicate(timeout=_END)
                raise StartFailedError(f"the testnet did not start:\n{said.decode(errors='replace')[-2000:]}")
            yield Testnet(tuple((found[0], found[1]) for found in json.loads(line)), process.pid)
        finally:
            _end(process)


testnet.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test, wherever it is imported


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()  # which ends it
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()


async def _run(count: int, host: str) -> None:
    engines: list[Engine] = []
    addresses: list[tuple[str, int]] = []
    for _ in range(count):
        settings = EngineSettings(bootstrap=tuple(addresses[:1]), host=host, ephemeral=False, firewalled=False)
        engine = await Engine.start(os.urandom(32), settings)
        engines.append(engine)
        local = (await engine.status()).local
        addresses.append((host, local[1] if local else 0))
    for engine in engines:
        await engine.ready()
    sys.stdout.write(json.dumps(addresses) + "\n")
    sys.stdout.flush()
    await _ended()
    await asyncio.gather(*(engine.close() for engine in engines))


async def _ended() -> None:
    """Wait for the end of standard input, or for a signal."""
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end.set)
    loop.add_reader(sys.stdin.fileno(), end.set)
    await end.wait()
    loop.remove_reader(sys.stdin.fileno())


if __name__ == "__main__":
    asyncio.run(_run(int(sys.argv[1]), sys.argv[2]))
