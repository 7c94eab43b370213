"""Pings the workers and says who is silent and who is back (`health.py` decides).

Each has a connection for it alone, on which a worker's event loop answers. One that does not answer is connected to anew, again and again:
while it is cut off TCP waits twice as long before each try to send, so that an old connection may be dead for as long again afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import structlog

from tether.orchestrator.health import LIMIT, PERIOD, Health

__all__ = ["Line", "Pinger"]

log = structlog.get_logger("tether.orchestrator")


class Line(Protocol):
    """A connection to a worker: one of Dask's comms."""

    async def write(self, msg: Any) -> Any: ...

    async def read(self) -> Any: ...

    def abort(self) -> None: ...


class Pinger:
    """Belongs to one event loop."""

    def __init__(self, connect: Callable[[str], Awaitable[Line]], silent: Callable[[str], None], back: Callable[[str], None]) -> None:
        """`connect`: to a worker's address, within about `LIMIT`. `silent` and `back` get the address, once for each change."""
        self._connect, self._silent, self._back = connect, silent, back
        self._health = Health()
        self._lines: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.TimerHandle | None = None

    def add(self, address: str) -> None:
        """A worker came, and is to be pinged from now on."""
        self.remove(address)
        self._health.add(address, time.monotonic())
        self._lines[address] = asyncio.ensure_future(self._ping(address))
        if self._looking is None:
            self._wait()

    def remove(self, address: str) -> None:
        """It went."""
        self._health.remove(address)
        line = self._lines.pop(address, None)
        if line is not None:
            line.cancel()

    async def aclose(self) -> None:
        """Ping nobody any more."""
        lines = list(self._lines.values())
        for address in list(self._lines):
            self.remove(address)
        if self._looking is not None:
            self._looking.cancel()
        await asyncio.gather(*lines, return_exceptions=True)

    def _wait(self) -> None:
        now = time.monotonic()
        self._looking = None
        if self._lines:
            self._looking = asyncio.get_running_loop().call_later(max(self._health.next_look(now) - now, 0.0), self._look)

    def _look(self) -> None:
        for address in self._health.look(time.monotonic()):
            log.warning("worker silent", worker=address)
            self._silent(address)
        self._wait()

    async def _ping(self, address: str) -> None:
        while True:
            try:
                await self._converse(address)
            except (OSError, TimeoutError):
                await asyncio.sleep(PERIOD)
            except Exception:  # whatever it answered: one that is not pinged would be silent for ever
                log.exception("pinging failed", worker=address)
                await asyncio.sleep(PERIOD)

    async def _converse(self, address: str) -> None:
        """Until the connection ends, or an answer takes too long."""
        line = await self._connect(address)
        try:
            await line.write({"op": "tether_pings", "reply": False})
            while True:
                await line.write({})
                async with asyncio.timeout(LIMIT):
                    await line.read()
                if self._health.answered(address, time.monotonic()):
                    log.info("worker back", worker=address)
                    self._back(address)
                await asyncio.sleep(PERIOD)
        finally:
            line.abort()
