"""Versions of others that were refused: not fetched nor looked at again while nothing is different, which would cost the same in vain."""

from __future__ import annotations

from typing import Final, NamedTuple

from tether.errors import BadModelError, MalformedFeedError, MalformedManifestError, TetherError, UntrustedCodeError, from_code
from tether.types import Digest

__all__ = ["Refusals"]

_FINAL: Final = (BadModelError, MalformedFeedError, MalformedManifestError, UntrustedCodeError)
"""What the version itself is the reason for. A full disk, a library that is missing, peers that do not give it, may be otherwise soon."""


class _Refusal(NamedTuple):
    publisher: str
    name: str
    trusted: bool
    error: TetherError


class Refusals:
    """Of one process: the next one, which may be a newer Tether, looks once more. Belongs to one event loop."""

    def __init__(self) -> None:
        self._known: dict[tuple[Digest, int], _Refusal] = {}

    def check(self, digest: Digest, nbytes: int, *, trusted: bool) -> None:
        """Whether a version, of the size that its feed says, may be tried. `trusted`: whether its publisher is, for code, now.

        Raises: what it was refused for.
        """
        known = self._known.get((digest, nbytes))
        if known is None:
            return
        if known.trusted != trusted:
            del self._known[digest, nbytes]
            return
        raise from_code(known.error.code, *known.error.args)

    def note(self, whose: tuple[str, str], digest: Digest, nbytes: int, error: TetherError, *, trusted: bool) -> None:
        """It was tried, and this is what became of it. `whose`: publisher and the model's name there."""
        if isinstance(error, _FINAL):
            self._known[digest, nbytes] = _Refusal(*whose, trusted, error)

    def forget(self, publisher: str, name: str | None = None) -> None:
        """A person wants it to be tried again; None: all of this publisher's models."""
        self._known = {key: each for key, each in self._known.items() if each.publisher != publisher or name not in {None, each.name}}
