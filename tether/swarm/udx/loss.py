"""Pure: how long a round trip takes, and which packets are lost: RACK (RFC 8985) on whole batches, and the timeouts of RFC 6298."""

from __future__ import annotations

import math

from tether.swarm.udx.flight import Delivery, Flight

__all__ = ["LossDetector", "RoundTrip"]

_MIN_TIMEOUT, _MAX_TIMEOUT = 1.0, 30.0
_OUTLIER = 1.0
"""A round trip longer than this that is the first, or does not fit the others, holds a sleep or a cut. A true one is soon believed."""
_DUPLICATES = 3
"""So many packets above a hole speak of loss, before anything was seen to be reordered."""
_MAX_PATIENCE = 8
"""How far reordering widens the window, in quarters of the shortest round trip."""
_MIN_REORDERING = 0.001
_ROUNDING = 1e-6
"""Times are floats: what is due now must not be due in 1e-17 s for ever."""


class RoundTrip:
    """Smoothed round trip, its variation, its minimum, and the retransmission timeout they give (RFC 6298, 1 to 30 s)."""

    __slots__ = ("latest", "shortest", "smoothed", "timeout", "variation")

    def __init__(self) -> None:
        self.smoothed = 0.0
        """Zero: never measured."""
        self.variation = 0.0
        self.latest = 0.0
        self.shortest = math.inf
        self.timeout = _MIN_TIMEOUT

    def sample(self, seconds: float) -> None:
        """A packet that was sent once was acknowledged after so long."""
        if not self.smoothed:
            seconds = min(seconds, _OUTLIER)
            self.smoothed, self.variation = seconds, seconds / 2
        else:
            expected = self.smoothed + 5 * self.variation
            if seconds > max(expected, _OUTLIER):
                seconds = min(expected, _MAX_TIMEOUT)
            self.variation += (abs(self.smoothed - seconds) - self.variation) / 4
            self.smoothed += (seconds - self.smoothed) / 8
        self.latest = seconds
        self.shortest = min(self.shortest, seconds)
        self.timeout = min(max(self.smoothed + 4 * self.variation, _MIN_TIMEOUT), _MAX_TIMEOUT)


class LossDetector:
    """RACK: a packet is lost when one that left later was delivered, and the time that reordering may take is over."""

    __slots__ = ("_patience", "_reordering", "_round_trip", "_sent_at", "_seq")

    def __init__(self) -> None:
        self._sent_at = 0.0
        self._seq = 0
        self._round_trip = 0.0
        self._reordering = False
        self._patience = 1

    def observe(self, delivery: Delivery, now: float) -> None:
        """Packets were delivered."""
        if delivery.seq and (delivery.sent_at, delivery.seq) > (self._sent_at, self._seq):
            self._sent_at, self._seq = delivery.sent_at, delivery.seq
            self._round_trip = now - delivery.sent_at
        self._reordering |= delivery.is_reordered or delivery.is_spurious
        if delivery.is_spurious:
            self._patience = min(self._patience + 1, _MAX_PATIENCE)

    def find(self, flight: Flight, trip: RoundTrip, now: float) -> tuple[list[int], float]:
        """Packets that are lost as of now, and in how many seconds more may be: 0 if none may."""
        lost: list[int] = []
        wait = 0.0
        due = now - self._round_trip - self._window(flight, trip)
        for batch in flight.batches:
            if (batch.sent_at, batch.seq) >= (self._sent_at, self._seq):
                break
            for seq in flight.missing(batch):
                if batch.sent_at == self._sent_at and seq + 1 >= self._seq:
                    break
                if batch.sent_at > due:
                    wait = max(wait, batch.sent_at - due + _ROUNDING)
                    break
                lost.append(seq)
        for seq, sent_at in flight.resent.items():
            if sent_at > self._sent_at:
                break
            if sent_at == self._sent_at and seq + 1 >= self._seq:
                continue
            if sent_at > due:
                wait = max(wait, sent_at - due + _ROUNDING)
            else:
                lost.append(seq)
        return lost, wait

    def _window(self, flight: Flight, trip: RoundTrip) -> float:
        if not self._reordering and flight.sacked.count >= _DUPLICATES:
            return 0.0
        window = min(self._patience * trip.shortest / 4, trip.smoothed)
        return max(window, _MIN_REORDERING) if self._reordering else window
