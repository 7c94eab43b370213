"""Pure: from which of many peers each blob of a version comes, rarest first; who is slow, who lied, how much may come in.

What is there rarely comes first, and among equals everybody has another order, so that labs that fetch at the same time soon have something
to give each other. A blob is asked of whoever will have sent it first, judged by what each peer gave until now; of the origin only where no
other has it, or all others are far slower, and then by one of those who fetch, which is drawn by lot: so the origin sends little more than
one copy where a few fetch, and two where 64 do (`benchmarks/swarm_scale`). What a peer sends is not believed: `lied` is for the first wrong
blob, and there is no second.

What one lab does not know yet must not cost the origin a copy: labs that are only being connected to have their part too, and who is done
with its own waits, twice as long as the origin takes for a blob, before it asks for another's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tether.swarm.wire.bandwidth import TokenBucket

__all__ = ["Asking", "Sources"]

_FIRST_RATE = 8e6
"""Bytes a second that a peer is taken to give before it gave anything."""
_SLOWEST = 1e3
"""What a peer at one byte a second counts as: its estimate stays a number that others can be compared with."""
_AHEAD = 0.5
"""Seconds' worth of bytes that are asked of one peer at a time: enough for any round trip, little to lose when it goes."""
_MIN_WINDOW, _MAX_WINDOW = 4 << 20, 32 << 20
"""Bytes: one blob at least; beyond that a fast peer gains nothing, and much is asked again when it goes."""
_WEIGHT = 0.3
"""Of the latest blob in the estimate of a peer's rate."""
_PATIENCE = 2.0
"""Seconds, and four times what the fastest that gave something would take, after which another one is asked as well."""
_TIMES = 4.0
_TOO_SLOW = 2.0
"""Seconds, and four times the origin's, that the others may take before the origin is asked for what they have."""
_CLAIM = 3.0
"""Seconds without a new blob after which a lab counts as fetching no longer, and what is its part as anybody's."""
_IDLE = 2.0
"""Times what the origin takes for a blob, and at most as many seconds, for which a lab with nothing under way leaves others their parts."""
_RESTS = (0.1, 0.4, 1.0, 2.0, 10.0)
"""Seconds that a peer is left alone after failures in a row."""


@dataclass(frozen=True, slots=True)
class Asking:
    """A blob that is to be asked of a peer."""

    index: int
    peer: str
    wait: float
    """Seconds to wait before: the bandwidth cap."""


