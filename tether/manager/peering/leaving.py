"""Pure: when a lab may drop a copy that is one too many, so that as many as agreed are left, however many labs drop theirs at once.

A lab that has one too many for a while says that it is *leaving*, and goes on having it and giving it. It drops it when as many other
labs as there are to be copies have said, asked after it began to leave, that they have all of it and are not leaving themselves.

Why no more is needed: of all labs that drop a copy take the one that began to leave last. Each lab that it relied on was not leaving at
a later time than that; if it dropped its copy too, it began to leave even later, and there is none. So those it relied on are left. That
holds whatever is lost or late on the way, and for labs that plan differently; who began to leave and stopped begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["GRACE", "Leaving"]

GRACE: Final = 3600.0
"""Seconds for which a copy has to be one too many: a lab that comes and goes costs nobody a copy, nor its way here once more."""


@dataclass(slots=True)
class _Copy:
    mark: str
    """What was here of the model when it began to be one too many."""
    since: float
    left: float | None = None
    """When this lab began to say that it leaves it."""


class Leaving:
    """One lab's copies of one publisher's models. Times are of a monotonic clock."""

    def __init__(self, grace: float = GRACE) -> None:
        self._grace = grace
        self._copies: dict[str, _Copy] = {}

    @property
    def names(self) -> frozenset[str]:
        """Models that this lab leaves: to be said of it as long as it is so, and first of all."""
        return frozenset(name for name, copy in self._copies.items() if copy.left is not None)

    def look(self, surplus: Mapping[str, str], now: float) -> None:
        """`surplus`: models that this lab need not have, as of now → mark of what it has of them. Of others none is left any more."""
        before = self._copies
        self._copies = {
            name: before[name] if name in before and before[name].mark == mark else _Copy(mark, now) for name, mark in surplus.items()
        }
        for copy in self._copies.values():
            if copy.left is None and now - copy.since >= self._grace:
                copy.left = now

    def may_drop(self, name: str, wanted: int, asked: Mapping[str, float]) -> bool:
        """`wanted`: copies that there are to be. `asked`: other labs that have all of it and do not leave it → when they were asked."""
        copy = self._copies.get(name)
        if copy is None or copy.left is None:
            return False
        return sum(at > copy.left for at in asked.values()) >= wanted
