"""Pure: a set of numbers that come in long ranges: which packets arrived out of order, which the peer has."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

__all__ = ["Ranges"]


class Ranges:
    """Disjoint half-open ranges in order, no two of which touch. Cost grows with the number of ranges, not of numbers."""

    __slots__ = ("_ends", "_starts", "count")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.count = 0
        """How many numbers are in."""

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        """How many ranges."""
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self._starts, number) - 1
        return index >= 0 and number < self._ends[index]

    @property
    def first(self) -> int:
        """The smallest number; there must be one."""
        return self._starts[0]

    @property
    def end(self) -> int:
        """One above the largest number; there must be one."""
        return self._ends[-1]

    def slice(self, start: int, count: int) -> list[tuple[int, int]]:
        """`count` ranges from index `start` on, going round at the end, each at most once."""
        every = list(self)
        return every[start : start + count] + every[: max(0, min(start, start + count - len(every)))]

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Put [start, end) in, `start < end`; gives the parts that were not in before."""
        starts, ends = self._starts, self._ends
        low = bisect_left(ends, start)
        high = bisect_right(starts, end, low)
        fresh: list[tuple[int, int]] = []
        at = start
        for index in range(low, high):
            if at < starts[index]:
                fresh.append((at, starts[index]))
            at = max(at, ends[index])
        if at < end:
            fresh.append((at, end))
        if low < high:
            start, end = min(start, starts[low]), max(end, ends[high - 1])
        starts[low:high], ends[low:high] = [start], [end]
        self.count += sum(stop - begin for begin, stop in fresh)
        return fresh

    def trim(self, below: int) -> int:
        """Take all numbers under `below` out; how many those were."""
        starts, ends = self._starts, self._ends
        index = bisect_right(ends, below)
        gone = sum(ends[:index]) - sum(starts[:index])
        del starts[:index], ends[:index]
        if starts and starts[0] < below:
            gone += below - starts[0]
            starts[0] = below
        self.count -= gone
        return gone

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, end) that are not in."""
        index = bisect_right(self._ends, start)
        while start < end:
            if index == len(self._starts) or self._starts[index] >= end:
                yield start, end
                return
            if start < self._starts[index]:
                yield start, self._starts[index]
            start = self._ends[index]
            index += 1

    def last_gap(self, number: int) -> int:
        """The largest number not above `number` that is not in."""
        index = bisect_right(self._starts, number) - 1
        return self._starts[index] - 1 if index >= 0 and number < self._ends[index] else number
