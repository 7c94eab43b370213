"""Pure but for `FeedStates`: what a follower believes of a publisher's feed, and which news of it are refused.

What counts is a head that the lab signed and that contains all that was seen before. Followers keep the last one and hand it on: whoever
shows one history to some and another to others is found out when two of them meet.

`era` counts the cores of a lab: a manager that takes over without the end of the core begins a new one and says all again. Who stole the
key can do that, too, and then the lab's own heads would only look old. But a lab that began a new era signs nothing of the earlier one any
more: a head of an earlier era that was signed later than a newer one began (by more than clocks differ) is a fork, whichever comes first.
And a new era has to account for all that was said before (`feed_entries.contradictions`).
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

import msgspec

from tether.errors import FeedRefusedError, MalformedFeedError, StoreError
from tether.security.files import sync_folder, written_aside
from tether.swarm.feeds.heads import Head, parse_head
from tether.swarm.records.records import SKEW

__all__ = ["FATAL", "TAKEN", "FeedState", "FeedStates", "PastEra", "Refusal", "Verdict", "judge"]

_HEX = re.compile(r"[0-9a-f]{64}")
_FORMAT = 1
_MOST_PAST = 8
"""Eras that are remembered: a lab begins one when a disk failed or another machine took over."""


class Verdict(Enum):
    """What an offered head is to one who knows another."""

    FIRST = "first"
    NEWER = "newer"
    NEW_ERA = "new-era"
    SAME = "same"
    UNPROVEN = "unproven"
    """Longer, but nobody showed that it contains what is known: ask for its root at the known length."""
    ROLLED_BACK = "rolled-back"
    """Older than what is known. Anybody can say old things again: the peer is refused, the feed goes on."""
    FORKED = "forked"
    """The publisher's key signed two histories. Which one is true nobody can tell from here: no more is taken until a person decides."""
    TRUNCATED = "truncated"
    """History was cut off and goes on otherwise: the same."""
    CONTRADICTS = "contradicts"
    """A new era that does not account for what was said before, or says something else: the same."""
    AHEAD = "ahead"
    """Signed at a time that is not yet: one of two clocks is wrong. Nothing is taken, nothing is held against anybody."""
    STOPPED = "stopped"
    """The feed was refused before."""


TAKEN = frozenset({Verdict.FIRST, Verdict.NEWER, Verdict.NEW_ERA})
"""What is to be imported."""
FATAL = frozenset({Verdict.FORKED, Verdict.TRUNCATED, Verdict.CONTRADICTS})
"""What is followed by nothing until a person decides."""


_WHY = {
    Verdict.FORKED: "its key signed two histories",
    Verdict.TRUNCATED: "its key cut off a part of its history",
    Verdict.CONTRADICTS: "it was begun anew and forgot, or changed, what it said before",
}


class Refusal(msgspec.Struct, frozen=True):
    """Why a feed is followed no further, with the proof."""

    verdict: Verdict
    known: bytes
    """Signed head that was believed."""
    offered: bytes
    """Signed head that contradicts it."""
    at: float
    seen_from: str
    """Key of the peer that showed it; it did nothing wrong."""


class PastEra(msgspec.Struct, frozen=True):
    """An era that another one followed."""

    era: int
    core: str
    began: int
    head: bytes
    """The last one of it that was believed, signed."""


class FeedState(msgspec.Struct, frozen=True):
    """What is believed of one publisher's feed."""

    publisher: str
    head: bytes | None = None
    """The last that was imported, signed: handed on to who asks."""
    refusal: Refusal | None = None
    rollbacks: int = 0
    """How often somebody came with something older."""
    past: tuple[PastEra, ...] = ()
    """Earlier eras, oldest first."""
    pardoned: str = ""
    """Key of a core that may contradict what was said before: a person looked at it."""
    format: int = _FORMAT

    @property
    def known(self) -> Head | None:
        """What `head` says."""
        return parse_head(self.head, self.publisher) if self.head else None

    def imported(self, head: bytes) -> FeedState:
        """What the head stands for is in the catalog, durably."""
        known, new = self.known, parse_head(head, self.publisher)
        past = self.past
        if known is not None and self.head is not None and known.era < new.era:
            past = (*past, PastEra(known.era, known.core, known.began, self.head))[-_MOST_PAST:]
        return msgspec.structs.replace(self, head=head, past=past)

    def refused(self, verdict: Verdict, offered: bytes, at: float, seen_from: str) -> FeedState:
        """Remember it; after a fork, a cut or a contradiction nothing is taken any more."""
        if verdict is Verdict.ROLLED_BACK:
            return msgspec.structs.replace(self, rollbacks=self.rollbacks + 1)
        if verdict not in FATAL or self.refusal is not None or self.head is None:
            return self
        return msgspec.structs.replace(self, refusal=Refusal(verdict, self.head, offered, at, seen_from))

    def forgiven(self, *, from_the_start: bool = False) -> FeedState:
        """A person decided to follow it again: from where it was, or as if it were new. The new era that contradicted may then do so.

        What is in the catalog still binds its numbers.
        """
        refusal = self.refusal
        contradicted = refusal is not None and refusal.verdict is Verdict.CONTRADICTS
        pardoned = parse_head(refusal.offered, self.publisher).core if refusal is not None and contradicted else self.pardoned
        if from_the_start:
            return FeedState(self.publisher, rollbacks=self.rollbacks, pardoned=pardoned)
        return msgspec.structs.replace(self, refusal=None, pardoned=pardoned)

    def check(self) -> None:
        """Raises: FeedRefusedError: a person has to decide."""
        if self.refusal is not None:
            verdict = self.refusal.verdict
            raise FeedRefusedError(
                f"the feed of {self.publisher} is refused ({verdict.value}): {_WHY[verdict]}. Its key was stolen, or the lab restored "
                "a backup; nothing new of it is taken. Ask the lab, then say which to follow",
                verdict.value,
            )


