"""Pure: what a peer answers about its feed, and what a proven update of a feed makes of what was known."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import MalformedFeedError
from tether.swarm.feeds.entries import Change, Content, applied, contradictions, redefined, renewed
from tether.swarm.feeds.heads import MAX_HEAD_NBYTES, Head, parse_head
from tether.swarm.feeds.state import FeedState, Verdict

__all__ = ["News", "Offer", "check_bound", "parse_offer", "read", "some"]

_SOME = 3

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Offer:
    """What `tether/1/feed` answered."""

    server: bytes
    """Key under which the feed is served."""
    signed: bytes
    """The head, as its publisher signed it."""
    head: Head
    """What it says; the signature was checked."""


@dataclass(frozen=True, slots=True)
class News:
    """What a feed says now. Import it, then tell `FollowedFeed.imported`: until then a restart brings it again."""

    content: Content
    """All of it."""
    changed: tuple[str, ...]
    """Names of the models that are other than they were."""
    verdict: Verdict
    """FIRST, NEWER; NEW_ERA: the lab began its feed anew; SAME, after a start: what was imported before."""
    length: int
    state: FeedState
    """What is believed once it is imported."""


def parse_offer(answer: Any, publisher: str) -> Offer:
    """Raises: MalformedFeedError: it is none, or not signed by `publisher` (key, hex)."""
    core, server, text = (answer.get(name) if isinstance(answer, Mapping) else None for name in ("core", "server", "head"))
    if not (isinstance(server, str) and _HEX.fullmatch(server) and isinstance(text, str) and len(text) <= 2 * MAX_HEAD_NBYTES):
        raise MalformedFeedError("the lab's answer about its feed has no keys and head: it may have another version of Tether")
    try:
        signed = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MalformedFeedError(f"the head of the lab's feed is no base64 ({error})") from None
    head = parse_head(signed, publisher)
    if head.core != core:
        raise MalformedFeedError("the lab names one core, and signed the head of another one")
    return Offer(bytes.fromhex(server), signed, head)


def read(verdict: Verdict, before: Content | None, update: Sequence[Change]) -> tuple[Content, tuple[str, ...], tuple[str, ...]]:
    """What the feed says after an update, the models that changed, and in words, how a new era contradicts what was said before.

    `before`: what it said at the head that is known; None: that is not here any more, or never was, and the update is all of the feed.

    Raises: MalformedFeedError.
    """
    if verdict is Verdict.NEWER and before is not None:
        content, changed = applied(before, update)
        return content, changed, ()
    content, _ = applied(Content(), update)
    known = before or Content()
    return content, renewed(known, content), contradictions(known, content) if verdict is Verdict.NEW_ERA else ()


def check_bound(content: Content, bound: Content) -> None:
    """What the catalog here says of the publisher's models binds their numbers. Raises: MalformedFeedError."""
    against = redefined(bound, content)
    if against:
        raise MalformedFeedError(
            f"the feed gives numbers to other versions than this lab has under them: {some(against)}. Nothing of it is taken; ask the lab "
            "which are right, and delete those here that are not"
        )


def some(reasons: Sequence[str]) -> str:
    """The first of many, as far as a line holds."""
    return "; ".join(reasons[:_SOME]) + (f" and {len(reasons) - _SOME} more" if len(reasons) > _SOME else "")
