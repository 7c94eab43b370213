"""Pure: which workers get a copy of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Candidate", "place"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker, seen from one model."""

    address: str
    loaded: bool
    """It has the model in memory."""
    loading: bool
    able: bool
    """It may be asked to load it now."""
    models: int
    """How many models it has or is loading."""


def place(candidates: Sequence[Candidate], copies: int) -> list[str]:
    """The workers that should load the model now: emptiest first, until `copies` have it.

    The first copy comes alone: loads at the same time share the machine's cores, and all who wait are waiting for one of them.
    """
    having = sum(candidate.loaded or candidate.loading for candidate in candidates)
    wanted = copies if any(candidate.loaded for candidate in candidates) else 1
    missing = wanted - having
    free = [candidate for candidate in candidates if candidate.able and not (candidate.loaded or candidate.loading)]
    free.sort(key=lambda candidate: (candidate.models, candidate.address))
    return [candidate.address for candidate in free[: max(missing, 0)]]
