"""Says on the DHT that this lab is there and what it has, and finds others that have models of a publisher."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

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
_MET, _MISSED = 15.0, 3.0
"""Seconds for which what one lab says of itself is not looked for again, where it was found and where not."""


class Neighbourhood(Protocol):
    """What is needed of the swarm; keys are hex."""

    async def announce(self, topic: bytes) -> int: ...

    async def unannounce(self, topic: bytes) -> None: ...

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
        self._region = ""
        self._books: dict[str, PeerBook] = {}
        self._acquaintances = self._new_book()
        """Those that people here know, whatever they announce."""
        self._looked: dict[str, float] = {}
        self._met: dict[str, float] = {}
        self._meeting: dict[str, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._seq: int | None = None
        self._topics: frozenset[bytes] = frozenset()
        """Under which it may be announced."""
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
        self._region = offered.region
        await self._write(offered, LIFETIME)
        topics = [topic(publisher) for publisher in sorted({self._identity.public, *(held.publisher for held in offered.held)})]
        before, self._topics = self._topics, self._topics.union(topics)
        for each in topics:
            await self._swarm.announce(each)
        for each in before.difference(topics):
            await self._swarm.unannounce(each)
        self._topics = frozenset(topics)

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
        """Say that the lab is gone, everywhere at once: nobody waits long for that. Raises: TetherError: it could not be said."""
        for task in self._meeting.values():
            task.cancel()
        farewells = [self._swarm.unannounce(each) for each in self._topics]
        if self._seq is not None:
            farewells.append(self._write(Capabilities(), 0.0))
        self._topics = frozenset()
        for failure in await asyncio.gather(*farewells, return_exceptions=True):
            if failure is not None:
                raise failure

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

    async def meet(self, peers: Iterable[str], seconds: float) -> None:
        """Look for what these labs (keys), which people here know, say of themselves; `seconds`: for those of whom nothing is known yet."""
        now, said = time.time(), self.said()
        self._met = {peer: at for peer, at in self._met.items() if now - at < (_MET if peer in said else _MISSED)}
        self._meeting = {peer: task for peer, task in self._meeting.items() if not task.done()}
        due = (peer for peer in peers if not (peer in self._met or peer in self._meeting or self._access.is_banned(peer)))
        for peer in islice(due, _MOST):
            self._met[peer] = now
            self._meeting[peer] = asyncio.create_task(self._ask(peer, self._acquaintances, now))
        unknown = [task for peer, task in self._meeting.items() if peer not in said]
        if unknown:
            await asyncio.wait(unknown, timeout=seconds)

    def said(self) -> dict[str, Record]:
        """What labs (by key) say of themselves, as far as it was found and is good."""
        now, found = time.time(), dict[str, Record]()
        for book in (self._acquaintances, *self._books.values()):
            for record in book.peers(now):
                if record.peer not in found or found[record.peer].seq < record.seq:
                    found[record.peer] = record
        found.pop(self._identity.public, None)
        return found

    def proved(self, peer: str) -> None:
        """It answered."""
        for book in (self._acquaintances, *self._books.values()):
            book.proved(peer)

    def failed(self, peer: str) -> None:
        """It did not."""
        for book in (self._acquaintances, *self._books.values()):
            book.failed(peer, time.time())

    async def _look(self, publisher: str, now: float) -> None:
        book = self._book(publisher)
        found = [peer for peer in await self._swarm.lookup(topic(publisher)) if not self._access.is_banned(peer)]
        known = [peer for peer in found if self._is_friend(peer)]
        chosen = list(dict.fromkeys((publisher, *known, *found)))[:_MOST]
        await asyncio.gather(*(self._ask(peer, book, now) for peer in chosen))

    async def _ask(self, peer: str, book: PeerBook, now: float) -> None:
        """A question that fails is as one that nobody answers."""
        with contextlib.suppress(TetherError):
            async with self._room:
                record = await self._swarm.get_record(peer)
            if record is not None:
                book.offer(record[0], now, peer)

    def _book(self, publisher: str) -> PeerBook:
        if publisher not in self._books:
            self._books[publisher] = self._new_book()
        return self._books[publisher]

    def _new_book(self) -> PeerBook:
        return PeerBook(os.urandom(16), is_known=self._is_friend, is_banned=self._access.is_banned, region=lambda: self._region)

    def _is_friend(self, peer: str) -> bool:
        return bool(self._access.scopes(peer)) or self._follows(peer)
