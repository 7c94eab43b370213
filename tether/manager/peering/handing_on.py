"""Followers of a feed hand on the head that they have to those whom they meet: two that were shown different histories find out.

`tether/1/heads`, JSON: {"publisher": key, "head": signed, base64, "growth": or null} -> {"head": the one that is believed there, or "",
"growth": or null}. Who shows a head that the publisher signed shows that it may know the feed; who does not follow it says nothing of it.
A growth goes along where its giver found that the other's head is not contained in its own, so that the other finds it, too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

import msgspec
import structlog

from tether.errors import MalformedFeedError, MalformedRequestError, RemoteError, TetherError
from tether.manager.peering.feeds import FollowedFeed
from tether.swarm.feeds.state import FATAL, Verdict
from tether.swarm.feeds.tree import Growth

__all__ = ["HandingOn", "HandingOnSide"]

log = structlog.get_logger("tether.swarm")
_LOOK: Final = 2.0
"""Seconds between looks at who is connected and which heads are new."""
_MOST: Final = 16
"""Questions in one look."""
_REST, _AGAIN = 600.0, 60.0
"""Seconds for which one is not asked about a feed that does not follow it; that did not answer."""
_CONTRADICTED: Final = FATAL | {Verdict.STOPPED}


class _Heads(msgspec.Struct, omit_defaults=True):
    """Question and answer; only a question names the publisher."""

    publisher: str = ""
    head: str = ""
    growth: Growth | None = None


@dataclass(frozen=True, slots=True)
class HandingOnSide:
    """What it needs of the lab."""

    feeds: Callable[[], Mapping[str, FollowedFeed]]
    """Those that are followed, by publisher (key, hex)."""
    connected: Callable[[], Collection[str]]
    """Keys of peers with which there is a connection."""
    ask: Callable[[str, bytes], Awaitable[bytes]]
    """Peer, value of `heads` → answer. Raises: TetherError."""


class HandingOn:
    """Of one lab. Belongs to one event loop."""

    def __init__(self, side: HandingOnSide) -> None:
        self._with = side
        self._told: dict[tuple[str, str], bytes] = {}
        """Peer and publisher → the head that it was shown; while it stays connected."""
        self._resting: dict[tuple[str, str], float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:  # a bug: what is followed goes on
                log.exception("heads of feeds could not be handed on")
            await asyncio.sleep(_LOOK)

    async def look(self) -> None:
        """Show what is new to those who have not seen it."""
        now, feeds, connected = asyncio.get_running_loop().time(), self._with.feeds(), self._with.connected()
        self._told = {key: head for key, head in self._told.items() if key[0] in connected}
        self._resting = {key: until for key, until in self._resting.items() if until > now}
        due = (
            (peer, publisher, head)
            for publisher, feed in feeds.items()
            if (head := feed.state.head) is not None
            for peer in connected
            if peer != publisher and (peer, publisher) not in self._resting and self._told.get((peer, publisher)) != head
        )
        await asyncio.gather(*(self._show(peer, feeds[publisher], head) for peer, publisher, head in islice(due, _MOST)))

    async def answer(self, peer: str, value: bytes) -> bytes:
        """What `heads` answers. Raises: MalformedRequestError, MalformedFeedError: the value makes no sense; StoreError."""
        asked = _parsed(value, MalformedRequestError("heads: the value names a publisher and a head that it signed"))
        feed, theirs = self._with.feeds().get(asked.publisher), _bytes(asked.head)
        if feed is None or feed.state.head is None or peer == asked.publisher:
            return msgspec.json.encode(_Heads())
        verdict = await feed.heard(theirs, peer, asked.growth)
        growth = await feed.growth(theirs, peer) if verdict in _CONTRADICTED else None
        return msgspec.json.encode(_Heads(head=_text(feed.state.head or b""), growth=growth))

    async def _show(self, peer: str, feed: FollowedFeed, head: bytes) -> None:
        key = (peer, feed.publisher)
        self._told[key] = head
        try:
            answer = await self._asked(peer, _Heads(feed.publisher, _text(head)))
            if not answer.head:
                self._resting[key] = asyncio.get_running_loop().time() + _REST
                return
            theirs = _bytes(answer.head)
            if await feed.heard(theirs, peer, answer.growth) in _CONTRADICTED and (growth := await feed.growth(theirs, peer)) is not None:
                await self._asked(peer, _Heads(feed.publisher, _text(head), growth))
        except TetherError as error:
            log.debug("a peer does not say which head of a feed it has", peer=peer, publisher=feed.publisher, error=str(error))
            self._told.pop(key, None)
            self._resting[key] = asyncio.get_running_loop().time() + _AGAIN

    async def _asked(self, peer: str, asked: _Heads) -> _Heads:
        answer = await self._with.ask(peer, msgspec.json.encode(asked))
        return _parsed(answer, RemoteError("a lab's answer about heads makes no sense: it may have another version of Tether"))


def _parsed(data: bytes, error: TetherError) -> _Heads:
    try:
        return msgspec.json.decode(data, type=_Heads)
    except msgspec.DecodeError as cause:
        raise error from cause


def _bytes(text: str) -> bytes:
    """Raises: MalformedFeedError."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedFeedError("a head of a feed was handed on that is no base64") from None


def _text(head: bytes) -> str:
    return base64.b64encode(head).decode()
