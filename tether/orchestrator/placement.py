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
    lent: bool = False
    """It is another lab's."""

    @property
    def has(self) -> bool:
        """Whether it need not be asked."""
        return self.loaded or self.loading


def place(candidates: Sequence[Candidate], copies: int) -> list[str]:
    """The workers that should load the model now: emptiest first, until `copies` have it. Lent ones get what too few of the lab's can hold.

    The first copy comes alone: loads at the same time share the machine's cores, and all who wait are waiting for one of them.
    """
    wanted = copies if any(candidate.loaded for candidate in candidates) else 1
    own = [candidate for candidate in candidates if not candidate.lent]
    lent = [candidate for candidate in candidates if candidate.lent]
    beyond = wanted - sum(candidate.has or candidate.able for candidate in own)
    return _emptiest(own, wanted) + _emptiest(lent, beyond)


def _emptiest(candidates: Sequence[Candidate], wanted: int) -> list[str]:
    missing = wanted - sum(candidate.has for candidate in candidates)
    free = [candidate for candidate in candidates if candidate.able and not candidate.has]
    free.sort(key=lambda candidate: (candidate.models, candidate.address))
    return [candidate.address for candidate in free[: max(missing, 0)]]
