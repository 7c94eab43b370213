"""Pure: who is relayed to whom: two ends that name the same token, within bounds, for a time. And the wire of npm's blind-relay 1.6.

On a protomux channel `blind-relay`, whose id is the public key of the one that asks; what a message says goes both ways:

    pair     0 | u8 flags, 1: the initiator's end | 32 bytes token | uint id of the sender's UDX stream | uint seq, 0
    unpair   1 | u8 flags | 32 bytes token
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tether.errors import ProtocolError, QueueFullError
from tether.swarm.wire.compact import read_uint, uint

__all__ = ["PAIR", "PROTOCOL", "UNPAIR", "End", "Pairs", "RelayLimits", "Wish", "pair_message", "read_pair", "read_unpair"]

PROTOCOL: Final = "blind-relay"
PAIR, UNPAIR = 0, 1
_TOKEN_NBYTES = 32
_INITIATOR = 1
_MAX_STREAM = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What relaying may cost."""

    max_pairs: int = 64
    """At a time, of all peers."""
    max_ends: int = 8
    """That one peer has paired or waiting, at a time."""
    max_streams: int = 16
    """Over which one peer asks, at a time: hyperdht opens one for each pair."""
    patience: float = 20.0
    """Seconds that an end waits for the other one: hyperdht waits for fifteen."""
    seconds: float = 4 * 3600.0
    """That a pair lasts; peers find each other again after it, if they still need to."""
    nbytes_per_second: float = 12.5e6
    """Of all pairs, both directions together."""
    queue_seconds: float = 0.1
    """That a packet waits for that; what would wait longer is lost, as in a router's queue."""


class Wish(NamedTuple):
    """What `pair` asks for."""

    is_initiator: bool
    token: bytes
    stream_id: int


def pair_message(wish: Wish) -> bytes:
    """As a message of the channel."""
    return uint(PAIR) + uint(_INITIATOR if wish.is_initiator else 0) + wish.token + uint(wish.stream_id) + uint(0)


def read_pair(body: memoryview) -> Wish:
    """What stands behind the type. Raises: ProtocolError: it is cut short, or names a stream that can't be."""
    flags, token, at = _read_head(body)
    stream_id, at = read_uint(body, at)
    read_uint(body, at)
    if stream_id > _MAX_STREAM:
        raise ProtocolError(f"a pairing names stream {stream_id}, which has more than 32 bits")
    return Wish(bool(flags & _INITIATOR), token, stream_id)


def read_unpair(body: memoryview) -> bytes:
    """The token. Raises: ProtocolError: it is cut short."""
    return _read_head(body)[1]


def _read_head(body: memoryview) -> tuple[int, bytes, int]:
    flags, at = read_uint(body, 0)
    end = at + _TOKEN_NBYTES
    if len(body) < end:
        raise ProtocolError("a pairing ends within its token")
    return flags, bytes(body[at:end]), end


@dataclass(frozen=True, slots=True)
class End:
    """One of the two."""

    peer: str
    asking: int
    """The stream over which it asked."""
    is_initiator: bool
    stream_id: int


class Pairs:
    """Ends that wait, and pairs. Times are any monotonic clock's."""

    def __init__(self, limits: RelayLimits) -> None:
        self._limits = limits
        self._waiting: dict[bytes, tuple[End, float]] = {}
        self._paired: dict[bytes, tuple[End, End, float]] = {}
        self._ends: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._paired)

    @property
    def waiting(self) -> int:
        """Ends without another one."""
        return len(self._waiting)

    def ask(self, token: bytes, end: End, now: float) -> tuple[End, End] | None:
        """The two that are to be joined, the initiator's first; None: the other one is awaited, or this one is there already.

        Raises: QueueFullError: the peer has too many, or all together have.
        """
        if token in self._paired:
            return None
        other = self._waiting.get(token)
        if other is not None and other[0].is_initiator == end.is_initiator:
            return None
        if self._ends[end.peer] >= self._limits.max_ends:
            raise QueueFullError(f"{self._limits.max_ends} streams of this peer are relayed or about to be: end one first")
        if len(self._paired) >= self._limits.max_pairs:
            raise QueueFullError(f"{self._limits.max_pairs} pairs are relayed here: try again later, or another relay")
        self._ends[end.peer] += 1
        if other is None:
            self._waiting[token] = end, now + self._limits.patience
            return None
        del self._waiting[token]
        first, second = (end, other[0]) if end.is_initiator else (other[0], end)
        self._paired[token] = first, second, now + self._limits.seconds
        return first, second

    def withdraw(self, token: bytes, asking: int) -> bool:
        """An end wants it no more; whether that ends a pair. Tokens of others are passed over."""
        if token not in self._tokens_of(asking):
            return False
        return self.end(token)

    def leave(self, asking: int) -> list[bytes]:
        """The stream over which ends were asked for is gone; the pairs that this ends."""
        return [token for token in self._tokens_of(asking) if self.end(token)]

    def expire(self, now: float) -> list[bytes]:
        """Who waited too long waits no more; the pairs whose time is over."""
        for token in [token for token, (_, until) in self._waiting.items() if until <= now]:
            self.end(token)
        return [token for token in [token for token, (*_, until) in self._paired.items() if until <= now] if self.end(token)]

    def end(self, token: bytes) -> bool:
        """Forget it; whether it was a pair."""
        waiting, paired = self._waiting.pop(token, None), self._paired.pop(token, None)
        for end in (waiting or paired or (None,))[:-1]:
            self._release(end.peer)
        return paired is not None

    def _release(self, peer: str) -> None:
        self._ends[peer] -= 1
        if not self._ends[peer]:
            del self._ends[peer]

    def _tokens_of(self, asking: int) -> list[bytes]:
        return [token for token, ends in self._all() if any(end.asking == asking for end in ends)]

    def _all(self) -> Iterator[tuple[bytes, tuple[End, ...]]]:
        for token, (end, _) in self._waiting.items():
            yield token, (end,)
        for token, (first, second, _) in self._paired.items():
            yield token, (first, second)
