"""Peers that may be gone: on whose streams nothing comes back, and who were here until a moment ago. Knows no network.

A process that was killed says nothing, and a stream bears 30 s of silence, since a cut of some seconds must not end it. So it is connected
to beside the silent stream; only if the peer answers there, and still not here though it was asked again, the stream is cut. A peer that is
only slow is slow on both, and keeps what it works on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import structlog

from tether.errors import TetherError
from tether.swarm.node.held import HeldStream
from tether.swarm.node.standing import ConnectionLimits

__all__ = ["Doubts"]

log = structlog.get_logger("tether.swarm")
_MOST_MISSED = 4096


class Doubts:
    """Of one lab's connections. Belongs to the loop that it is made on."""

    def __init__(
        self, limits: ConnectionLimits, of: Callable[[str], Iterable[HeldStream]], beside: Callable[[HeldStream], Awaitable[object]]
    ) -> None:
        """`of`: all streams with a peer. `beside`: connects to the stream's peer once more, for what the stream is for."""
        self._limits, self._of, self._beside = limits, of, beside
        self._loop = asyncio.get_running_loop()
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._missed: dict[str, float] = {}
        """When the last stream to a peer was lost, on the loop's clock, oldest first."""

    def look(self, streams: Iterable[HeldStream], now: float) -> list[HeldStream]:
        """To be called each second; which streams were silent and are not any more."""
        heard = []
        for held in streams:
            before = held.is_silent
            if not held.listen(now, self._limits.silence):
                if before:
                    heard.append(held)
            elif held.is_awaited and held.peer not in self._asking:
                self._ask(held)
        while self._missed and next(iter(self._missed.values())) + self._limits.returning < now:
            del self._missed[next(iter(self._missed))]
        return heard

    def lost(self, held: HeldStream) -> None:
        """A stream is gone: so may its peer be, for a while. Not if it was cut on purpose, or closed here since nobody used it."""
        if not (held.was_cut or held.is_guest or (held.is_leaving and held.peer not in self._missed)):
            self.miss(held.peer)

    def miss(self, peer: str) -> None:
        """It is about to go, or has gone, and another process of it to come."""
        self._missed.pop(peer, None)
        self._missed[peer] = self._loop.time()
        if len(self._missed) > _MOST_MISSED:
            del self._missed[next(iter(self._missed))]

    def expected_until(self, peer: str) -> float:
        """Until when, on the loop's clock, it is worth waiting for a peer that was here a moment ago; 0: it was not."""
        return self._missed.get(peer, -self._limits.returning) + self._limits.returning

    def dismiss(self, peer: str) -> None:
        """It is not to be waited for, whatever happens to its streams."""
        self._missed.pop(peer, None)
        asking = self._asking.pop(peer, None)
        if asking is not None:
            asking.cancel()

    async def aclose(self) -> None:
        """Ask nobody any more."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _ask(self, held: HeldStream) -> None:
        task = self._asking[held.peer] = self._loop.create_task(self._prove(held), name=f"swarm-doubt-{held.peer[:8]}")
        task.add_done_callback(lambda _: self._asking.get(held.peer) is task and self._asking.pop(held.peer))

    async def _prove(self, held: HeldStream) -> None:
        """Cut what the peer is silent on, if it answers elsewhere."""
        try:
            await self._beside(held)
        except TetherError as error:
            log.info("a peer is silent, and can't be reached anew", peer=held.peer, error=str(error))
            return  # the next look asks again, if somebody still waits then
        silent = {each: each.came for each in self._of(held.peer) if each.is_silent}
        for each in silent:
            each.poke()
        await asyncio.sleep(self._limits.proof)
        for each, came in silent.items():
            if each.came == came and not each.is_gone:
                log.info("a stream that leads nowhere is cut: its peer answers on another one", peer=held.peer, purpose=each.purpose)
                each.destroy()
