"""Keeps models of other labs here: follows what each publisher says of them, and pulls what is new from whoever has it.

What a publisher says comes from its feed, where this lab may have that; else the publisher itself is asked for single models now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from tether.errors import (
    ForbiddenError,
    InternalError,
    MalformedFeedError,
    MalformedManifestError,
    RequestError,
    TetherError,
    UnknownModelError,
    UntrustedCodeError,
)
from tether.manager.peering.feeds import FollowedFeed, Following, News
from tether.manager.peering.listing import content_of_rows
from tether.manager.peering.progress import Progress
from tether.manager.peering.pulling import Pulling, Wish
from tether.manager.peering.subscriptions import EVERYTHING, Subscription
from tether.swarm.feeds.entries import Content
from tether.types import Digest

__all__ = ["FINAL", "Kept", "KeptModel", "Surroundings"]

log = structlog.get_logger("tether.manager")
FINAL: Final = (RequestError, MalformedFeedError, MalformedManifestError)
"""Why a model does not come, so that waiting does not help: something has to be other than it is."""
_WAIT = 20.0
"""Seconds for which a publisher whose feed this lab may not have is to keep a question open until it has news."""
_GLANCE = 5.0
"""Seconds for asking it whether it has a model at all: others wait to come in."""
_SPACING = 0.2
"""Seconds between questions, however often it has news."""
_AT_ONCE = 4
"""Models that come in side by side, where many are small."""
_LOOKED_FOR = 8
"""Versions of a model whose holders are looked for: who has one has most likely all."""
_AGAIN, _AT_LAST = 1.0, 60.0
"""Seconds until what failed is tried again: at first, and at most."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What keeping needs of the lab."""

    ask: Callable[[str, str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
    """Peer, method, JSON value → JSON value. Raises: TetherError."""
    pulling: Pulling
    following: Callable[[str, Callable[[str, News], None]], Following]
    """Publisher, and who is told what it says."""
    holders: Callable[[str, Digest], Awaitable[Sequence[str]]]
    """Publisher, version → keys of labs that may have it. Raises: TetherError: the network is away."""
    changed: Callable[[], None]
    """The catalog here is another one."""


@dataclass(slots=True)
class KeptModel:
    """How far one model has come."""

    progress: Progress = field(default_factory=Progress)
    versions: tuple[str, ...] = ()
    """As they are called here, when all that was asked for is here."""
    error: TetherError | None = None
    """Why it does not come."""
    is_done: bool = False


class Kept:
    """Models of one publisher. Belongs to one event loop."""

    def __init__(self, subscription: Subscription, surroundings: Surroundings) -> None:
        self._subscription, self._with = subscription, surroundings
        self.models: dict[str, KeptModel] = {}
        """By the publisher's name for them; those that it is known to have, or that were asked for."""
        self._feed = FollowedFeed(subscription.publisher, surroundings.following(subscription.publisher, self._heard))
        self._content: Content | None = None
        self._assigned: Mapping[str, tuple[str, ...]] = {}
        self._holds = False
        self._pulled: Content | None = None
        """The last that was gone through."""
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """A model comes in, or goes."""
        self._had: dict[str, frozenset[Digest]] = {}
        """Versions of a model that are here."""
        self._seen = ""
        self._news: News | None = None
        self._look, self._wake, self._moved = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._pull())]

    async def aclose(self) -> None:
        """Keep them no more; what came stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._feed.aclose()

    def subscribe(self, subscription: Subscription) -> None:
        """Other models from now on."""
        if subscription == self._subscription:
            return
        self._subscription, self._seen = subscription, ""
        for name in subscription.models:
            known = self.models.get(name)
            if known is not None and known.error is not None:
                known.error, known.is_done = None, False
        self.nudge()

    def try_again(self, name: str) -> None:
        """A person asks for a model (or `EVERYTHING`) of which something was refused."""
        self._with.pulling.forgive(self._subscription.publisher, None if name == EVERYTHING else name)
        for each in self.models.values() if name == EVERYTHING else (self.models.setdefault(name, KeptModel()),):
            if isinstance(each.error, FINAL):
                each.error = None
        self.nudge()

    def trust_changed(self) -> None:
        """A publisher may be trusted otherwise than before."""
        if any(isinstance(each.error, UntrustedCodeError) for each in self.models.values()):
            self._wake.set()

    def hold(self) -> None:
        """Copies are held here for the publisher: what its feed said counts also when it is gone, and before it is asked."""
        if not self._holds:
            self._holds = True
            self._look.set()

    def assign(self, models: Mapping[str, tuple[str, ...]]) -> None:
        """Keep these too, from these labs (keys); until another call."""
        before, self._assigned = self._assigned, models
        if any(before.get(name) != sources for name, sources in models.items() if not (name in self.models and self.models[name].is_done)):
            self._wake.set()

    @property
    def feed(self) -> FollowedFeed:
        """The publisher's; it may not be followed."""
        return self._feed

    def is_asked_for(self, name: str) -> bool:
        """Whether people here want this model, whoever else does."""
        return bool(self._subscription.names((name,)))

    async def drop(self, name: str, remove: Callable[[], Awaitable[object]]) -> bool:
        """Have a model removed, and tell whether it was: not one that somebody wants, or that just comes in. Raises: what `remove` does."""
        if self._turns[name].locked():
            return False
        async with self._turns[name]:
            if self.is_asked_for(name) or name in self._assigned:
                return False
            await remove()
            self.models.pop(name, None)
            self._had.pop(name, None)
        self._with.changed()
        return True

    @property
    def content(self) -> Content | None:
        """What the publisher says; None: not known yet."""
        return self._content

    def nudge(self) -> None:
        """Ask and try now: the network is back."""
        self._feed.nudge()
        self._look.set()
        self._wake.set()

    def model(self, name: str) -> KeptModel:
        """How far a model is."""
        known = self._all() if name == EVERYTHING else self.models.get(name) or KeptModel()
        if known.error is None and not known.is_done and self._feed.problem is not None:
            return replace(known, error=self._feed.problem)
        return known

    def _all(self) -> KeptModel:
        """All of them together; those that can't come are in the way of none."""
        states = [state for name, state in self.models.items() if name != EVERYTHING]
        progress = Progress()
        for state in states:
            progress = progress.beside(state.progress)
        versions = tuple(version for state in states for version in state.versions)
        refused = next((state.error for state in (*states, self.models.get(EVERYTHING, KeptModel())) if state.error is not None), None)
        is_done = self._content is not None and self._content is self._pulled
        return KeptModel(progress, versions, None if is_done else refused, is_done=is_done)

    async def moved(self, seconds: float) -> None:
        """Wait until something is other than before, or so long."""
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._moved.wait()

    # --- what the publisher says

    def _heard(self, _: str, news: News) -> None:
        changed = tuple(self.models) if self._news is None else news.changed  # else of another's words than the feed's
        self._news, self._content = news, news.content
        for name in changed:
            if name in self.models:
                self.models[name].is_done = False
        self._wake.set()

    async def _follow(self) -> None:
        """By its feed, while this lab may have that; else by asking for the models themselves."""
        pause, is_refused = _AGAIN, False
        while True:
            self._look.clear()
            try:
                if (self._holds and not is_refused) or await self._may_follow():
                    await self._by_feed()
                is_refused = True
                await self._unless_nudged(self._asked())
                pause = _AGAIN
                await asyncio.sleep(_SPACING)
                continue
            except TetherError as error:
                self._failed(self._subscription.models, error)
            except Exception as error:
                log.exception("another lab's models could not be asked for")
                self._failed(self._subscription.models, InternalError(f"{type(error).__name__}: the log has the traceback"))
            await self._rest(pause)
            pause = min(2 * pause, _AT_LAST)

    async def _by_feed(self) -> None:
        """Until the publisher takes the right to it back. What is known of it counts only where the publisher may be away."""
        self._feed.start(with_known=self._holds and self._content is None)
        await self._feed.forbidden()

    async def _may_follow(self) -> bool:
        try:
            await self._with.ask(self._subscription.publisher, "feed", {})
        except ForbiddenError:
            return False
        return True

    async def _unless_nudged(self, asking: Coroutine[Any, Any, None]) -> None:
        """Ask until somebody wants another question asked."""
        tasks = [asyncio.create_task(asking), asyncio.create_task(self._look.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._look.wait()

    async def _asked(self) -> None:
        """Ask the publisher for the models; it answers when they are other than before. Raises: TetherError."""
        names = None if EVERYTHING in self._subscription.models else list(self._subscription.models)
        question = {"names": names, "seen": self._seen, "wait": _WAIT}
        answer = await self._with.ask(self._subscription.publisher, "models", question)
        content, self._seen = content_of_rows(answer["models"]), str(answer.get("state", ""))
        if content != self._content:
            self._news, self._content = None, content
            for kept in self.models.values():
                kept.is_done = False
            self._wake.set()

    # --- pulling it

    async def _pull(self) -> None:
        pause: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()
            content, news = self._content, self._news
            if content is None:
                continue
            names = tuple(dict.fromkeys((*self._subscription.names(tuple(content.models)), *(self._assigned.keys() & content.models))))
            await self._missing(set(self._subscription.models) - {*names, EVERYTHING})
            failed = await asyncio.gather(*(self._turn(name, content) for name in names))
            if any(failed):
                pause = min(2 * (pause or _AGAIN / 2), _AT_LAST)
            else:
                pause, self._pulled = None, content
                self._moved.set()
                if news is not None:
                    await self._imported(news)

    async def _imported(self, news: News) -> None:
        try:
            await self._feed.imported(news)
        except TetherError as error:
            log.warning("how far a feed was followed can't be written down", publisher=self._subscription.publisher, error=str(error))

    async def _turn(self, name: str, content: Content) -> bool:
        async with self._turns[name]:
            return await self._model(name, content)

    async def _model(self, name: str, content: Content) -> bool:
        """Bring one model here; whether that is to be tried again."""
        kept = self.models.setdefault(name, KeptModel())
        kept.error, kept.is_done = None, False
        wish = Wish(self._subscription.publisher, Content({name: content.models[name]}))
        digests = frozenset(version.digest for version in content.models[name].versions.values())
        try:
            async with self._room:
                lacking = digests - self._had.get(name, frozenset())
                peers = self._assigned.get(name) or await self._peers(wish.publisher, lacking)  # those who told just now that they have it
                records = await self._with.pulling.pull(wish, peers, self._progressed)
        except TetherError as error:
            self._failed((name,), error)
            return not isinstance(error, FINAL)
        except Exception as error:
            log.exception("a model could not be brought here", publisher=wish.publisher, model=name)
            self._failed((name,), InternalError(f"{type(error).__name__}: the log has the traceback"))
            return True
        finally:
            self._with.changed()  # also by what came of it before it failed
        self._had[name] = digests
        kept.versions, kept.is_done = tuple(f"{record.name}:{record.version}" for record in records), True
        self._moved.set()
        return False

    async def _peers(self, publisher: str, lacking: Iterable[Digest]) -> list[str]:
        """Whom to ask: the publisher, and those who say that they have what is lacking. Where nothing is, nobody is looked for: it takes
        seconds, and an alias that moved is to be moved at once.
        """
        found: dict[str, None] = dict.fromkeys((publisher, *self._subscription.via))
        with contextlib.suppress(TetherError):
            for digest in list(lacking)[:_LOOKED_FOR]:
                found |= dict.fromkeys(await self._with.holders(publisher, digest))
        return list(found)

    def _progressed(self, name: str, progress: Progress) -> None:
        self.models[name].progress = progress
        self._moved.set()

    async def _missing(self, names: set[str]) -> None:
        """What the feed does not name yet may be just published: of what is asked for now the lab is asked itself."""
        new, there = sorted(name for name in names if name not in self.models or self.models[name].error is None), set()
        if new and self._news is not None:
            with contextlib.suppress(TetherError, TimeoutError):
                async with asyncio.timeout(_GLANCE):
                    answer = await self._with.ask(self._subscription.publisher, "models", {"names": new})
                there = set(content_of_rows(answer["models"]).models)
        self._failed(sorted(names - there), UnknownModelError("the lab has no such model, or none that this lab may have"))

    def _failed(self, names: Sequence[str], error: TetherError) -> None:
        for name in names:
            kept = self.models.setdefault(name, KeptModel())
            kept.error, kept.is_done = error, False
        self._moved.set()
