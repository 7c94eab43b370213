"""Pure: which workers get a copy of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Candidate", "place"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker, seen from one model."""

    address: str
    has: bool
    """It has the model or is loading it."""
    able: bool
    """It may be asked to load it now."""
    models: int
    """How many models it has or is loading."""


def place(candidates: Sequence[Candidate], copies: int) -> list[str]:
    """The workers that should load the model now: emptiest first, until `copies` have it."""
    missing = copies - sum(candidate.has for candidate in candidates)
    free = [candidate for candidate in candidates if candidate.able and not candidate.has]
    free.sort(key=lambda candidate: (candidate.models, candidate.address))
    return [candidate.address for candidate in free[: max(missing, 0)]]
