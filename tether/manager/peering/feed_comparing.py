"""Of two heads of one core, whether the longer contains the shorter: by what the copy here shows, or by what another follower does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from tether.errors import EngineError, MalformedFeedError, PeerUnreachableError
from tether.manager.peering.feed_copies import FeedCopies
from tether.security.rates import Bucket
from tether.swarm.feeds.heads import Head
from tether.swarm.feeds.state import FeedState, Verdict, judge
from tether.swarm.feeds.tree import FeedTree, Growth

__all__ = ["Comparing"]

log = structlog.get_logger("tether.swarm")
_MOST_ROOTS = 256
_READINGS, _READINGS_AT_ONCE = 1 / 60, 4.0
"""A second, and at once: how often the whole copy is read because of what one peer says."""
_MOST_PEERS = 64


class Comparing:
    """Of one feed's heads. Belongs to the engine's loop; to be called one at a time."""

    def __init__(self, copies: FeedCopies, clock: Callable[[], float]) -> None:
        self._copies, self._clock = copies, clock
        self._core = ""
        self._roots: dict[int, str] = {}
        """At lengths that the core had here: a head that another follower has is mostly of one of them."""
        self._readings: dict[str, Bucket] = {}

    def took(self, head: Head) -> None:
        """It is believed from now on."""
        if head.core != self._core:
            self._roots, self._core = {}, head.core
        self._roots[head.length] = head.root
        if len(self._roots) > _MOST_ROOTS:
            del self._roots[next(iter(self._roots))]

    async def judged(self, state: FeedState, head: Head, growth: Growth | None = None) -> Verdict:
        """`growth`: of a longer head, from the length that is known. Raises: MalformedFeedError: it is of other lengths."""
        verdict, known, shared = judge(state, head, None, self._clock()), state.known, None
        if known is None or not _is_of_one_core(head, known):
            return verdict
        if verdict is Verdict.ROLLED_BACK:
            shared = self._root(head) or await self._read_root(head.length, known)
        elif verdict is Verdict.UNPROVEN and growth is not None:
            shorter, longer = growth.roots(known.length, head.length)
            shared = shorter if longer == head.root else None
        return verdict if shared is None else judge(state, head, shared, self._clock())

    def may_judge(self, state: FeedState, head: Head, peer: str) -> bool:
        """Whether this peer may have a head judged now: not for ever, where all of the copy has to be read for it."""
        known = state.known
        is_shorter = known is not None and _is_of_one_core(head, known) and head.length < known.length
        return not is_shorter or self._root(head) is not None or self._may_read(peer)

    async def growth(self, state: FeedState, head: Head, peer: str) -> Growth | None:
        """What shows this peer, who has a shorter head of the same core, whether the one that is believed here contains it.

        None: it is another core, or a longer head, or the peer asked for that too often.
        """
        known = state.known
        if known is None or not _is_of_one_core(head, known) or head.length >= known.length or not self._may_read(peer):
            return None
        try:
            return await (await self._copies.of(known.core)).growth(head.length, known.length)
        except (EngineError, MalformedFeedError, PeerUnreachableError) as error:
            log.info("what shows how a feed grew is not here", publisher=state.publisher, error=str(error))
            return None

    def _root(self, head: Head) -> str | None:
        return self._roots.get(head.length) if head.core == self._core else None

    async def _read_root(self, length: int, known: Head) -> str | None:
        """Of the copy; None: that is not here, or not what is believed."""
        try:
            part = await (await self._copies.of(known.core)).read(FeedTree(), known.length, length)
        except (EngineError, MalformedFeedError, PeerUnreachableError):
            return None
        return part.marked if part.tree.root() == known.root else None

    def _may_read(self, peer: str) -> bool:
        if peer not in self._readings and len(self._readings) >= _MOST_PEERS:
            del self._readings[next(iter(self._readings))]
        bucket = self._readings.setdefault(peer, Bucket(_READINGS, _READINGS_AT_ONCE))
        return bucket.take(1.0, asyncio.get_running_loop().time())


def _is_of_one_core(one: Head, other: Head) -> bool:
    return (one.core, one.fork) == (other.core, other.fork)
