"""Pure: which of the requests that wait run together next."""

from __future__ import annotations

from bisect import bisect, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, TypeVar

import numpy as np

from tether.types import InferRequest, ModelInfo, Tensors

__all__ = ["BatchKey", "Rows", "Waiting", "join_inputs", "rows_of", "split_outputs"]

Job = TypeVar("Job")

BatchKey = tuple[tuple[int, ...], ...]
"""Shape without the batch axis of every input, in the model's order: requests of one key can be joined."""
_LEVEL = 1 << 48
"""What a level weighs in the order of requests: more than there will ever be arrivals."""


@dataclass(slots=True)  # a frozen one takes twice as long to make, one for each request
class Rows:
    """What batching needs to know of a request."""

    count: int
    key: BatchKey | None
    """None: the model has no batch axis, the request runs alone."""


_ALONE = Rows(1, None)


def rows_of(request: InferRequest, info: ModelInfo) -> Rows:
    """The request has the model's inputs, in its datatypes, of which the first axes agree: that is what decoding checks."""
    if not info.batched:
        return _ALONE
    shapes = [request.inputs[spec.name].shape for spec in info.inputs]
    return Rows(shapes[0][0] if shapes else 1, tuple([shape[1:] for shape in shapes]))


class Waiting(Generic[Job]):
    """Requests that wait, those that can be joined together. Who came first says of which shape the next batch is.

    With levels, those of a lower number come first, whenever they came; level 0 is that of all where there are none.
    """

    def __init__(self) -> None:
        self._jobs: dict[BatchKey | None, deque[tuple[int, int, Job]]] = {}
        """By key: level and number of arrival in one number, rows, request; in order."""
        self._arrived = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in self._jobs.values() for _, _, job in jobs)

    def add(self, rows: Rows, job: Job, level: int = 0) -> None:
        """It is the last of its shape and level."""
        self._arrived += 1
        self._count += 1
        jobs = self._jobs.setdefault(rows.key, deque())
        if not level:
            jobs.append((self._arrived, rows.count, job))
            return
        insort(jobs, (level * _LEVEL + self._arrived, rows.count, job), key=itemgetter(0))

    def count_at(self, level: int) -> int:
        """Those of a level; of level 0, all."""
        if not level:
            return self._count
        ends = level * _LEVEL, (level + 1) * _LEVEL
        below, upto = (sum(bisect(jobs, end, key=itemgetter(0)) for jobs in self._jobs.values()) for end in ends)
        return upto - below

    def next_key(self) -> BatchKey | None:
        """The shape of the next batch; None too where the next request runs alone. Raises: ValueError: nothing waits."""
        return min(self._jobs, key=lambda key: self._jobs[key][0][0]) if len(self._jobs) != 1 else next(iter(self._jobs))

    def shapes(self) -> list[BatchKey | None]:
        """All shapes, that of the next batch first."""
        return sorted(self._jobs, key=lambda key: self._jobs[key][0][0])

    def of(self, key: BatchKey | None) -> Iterator[tuple[int, Job]]:
        """Rows and requests of a shape, in order."""
        return ((rows, job) for _, rows, job in self._jobs[key])

    def has(self, key: BatchKey) -> bool:
        """Whether some of this shape wait."""
        return key in self._jobs

    def take(self, most_rows: int) -> list[Job]:
        """The next batch: as many of one shape as fit, in order, at least one; of a model without a batch axis exactly one.

        No waiting for more: what piled up while the last batch ran is the batch (FASTPATH.md §3).
        """
        return self.take_of(self.next_key(), most_rows) if self._count else []

    def take_of(self, key: BatchKey | None, most_rows: int) -> list[Job]:
        """As `take`, of this shape."""
        jobs = self._jobs[key]
        taken: list[Job] = []
        rows = 0
        while jobs and (not taken or (key is not None and rows + jobs[0][1] <= most_rows)):
            _, count, job = jobs.popleft()
            rows += count
            taken.append(job)
        if not jobs:
            del self._jobs[key]
        self._count -= len(taken)
        return taken

    def drop(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Take out those that are not wanted any more, in order of arrival within a shape."""
        dropped = [job for job in self if unwanted(job)]
        if dropped:
            kept = {key: deque(each for each in jobs if not unwanted(each[2])) for key, jobs in self._jobs.items()}
            self._replace(kept)
        return dropped

    def sort(self, level: Callable[[Job], int]) -> None:
        """Levels mean something else from now on; the order of arrival stays."""
        self._replace(
            {
                key: deque(sorted(((level(job) * _LEVEL + order % _LEVEL, rows, job) for order, rows, job in jobs), key=itemgetter(0)))
                for key, jobs in self._jobs.items()
            }
        )

    def _replace(self, jobs: dict[BatchKey | None, deque[tuple[int, int, Job]]]) -> None:
        self._jobs = {key: some for key, some in jobs.items() if some}
        self._count = sum(map(len, self._jobs.values()))


def join_inputs(requests: Sequence[InferRequest]) -> Tensors:
    """The requests' inputs as one batch, in order. One request passes through without a copy."""
    if len(requests) == 1:
        return requests[0].inputs
    return {name: np.concatenate([request.inputs[name] for request in requests]) for name in requests[0].inputs}


def split_outputs(outputs: Tensors, counts: Sequence[int]) -> list[Tensors]:
    """The rows of each request, as views, in order. `counts` sums to the rows of every output."""
    if len(counts) == 1:
        return [outputs]
    split: list[Tensors] = []
    start = 0
    for count in counts:
        split.append({name: array[start : start + count] for name, array in outputs.items()})
        start += count
    return split
