"""Pure: which of the requests that wait run together next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tether.errors import BadInputError
from tether.types import InferRequest, ModelInfo, Tensors

__all__ = ["BatchKey", "Rows", "join_inputs", "next_batch", "rows_of", "split_outputs"]

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


def next_batch(waiting: Sequence[Rows], max_rows: int) -> int:
    """How many from the head of the queue run together: as many of one key as fit in `max_rows`, in order, and always at least one.

    No waiting for more: what piled up while the last batch ran is the batch (FASTPATH.md §3).
    """
    if not waiting:
        return 0
    key, rows = waiting[0].key, waiting[0].count
    if key is None:
        return 1
    taken = 1
    for candidate in waiting[1:]:
        if candidate.key != key or rows + candidate.count > max_rows:
            break
        rows += candidate.count
        taken += 1
    return taken


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
