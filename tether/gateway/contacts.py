"""Other labs that come and go: the manager is asked for them while somebody listens to events, and not otherwise."""

from __future__ import annotations

import asyncio
from typing import Final

from tether.errors import TetherError
from tether.gateway.event_log import EventLog
from tether.ports import Management
from tether.routing.changes import Contacts

__all__ = ["ContactWatch"]

_LOOK: Final = 1.0
"""Seconds between looks: who comes and goes in between was not here."""
_IDLE: Final = 30.0
"""Seconds after the last listener began to wait: over the keep-alive of a stream, and the wait of who asks again and again."""


class ContactWatch:
    """Of one gateway; belongs to its loop."""

    def __init__(self, log: EventLog, management: Management) -> None:
        self._log, self._management = log, management
        self._heard_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        log.on_listener = self._listened

    def close(self) -> None:
        """Ask no more."""
        if self._looking is not None:
            self._looking.cancel()

    def _listened(self) -> None:
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        if self._looking is None or self._looking.done():
            self._looking = loop.create_task(self._look(loop))

    async def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        while loop.time() < self._heard_at + _IDLE:
            try:
                found = await self._management.contacts()
                self._log.meet(Contacts(frozenset(found["admitted"]), frozenset(found["connected"])))
            except TetherError:
                pass  # the manager is away; the next look shows what came of it
            await asyncio.sleep(_LOOK)
        self._log.meet(None)
