"""A blind relay: passes on the packets of two peers that no hole can be punched between. It sees who speaks with whom, and how much.

Its wire is npm's blind-relay, so hyperdht's `relayThrough` finds it under the key of whoever listens with `Relay.accept`. What is
relayed is sealed end to end. Nothing of it goes through JavaScript.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import structlog

from tether.errors import ForbiddenError, ProtocolError, QueueFullError, TetherError
from tether.ports import MessageStream
from tether.swarm.relaying.pairs import PAIR, PROTOCOL, UNPAIR, End, Pairs, RelayLimits, Wish, pair_message, read_pair, read_unpair
from tether.swarm.udx import UdxStream
from tether.swarm.wire.bandwidth import TokenBucket
from tether.swarm.wire.line import Line
from tether.swarm.wire.protomux import Asked, Channel, Closed, Event, MuxLimits, Opened, Received

__all__ = ["Relay", "RelayLimits", "RelayStatus", "is_relaying"]

log = structlog.get_logger("tether.swarm")
_SWEEP = 1.0
"""Seconds between looks at what is over."""
_MAX_UNREAD_NBYTES = 16 << 10
"""Answers have 40 bytes, and there are as many as ends."""
_MUX = MuxLimits(channels=2, held_nbytes=1 << 10, handshake_nbytes=64, frame_messages=64)
_OPENING_NBYTES = 32
"""Of a first message in which the protocol's name stands."""


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """What is relayed."""

    pairs: int
    waiting: int
    """Ends whose other end has not asked yet."""
    total: int
    """Pairs since the beginning."""
    nbytes: int
    """Passed on since the beginning, headers of UDX included."""
    dropped_nbytes: int
    """Lost since the beginning, because they came faster than the limit."""


def is_relaying(first: bytes) -> bool:
    """Whether a stream whose first message this is asks for relaying."""
    return PROTOCOL.encode() in first[:_OPENING_NBYTES]


