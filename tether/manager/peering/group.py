"""The labs that hold copies of one publisher's models: asked each second what they have, which also says that they are there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import structlog

from tether.errors import ForbiddenError, TetherError
from tether.manager.peering.group_view import Asked, Said, View, parse_said
from tether.manager.peering.replication import PATIENCE, Presence
from tether.swarm.feeds.entries import Content

__all__ = ["INTERVAL", "AskMember", "Group"]

log = structlog.get_logger("tether.swarm")
INTERVAL = 1.0
"""Seconds between questions."""
_AWAY = 5.0
"""Seconds between questions to one that is not here: connecting to it costs some packets each time."""

AskMember = Callable[[str, bytes], Awaitable[bytes]]
"""Key, value of `have` → answer. Raises: TetherError."""


class Group:
    """Belongs to one event loop."""

    def __init__(self, publisher: str, ask: AskMember) -> None:
        self.publisher, self._ask = publisher, ask
        self.content: Content | None = None
        """What the publisher's feed says; None: not known yet."""
        self._loop = asyncio.get_running_loop()
        self._met: dict[str, float] = {}
        """When each was first asked."""
        self._presence = Presence(self._loop.time())
        self._said: dict[str, Said] = {}
        self._heard: dict[str, float] = {}
        """When each was asked what it said last."""
        self._answered: set[str] = set()
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def aclose(self) -> None:
        """Ask nobody any more."""
        self.meet(())
        await asyncio.sleep(0)

    def meet(self, peers: Iterable[str]) -> None:
        """These belong to it, this lab itself left out."""
        members = set(peers)
        for peer in self._asking.keys() - members:
            self._asking.pop(peer).cancel()
            self._said.pop(peer, None)
            self._heard.pop(peer, None)
            self._answered.discard(peer)
            self._met.pop(peer, None)
            self._presence.left(peer)
        for peer in members - self._asking.keys():
            self._met[peer] = self._loop.time()
            self._asking[peer] = asyncio.create_task(self._follow(peer), name=f"group-{peer[:8]}")

    def is_clear(self) -> bool:
        """Whether all were heard, or had the time for it: who decides before that takes what others hold."""
        return not any(self._is_new(peer) for peer in self._asking.keys() - self._answered)

    def view(self, own: str, said: Said) -> View:
        """What is known now; `said`: by this lab. To be called each second."""
        here = self._presence.here(self._loop.time())
        return View(self.content or Content(), {**self._said, own: said}, here | {own}, self.publisher)

    def asked(self, peer: str) -> float | None:
        """When, on the loop's clock, a lab was asked the question that it answered last."""
        return self._heard.get(peer)

    async def _follow(self, peer: str) -> None:
        while True:
            try:
                await self._asked(peer)
                pause = INTERVAL
            except TetherError as error:
                pause = INTERVAL if self._is_new(peer) or peer in self._presence.here(self._loop.time()) else _AWAY
                log.debug("a lab that holds copies does not say what it has", peer=peer, code=error.code, error=str(error))
            except Exception:  # a bug: the others are asked on
                log.exception("a lab that holds copies could not be asked", peer=peer)
                pause = _AWAY
            await asyncio.sleep(pause)

    def _is_new(self, peer: str) -> bool:
        return self._loop.time() - self._met[peer] < PATIENCE

    async def _asked(self, peer: str) -> None:
        before, began = self._said.get(peer), self._loop.time()
        try:
            answer = await self._ask(peer, msgspec.json.encode(Asked(self.publisher, before.state if before else "")))
        except ForbiddenError:  # it takes no part, or has not read yet who does
            self._said.pop(peer, None)
            self._heard.pop(peer, None)
            self._presence.left(peer)
            raise
        self._said[peer], self._heard[peer] = parse_said(answer, before), began
        self._answered.add(peer)
        self._presence.heard(peer, self._loop.time())
