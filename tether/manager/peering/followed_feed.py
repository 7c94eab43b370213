"""Another lab's feed: asked for, judged, followed while it grows, and given on as values. Nothing of it is in the catalog yet.

What was taken and what was imported are two things: a restart goes on from what was imported, and the difference comes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tether.errors import (
    FeedRefusedError,
    ForbiddenError,
    InternalError,
    MalformedFeedError,
    TetherError,
)
from tether.manager.peering.feed_comparing import Comparing
from tether.manager.peering.feed_copies import FeedCopies
from tether.manager.peering.feed_proving import Proving
from tether.manager.peering.feed_reading import News, Offer, check_bound, parse_offer, read, some
from tether.swarm.engine.engine import Engine
from tether.swarm.feeds.entries import Content
from tether.swarm.feeds.heads import parse_head
from tether.swarm.feeds.log import FeedCopy, LogPart
from tether.swarm.feeds.state import FATAL, TAKEN, FeedState, FeedStates, Verdict, judge
from tether.swarm.feeds.tree import FeedTree, Growth

__all__ = ["FollowedFeed", "Following"]

log = structlog.get_logger("tether.swarm")
_SPACING = 0.05
"""Seconds between two questions, however often the publisher's core grows."""
_ASK_ANYWAY = 300.0
"""Seconds after which a publisher that tells nothing is asked."""
_AGAIN, _AT_LAST = 0.2, 60.0
"""Seconds until what failed is tried again: at first, and at most."""
_STEADY = 10.0
"""Seconds that a connection has to last for the next one to be tried at once."""


@dataclass(frozen=True, slots=True)
class Following:
    """What a followed feed needs of its surroundings."""

    engine_of: Callable[[], Awaitable[Engine]]
    ask: Callable[[], Awaitable[Mapping[str, Any]]]
    """`tether/1/feed` of the publisher. Raises: ForbiddenError: it does not let this lab follow it; TetherError: it does not answer."""
    on_content: Callable[[str, News], None]
    """The publisher's key (hex), and what is new, or after a start what is known; models that the user follows are then pulled, and
    `imported` is called."""
    bound: Callable[[], Content]
    """What the catalog here says of the publisher's models: their numbers are given. Blocks."""
    states: FeedStates
    folder: Path
    """Of this publisher's copies alone."""
    clock: Callable[[], float] = time.time


