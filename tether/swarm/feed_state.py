r"""Pure but for `FeedStates`: what a follower believes of a publisher's feed, and which news of it are refused.

    head  =  signature (64 bytes, by the lab's identity) of "tether feed v1\0" + body, then the body: msgpack array of the fields of `Head`

A head says: my feed is this Hypercore, so long, and this is the root of its tree. Hypercore signs lengths, too, with the core's key; that
does not tell whose core it is, and by design it lets a core be cut off and go on otherwise (its fork count). A lab's history is not cut.
So what counts is a head that the lab signed and that contains all that was seen before. Followers keep the last one and hand it on: whoever
shows one history to some and another to others is found out when two of them meet.

`era` counts the cores of a lab: a manager that takes over without the end of the core begins a new one and says all again; `feed_entries`
sees to it that no number means anything else than before.
"""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path

import msgspec

from tether.errors import BadSignatureError, FeedRefusedError, MalformedFeedError, StoreError
from tether.security.files import written_aside
from tether.security.identity import Identity, verify

__all__ = ["MAX_HEAD_NBYTES", "TAKEN", "FeedState", "FeedStates", "Head", "Refusal", "Verdict", "judge", "parse_head", "sign_head"]

MAX_HEAD_NBYTES = 512
_SIGNED = b"tether feed v1\0"
_SIGNATURE_NBYTES = 64
_HEX = re.compile(r"[0-9a-f]{64}")
_MOST = 1 << 53
"""What JavaScript counts to."""
_FORMAT = 1


class Head(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The end of a feed, as its publisher signed it."""

    publisher: str
    """The lab's key, hex."""
    core: str
    """Public key of the Hypercore, hex."""
    era: int
    """Which core of the lab's this is, from 1."""
    length: int
    """Blocks."""
    fork: int
    """How often the core was cut off: 0, in a lab that does as it should."""
    root: str
    """Of the tree over all blocks (`core.treeHash(length)`), hex."""
    signed: int
    """Unix time."""
    format: int = _FORMAT


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
    STOPPED = "stopped"
    """The feed was refused before."""


TAKEN = frozenset({Verdict.FIRST, Verdict.NEWER, Verdict.NEW_ERA})
"""What is to be imported."""
_FATAL = frozenset({Verdict.FORKED, Verdict.TRUNCATED})


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


class FeedState(msgspec.Struct, frozen=True):
    """What is believed of one publisher's feed."""

    publisher: str
    head: bytes | None = None
    """The last that was imported, signed: handed on to who asks."""
    refusal: Refusal | None = None
    rollbacks: int = 0
    """How often somebody came with something older."""
    format: int = _FORMAT

    @property
    def known(self) -> Head | None:
        """What `head` says."""
        return parse_head(self.head, self.publisher) if self.head else None

    def imported(self, head: bytes) -> FeedState:
        """What the head stands for is in the catalog, durably."""
        return msgspec.structs.replace(self, head=head)

    def refused(self, verdict: Verdict, offered: bytes, at: float, seen_from: str) -> FeedState:
        """Remember it; after a fork or a cut nothing is taken any more."""
        if verdict is Verdict.ROLLED_BACK:
            return msgspec.structs.replace(self, rollbacks=self.rollbacks + 1)
        if verdict not in _FATAL or self.refusal is not None or self.head is None:
            return self
        return msgspec.structs.replace(self, refusal=Refusal(verdict, self.head, offered, at, seen_from))

    def forgiven(self, *, from_the_start: bool = False) -> FeedState:
        """A person decided to follow it again: from where it was, or as if it were new. What is in the catalog still binds its numbers."""
        return msgspec.structs.replace(self, refusal=None, head=None if from_the_start else self.head)

    def check(self) -> None:
        """Raises: FeedRefusedError: a person has to decide."""
        if self.refusal is not None:
            verdict = self.refusal.verdict.value
            raise FeedRefusedError(
                f"the feed of {self.publisher} is {verdict}: its key signed two histories, so it was stolen, or the lab restored a backup. "
                "Nothing new of it is taken; ask the lab, then say which to follow",
                verdict,
            )


def judge(state: FeedState, offered: Head, shared_root: str | None) -> Verdict:
    """What to make of a head whose signature was checked.

    `shared_root`: root at the shorter of both lengths, in the tree of the longer: of the offered core (proven by its blocks), or of the one
    that is here; None: not known. The shorter one is contained in the longer if it is its root.
    """
    known = state.known
    if state.refusal is not None:
        return Verdict.STOPPED
    if known is None:
        return Verdict.FIRST
    if offered.era != known.era:
        return Verdict.NEW_ERA if offered.era > known.era else Verdict.ROLLED_BACK
    if offered.core != known.core:
        return Verdict.FORKED
    if offered.fork != known.fork:
        return Verdict.TRUNCATED if offered.fork > known.fork else Verdict.ROLLED_BACK
    return _compared(known, offered, shared_root)


def _compared(known: Head, offered: Head, shared_root: str | None) -> Verdict:
    if offered.length == known.length:
        return Verdict.SAME if offered.root == known.root else Verdict.FORKED
    shorter = min(known, offered, key=lambda head: head.length)
    if shared_root is not None and shared_root != shorter.root:
        return Verdict.FORKED
    if shorter is offered:
        return Verdict.ROLLED_BACK
    return Verdict.UNPROVEN if shared_root is None else Verdict.NEWER


def sign_head(identity: Identity, head: Head) -> bytes:
    """Raises: MalformedFeedError: it would not be one."""
    _check(head)
    data = msgspec.msgpack.encode(head)
    return identity.sign(_SIGNED + data) + data


def parse_head(data: bytes, publisher: str) -> Head:
    """The head, if `publisher` (key, hex) signed it. Raises: MalformedFeedError."""
    if not _SIGNATURE_NBYTES < len(data) <= MAX_HEAD_NBYTES:
        raise MalformedFeedError(f"a signed head has up to {MAX_HEAD_NBYTES} bytes, this has {len(data)}")
    body = data[_SIGNATURE_NBYTES:]
    try:
        head = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFeedError(f"the head of a feed can't be read ({error}): its lab may have another version of Tether") from None
    _check(head)
    try:
        verify(publisher, _SIGNED + body, data[:_SIGNATURE_NBYTES])
    except BadSignatureError as error:
        raise MalformedFeedError(f"the head was not signed by {publisher[:64]}") from error
    if head.publisher != publisher or msgspec.msgpack.encode(head) != body:
        raise MalformedFeedError(f"the head is not one of {publisher[:64]}, or not written in the one way that counts")
    return head


_decoder = msgspec.msgpack.Decoder(Head, strict=True)


def _check(head: Head) -> None:
    """Raises: MalformedFeedError."""
    named = all(map(_HEX.fullmatch, (head.publisher, head.core, head.root)))
    counted = 0 < head.era < _MOST and 0 <= head.length < _MOST and 0 <= head.fork < _MOST and 0 <= head.signed < _MOST
    if not named or not counted or head.format != _FORMAT:
        raise MalformedFeedError("the head of a feed breaks a rule of the format")


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
                _sync(self._folder)
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
    for head in (state.head, *proofs):
        if head is not None:
            parse_head(head, publisher)
    return state


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
