"""Pure: how often wrong invitations may be tried: by one key, at one invitation, and by everybody together.

A secret has 128 random bits, so no number of tries finds one. What is bounded is what trying costs: an answer each, a line in the log, the
attention of who reads it. Tries that name an invitation which exists have a bucket of their own: who floods a lab with inventions, and keys
cost nothing, can't keep those out who were invited.
"""

from __future__ import annotations

from tether.security.rates import Bucket

__all__ = ["FORGIVEN", "TRIES", "Guesses"]

TRIES = 3
"""Wrong ones of one key."""
FORGIVEN = 3600.0
"""Seconds after the last of them, it may try again: whoever used an old link three times is not shut out for good."""
_BLIND_RATE, _BLIND_BURST = 1.0, 100.0
"""For tries that name no invitation: a second, and at once."""
_AIMED_RATE, _AIMED_BURST = 1 / 60, 10.0
"""For tries with a wrong secret for an invitation that exists."""
_MOST = 4096
"""Keys and invitations that are remembered, the latest: a megabyte."""


class Guesses:
    """What was tried, in memory: a restart forgives it."""

    def __init__(self) -> None:
        self._tries: dict[str, tuple[int, float]] = {}
        self._blind = Bucket(_BLIND_RATE, _BLIND_BURST)
        self._aimed: dict[str, Bucket] = {}

    def wait(self, peer: str, invitation: str | None, now: float) -> float:
        """Seconds until a try of this key is looked at; 0.0: now. `invitation`: the one that it names, if there is one."""
        tries, last = self._tries.get(peer, (0, now))
        if tries >= TRIES and now - last < FORGIVEN:
            return FORGIVEN - (now - last)
        bucket = self._blind if invitation is None else self._aimed.get(invitation)
        return bucket.wait(1.0, now) if bucket else 0.0

    def wrong(self, peer: str, invitation: str | None, now: float) -> None:
        """It was looked at, and was wrong."""
        tries, last = self._tries.pop(peer, (0, now))
        self._tries[peer] = (1 if now - last >= FORGIVEN else tries + 1, now)
        _trim(self._tries)
        if invitation is None:
            self._blind.take(1.0, now)
            return
        bucket = self._aimed.pop(invitation, None) or Bucket(_AIMED_RATE, _AIMED_BURST)
        bucket.take(1.0, now)
        self._aimed[invitation] = bucket
        _trim(self._aimed)

    def right(self, peer: str) -> None:
        """It was right: what was wrong before is forgotten."""
        self._tries.pop(peer, None)

    def __len__(self) -> int:
        return len(self._tries) + len(self._aimed)


def _trim(known: dict[str, tuple[int, float]] | dict[str, Bucket]) -> None:
    if len(known) > _MOST:
        del known[next(iter(known))]
