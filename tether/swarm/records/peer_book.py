"""Pure: the peers of a topic, as far as their records can be believed: bounded, however many are announced.

Keys cost nothing, so most of what a lookup gives may be inventions. Three things bound them: signatures are checked at a rate; of strangers
a sample is kept that nobody can steer, since it is drawn by a salted hash; and those whom we know, or who proved to be what they say, are
never pushed out by strangers. A stranger that does not answer makes room, so that in time all are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from blake3 import blake3

from tether.errors import MalformedRecordError
from tether.security.rates import Bucket
from tether.swarm.records.records import MAX_LIFETIME, SKEW, Record, parse, peer_of
from tether.types import Digest

__all__ = ["MOST", "PeerBook", "Verdict"]

MOST = 512
"""Strangers, and again as many friends: 2 MB at most. A lookup brings some hundred."""
_RATE, _BURST = 50.0, 600.0
"""Signatures that are checked a second, and at once, 0.2 ms each: at most a hundredth of a core."""
_REST = 600.0
"""Seconds for which a stranger that did not answer is not written down again."""


class Verdict(Enum):
    """What became of an offered record."""

    NEW = "a peer that was not in the book"
    UPDATED = "newer than what was known of the peer"
    SAME = "known already"
    OLDER = "older than what is known: a replay"
    CONFLICT = "another one with the same number: the peer says two things"
    EXPIRED = "its time is over"
    EARLY = "from the future: a clock is wrong by more than a quarter of an hour"
    MALFORMED = "breaks a rule, or is not signed by its peer"
    BUSY = "too many came at once: offer it again later"
    FULL = "a stranger, and the book is full of them"
    RESTING = "a stranger that did not answer a moment ago"
    BANNED = "a peer that is not spoken with"


@dataclass(slots=True)
class _Entry:
    record: Record
    until: float
    """The record is good until then."""
    lot: bytes
    """Drawn for the peer: the highest goes where there are too many."""

    def remembered_until(self) -> float:
        """When no record of before can be good any more: until then its number is needed to tell a replay."""
        return self.record.issued + MAX_LIFETIME + SKEW


class PeerBook:
    """The book of one topic."""

    def __init__(
        self,
        salt: bytes,
        *,
        is_known: Callable[[str], bool] = lambda _: False,
        is_banned: Callable[[str], bool] = lambda _: False,
        region: Callable[[], str] = lambda: "",
    ) -> None:
        """`salt`: secret random bytes; `is_known`: whether the user named, allowed or follows this key; `is_banned`: `Access.is_banned`.

        `region`: where this lab is.
        """
        self._salt, self._is_known, self._is_banned, self._region = salt, is_known, is_banned, region
        self._friends: dict[str, _Entry] = {}
        self._strangers: dict[str, _Entry] = {}
        self._resting: dict[str, float] = {}
        self._strange_rate = Bucket(_RATE, _BURST)
        self._friendly_rate = Bucket(_RATE, _BURST)

    def offer(self, data: bytes, now: float, peer: str | None = None) -> Verdict:
        """Take in what was found. `peer`: under whose key it lay in the DHT."""
        try:
            named = peer_of(data)
        except MalformedRecordError:
            return Verdict.MALFORMED
        if peer is not None and named != peer:
            return Verdict.MALFORMED  # before it is counted: who writes a friend's name under a key of his own costs the friend nothing
        refusal = self._refusal(named, now)
        if refusal is not None:
            return refusal
        bucket = self._friendly_rate if self._is_friend(named) else self._strange_rate
        if not bucket.take(1.0, now):
            return Verdict.BUSY
        try:
            return self._enter(parse(data), now)
        except MalformedRecordError:
            return Verdict.MALFORMED

    def _refusal(self, peer: str, now: float) -> Verdict | None:
        """What can be told without looking at the signature."""
        if self._is_banned(peer):
            return Verdict.BANNED
        if self._resting.get(peer, now) > now and not self._is_friend(peer):
            return Verdict.RESTING
        return None

    def _enter(self, record: Record, now: float) -> Verdict:
        if record.issued > now + SKEW:
            return Verdict.EARLY
        known = self._find(record.peer)
        if known is not None:
            verdict = _compared(record, known.record)
            if verdict is not Verdict.UPDATED:
                return verdict
        until = min(now + record.lifetime, record.issued + record.lifetime + SKEW)
        if until <= now and known is None:
            return Verdict.EXPIRED
        return self._write(_Entry(record, until, self._lot(record.peer)), now, known)

    def _write(self, entry: _Entry, now: float, known: _Entry | None) -> Verdict:
        peer = entry.record.peer
        if known is not None:
            (self._friends if peer in self._friends else self._strangers)[peer] = entry
            return Verdict.UPDATED if entry.until > now else Verdict.EXPIRED
        section = self._friends if self._is_known(peer) else self._strangers
        if len(section) >= MOST:
            self.sweep(now)
        section[peer] = entry
        if len(section) > MOST:
            out = self._one_too_many(section, now)
            del section[out]
            return Verdict.FULL if out == peer else Verdict.NEW
        return Verdict.NEW

    def _one_too_many(self, section: dict[str, _Entry], now: float) -> str:
        """Who has to go: somebody whose record is over, else by a lot that the peers can't know; of those that the user knows the last."""
        over = next((peer for peer, entry in section.items() if entry.until <= now), None)
        return over or max(section, key=lambda peer: (not self._is_known(peer), section[peer].lot))

    def _lot(self, peer: str) -> bytes:
        return blake3(self._salt + bytes.fromhex(peer)).digest()

    # --- what was found out by speaking with them

    def proved(self, peer: str) -> None:
        """It answered, and what it said of itself was so: strangers can't push it out any more."""
        if peer not in self._strangers:
            return
        if len(self._friends) >= MOST:
            unknown = [friend for friend in self._friends if not self._is_known(friend)]
            if not unknown:
                return
            del self._friends[min(unknown, key=lambda friend: self._friends[friend].until)]
        self._friends[peer] = self._strangers.pop(peer)

    def failed(self, peer: str, now: float) -> None:
        """It did not answer. A stranger goes; a friend stays until its record is over."""
        if self._strangers.pop(peer, None) is not None:
            self._resting[peer] = now + _REST
            if len(self._resting) > MOST:
                del self._resting[next(iter(self._resting))]

    def forget(self, peer: str) -> None:
        """It was banned. Who takes its leave is not forgotten: the number of its last record tells a replay of those before."""
        self._friends.pop(peer, None)
        self._strangers.pop(peer, None)

    # --- reading

    def get(self, peer: str, now: float) -> Record | None:
        """What it last said, if that is still good."""
        entry = self._find(peer)
        return entry.record if entry and entry.until > now and not self._is_banned(peer) else None

    def peers(self, now: float) -> list[Record]:
        """Those whose records are good: friends first, in each part those of this lab's region, then the least loaded."""
        return [entry.record for section in (self._friends, self._strangers) for entry in self._good(section, now)]

    def holders(self, digest: Digest, now: float) -> tuple[list[Record], list[Record]]:
        """Those that say that they have a version, and those that have more than they could say: to be asked for their listings."""
        said = [(record, record.holds(digest)) for record in self.peers(now)]
        return [record for record, holds in said if holds], [record for record, holds in said if holds is None]

    def _good(self, section: dict[str, _Entry], now: float) -> list[_Entry]:
        found = [entry for peer, entry in section.items() if entry.until > now and not self._is_banned(peer)]
        region = self._region()
        return sorted(found, key=lambda entry: (not region or entry.record.region != region, entry.record.load, entry.lot))

    def sweep(self, now: float) -> None:
        """Forget those of whom nothing that could come again would be good."""
        for section in (self._friends, self._strangers):
            for peer in [peer for peer, entry in section.items() if entry.until <= now and entry.remembered_until() <= now]:
                del section[peer]
        self._resting = {peer: until for peer, until in self._resting.items() if until > now}

    def _is_friend(self, peer: str) -> bool:
        return peer in self._friends or self._is_known(peer)

    def _find(self, peer: str) -> _Entry | None:
        return self._friends.get(peer) or self._strangers.get(peer)

    def __iter__(self) -> Iterator[str]:
        yield from self._friends
        yield from self._strangers

    def __len__(self) -> int:
        """Of all that is remembered, good or not."""
        return len(self._friends) + len(self._strangers)


def _compared(new: Record, known: Record) -> Verdict:
    if new.seq < known.seq:
        return Verdict.OLDER
    if new.seq > known.seq:
        return Verdict.UPDATED
    return Verdict.SAME if new == known else Verdict.CONFLICT