def judge(state: FeedState, offered: Head, shared_root: str | None, now: float) -> Verdict:
    """What to make of a head whose signature was checked, at Unix time `now`.

    `shared_root`: root at the shorter of both lengths, in the tree of the longer: of the offered core (proven by its blocks), or of the one
    that is here; None: not known. The shorter one is contained in the longer if it is its root.
    """
    known = state.known
    if state.refusal is not None:
        return Verdict.STOPPED
    if max(offered.signed, offered.era) > now + SKEW:  # an era is a time: else who stole the key could begin the last one that there is
        return Verdict.AHEAD
    if known is None:
        return Verdict.FIRST
    return _of_another_era(state, known, offered) if offered.era != known.era else _compared(known, offered, shared_root)


def _of_another_era(state: FeedState, known: Head, offered: Head) -> Verdict:
    """Signed later than a newer era began: somebody else signs, too."""
    if offered.era > known.era:
        return Verdict.FORKED if known.signed > offered.began + SKEW else Verdict.NEW_ERA
    seen = (*state.past, PastEra(known.era, known.core, known.began, b""))
    another = any(each.era == offered.era and (each.core, each.began) != (offered.core, offered.began) for each in seen)
    ended = min(each.began for each in seen if each.era > offered.era)
    return Verdict.FORKED if another or offered.signed > ended + SKEW else Verdict.ROLLED_BACK


def _compared(known: Head, offered: Head, shared_root: str | None) -> Verdict:
    if (offered.core, offered.began) != (known.core, known.began):
        return Verdict.FORKED
    if offered.fork != known.fork:
        return Verdict.TRUNCATED if offered.fork > known.fork else Verdict.ROLLED_BACK
    return _contained(known, offered, shared_root)


def _contained(known: Head, offered: Head, shared_root: str | None) -> Verdict:
    if offered.length == known.length:
        return Verdict.SAME if offered.root == known.root else Verdict.FORKED
    shorter = min(known, offered, key=lambda head: head.length)
    if shared_root is not None and shared_root != shorter.root:
        return Verdict.FORKED
    if shorter is offered:
        return Verdict.ROLLED_BACK
    return Verdict.UNPROVEN if shared_root is None else Verdict.NEWER


class FeedStates:
    """What is believed, in a folder: one small file a publisher, replaced whole. Blocks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, publisher: str) -> FeedState:
        """What was saved; nothing is known of one that never was. Raises: StoreError: it can't be read, or was damaged."""
        path = self._path(publisher)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return FeedState(publisher)
        except OSError as error:
            raise StoreError(f"{path} can't be read ({error.strerror}): mend the folder's permissions") from error
        try:
            return _sound(msgspec.json.decode(data, type=FeedState), publisher)
        except (msgspec.DecodeError, UnicodeDecodeError, MalformedFeedError) as error:
            # Taken for nothing known, it would let an old or forked feed in.
            raise StoreError(f"{path} was damaged ({error}): restore it, or remove it to follow the feed as if it were new") from error

    def save(self, state: FeedState) -> None:
        """Durable when it returns. Raises: StoreError."""
        path = self._path(state.publisher)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with written_aside(path, msgspec.json.encode(state)) as partial:
                partial.rename(path)
                sync_folder(self._folder)
        except OSError as error:
            raise StoreError(f"{path} can't be written ({error.strerror}): free some space, or mend the folder's permissions") from error

    def publishers(self) -> list[str]:
        """Whose feeds were ever followed."""
        return sorted(path.stem for path in self._folder.glob("*.json") if _HEX.fullmatch(path.stem))

    def _path(self, publisher: str) -> Path:
        if not _HEX.fullmatch(publisher):
            raise MalformedFeedError(f"{publisher[:80]!r} is no publisher's key")
        return self._folder / f"{publisher}.json"


def _sound(state: FeedState, publisher: str) -> FeedState:
    if state.publisher != publisher or state.format != _FORMAT:
        raise MalformedFeedError("it is of another publisher, or of a newer Tether")
    proofs = (state.refusal.known, state.refusal.offered) if state.refusal else ()
    for head in (state.head, *proofs, *(each.head for each in state.past)):
        if head is not None:
            parse_head(head, publisher)
    return state
