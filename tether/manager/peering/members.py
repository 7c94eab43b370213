"""Who belongs to the groups of labs that this one holds copies with, and what that opens to them besides their scopes.

Asked for each stream, call and blob: it waits for nobody. The rule: a publisher names in its feed the labs to which it gave `replicate` for
all that it has; a lab that chose to hold copies for that publisher gives them the publisher's models too, no other, and tells them and the
publisher which of these it has. So nobody gets a byte that the publisher did not allow. What the publisher takes back is closed here when
its feed says so; what it can't say any more, because it is gone, stays as it was. Who is banned here gets nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from tether.manager.peering.loans import Loans
from tether.security.access import Access

__all__ = ["LABEL_DIGITS", "Members"]

LABEL_DIGITS = 12
"""Of its key, as the catalog calls a publisher that was given no petname."""
_HAVE, _HEADS, _BLOBS = "have", "heads", "blobs"


class Members:
    """Of one lab's groups."""

    def __init__(self, access: Access, loans: Loans | None = None) -> None:
        """`loans`: what lending opens besides."""
        self._access, self._loans = access, loans or Loans(access)
        self._groups: Mapping[str, frozenset[str]] = {}
        self._publishers: Mapping[str, str] = {}

    def meet(self, groups: Mapping[str, frozenset[str]], petnames: Mapping[str, str]) -> None:
        """From now on: publisher → who belongs to its group, itself included; publisher → what the catalog calls it."""
        self._groups = groups
        self._publishers = {petnames.get(publisher, publisher[:LABEL_DIGITS]): publisher for publisher in groups}

    def knows(self, peer: str) -> bool:
        """Whether it belongs to any, or workers are lent between it and this lab."""
        return self._is_member(peer) or self._loans.knows(peer)

    def may_ask(self, peer: str, publisher: str) -> bool:
        """Whether it may know what this lab has of a publisher's models."""
        return (peer in self._groups.get(publisher, ()) and not self._access.is_banned(peer)) or self._access.may(peer, _HAVE)

    def opens(self, peer: str, method: str) -> bool:
        """Whether a method is open to it by a group, or by lending."""
        return (method in {_HAVE, _HEADS} and self._is_member(peer)) or self._loans.opens(peer, method)

    def may(self, peer: str, method: str, model: str | None = None) -> bool:
        """As `Access.may`, with what groups and lending open; `model`: by its name in the catalog."""
        is_open = self._access.may(peer, method, model) or self._loans.may(peer, method, model)
        return is_open or (method == _BLOBS and self._shares(peer, model))

    def _is_member(self, peer: str) -> bool:
        return any(peer in members for members in self._groups.values()) and not self._access.is_banned(peer)

    def _shares(self, peer: str, model: str | None) -> bool:
        if model is None:
            return self._is_member(peer)
        label, tilde, _ = model.partition("~")
        publisher = self._publishers.get(label) if tilde else None  # without: this lab's own, of which its scopes decide
        return publisher is not None and peer in self._groups[publisher] and not self._access.is_banned(peer)
