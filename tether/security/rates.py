"""Pure: how much of something may happen in a time."""

from __future__ import annotations

from dataclasses import dataclass, field

from tether.errors import ConfigError

__all__ = ["Bucket"]


@dataclass(slots=True)
class Bucket:
    """A token bucket: `burst` at once, then `rate` a second. Times are any clock's; one that goes back gives nothing and takes nothing.

    Raises: ConfigError: `rate` is not over 0: what waits would wait for ever.
    """

    rate: float
    burst: float
    _level: float = field(init=False)
    _at: float = field(init=False, default=float("-inf"))

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigError(f"a rate of {self.rate:g} a second lets nothing through: give one over 0")
        self._level = self.burst

    def take(self, amount: float, now: float) -> bool:
        """Take all of it, or nothing."""
        self._fill(now)
        if amount > self._level:
            return False
        self._level -= amount
        return True

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `take` would succeed; takes nothing."""
        self._fill(now)
        return max(0.0, (min(amount, self.burst) - self._level) / self.rate)

    def _fill(self, now: float) -> None:
        if now > self._at:
            passed = now - self._at  # infinite the first time, when the bucket is full anyway
            self._level = min(self.burst, self._level + passed * self.rate)
            self._at = now