class Relay:
    """Relays for those that it admits. Belongs to the loop that it is made on."""

    def __init__(self, admits: Callable[[str], bool], limits: RelayLimits | None = None) -> None:
        """`admits`: whether a peer (public key, hex) may use it; asked for each stream, and again for each pair."""
        self._admits, self._limits = admits, limits or RelayLimits()
        self._loop = asyncio.get_running_loop()
        self._pairs = Pairs(self._limits)
        self._bucket = TokenBucket(self._limits.nbytes_per_second, round(self._limits.nbytes_per_second * self._limits.queue_seconds))
        self._askings: dict[int, _Asking] = {}
        self._of_peer: Counter[str] = Counter()
        self._joined: dict[bytes, tuple[UdxStream, UdxStream]] = {}
        self._numbers = self._total = self._nbytes = self._dropped_nbytes = 0
        self._sweeping: asyncio.TimerHandle | None = None

    @property
    def status(self) -> RelayStatus:
        """What is relayed now."""
        return RelayStatus(len(self._pairs), self._pairs.waiting, self._total, self._nbytes, self._dropped_nbytes)

    def accept(self, stream: MessageStream, carrier: object) -> None:
        """Take a stream over which a peer may ask; one that may not is cut. `carrier`: the UDX stream that it travels on."""
        if not isinstance(carrier, UdxStream) or carrier.socket is None:
            stream.destroy()
            return
        if not self._admits(stream.peer) or self._of_peer[stream.peer] >= self._limits.max_streams:
            log.info("relay refused", peer=stream.peer)
            stream.destroy()
            return
        self._numbers += 1
        self._of_peer[stream.peer] += 1
        self._askings[self._numbers] = _Asking(self, self._numbers, stream, carrier)
        self._sweep_later()

    def cut(self, peer: str) -> None:
        """The peer is admitted no more: what it has is ended at once."""
        self._cut([asking for asking in self._askings.values() if asking.peer == peer])

    def close(self) -> None:
        """End everything that is relayed."""
        self._cut(list(self._askings.values()))

    # --- what askings do

    def asked(self, asking: _Asking, wish: Wish) -> None:
        """A peer wants this. Raises: ForbiddenError; QueueFullError."""
        if not self._admits(asking.peer):
            raise ForbiddenError("this relay does not serve that key")
        ends = self._pairs.ask(wish.token, End(asking.peer, asking.number, wish.is_initiator, wish.stream_id), self._loop.time())
        if ends is not None:
            self._join(wish.token, ends)

    def withdrawn(self, asking: _Asking, token: bytes) -> None:
        """It wants it no more."""
        if self._pairs.withdraw(token, asking.number):
            self._part(token)

    def gone(self, asking: _Asking) -> None:
        """It is gone, and with it what was for it."""
        if self._askings.pop(asking.number, None) is None:
            return
        self._of_peer[asking.peer] -= 1
        if not self._of_peer[asking.peer]:
            del self._of_peer[asking.peer]
        # Silently: mostly the two found a direct way, and would take our word for each other's.
        for token in self._pairs.leave(asking.number):
            self._part(token)

    # --- within

    def _join(self, token: bytes, ends: tuple[End, End]) -> None:
        """Both ways are open before anybody hears of it, each to where its peer asks from: what comes first is not lost."""
        first, second = (self._stream_to(token, end) for end in ends)
        first.relay_to(second, self._wait)
        second.relay_to(first, self._wait)
        self._joined[token] = first, second
        self._total += 1
        for end, stream in zip(ends, (first, second), strict=True):
            self._askings[end.asking].tell(Wish(end.is_initiator, token, stream.id))

    def _stream_to(self, token: bytes, end: End) -> UdxStream:
        carrier = self._askings[end.asking].carrier
        number = secrets.randbits(32)
        while number in carrier.udx.streams:
            number = secrets.randbits(32)
        stream = UdxStream(carrier.udx, number, on_close=lambda _: self._closed(token))
        if carrier.socket is not None and carrier.remote is not None:
            stream.connect(carrier.socket, end.stream_id, carrier.remote[1], carrier.remote[0])
        return stream

    def _closed(self, token: bytes) -> None:
        self._pairs.end(token)
        self._joined.pop(token, None)

    def _part(self, token: bytes) -> None:
        for stream in self._joined.pop(token, ()):
            stream.destroy()

    def _dismiss(self, tokens: list[bytes]) -> None:
        for token in tokens:
            self._joined[token][0].dismiss()

    def _cut(self, askings: list[_Asking]) -> None:
        for asking in askings:
            self._dismiss(self._pairs.leave(asking.number))
            asking.destroy()

    def _wait(self, nbytes: int) -> float | None:
        """Seconds after which these bytes go on; None: never."""
        seconds = self._bucket.take(nbytes, self._loop.time())
        if seconds > self._limits.queue_seconds:
            self._bucket.give_back(nbytes)
            self._dropped_nbytes += nbytes
            return None
        self._nbytes += nbytes
        return seconds

    def _sweep_later(self) -> None:
        if self._sweeping is None and self._askings:
            self._sweeping = self._loop.call_later(_SWEEP, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        self._dismiss(self._pairs.expire(self._loop.time()))
        self._sweep_later()


class _Asking:
    """One stream over which a peer asks."""

    def __init__(self, relay: Relay, number: int, stream: MessageStream, carrier: UdxStream) -> None:
        self.number, self.peer, self.carrier = number, stream.peer, carrier
        self._relay = relay
        self._line = Line(stream, _MAX_UNREAD_NBYTES, _MUX)
        self._line.mux.offer(PROTOCOL, bytes.fromhex(stream.peer))
        self._channel: Channel | None = None
        self._line.open(self._on_event, self._on_closed)

    def tell(self, wish: Wish) -> None:
        """It is joined: where it is to send to."""
        if self._channel is not None:
            self._line.post(self._channel, pair_message(wish))

    def destroy(self) -> None:
        """Cut it."""
        self._line.destroy()

    def _on_event(self, event: Event) -> None:
        match event:
            case Asked():
                self._channel, held = self._line.mux.accept(event)
                for message in held:
                    self._on_message(message)
            case Received():
                self._on_message(event)
            case Closed():
                self._line.finish(None)
            case Opened():  # we open none by ourselves
                pass
            case _:
                assert_never(event)

    def _on_message(self, message: Received) -> None:
        if message.type == UNPAIR:
            self._relay.withdrawn(self, read_unpair(message.body))
        elif message.type == PAIR:
            self._ask(read_pair(message.body))
        else:
            raise ProtocolError(f"a message of type {message.type} on the channel {PROTOCOL}")

    def _ask(self, wish: Wish) -> None:
        try:
            self._relay.asked(self, wish)
        except (ForbiddenError, QueueFullError) as error:
            # The wire has no refusal: a peer whose channel closes looks for another way at once, else after fifteen seconds.
            log.info("relay refused", peer=self.peer, code=error.code, error=str(error))
            self._line.finish(None)

    def _on_closed(self, _: TetherError) -> None:
        self._relay.gone(self)
