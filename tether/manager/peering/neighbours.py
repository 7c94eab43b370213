"""Says on the DHT that this lab is there and what it has, and finds others that have models of a publisher."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

import structlog

from tether.errors import MalformedRecordError, TetherError
from tether.security.access import Access
from tether.security.identity import Identity
from tether.swarm.records.peer_book import PeerBook
from tether.swarm.records.records import LIFETIME, Capabilities, Record, next_seq, sign, topic
from tether.types import Digest

__all__ = ["Neighbourhood", "Neighbours"]

log = structlog.get_logger("tether.swarm")
_REWRITE = 300.0
"""Seconds between writings of the record, and announcements: nodes forget after twenty minutes, so three may fail."""
_SPACING = 5.0
"""Seconds between writings, however often the catalog changes."""
_AGAIN = 30.0
"""Seconds until what could not be written is tried again."""
_AT_ONCE = 8
"""Records that are asked for side by side."""
_MOST = 64
"""Of those that a lookup names: who announces ten thousand inventions costs us these questions and no more."""
_FRESH = 20.0
"""Seconds for which a lookup is not repeated."""


class Neighbourhood(Protocol):
    """What is needed of the swarm; keys are hex."""

    async def announce(self, topic: bytes) -> int: ...

    async def lookup(self, topic: bytes) -> list[str]:
        """Who announced it; inventions among them."""
        ...

    async def put_record(self, value: bytes, seq: int) -> int: ...

    async def get_record(self, peer: str) -> tuple[bytes, int] | None:
        """Value and number of the mutable record under this key."""
        ...


class Neighbours:
    """Of one lab. Belongs to one event loop."""

    def __init__(
        self,
        swarm: Neighbourhood,
        identity: Identity,
        access: Access,
        offered: Callable[[], Capabilities],
        follows: Callable[[str], bool],
    ) -> None:
        """`offered`: what the lab has now; blocks. `follows`: whether the user follows this key."""
        self._swarm, self._identity, self._access, self._offered = swarm, identity, access, offered
        self._follows = follows
        self._books: dict[str, PeerBook] = {}
        self._looked: dict[str, float] = {}
        self._seq: int | None = None
        self._changed = asyncio.Event()
        self._changed.set()
        self._is_away = False

    def changed(self) -> None:
        """What the lab has is other than before."""
        self._changed.set()

    # --- being found

    async def run(self) -> None:
        """Announce and write the record, until cancelled. What fails is tried again, and said once."""
        while True:
            self._changed.clear()
            try:
                await self._appear()
                self._is_away, pause = False, _REWRITE
            except TetherError as error:
                if not self._is_away:
                    log.warning("not announced: peers find this lab by its address alone, until the network is back", error=str(error))
                self._is_away, pause = True, _AGAIN
            await asyncio.sleep(_SPACING)
            try:
                async with asyncio.timeout(pause - _SPACING):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _appear(self) -> None:
        offered = await asyncio.to_thread(self._offered)
        await self._write(offered, LIFETIME)
        for publisher in sorted({self._identity.public, *(held.publisher for held in offered.held)}):
            await self._swarm.announce(topic(publisher))

    async def _write(self, offered: Capabilities, lifetime: float) -> None:
        if self._seq is None:
            known = await self._swarm.get_record(self._identity.public)
            self._seq = known[1] if known else 0
        now = time.time()
        self._seq = next_seq(self._seq, now)
        try:
            record = sign(self._identity, offered, self._seq, now, lifetime)
        except MalformedRecordError as error:
            log.warning("what the lab offers does not go into a record", error=str(error))
            return
        await self._swarm.put_record(record, self._seq)

    async def leave(self) -> None:
        """Say that the lab is gone. Raises: TetherError: it could not be said."""
        if self._seq is not None:
            await self._write(Capabilities(), 0.0)

    # --- finding

    async def find(self, publisher: str) -> list[Record]:
        """Labs that say that they hold or serve models of this publisher (key, hex), as far as their records can be believed."""
        now = time.time()
        if now - self._looked.get(publisher, 0.0) > _FRESH:
            await self._look(publisher, now)
            self._looked[publisher] = now
        return self._book(publisher).peers(time.time())

    async def holders(self, publisher: str, digest: Digest) -> list[str]:
        """Keys of labs that may have this version: those that say so first."""
        await self.find(publisher)
        said, silent = self._book(publisher).holders(digest, time.time())
        return [record.peer for record in (*said, *silent) if record.peer != self._identity.public]

    def proved(self, peer: str) -> None:
        """It answered."""
        for book in self._books.values():
            book.proved(peer)

    def failed(self, peer: str) -> None:
        """It did not."""
        for book in self._books.values():
            book.failed(peer, time.time())

    async def _look(self, publisher: str, now: float) -> None:
        book = self._book(publisher)
        found = [peer for peer in await self._swarm.lookup(topic(publisher)) if not self._access.is_banned(peer)]
        known = [peer for peer in found if self._is_friend(peer)]
        chosen = list(dict.fromkeys((publisher, *known, *found)))[:_MOST]
        room = asyncio.Semaphore(_AT_ONCE)

        async def ask(peer: str) -> None:
            async with room:
                record = await self._swarm.get_record(peer)
            if record is not None:
                book.offer(record[0], now, peer)

        await _all(ask(peer) for peer in chosen)

    def _book(self, publisher: str) -> PeerBook:
        if publisher not in self._books:
            self._books[publisher] = PeerBook(os.urandom(16), is_known=self._is_friend, is_banned=self._access.is_banned)
        return self._books[publisher]

    def _is_friend(self, peer: str) -> bool:
        return bool(self._access.scopes(peer)) or self._follows(peer)


async def _all(questions: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Ask; one that fails is as one that nobody answers."""
    for answer in await asyncio.gather(*questions, return_exceptions=True):
        if isinstance(answer, BaseException) and not isinstance(answer, TetherError):
            raise answer
