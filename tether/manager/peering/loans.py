"""What lending opens, besides scopes. Asked for each call and blob: it waits for nobody.

To a lab that this one lends workers to: `ping`, `capacity`, and `infer` of that lab's own models, as far as the terms name them. To a lab
that lends workers to this one: the versions of the models that it was asked to run. Who is banned here gets nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tether.manager.peering.lent_state import covers
from tether.security.access import Access

__all__ = ["Loans"]

_LENT: Final = frozenset({"ping", "capacity", "infer"})
_BORROWED: Final = frozenset({"models", "manifest", "blobs"})


class Loans:
    """Of one lab."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self.terms: Mapping[str, str] = {}
        """Whom this lab lends workers to, by key → glob of the models that they are for."""
        self.given: Mapping[str, frozenset[str]] = {}
        """Labs that lend workers to this one → models that they were asked to run."""

    def lends(self, peer: str, model: str | None = None) -> bool:
        """Whether this lab runs a model of that lab's own, by its publisher's name for it; None: any at all."""
        glob = self.terms.get(peer)
        return glob is not None and (model is None or covers(glob, model)) and not self._access.is_banned(peer)

    def knows(self, peer: str) -> bool:
        """Whether there is anything between this lab and that one."""
        return (peer in self.terms or peer in self.given) and not self._access.is_banned(peer)

    def opens(self, peer: str, method: str) -> bool:
        """Whether a method is open to it; for which models, `lends` and `may` say."""
        return (method in _LENT and self.lends(peer)) or self.may(peer, method, None)

    def may(self, peer: str, method: str, model: str | None) -> bool:
        """Whether it may have a model of this lab, by its name in the catalog, since it is to run it; None: any at all."""
        given = self.given.get(peer)
        if given is None or method not in _BORROWED or self._access.is_banned(peer):
            return False
        return bool(given) if model is None else model in given
