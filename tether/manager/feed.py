"""Pure: what a writer sends its followers, and which of them keep step."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from blake3 import blake3

from tether.security.access_file import AccessState
from tether.store.index.mirror_tables import CatalogState

__all__ = ["GONE", "LAG", "MOST", "Changes", "Followers"]

LAG = 3.0
"""Seconds in which a follower that was sent a change may show no progress; then publishes wait for it no longer."""
GONE = 1.0
"""Seconds for which they wait for one whose connection ended: it connects again in a fifth of that."""
MOST = 120.0
"""Seconds for one change, however busy the follower is: who publishes waits 300."""


@dataclass(slots=True)
class _Follower:
    connection: int
    since: float
    """When it came, or was last heard of."""
    connected: bool = True
    applied: int = -1
    sent: int = -1
    sent_at: float = 0.0
    progress: int = 0


class Followers:
    """What is known of those who follow this writer, in one term."""

    def __init__(self) -> None:
        self._known: dict[str, _Follower] = {}
        self.acknowledged = -1
        """The highest change that was acknowledged to whoever made it."""
        self.awaited: frozenset[str] = frozenset()
        """Those that keep up. What is acknowledged, they have; whether they may take over is another question."""

    def joined(self, member: str, connection: int, now: float) -> None:
        """It opened a feed; an earlier one of its is dead."""
        self._known[member] = _Follower(connection, now)

    def left(self, member: str, connection: int, now: float) -> None:
        """A feed ended."""
        known = self._known.get(member)
        if known is not None and known.connection == connection:
            known.connected, known.since = False, now

    def sent(self, member: str, change: int, now: float) -> None:
        """It was sent what leads to this change; no more is sent before it has that."""
        known = self._known[member]
        known.sent, known.sent_at = change, now

    def is_idle(self, member: str) -> bool:
        """Whether it has all that it was sent."""
        known = self._known[member]
        return known.applied >= known.sent

    def busy(self, member: str, progress: int, now: float) -> None:
        """It fetches: so many bytes until now."""
        known = self._known[member]
        if progress > known.progress:
            known.progress, known.since = progress, now

    def applied(self, member: str, change: int, now: float) -> None:
        """A change is durable there.

        One that was quick is waited for from now on: without that it would never catch up with who publishes without a pause.
        """
        known = self._known[member]
        known.applied, known.since = max(known.applied, change), now
        if now - known.sent_at < LAG:
            self.awaited |= {member}

    def in_step(self, now: float) -> frozenset[str]:
        """Those that have all that was acknowledged until now, and go on."""
        return frozenset(
            member
            for member, known in self._known.items()
            if known.connected and known.applied >= max(self.acknowledged, 0) and not self._lags(known, now)
        )

    def have(self, members: frozenset[str], change: int) -> bool:
        """Whether all of these have a change."""
        return all(member in self._known and self._known[member].applied >= change for member in members)

    def lagging(self, members: frozenset[str], now: float) -> frozenset[str]:
        """Those of them that are not worth waiting for; nor are such of the awaited ones."""
        self.awaited = frozenset(member for member in self.awaited if not self._lags(self._known.get(member), now))
        return frozenset(member for member in members if self._lags(self._known.get(member), now))

    def _lags(self, known: _Follower | None, now: float) -> bool:
        if known is None:
            return True
        if not known.connected:
            return now - known.since >= GONE
        return known.applied < known.sent and (now - max(known.since, known.sent_at) >= LAG or now - known.sent_at >= MOST)


class Changes:
    """What one follower was sent: the next message holds what is different."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], bytes] = {}
        self._rest = self._access = b""

    def since(self, state: CatalogState) -> CatalogState:
        """What is new in `state`, which is a whole one; at first all of it."""
        whole = not self._rest
        models = {(model.publisher, model.name): model for model in state.models}
        prints = {name: _print(model) for name, model in models.items()}
        changed = tuple(model for name, model in models.items() if self._models.get(name) != prints[name])
        rest = _print(state.rest)
        same, self._rest, self._models = rest == self._rest, rest, prints
        return CatalogState(change=state.change, whole=whole, models=changed, rest=None if same else state.rest)

    def access_since(self, state: AccessState) -> AccessState | None:
        """Who may do what, where that is new. It may be newer than the catalog that goes with it, and must not be older."""
        now = _print(state)
        same, self._access = now == self._access, now
        return None if same else state


def _print(value: object) -> bytes:
    return blake3(msgspec.msgpack.encode(value)).digest()
