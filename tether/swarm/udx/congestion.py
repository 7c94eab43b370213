"""Pure: how much may be in flight and how fast it leaves: BBR version 1 (draft-cardwell-iccrg-bbr-congestion-control-00).

The path is modelled by its bandwidth (most packets/s of the last ten rounds) and its shortest round trip; the window is twice their
product, and packets are paced at the bandwidth. Loss by itself does not shrink the model: at 1 % loss and 20 ms CUBIC falls to a
few MB/s. What differs from the draft: a round that loses more than an eighth bounds the window (a short queue overflows, as in
version 2); probing for the round trip keeps half the product in flight instead of four packets (as version 3); a path whose round
trip is shorter than a tick of the event loop is not paced, since its whole window passes within the tick.
"""

from __future__ import annotations

import enum
import math
from collections import deque

from tether.swarm.udx.flight import Batch, Delivery

__all__ = ["Congestion"]

_HIGH_GAIN = 2.885
"""2 / ln 2: the least that doubles the rate each round."""
_CYCLE = (1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
_ROUNDS = 10
_FULL_ROUNDS, _FULL_GROWTH = 3, 1.25
_ROUND_TRIP_AGE = 10.0
_PROBE_SECONDS = 0.2
_INITIAL, _MIN, _MAX = 10.0, 8.0, 6000.0
"""Packets. Most: twice libudx' window of 4 MiB, whatever the model says."""
_AFTER_TIMEOUT = 4.0
_HEADROOM = 8.0
_MAX_AGGREGATION = 0.1
"""Seconds of bandwidth that acks may be late by."""
_LOSS_SHARE, _LOSS_PACKETS, _LOSS_FACTOR = 0.125, 40, 0.7
_TICK = 0.001
_CATCH_UP = 0.01
"""Pacing makes up for an event loop that was late by so much, not for more."""
_BURST = 64
_ROUNDING = 0.001
"""Of a packet: time is a float, and tokens must not come to 0.99999 for ever."""
_UNPACED = 1 << 30
_PACING_MARGIN = 0.99


class _State(enum.Enum):
    STARTUP = enum.auto()
    DRAIN = enum.auto()
    PROBE_BANDWIDTH = enum.auto()
    PROBE_ROUND_TRIP = enum.auto()


class _Most:
    """The largest value of the last ten rounds."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: deque[tuple[int, float]] = deque()

    def add(self, rounds: int, value: float) -> float:
        values = self._values
        while values and values[-1][1] <= value:
            values.pop()
        values.append((rounds, value))
        while values[0][0] < rounds - _ROUNDS:
            values.popleft()
        return values[0][1]


class Congestion:
    """The model of the path, and window and pace that follow from it."""

    def __init__(self, now: float, delivered: int = 0) -> None:
        self.window = _INITIAL
        """Packets that may be in flight."""
        self.is_limited = False
        """The window held packets back since the last ack."""
        self.delivered = delivered
        """Packets of the stream, over all its paths."""
        self.bandwidth = 0.0
        """Packets a second; zero before the first sample."""
        self.round_trip = math.inf
        """The shortest of the last ten seconds."""
        self._delivered_at = self._since = now
        self._app_limited_until = 0
        self._state = _State.STARTUP
        self._rates, self._bursts, self._burst = _Most(), _Most(), 0.0
        self._rounds, self._round_end = 0, delivered
        self._is_full, self._full_rate, self._full_rounds = False, 0.0, 0
        self._phase, self._phase_since = 2, now
        self._round_trip_at, self._probe_until = now, 0.0
        self._ceiling, self._lost, self._passed = _MAX, 0, 0
        self._pace, self._tokens, self._filled_at, self._is_waiting = 0.0, 0.0, now, False

    def stamp(self, batch: Batch, *, is_first: bool) -> None:
        """A batch leaves; `is_first`: nothing else is in flight."""
        if is_first:
            self._since = self._delivered_at = batch.sent_at
        batch.delivered, batch.delivered_at, batch.since = self.delivered, self._delivered_at, self._since
        batch.is_limited = self.delivered < self._app_limited_until
        self._tokens -= batch.count

    def ran_dry(self, in_flight: int) -> None:
        """All that the application wrote was sent: rates measured until this is delivered are its own, not the network's."""
        self._app_limited_until = self.delivered + in_flight + 1

    def allowance(self, now: float) -> int:
        """How many packets pacing lets go now."""
        if not self._pace:
            return _UNPACED
        # Pace held them back: the loop's being late is made up for. Something else did: what was not used is gone, or it left as a burst.
        most = max(self._pace * _CATCH_UP if self._is_waiting else 0.0, 2 * self._quantum)
        self._is_waiting = False
        self._tokens = min(self._tokens + (now - self._filled_at) * self._pace, most)
        self._filled_at = now
        return int(self._tokens + _ROUNDING) if self._tokens + _ROUNDING >= self._quantum else 0

    def release_at(self, now: float) -> float:
        """When `allowance` will let go again: it held packets back."""
        self._is_waiting = True
        return now + max((self._quantum - self._tokens) / self._pace, _TICK / 10) if self._pace else now

    def on_resent(self) -> None:
        """A packet was sent again."""
        self._tokens -= 1

    def on_delivery(self, delivery: Delivery, in_flight: int, now: float) -> None:
        """Packets were delivered."""
        self.delivered += delivery.count
        self._passed += delivery.count
        self._observe_rate(delivery, now)
        self._delivered_at = now
        self._burst = self._bursts.add(self._rounds, delivery.count)
        if delivery.batch is not None:
            self._observe_round_trip(now - delivery.batch.sent_at, is_idle=delivery.batch.is_limited, now=now)
        self._move(in_flight, now)
        self._set_pace()
        self._set_window(delivery.count)
        self.is_limited = False

    def on_loss(self, count: int) -> None:
        """So many packets were found lost."""
        self._lost += count

    def on_recovery(self, in_flight: int) -> None:
        """The first loss of a window. Of many at once: what is sent from here on is what was delivered."""
        if self._lost >= _HEADROOM and self._lost > _LOSS_SHARE * (self._lost + self._passed):
            self.window = max(_MIN, min(self.window, in_flight + 2 * _HEADROOM))

    def on_timeout(self) -> None:
        """Nothing came back for a retransmission timeout."""
        self.window = _AFTER_TIMEOUT

    @property
    def _quantum(self) -> float:
        return min(max(self._pace * _TICK, 1.0), _BURST)

    def _observe_rate(self, delivery: Delivery, now: float) -> None:
        batch = delivery.batch
        if batch is None:
            return
        self._since = batch.sent_at
        interval = max(batch.sent_at - batch.since, now - batch.delivered_at)
        is_round = batch.delivered >= self._round_end
        if is_round:
            self._begin_round()
        if interval > 0 and (self.round_trip is math.inf or interval >= self.round_trip / 2):
            rate = (self.delivered - batch.delivered) / interval
            if not batch.is_limited or rate > self.bandwidth:
                self.bandwidth = self._rates.add(self._rounds, rate)
        if is_round and not self._is_full and not batch.is_limited:
            self._check_full()

    def _begin_round(self) -> None:
        self._round_end = self.delivered
        self._rounds += 1
        total = self._lost + self._passed
        if total > _LOSS_PACKETS and self._lost > _LOSS_SHARE * total:
            self._ceiling = max(_LOSS_FACTOR * self.window, self._product, 2 * _MIN)
        else:
            self._ceiling = min(self._ceiling * 1.05, _MAX)
        self._lost = self._passed = 0

    def _check_full(self) -> None:
        if self.bandwidth >= self._full_rate * _FULL_GROWTH:
            self._full_rate, self._full_rounds = self.bandwidth, 0
            return
        self._full_rounds += 1
        self._is_full = self._full_rounds >= _FULL_ROUNDS

    def _observe_round_trip(self, seconds: float, *, is_idle: bool, now: float) -> None:
        is_old = now - self._round_trip_at > _ROUND_TRIP_AGE
        if seconds <= self.round_trip or is_old:
            self.round_trip, self._round_trip_at = seconds, now
        if is_old and self._is_full and not is_idle:
            self._state, self._probe_until = _State.PROBE_ROUND_TRIP, now + max(_PROBE_SECONDS, seconds)

    def _move(self, in_flight: int, now: float) -> None:
        match self._state:
            case _State.STARTUP:
                if self._is_full:
                    self._state = _State.DRAIN
            case _State.DRAIN:
                if in_flight <= self._product:
                    self._probe_bandwidth(now)
            case _State.PROBE_BANDWIDTH:
                self._advance_phase(in_flight, now)
            case _State.PROBE_ROUND_TRIP:
                if now >= self._probe_until:
                    self._probe_bandwidth(now)

    def _probe_bandwidth(self, now: float) -> None:
        self._state, self._phase, self._phase_since = _State.PROBE_BANDWIDTH, 2, now

    def _advance_phase(self, in_flight: int, now: float) -> None:
        gain = _CYCLE[self._phase]
        is_over = now - self._phase_since > self.round_trip
        if gain > 1:
            is_over = is_over and (self._lost > 0 or in_flight >= gain * self._product)
        elif gain < 1:
            is_over = is_over or in_flight <= self._product
        if is_over:
            self._phase, self._phase_since = (self._phase + 1) % len(_CYCLE), now

    @property
    def _product(self) -> float:
        return self.bandwidth * self.round_trip if self.bandwidth else _INITIAL

    def _set_pace(self) -> None:
        if not self.bandwidth or self.round_trip < _TICK:
            self._pace = 0.0
            return
        match self._state:
            case _State.STARTUP:
                self._pace = max(self._pace, _HIGH_GAIN * self.bandwidth, _HIGH_GAIN * _INITIAL / self.round_trip)
            case _State.DRAIN:
                self._pace = self.bandwidth / _HIGH_GAIN
            case _State.PROBE_BANDWIDTH:
                self._pace = _PACING_MARGIN * _CYCLE[self._phase] * self.bandwidth
            case _State.PROBE_ROUND_TRIP:
                self._pace = self.bandwidth

    def _set_window(self, count: int) -> None:
        if self._is_full:
            late = min(2 * self._burst, max(self.bandwidth * _MAX_AGGREGATION, _INITIAL))
            target = 2 * self._product + late + _HEADROOM
            if self._state is _State.PROBE_ROUND_TRIP:
                target = self._product / 2
            window = min(self.window + count, target)
        else:  # pacing holds packets back too, which must not make the beginning slower
            window = self.window + (count if self.is_limited or self.window < _HIGH_GAIN * self._product else 0)
        self.window = max(_MIN, min(window, self._ceiling))
