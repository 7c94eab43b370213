"""An answer in parts on its way through the gateway: what came and was not read yet, and since when nothing does."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from tether.ports import HopReply

__all__ = ["Parts"]


class Parts:
    """One stream. Few parts are here at a time: the worker waits for word that one was read. Belongs to one event loop."""

    def __init__(self, patience: float | None) -> None:
        """`patience`: seconds for each part; None: the whole has a deadline instead."""
        self.patience = patience
        self.have_begun = False
        """Whether something came: then no other worker can begin again."""
        self._since: float | None = time.monotonic()
        """When the wait for the next part began; None: it is the reader's turn."""
        self._unread: deque[HopReply] = deque()
        self._is_reading = self._are_over = False
        self._news = asyncio.Event()
        self._taken: Callable[[], None] = _nothing

    def sent(self, taken: Callable[[], None]) -> None:
        """A worker has the request; `taken` tells it that one of its parts was read."""
        self._taken = taken

    def came(self, reply: HopReply) -> None:
        """One more part."""
        self.have_begun, self._since = True, None
        self._unread.append(reply)
        self._news.set()

    def end(self, reply: HopReply) -> None:
        """The worker's last word: an error, or OK, with one more part in it if it has a body."""
        if reply.status != 200 or reply.body:  # noqa: PLR2004 (HTTP's OK)
            self._unread.append(reply)
        self._since, self._are_over = None, True
        self._news.set()

    def are_late(self, now: float) -> bool:
        """Whether the worker took too long for the next part."""
        return self.patience is not None and self._since is not None and now > self._since + self.patience

    async def next(self) -> HopReply | None:
        """The next part, else an error, which is the last; None: there are no more. Who asks has done with the one before."""
        if self._is_reading:
            self._is_reading = False
            self._taken()
        while not self._unread:
            if self._are_over:
                return None
            if self._since is None:
                self._since = time.monotonic()
            self._news.clear()
            await self._news.wait()
        self._is_reading = True
        return self._unread.popleft()


def _nothing() -> None:
    """No worker has it yet."""
