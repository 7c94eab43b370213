"""Clocks for what lasts: none of them jumps when somebody, or NTP, sets the wall clock."""

from __future__ import annotations

import functools
import time

__all__ = ["boot_clock", "steady_time"]


def boot_clock() -> float:
    """Seconds that go on while the host sleeps: `time.monotonic` stands still then, and a lease would seem to be young."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@functools.cache
def _offset() -> float:
    return time.time() - boot_clock()


def steady_time() -> float:
    """Unix time as this process saw it when it asked first, and from then on the seconds that passed.

    For moments that people may see and intervals are measured by; not for what other processes or the disk remember.
    """
    return _offset() + boot_clock()
