"""Pure: which of the requests that wait run together next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from tether.errors import BadInputError
from tether.types import InferRequest, ModelInfo, Tensors

__all__ = ["BatchKey", "Rows", "Waiting", "join_inputs", "rows_of", "split_outputs"]

Job = TypeVar("Job")

BatchKey = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape without the batch axis of every input: requests of one key can be joined."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What batching needs to know of a request."""

    count: int
    key: BatchKey | None
    """None: the model has no batch axis, the request runs alone."""


def rows_of(request: InferRequest, info: ModelInfo) -> Rows:
    """Raises: BadInputError: the inputs of one request have different numbers of rows."""
    if not info.batched:
        return Rows(1, None)
    counts = {array.shape[0] for array in request.inputs.values()}
    if len(counts) > 1:
        given = ", ".join(f"{name} {array.shape[0]}" for name, array in request.inputs.items())
        raise BadInputError(f"the inputs have different numbers of rows ({given}); the first axis is the batch and must agree")
    key = tuple((name, array.dtype.str, array.shape[1:]) for name, array in sorted(request.inputs.items()))
    return Rows(counts.pop() if counts else 1, key)


class Waiting(Generic[Job]):
    """Requests that wait, those that can be joined together. Who came first says of which shape the next batch is."""

    def __init__(self) -> None:
        self._jobs: dict[BatchKey | None, deque[tuple[int, int, Job]]] = {}
        """By key: number of arrival, rows, request; in order."""
        self._arrived = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in self._jobs.values() for _, _, job in jobs)

    def add(self, rows: Rows, job: Job) -> None:
        """It is the last of its shape."""
        self._arrived += 1
        self._count += 1
        self._jobs.setdefault(rows.key, deque()).append((self._arrived, rows.count, job))

    def next_key(self) -> BatchKey | None:
        """The shape of the next batch; None too where the next request runs alone. Raises: ValueError: nothing waits."""
        return min(self._jobs, key=lambda key: self._jobs[key][0][0])

    def has(self, key: BatchKey) -> bool:
        """Whether some of this shape wait."""
        return key in self._jobs

    def take(self, most_rows: int) -> list[Job]:
        """The next batch: as many of one shape as fit, in order, at least one; of a model without a batch axis exactly one.

        No waiting for more: what piled up while the last batch ran is the batch (FASTPATH.md §3).
        """
        if not self._count:
            return []
        key = self.next_key()
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
            self._jobs = {key: jobs for key, jobs in kept.items() if jobs}
            self._count -= len(dropped)
        return dropped


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
