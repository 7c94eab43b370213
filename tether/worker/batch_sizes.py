"""Pure: how many rows a batch of one model is to have, learned from what batches took."""

from __future__ import annotations

from tether.worker.batching import BatchKey

__all__ = ["BatchSizes"]

_ENOUGH = 3
"""Batches of a size after which its cost is known: the first ones pay for allocations and caches."""
_STALE = 256
"""Batches as large as they might be after which another size is unknown again, and tried three times: the machine is another one by then,
or was busy with something else. While few requests come nothing is learned of what many need, nor forgotten."""
_GAIN = 1.07
"""How much less a row must cost in a larger batch. What that gains is paid by all who wait for its last row; and where a batch holds
as many requests as there are clients, gateway and worker take turns instead of working side by side (FASTPATH.md §3)."""
_FULL = 7 / 8
"""The part of a size from which a batch is as good as full."""
_LOOK = 16
"""Every so many batches, half the size is tried where nothing is known of it."""
_THINK = 8
"""Batches between two choices, which cost some microseconds."""
_SHAPES = 64
"""Shapes of one model that are told apart; beyond that the one that was used longest ago is forgotten."""
_SMOOTHING = 0.2
_TOO_MANY = 1e9
"""Seconds a row in a size that the model can't run: more than any latency, so it is not chosen until it is stale."""
_OUTLIER = 4.0
"""A batch that took so many times what was expected counts as so many: the machine stood still, or the runtime began anew."""


class BatchSizes:
    """Of one model version; belongs to its thread.

    A batch is to have as few rows as make nearly full use of the runtime, and no more than run in half the latency that is wanted, since
    who comes while it runs waits for it and then for the next. There is no timer: a batch is made of what waits, few rows where few wait.
    """

    def __init__(self, latency: float, first: int = 32, most: int = 1024) -> None:
        """`latency`: seconds within which answers are wanted; `first`: rows while nothing is known; `most`: rows ever."""
        self._half, self._first, self._top = latency / 2, _bucket(first), _bucket(most)
        self._shapes: dict[BatchKey, _Shape] = {}
        """The one that was used last stands last."""
        self._last: tuple[BatchKey | None, _Shape] = None, _Shape(self._half, self._first, self._top)
        """It, and its key: mostly it is the next one too."""

    def most_rows(self, key: BatchKey) -> int:
        """Rows of the next batch of this shape, if that many wait."""
        return 1 << self._shape(key).next()

    def ran(self, key: BatchKey, rows: int, seconds: float, *, is_full: bool) -> None:
        """A batch is done: what it took with everything that is done for a row (decoded, run, encoded).

        `is_full`: whether more waited than it took. One that could have had more rows says nothing of its size: few shared its price.
        """
        size = min(_bucket(rows), self._top)
        if is_full or rows >= _FULL * (1 << size):
            self._shape(key).learn(size, seconds / max(rows, 1))

    def failed(self, key: BatchKey, rows: int) -> None:
        """A batch failed, and its requests ran one by one: the model can't run so many rows at once."""
        self._shape(key).refuse(min(_bucket(rows), self._top))

    def _shape(self, key: BatchKey) -> _Shape:
        if key == self._last[0]:
            return self._last[1]
        shape = self._shapes.pop(key, None) or _Shape(self._half, self._first, self._top)
        if len(self._shapes) >= _SHAPES:
            del self._shapes[next(iter(self._shapes))]
        self._shapes[key] = shape
        self._last = key, shape
        return shape


class _Shape:
    """Batches of one shape. Sizes by powers of two: size `n` is of more than half of 2ⁿ rows, up to 2ⁿ."""

    __slots__ = ("_chosen", "_costs", "_first", "_full", "_half", "_looks", "_top", "_used")

    def __init__(self, half: float, first: int, top: int) -> None:
        self._half, self._first, self._top, self._chosen = half, first, top, first
        self._costs: dict[int, float] = {}
        """Size → seconds a row."""
        self._used: dict[int, tuple[int, int]] = {}
        """Size → batches of it, and how many as large as they might be there had been at the last one."""
        self._full = self._looks = 0

    def next(self) -> int:
        self._looks += 1
        smaller = self._chosen - 1
        if self._looks % _LOOK == 0 and smaller >= 0 and not self._knows(smaller):
            return smaller
        return self._chosen

    def learn(self, size: int, seconds_a_row: float) -> None:
        self._full += size >= self._chosen
        count, last = self._used.get(size, (0, 0))
        if self._full - last >= _STALE:
            count = 0
        before = self._costs[size] if count else seconds_a_row
        weight = _SMOOTHING if count >= _ENOUGH else 1 / (count + 1)
        self._costs[size] = before + weight * (min(seconds_a_row, _OUTLIER * before) - before)
        self._used[size] = count + 1, self._full
        if count < _ENOUGH or self._looks % _THINK == 0:
            self._chosen = self._choose()

    def refuse(self, size: int) -> None:
        self._costs[size], self._used[size] = _TOO_MANY, (_ENOUGH, self._full)
        self._chosen = self._choose()

    def _knows(self, size: int) -> bool:
        count, last = self._used.get(size, (0, 0))
        return count >= _ENOUGH and self._full - last < _STALE

    def _choose(self) -> int:
        known = {size: cost for size, cost in self._costs.items() if self._knows(size)}
        if not known:
            return self._chosen
        # where one row alone takes longer than half the latency, that can't be had: twice as long for many rows is worth it
        allowed = max(self._half, 2 * known.get(0, 0.0))
        fitting = {size: cost for size, cost in known.items() if cost * (1 << size) <= allowed}
        if not fitting:
            return max(min(self._longest(min(known.values())), min(known) - 1), 0)
        cheapest = min(fitting.values())
        chosen = min(size for size, cost in fitting.items() if cost <= cheapest * _GAIN)
        return self._larger(chosen, allowed / cheapest) if chosen == max(fitting) else chosen

    def _larger(self, size: int, rows: float) -> int:
        """The next one to try; at once the first one of all, if that many rows fit even if each costs what it does now."""
        untried = [each for each in range(size + 1, max(size + 1, self._first) + 1) if 1 << each <= rows and not self._knows(each)]
        return min(max(untried, default=size), self._top)

    def _longest(self, seconds_a_row: float) -> int:
        """The largest size that fits if a row costs as much in it."""
        rows = min(self._half / seconds_a_row, 1 << self._top) if seconds_a_row > 0 else 1 << self._top
        return max(int(rows), 1).bit_length() - 1


def _bucket(rows: int) -> int:
    return (rows - 1).bit_length()
