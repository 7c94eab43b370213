"""Pure: how large a packet may be (after RFC 8899). Probes are data packets with padding, at most 255 bytes larger than what passed.

Found by halving between what passed and what did not. A size that passed and later does not (a black hole: large packets vanish, small
ones come through) is told from repeated timeouts by the sender, which then goes back to the base.
"""

from __future__ import annotations

__all__ = ["BASE_NBYTES", "MAX_NBYTES", "PathMtu"]

BASE_NBYTES, MAX_NBYTES = 1200, 1500
"""libudx' base, which every path is expected to carry, and Ethernet's; a receiver of libudx has room for 2048."""
_MAX_PADDING = 255
_STEP = 16
"""Nearer to the limit is not worth a probe."""
_ATTEMPTS = 3
_SEARCH_AGAIN = 600.0
_SEARCH_AFTER_BLACK_HOLE = 60.0


class PathMtu:
    """What the path carries, IP and UDP headers included."""

    __slots__ = ("_attempts", "_ceiling", "_probing", "_search_at", "overhead", "payload_nbytes", "size")

    def __init__(self, overhead: int) -> None:
        self.overhead = overhead
        """Bytes of a datagram that are not payload: 48 with IPv4, 68 with IPv6. `payload_nbytes`: what is left of `size`."""
        self._set(BASE_NBYTES)
        self._ceiling = MAX_NBYTES + 1
        self._probing = 0
        self._attempts = 0
        self._search_at = 0.0

    def padding(self, now: float) -> int:
        """By how much to enlarge the next full packet; 0: not now."""
        if self._probing or now < self._search_at:
            return 0
        if self._search_at:
            self._ceiling, self._search_at = MAX_NBYTES + 1, 0.0
        padding = self._next_size() - self.size
        if not padding and self.size < MAX_NBYTES:
            self._search_at = now + _SEARCH_AGAIN
        return padding

    def sent(self, padding: int) -> None:
        """The probe left."""
        self._probing = self.size + padding

    def passed(self) -> None:
        """It was acknowledged."""
        if self._probing:
            self._set(self._probing)
            self._probing = self._attempts = 0

    def lost(self) -> None:
        """It was not."""
        if not self._probing:
            return
        self._attempts += 1
        if self._attempts >= _ATTEMPTS:
            self._ceiling, self._attempts = self._probing, 0
        self._probing = 0

    def shrink(self, now: float) -> None:
        """Packets larger than the base do not come through any more."""
        self._set(BASE_NBYTES)
        self._probing = self._attempts = 0
        self._search_at = now + _SEARCH_AFTER_BLACK_HOLE

    def _set(self, size: int) -> None:
        self.size = size
        self.payload_nbytes = size - self.overhead

    def _next_size(self) -> int:
        if self._ceiling > MAX_NBYTES:
            return min(self.size + _MAX_PADDING, MAX_NBYTES)
        if self._ceiling - self.size <= _STEP:
            return self.size
        return min((self.size + self._ceiling) // 2, self.size + _MAX_PADDING)
