"""The lab's own feed: says what the catalog says, to who may follow it, and never two things for one place.

What was signed is remembered durably before anybody is told (`own.json`), and compared with the log before anything is written to it. A log
that lost its end, or is gone, is not gone on with: the lab begins a new core, in a new era, and says all again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from tether.errors import EngineClosedError, EngineError, MalformedFeedError, TetherError
from tether.manager.peering.feed_content import content_of
from tether.manager.peering.feed_memory import FeedMemory, begun, load_memory, save_memory
from tether.manager.peering.own_log import OwnLog
from tether.security.identity import Identity
from tether.store import Repository
from tether.swarm.engine.engine import Engine
from tether.swarm.feeds.entries import Change, Content, applied, entries
from tether.swarm.feeds.heads import Head, sign_head
from tether.swarm.feeds.hyperbee import FeedServer

__all__ = ["OwnFeed"]

log = structlog.get_logger("tether.swarm")
_GOODBYE = 2.0
"""Seconds for taking back, at the end, where the feed is served: without a network it takes eight."""
_FRESH = 60
"""Seconds for which a signed head is given without being signed anew: how late a head was signed tells a lab from who stole its key."""
T = TypeVar("T")


class OwnFeed:
    """Of the manager that writes. Belongs to one event loop, the engine's."""

    def __init__(
        self,
        engine_of: Callable[[], Awaitable[Engine]],
        repository: Repository,
        identity: Identity,
        folder: Path,
        admits: Callable[[str], bool],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`engine_of`: the running engine; asked when the feed is first asked for. `admits`: whether a peer (key, hex) may follow now."""
        self._engine_of, self._repository, self._identity, self._folder = engine_of, repository, identity, folder
        self._admits, self._clock = admits, clock
        self.more: Callable[[Content], Content] = _no_more
        """Of the catalog's content, what the feed is to say; blocks."""
        self._lock = asyncio.Lock()
        self._working: set[asyncio.Task[Any]] = set()
        self._changes, self._said = 0, -1
        self._memory: FeedMemory | None = None
        self._log: OwnLog | None = None
        self._server: FeedServer | None = None
        self.problem: TetherError | None = None
        """Why followers do not see the catalog as it is."""

    @property
    def is_begun(self) -> bool:
        """Whether anybody asked for it since the start."""
        return self._said >= 0

    async def answer(self) -> dict[str, str]:
        """What `tether/1/feed` answers: the core's key, the key that it is served under, the signed head.

        Raises: what `engine_of` does; EngineError, StoreError; MalformedFeedError: the catalog can't be said, and nothing ever was.
        """
        return await self._alone(self._answered)

    async def changed(self) -> None:
        """The catalog is another one: say so. What piles up while it is written is written at once. What fails is in `problem`."""
        self._changes += 1
        wanted = self._changes
        if not self.is_begun:
            return  # who asks first gets all
        try:
            await self._alone(lambda: self._caught_up(wanted))
        except TetherError as error:
            self._failed(error)

    async def renew(self) -> None:
        """Begin a new core, whose key only those get who may ask; followers see a new era. Raises: as `answer`."""
        await self._alone(lambda: self._renewed("somebody asked for it"))

    async def cut(self, peer: str) -> None:
        """The peer (key, hex) may follow no more: what it is being sent ends now."""
        if self._server is not None:
            with contextlib.suppress(EngineError, EngineClosedError):  # closed meanwhile: then it is being sent nothing
                await self._server.cut(bytes.fromhex(peer))

    async def aclose(self) -> None:
        """Finish what is being written, and give the files back; before the engine is closed."""
        await asyncio.gather(*self._working, return_exceptions=True)
        async with self._lock:
            with contextlib.suppress(TimeoutError):  # what is left open goes with the engine
                async with asyncio.timeout(_GOODBYE):
                    await self._close()

    async def _alone(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """One at a time, and to its end: who asked may go, a log that is half written may not stay."""

        async def locked() -> T:
            async with self._lock:
                try:
                    return await work()
                except MalformedFeedError:
                    raise  # nothing was written
                except BaseException:
                    await self._close()  # how far it was written is not known: it is read again
                    raise

        task = asyncio.create_task(locked(), name="own-feed")
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return await asyncio.shield(task)

    # --- alone

    async def _answered(self) -> dict[str, str]:
        await self._caught_up(self._changes)
        memory = self._remembered
        if self._clock() - memory.signed >= _FRESH:
            memory = await self._sign(self._opened)
        server = self._server.public_key.hex() if self._server else ""
        return {"core": self._opened.core, "server": server, "head": base64.b64encode(memory.head or b"").decode()}

    async def _caught_up(self, wanted: int) -> None:
        engine = await self._engine_of()
        if self._log is not None and self._log.engine is not engine:
            await self._close()
        if self._log is not None and self._said >= wanted:
            return
        said, content = self._changes, await asyncio.to_thread(self._content)
        own = self._log or await self._open(engine)
        self.problem = None
        try:
            await self._say(own, content)
        except MalformedFeedError as error:
            if self._remembered.head is None:
                raise
            self._failed(error)
        if self._server is None:
            self._server = await FeedServer.open(engine, bytes.fromhex(self._remembered.server), lambda key: self._admits(key.hex()))
            await self._server.offer([self._opened.bee])
        self._said = said

    def _content(self) -> Content:
        return self.more(content_of(self._repository.snapshot().models, self._identity.public))

    async def _open(self, engine: Engine) -> OwnLog:
        memory = self._memory = await asyncio.to_thread(load_memory, self._file, self._identity.public)
        if memory is None:
            return await self._begin(engine, "nothing is known of an earlier one")
        if memory.since != (await asyncio.to_thread(self._repository.footing)).since:
            return await self._begin(engine, "another manager of the lab wrote meanwhile")
        seed = bytes.fromhex(memory.core)
        own = self._log = await OwnLog.resume(engine, self._folder / str(memory.era), seed, memory.known(self._identity.public))
        return own or await self._begin(engine, "its log is not what was signed")

    async def _begin(self, engine: Engine, why: str) -> OwnLog:
        """Not shown to anybody before it says all and is signed."""
        before = self._memory
        if self._log is not None:
            await self._log.aclose()
        footing = await asyncio.to_thread(self._repository.footing)
        self._log, self._memory = None, begun(before, int(self._clock()), footing.since)
        log.log(_level(before), "the lab's feed is begun anew", why=why, era=self._memory.era)
        await asyncio.to_thread(save_memory, self._file, self._memory)
        self._log = await OwnLog.begin(engine, self._folder / str(self._memory.era), bytes.fromhex(self._memory.core))
        return self._log

    async def _say(self, own: OwnLog, content: Content) -> None:
        """Raises: MalformedFeedError: no follower would take what the catalog says."""
        try:
            if await own.is_full():
                await self._renewed("it is as long as followers take", content)
                return
            await own.say(content)
        except MalformedFeedError:
            await self._renewed("numbers of versions mean something else than it said", content)
            return
        known, head = self._remembered.known(self._identity.public), await own.head()
        if known is None or head.length != known.length:
            await self._sign(own)

    async def _renewed(self, why: str, content: Content | None = None) -> None:
        """All again in a new core; who follows has to ask for it. Raises: MalformedFeedError: it can't be said; the old one stays."""
        if content is None:
            await self._caught_up(self._changes)
            content = await asyncio.to_thread(self._content)
        await asyncio.to_thread(_check_sayable, content)
        own = await self._begin(self._opened.engine, why)
        await own.say(content)
        await self._sign(own)
        if self._server is not None:
            await self._server.offer([own.bee])

    async def _sign(self, own: OwnLog) -> FeedMemory:
        head, memory = await own.head(), self._remembered
        known, now = memory.known(self._identity.public), max(int(self._clock()), memory.signed)
        began = known.began if known else now
        signed = Head(self._identity.public, own.core, memory.era, head.length, head.fork, head.digest.hex(), began, now)
        new = msgspec.structs.replace(memory, signed=now, head=sign_head(self._identity, signed))
        await asyncio.to_thread(self._remember, new)
        self._memory = new
        return new

    def _remember(self, memory: FeedMemory) -> None:
        save_memory(self._file, memory)
        for folder in self._folder.iterdir():  # of earlier eras
            if folder.is_dir() and folder.name != str(memory.era):
                shutil.rmtree(folder, ignore_errors=True)

    async def _close(self) -> None:
        server, own = self._server, self._log
        self._server = self._log = None
        try:
            if server is not None:
                await server.aclose()
        except TetherError as error:
            log.info("the feed's server ended with the engine", error=str(error))
        if own is not None:
            await own.aclose()

    def _failed(self, error: TetherError) -> None:
        if self.problem is None or str(self.problem) != str(error):
            log.warning("followers do not see the catalog as it is", error=str(error))
        self.problem = error

    @property
    def _file(self) -> Path:
        return self._folder / "own.json"

    @property
    def _opened(self) -> OwnLog:
        if self._log is None:
            raise EngineError("the lab's feed is closed")
        return self._log

    @property
    def _remembered(self) -> FeedMemory:
        if self._memory is None:
            raise EngineError("the lab's feed was never opened")
        return self._memory


def _no_more(content: Content) -> Content:
    return content


def _check_sayable(content: Content) -> None:
    """Raises: MalformedFeedError: no follower would take it, whatever it knows."""
    applied(Content(), [Change(key, value) for key, value in entries(content).items()])


def _level(before: FeedMemory | None) -> int:
    """A lab's first feed is no news."""
    return logging.INFO if before is None else logging.WARNING