class FollowedFeed:
    """One publisher's. Belongs to the engine's loop."""

    def __init__(self, publisher: str, following: Following) -> None:
        """`publisher`: key, hex."""
        self.publisher, self._with = publisher, following
        self._copies = FeedCopies(following.engine_of, following.folder, self._told)
        self._comparing = Comparing(self._copies, following.clock)
        self._proving = Proving(publisher, self._copies)
        self._lock, self._saving = asyncio.Lock(), asyncio.Lock()
        self._event, self._wake = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._saved: FeedState | None = None
        self._taken = FeedState(publisher)
        """With what is not imported yet."""
        self._tree = FeedTree()
        """Over the blocks that say `content`."""
        self.content: Content | None = None
        """What it says; None: not known yet, or no more."""
        self._is_told = False
        """Whether `on_content` was called since `start`."""
        self._tells_known = True
        self.problem: TetherError | None = None
        """Why nothing new comes; FeedRefusedError: a person has to decide."""

    @property
    def state(self) -> FeedState:
        """What is believed. `state.head` is for handing on."""
        return self._taken

    def start(self, *, with_known: bool = True) -> None:
        """Follow it until `aclose`, or until this lab may not any more. `with_known`: what it said before counts until it answers."""
        if self._task is None or self._task.done():
            self._is_told, self._tells_known = False, with_known
            self._task = asyncio.create_task(self._run(), name=f"feed-{self.publisher[:8]}")

    async def forbidden(self) -> None:
        """Wait until the publisher lets this lab follow it no longer: it is not asked again then before the next `start`."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def nudge(self) -> None:
        """Ask now: the peer is back, or somebody has a newer head."""
        self._event.set()
        self._wake.set()

    async def imported(self, news: News) -> None:
        """What it says of the models that are followed is in the catalog, durably. Raises: StoreError."""
        before = self._saved.known if self._saved else None
        new = news.state.known
        if self._saved is None or new is None or (before and (before.era, before.length) >= (new.era, new.length)):
            return
        state = self._saved
        await self._save(msgspec.structs.replace(news.state, refusal=state.refusal, rollbacks=state.rollbacks, pardoned=state.pardoned))
        await self._copies.keep({head.core for head in (new, self._taken.known) if head})

    async def heard(self, signed: bytes, seen_from: str, growth: Growth | None = None) -> Verdict:
        """A head of this feed that another peer (key, hex) handed on: a longer one is asked for, one that contradicts stops the feed.

        An older one is nothing against the peer, which is only behind. `growth`: of a longer one, from the length that is known here.

        Raises: MalformedFeedError: it is none; StoreError.
        """
        head = parse_head(signed, self.publisher)
        async with self._lock:
            if not self._comparing.may_judge(self._taken, head, seen_from):
                return Verdict.ROLLED_BACK
            verdict = await self._comparing.judged(self._taken, head, growth)
            if verdict in FATAL:
                await self._refuse(verdict, signed, seen_from)
        if verdict in TAKEN or verdict in FATAL or verdict is Verdict.UNPROVEN:
            self.nudge()
        return verdict

    async def growth(self, signed: bytes, peer: str) -> Growth | None:
        """What shows this peer, who has a shorter head, whether the one that is believed here contains it; None: it can't be shown.

        Raises: MalformedFeedError: it is no head of this feed.
        """
        head = parse_head(signed, self.publisher)
        async with self._lock:
            return await self._comparing.growth(self._taken, head, peer)

    async def forgive(self, *, from_the_start: bool = False) -> None:
        """A person decided to follow it again. Raises: StoreError."""
        async with self._lock:
            await self._load()
            self._taken = self._taken.forgiven(from_the_start=from_the_start)
            await self._save((self._saved or self._taken).forgiven(from_the_start=from_the_start))
            if from_the_start:
                self.content, self._tree = None, FeedTree()
        self.nudge()

    async def aclose(self) -> None:
        """Follow it no more; before the engine is closed."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # which passes on that who waits here is cancelled
        await self._copies.aclose()

    # --- the loop

    async def _run(self) -> None:
        loop, pause = asyncio.get_running_loop(), _AGAIN
        while True:
            began = loop.time()
            try:
                await self._session()
            except ForbiddenError as error:
                log.info("a feed is followed no longer: its lab does not allow it", publisher=self.publisher, error=str(error))
                self.problem = None
                await self._copies.aclose()
                return
            except TetherError as error:
                self._failed(error)
            except Exception as error:
                log.exception("following a feed failed", publisher=self.publisher)
                self._failed(InternalError(f"following the feed failed ({type(error).__name__}): the log has the traceback"))
            if self.problem is not None:
                await self._copies.aclose()
            pause = _AGAIN if loop.time() - began > _STEADY else min(2 * pause, _AT_LAST)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()

    async def _session(self) -> None:
        """Until the connection to the publisher ends. Raises: TetherError."""
        async with self._lock:
            await self._load()
        while True:
            self._event.clear()
            offer = parse_offer(await self._with.ask(), self.publisher)
            async with self._lock:
                copy = await self._consider(offer)
            self.problem = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ASK_ANYWAY):
                    await self._event.wait()
            if not copy.is_live:
                return
            await asyncio.sleep(_SPACING)

    async def _load(self) -> None:
        """What was believed, and what it said. Raises: StoreError."""
        if self._saved is None:
            self._saved = self._taken = await asyncio.to_thread(self._with.states.load, self.publisher)
        known = self._taken.known
        if self.content is None and known is not None:
            self.content, self._tree = await self._proving.remembered(known)
            if self.content is not None and self._tells_known:
                self._tell(self.content, (), Verdict.SAME, known.length)

    def _told(self) -> None:
        """It grew, or its connection ended: no reason to shorten a pause."""
        self._event.set()

    # --- one offer; the lock is held

    async def _consider(self, offer: Offer) -> FeedCopy:
        """Take what is new, or refuse it; its copy, connected. Raises: TetherError."""
        head = offer.head
        verdict = await self._comparing.judged(self._taken, head)
        if verdict is Verdict.SAME and self.content is not None:
            if not self._is_told:
                self._tell(self.content, (), verdict, head.length)
            copy = await self._copies.of(head.core)
            await copy.connect(offer.server)
            return copy
        if verdict not in {Verdict.SAME, Verdict.UNPROVEN, *TAKEN}:
            raise await self._refuse(verdict, offer.signed, self.publisher)
        if head.fork:
            raise MalformedFeedError("the feed's history was cut off once: its lab has to begin it anew")
        shown = await self._proving.proven(offer, self._taken.known, FeedTree() if self.content is None else self._tree)
        verdict = judge(self._taken, head, shown.marked, self._with.clock())
        if shown.tree.root() != head.root:
            verdict = Verdict.FORKED
        if verdict is not Verdict.SAME and verdict not in TAKEN:
            raise await self._refuse(verdict, offer.signed, self.publisher)
        await self._take(verdict, offer, shown)
        copy = await self._copies.of(head.core)
        await copy.connect(offer.server)
        return copy

    async def _take(self, verdict: Verdict, offer: Offer, shown: LogPart) -> None:
        """Raises: MalformedFeedError: nothing of it counts; FeedRefusedError."""
        content, changed, against = await asyncio.to_thread(read, verdict, self.content, shown.sound().changes)
        if against and self._taken.pardoned != offer.head.core:
            log.warning("a feed begun anew contradicts what it said before", publisher=self.publisher, against=some(against))
            raise await self._refuse(Verdict.CONTRADICTS, offer.signed, self.publisher)
        check_bound(content, await asyncio.to_thread(self._with.bound))
        if verdict is Verdict.NEW_ERA:
            log.warning("a lab began its feed anew", publisher=self.publisher, era=offer.head.era)
        self._taken, self.content, self._tree = self._taken.imported(offer.signed), content, shown.tree
        self._comparing.took(offer.head)
        await self._copies.close_others(offer.head.core)
        self._tell(content, changed, verdict, offer.head.length)

    def _tell(self, content: Content, changed: Sequence[str], verdict: Verdict, length: int) -> None:
        self._is_told = True
        self._with.on_content(self.publisher, News(content, tuple(changed), verdict, length, self._taken))

    async def _refuse(self, verdict: Verdict, signed: bytes, seen_from: str) -> FeedRefusedError:
        """Remembered at once; the error to raise. Raises: StoreError."""
        await self._load()
        before = self._taken
        self._taken = before.refused(verdict, signed, self._with.clock(), seen_from)
        if self._taken != before:
            log.warning("a feed was refused", publisher=self.publisher, verdict=verdict.value, seen_from=seen_from)
        if self._taken.refusal != before.refusal or _is_told(self._taken.rollbacks, before.rollbacks):
            saved = self._saved or self._taken
            await self._save(msgspec.structs.replace(saved, refusal=self._taken.refusal, rollbacks=self._taken.rollbacks))
        try:
            self._taken.check()
        except FeedRefusedError as error:
            return error
        return FeedRefusedError(_REASONS.get(verdict, "the feed is refused"), verdict.value)

    async def _save(self, state: FeedState) -> None:
        async with self._saving:
            self._saved = state
            await asyncio.to_thread(self._with.states.save, state)

    def _failed(self, error: TetherError) -> None:
        if self.problem is None or str(self.problem) != str(error):
            log.warning("nothing new of a feed", publisher=self.publisher, error=str(error))
        self.problem = error


_REASONS = {
    Verdict.ROLLED_BACK: "the lab shows its feed as it was earlier: it is asked again; if it stays so, it restored a backup",
    Verdict.AHEAD: "the feed was signed at a time that is yet to come: set the clock of this machine, or the lab its own",
}


def _is_told(rollbacks: int, before: int) -> bool:
    """Who shows old heads again and again does not get a write to the disk for each."""
    return rollbacks != before and rollbacks & (rollbacks - 1) == 0