@dataclass(slots=True)
class _Peer:
    has: npt.NDArray[np.bool_]
    is_origin: bool
    lots: npt.NDArray[np.float64]
    """One for each blob: of those who fetch, the lowest is the one who asks the origin for it."""
    came: float
    gained: float
    """When it last said that it has more."""
    rate: float = _FIRST_RATE
    asked: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Index → bytes, and when."""
    nbytes: int = 0
    """Of these."""
    last: float = -math.inf
    """When it last gave something."""
    took: float = math.inf
    """Seconds from an asking to a large blob, smoothed: askings of others that wait at the peer are in it, as they are not in `rate`."""
    failures: int = 0
    resting: float = -math.inf

    def expected(self, nbytes: int) -> float:
        """Seconds until it will have sent that much more."""
        return (self.nbytes + nbytes) / self.rate

    def is_fetching(self, now: float) -> bool:
        """Whether what is its part will come by it: it just came, or goes on, and has given us some of that."""
        is_new = now - self.came < _CLAIM
        return not self.is_origin and (is_new or (self.last > -math.inf and now - self.gained < _CLAIM)) and not self.has.all()

    @property
    def window(self) -> float:
        return min(max(self.rate * _AHEAD, _MIN_WINDOW), _MAX_WINDOW)

    def has_room(self, nbytes: int) -> bool:
        return not self.asked or self.nbytes + nbytes <= self.window

    def expected_at_most(self, nbytes: int) -> float:
        """`expected` of a blob that is no larger, whatever it is asked for until then."""
        return (max(self.window, self.nbytes, nbytes) + nbytes) / self.rate


class Sources:
    """The peers of one version's download. Blobs go by their index in the manifest."""

    def __init__(self, count: int, own: str, version: str, downlink: TokenBucket | None = None) -> None:
        """`own`: this lab's key: its order among equally rare blobs. `downlink`: the cap that all downloads share."""
        self._count, self._version, self._downlink = count, version, downlink or TokenBucket()
        self._peers: dict[str, _Peer] = {}
        self._expected: dict[str, tuple[npt.NDArray[np.float64], float]] = {}
        """Lots of those that are being connected to, and since when."""
        self._busy_at: float | None = None
        """When something was under way, or could have been, as far as `next` has seen."""
        self._liars: set[str] = set()
        self._available = np.zeros(count, np.int32)
        self._lots = self._drawn(own)
        self._sizes: tuple[Sequence[int], npt.NDArray[np.int64]] = ((), np.zeros(0, np.int64))
        """Those that `next` was given, and the same as an array: it is given the same ones each time."""

    def _drawn(self, peer: str) -> npt.NDArray[np.float64]:
        """A lab's lots: all draw the same for it."""
        seed = int.from_bytes(blake3(f"{peer} {self._version}".encode()).digest())
        return np.random.Generator(np.random.PCG64(seed)).random(self._count)

    @property
    def liars(self) -> frozenset[str]:
        """To be cut and banned (`Access.ban`)."""
        return frozenset(self._liars)

    @property
    def peers(self) -> dict[str, float]:
        """Those that are here, and the bytes a second that each gives."""
        return {name: peer.rate for name, peer in self._peers.items()}

    # --- who has what

    def expected(self, peers: Iterable[str], now: float) -> None:
        """They may join soon: what is their part is left to them, for as long as to one that just came."""
        self._expected |= {peer: (self._drawn(peer), now) for peer in peers}

    def joined(self, peer: str, has: Sequence[bool], now: float, *, is_origin: bool = False) -> None:
        """It is connected and says which blobs it has; what it said before is forgotten. A bitmap of another length says nothing.

        `is_origin`: it published the version, and all who want it come to it.
        """
        self._expected.pop(peer, None)
        if peer in self._liars:
            return
        bits = np.array(has, np.bool_) if len(has) == self._count else np.zeros(self._count, np.bool_)
        known = self._peers.get(peer)
        if known is None:
            self._peers[peer] = _Peer(bits, is_origin, self._drawn(peer), now, now)
        else:
            self._available -= known.has
            known.has = bits
        self._available += bits

    def gained(self, peer: str, indices: Iterable[int], now: float) -> None:
        """It has these, too."""
        known = self._peers.get(peer)
        for index in indices:
            if known is not None and 0 <= index < self._count and not known.has[index]:
                known.has[index], known.gained = True, now
                self._available[index] += 1

    def left(self, peer: str) -> list[int]:
        """It is gone, or does not come; gives what it was asked for: to be asked elsewhere."""
        self._expected.pop(peer, None)
        known = self._peers.pop(peer, None)
        if known is None:
            return []
        self._available -= known.has
        return list(known.asked)

    def order(self, missing: Iterable[int]) -> list[int]:
        """What is missing and somebody has, in the order in which it is to be asked for: rarest first."""
        return list(map(int, self._ordered(np.fromiter(missing, np.int64))))

    def _ordered(self, missing: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        wanted = missing[self._available[missing] > 0]
        return wanted[np.lexsort((self._lots[wanted], self._available[wanted]))]

    def lacking(self, missing: Iterable[int]) -> list[int]:
        """What is missing and nobody has."""
        return [index for index in missing if self._available[index] == 0]

    # --- whom to ask

    def next(self, missing: Iterable[int], nbytes: Sequence[int], now: float) -> list[Asking]:
        """All that is to be asked now. `missing`: indices that nobody is asked for; `nbytes`: of each blob of the version."""
        out: list[Asking] = []
        if self._busy_at is None or self._is_busy:
            self._busy_at = now
        free, sizes = np.fromiter(missing, np.int64), self._as_array(nbytes)
        if not free.size or not self._has_room(int(sizes[free].min()), now):
            return out
        by_others, by_origins = self._askable(now, sizes)
        wanted = self._ordered(free[(by_others | by_origins)[free]])
        if not wanted.size:
            return out
        giving = [peer for peer in self._peers.values() if peer.resting <= now and peer.has[wanted].any()]
        last = np.flatnonzero(by_origins[wanted]).max(initial=-1)
        for place, index in enumerate(map(int, wanted)):
            if not any(peer.has_room(nbytes[index]) for peer in giving if place <= last or not peer.is_origin):
                break
            asking = self.ask(index, nbytes[index], now)
            if asking is not None:
                out.append(asking)
        return out

    def _as_array(self, nbytes: Sequence[int]) -> npt.NDArray[np.int64]:
        if self._sizes[0] is not nbytes:
            self._sizes = (nbytes, np.array(nbytes, np.int64))
        return self._sizes[1]

    def _has_room(self, nbytes: int, now: float) -> bool:
        """Whether any peer has: most of the time none has, for what else is looked at is too much to do for nothing."""
        return any(peer.resting <= now and peer.has_room(nbytes) for peer in self._peers.values())

    def _askable(self, now: float, nbytes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """What `ask` may ask others for, and what origins, and little else: `next` runs for each blob that comes, and few are ours.

        An origin has room most of the time, and is not asked for what another one has who is not far slower: without `near` each blob of a
        large version would be gone through, each time, to find just that.
        """
        here = [peer for peer in self._peers.values() if peer.resting <= now]
        smallest, largest = int(nbytes.min(initial=_MAX_WINDOW)), int(nbytes.max(initial=0))
        limit = max(_TOO_SLOW, _TIMES * min((peer.expected(smallest) for peer in here if peer.is_origin), default=math.inf))
        by_origins, by_others, others, near = (np.zeros(self._count, np.bool_) for _ in range(4))
        for peer in here:
            if peer.has_room(smallest):
                having = by_origins if peer.is_origin else by_others
                having |= peer.has
            if not peer.is_origin:
                others |= peer.has
                if peer.expected_at_most(largest) <= limit:
                    near |= peer.has
        return by_others, by_origins & ~near & (others | ~self._claimed(now) | (nbytes <= self._takes_over(now)))

    def _claimed(self, now: float) -> npt.NDArray[np.bool_]:
        """What another one who fetches too is about to get from the origin and to give."""
        claimed = np.zeros(self._count, np.bool_)
        for peer in self._peers.values():
            if peer.is_fetching(now):
                claimed |= (peer.lots < self._lots) & ~peer.has
        for lots, since in self._expected.values():
            if now - since < _CLAIM:
                claimed |= lots < self._lots
        return claimed

    def ask(self, index: int, nbytes: int, now: float) -> Asking | None:
        """Ask somebody for a blob; somebody else each time. None: nobody has it and room now."""
        best = self._best(index, nbytes, now)
        if best is None:
            return None
        wait = self._downlink.take(nbytes, now)
        self._peers[best].asked[index] = (nbytes, now + wait)
        self._peers[best].nbytes += nbytes
        return Asking(index, best, wait)

    def _best(self, index: int, nbytes: int, now: float) -> str | None:
        """Who is asked."""
        having = {name: peer for name, peer in self._peers.items() if peer.has[index] and index not in peer.asked and peer.resting <= now}
        quickest = sorted(having, key=lambda name: (having[name].expected(nbytes), name))
        others = [name for name in quickest if not having[name].is_origin]
        origins = [name for name in quickest if having[name].is_origin]
        limit = max(_TOO_SLOW, _TIMES * having[origins[0]].expected(nbytes)) if origins else math.inf
        if others and having[others[0]].expected(nbytes) <= limit:
            chosen = others
        else:
            chosen = [] if origins and self._is_anothers(index, nbytes, now) else quickest
        return next((name for name in chosen if having[name].has_room(nbytes)), None)

    def _is_anothers(self, index: int, nbytes: int, now: float) -> bool:
        """As `_claimed`, of one; not if there was nothing else to do for a while."""
        if nbytes <= self._takes_over(now):
            return False
        own = self._lots[index]
        fetching = (peer for peer in self._peers.values() if not peer.has[index] and peer.lots[index] < own)
        coming = (since for lots, since in self._expected.values() if lots[index] < own)
        return any(peer.is_fetching(now) for peer in fetching) or any(now - since < _CLAIM for since in coming)

    @property
    def _is_busy(self) -> bool:
        return any(peer.asked for peer in self._peers.values())

    def _takes_over(self, now: float) -> float:
        """Up to how many bytes a blob is asked for though it is another's part: more, the longer nothing is under way."""
        if self._busy_at is None or self._is_busy:
            return 0.0
        idle = now - self._busy_at
        rate = min((peer.rate for peer in self._peers.values() if peer.is_origin), default=_FIRST_RATE)
        return math.inf if idle >= _IDLE else idle / _IDLE * rate

    def stalled(self, now: float) -> list[int]:
        """What has been asked for too long ago by all that were asked: ask another one as well; the first that comes counts."""
        late: dict[int, bool] = {}
        best = max((peer.rate for peer in self._peers.values() if peer.last > -math.inf), default=_FIRST_RATE)
        took = min((peer.took for peer in self._peers.values() if peer.took < math.inf), default=0.0)
        for peer in [each for each in self._peers.values() if each.asked]:
            patience = max(_PATIENCE, _TIMES * peer.nbytes / best, _TIMES * took)
            for index, (_, asked) in peer.asked.items():
                late[index] = late.get(index, True) and now - max(asked, peer.last) >= patience
        return sorted(index for index, is_late in late.items() if is_late)

    # --- what came of it

    def arrived(self, peer: str, index: int, now: float) -> list[str]:
        """It gave the blob, verified; gives the others that were asked for it: take that back."""
        known = self._peers.get(peer)
        if known is not None and index in known.asked:
            nbytes, asked = known.asked[index]
            seconds = max(now - max(asked, known.last), 1e-4)
            known.rate = max(_SLOWEST, known.rate + _WEIGHT * (nbytes / seconds - known.rate))
            if nbytes >= _MIN_WINDOW // 2:
                known.took = now - asked if known.took == math.inf else known.took + _WEIGHT * (now - asked - known.took)
            known.last, known.failures = now, 0
        others = [name for name, other in self._peers.items() if index in other.asked and name != peer]
        for name in others:
            self._outrun(self._peers[name], index, now)
        for name in (peer, *others):
            self._release(name, index)
        return others

    @staticmethod
    def _outrun(peer: _Peer, index: int, now: float) -> None:
        """Another one was quicker: this one gives no more than it would have by now."""
        nbytes, asked = peer.asked[index]
        peer.rate = max(_SLOWEST, min(peer.rate, nbytes / max(now - max(asked, peer.last), 1e-4)))

    def absent(self, peer: str, index: int) -> None:
        """It says that it lacks the blob, whatever its bitmap said."""
        self._release(peer, index)
        known = self._peers.get(peer)
        if known is not None and known.has[index]:
            known.has[index] = False
            self._available[index] -= 1

    def failed(self, peer: str, index: int, now: float) -> None:
        """It did not answer; it is left alone for a moment, and is slower in our eyes."""
        self._release(peer, index)
        known = self._peers.get(peer)
        if known is not None and known.resting <= now:  # else it is the same failure, told once for each blob that was asked for
            known.resting = now + _RESTS[min(known.failures, len(_RESTS) - 1)]
            known.failures += 1
            known.rate = max(_SLOWEST, known.rate / 2)

    def lied(self, peer: str) -> list[int]:
        """It gave other bytes than the digest says. It is asked for nothing more; gives what it was asked for."""
        self._liars.add(peer)
        return self.left(peer)

    def _release(self, peer: str, index: int) -> None:
        known = self._peers.get(peer)
        if known is not None and index in known.asked:
            known.nbytes -= known.asked.pop(index)[0]
