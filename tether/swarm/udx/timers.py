"""Pure: when a sender must act though nothing came: losses, the tail, silence, the pace, a closed window.

A tail that is lost brings no acks, so after two round trips the last packet is sent again (TLP), whose ack tells of the others; at last
the timeout comes, after which all is sent anew. Both double up to 4 s and no more, so that a peer that is gone is known after seven
timeouts, 23 s; libudx gives up after 13 s.
"""

from __future__ import annotations

from tether.swarm.udx.loss import RoundTrip

__all__ = ["NEVER", "Timers"]

NEVER = 0.0
_MAX_TIMEOUTS, _MAX_PROBES = 7, 4
_MAX_DOUBLED = 4.0
_MIN_PROBE_SECONDS = 0.01
_ACK_DELAY = 0.002


class Timers:
    """Due times of a sender; NEVER: not running."""

    __slots__ = ("pace_at", "probe_at", "probes", "reorder_at", "repeats", "timeout_at", "timeouts", "window_at")

    def __init__(self) -> None:
        self.timeout_at = self.probe_at = NEVER
        self.reorder_at = NEVER
        """When packets that are late may be called lost."""
        self.pace_at = NEVER
        """When pace lets packets go."""
        self.window_at = NEVER
        """When a peer whose window is closed is asked again."""
        self.timeouts = self.probes = self.repeats = 0
        """Without progress since; `repeats` counts both."""

    @property
    def deadline(self) -> float:
        """The first that is due."""
        return min(filter(None, (self.timeout_at, self.probe_at, self.reorder_at, self.pace_at, self.window_at)), default=NEVER)

    @property
    def are_exhausted(self) -> bool:
        """Whether the peer had its chances."""
        return self.timeouts >= _MAX_TIMEOUTS

    @property
    def repeated_often(self) -> bool:
        """Whether what is in flight was repeated as often as the loss of an ack explains."""
        return self.repeats >= _MAX_PROBES

    def progressed(self) -> None:
        """The peer acknowledged something."""
        self.timeouts = self.probes = self.repeats = 0

    def probed(self) -> int:
        """The tail is sent again; how often it was since the last progress."""
        self.probes += 1
        self.repeats += 1
        return self.probes

    def timed_out(self) -> int:
        """The timeout passed; how often since the last progress."""
        self.timeouts += 1
        self.repeats += 1
        self.probes = 0
        return self.timeouts

    def watch(self, trip: RoundTrip, now: float, *, restart: bool) -> None:
        """Packets are in flight. `restart`: the timeout begins anew, after an ack or a timeout, not for a packet that leaves."""
        if restart or not self.timeout_at:
            doubled = min(trip.timeout * (1 << self.timeouts), _MAX_DOUBLED)
            self.timeout_at = now + max(trip.timeout, doubled)
        if trip.smoothed and self.probes < _MAX_PROBES:
            patience = (max(2 * trip.smoothed, _MIN_PROBE_SECONDS) + _ACK_DELAY) * (1 << self.probes)
            self.probe_at = min(now + min(patience, _MAX_DOUBLED), self.timeout_at)
        else:
            self.probe_at = NEVER

    def rest(self) -> None:
        """Nothing is in flight."""
        self.timeout_at = self.probe_at = self.reorder_at = NEVER

    def stop(self) -> None:
        """Nothing is due any more."""
        self.rest()
        self.pace_at = self.window_at = NEVER
