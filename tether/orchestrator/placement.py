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
    has_gpu: bool = False
    roomy: bool = True
    """It has room for the model without putting others out, and did not put any out lately."""

    @property
    def has(self) -> bool:
        """Whether it need not be asked."""
        return self.loaded or self.loading


def place(candidates: Sequence[Candidate], copies: int) -> list[str]:
    """The workers that should load the model now, until `copies` have it: those with a GPU first, of these the emptiest.

    Lent ones get what too few of the lab's can hold. The first copy comes alone: loads at the same time share the machine's cores, and all
    who wait are waiting for one of them. It may cost other models their place; another copy never does.
    """
    wanted = copies if any(candidate.loaded for candidate in candidates) else 1
    own = [candidate for candidate in candidates if not candidate.lent]
    lent = [candidate for candidate in candidates if candidate.lent]
    beyond = wanted - sum(candidate.has or candidate.able for candidate in own)
    is_spare = any(candidate.has for candidate in candidates)
    return _emptiest(own, wanted, is_spare=is_spare) + _emptiest(lent, beyond, is_spare=is_spare)


def _emptiest(candidates: Sequence[Candidate], wanted: int, *, is_spare: bool) -> list[str]:
    missing = wanted - sum(candidate.has for candidate in candidates)
    free = [candidate for candidate in candidates if candidate.able and not candidate.has and (candidate.roomy or not is_spare)]
    free.sort(key=lambda candidate: (not candidate.roomy, not candidate.has_gpu, candidate.models, candidate.address))
    return [candidate.address for candidate in free[: max(missing, 0)]]
