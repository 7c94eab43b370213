"""What the blocks of another lab's feed prove: that its head is what they hash to, and goes on from the one that is known."""

from __future__ import annotations

import asyncio

import structlog

from tether.errors import EngineError, MalformedFeedError, PeerUnreachableError
from tether.manager.peering.feed_copies import FeedCopies
from tether.manager.peering.feed_reading import Offer
from tether.swarm.feeds.entries import Content, applied
from tether.swarm.feeds.heads import Head
from tether.swarm.feeds.log import FeedCopy, LogPart
from tether.swarm.feeds.tree import FeedTree

__all__ = ["Proving"]

log = structlog.get_logger("tether.swarm")


class Proving:
    """Of one publisher's feed; nothing is kept here, and nobody is judged."""

    def __init__(self, publisher: str, copies: FeedCopies) -> None:
        """`publisher`: key, hex."""
        self._publisher, self._copies = publisher, copies

    async def remembered(self, known: Head) -> tuple[Content | None, FeedTree]:
        """What the copy here says at the head that is known; None: it is damaged, or gone."""
        try:
            copy = await self._copies.of(known.core)
            if await copy.length() >= known.length:
                part = await copy.read(FeedTree(), known.length)
                if part.tree.root() == known.root:
                    content, _ = await asyncio.to_thread(applied, Content(), part.sound().changes)
                    return content, part.tree
        except (EngineError, MalformedFeedError, PeerUnreachableError) as error:
            log.info("the copy of a feed is fetched again", publisher=self._publisher, error=str(error))
        return None, FeedTree()

    async def proven(self, offer: Offer, known: Head | None, tree: FeedTree) -> LogPart:
        """What the publisher's blocks prove. A copy that does not fit, or go on, says nothing against it: all is fetched beside it.

        `tree`: over the blocks up to `known`, empty where they are not at hand.

        Raises: TetherError; PeerUnreachableError: the publisher does not show what it signed.
        """
        core, problem = offer.head.core, "it is another history"
        before = tree if known is not None and known.core == core else FeedTree()
        try:
            shown = await _shown(await self._copies.of(core), offer, known, before)
            if _fits(shown, offer, known):
                return shown
        except (TimeoutError, EngineError) as error:
            problem = str(error)
        log.info("a copy of a feed does not go on: it is fetched again", publisher=self._publisher, error=problem)
        try:
            shown = await _shown(await self._copies.beside(core), offer, known, FeedTree())
        except TimeoutError:
            raise PeerUnreachableError(
                f"the lab signed that its feed has {offer.head.length} blocks, and does not show them; it is asked again"
            ) from None
        if _fits(shown, offer, known):
            await self._copies.replace(core)
        return shown


def _fits(shown: LogPart, offer: Offer, known: Head | None) -> bool:
    contained = known is None or known.core != offer.head.core or shown.marked == known.root
    return contained and shown.tree.root() == offer.head.root


async def _shown(copy: FeedCopy, offer: Offer, known: Head | None, before: FeedTree) -> LogPart:
    await copy.connect(offer.server)
    head = offer.head
    await copy.reach(head.length)
    return await copy.read(before, head.length, known.length if known is not None and known.core == head.core else None)
