"""Pure: how many bytes a second may go out. One queue: who came first goes first, and nobody is starved."""

from __future__ import annotations

from tether.errors import ConfigError

__all__ = ["TokenBucket"]


class TokenBucket:
    """Lets `burst_nbytes` through at once and `nbytes_per_second` for ever."""

    def __init__(self, nbytes_per_second: float = float("inf"), burst_nbytes: int = 1 << 20) -> None:
        """An infinite rate never waits. Raises: ConfigError: a rate that is not over 0, at which nothing would ever go."""
        self.limit(nbytes_per_second, burst_nbytes)
        self._paid_until = float("-inf")
        """When all that was taken so far will have gone out at the rate."""

    @property
    def nbytes_per_second(self) -> float:
        return self._rate

    def limit(self, nbytes_per_second: float, burst_nbytes: int = 1 << 20) -> None:
        """Another rate from now on; what was taken before keeps its time. Raises: as `__init__`, and nothing changed."""
        if not nbytes_per_second > 0:
            raise ConfigError(f"{nbytes_per_second:g} bytes a second let nothing through: give a rate over 0, or none for no limit")
        self._rate, self._burst_seconds = nbytes_per_second, burst_nbytes / nbytes_per_second

    def take(self, nbytes: int, now: float) -> float:
        """Seconds, from the monotonic time `now`, after which these bytes may go; they are taken whether or not they go."""
        start = max(self._paid_until, now - self._burst_seconds)
        self._paid_until = start + nbytes / self._rate
        return max(self._paid_until - now, 0.0)

    def give_back(self, nbytes: int) -> None:
        """Bytes that were taken did not go: who comes next need not wait for them; who waits already keeps their time."""
        self._paid_until -= nbytes / self._rate
