"""Who may open the lab's encrypted models, and the rotation of what protects the keys: JSON values in and out. Blocks."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tether.errors import BadEnvelopeError
from tether.security.identity import Identity
from tether.store import Repository
from tether.store.format.encrypted import ModelContext

__all__ = ["Grants", "Taken"]


class Taken(NamedTuple):
    """What taking encrypted models from a peer did."""

    models: list[str]
    """Those whose later versions have a new key."""
    message: str
    """For people; "" where it had none."""
    envelopes: dict[str, dict[str, str]]
    """With the new keys, for those who stay: model → public key → base64."""


class Grants:
    """Of one lab."""

    def __init__(self, repository: Repository, identity: Callable[[], Identity]) -> None:
        self._repository, self._identity = repository, identity

    def envelope(self, peer: str, name: str) -> str:
        """All keys of a model, which only `peer` (key, hex) can open: base64.

        Raises: BadKeyError: `peer` is no public key; LockedModelError: no model key of that name.
        """
        return self._envelope(ModelContext(self._identity().public, name), peer)

    def revoke(self, peer: str, names: Iterable[str] | None) -> Taken:
        """Take models (None: all) from a peer. Later versions get a new key, which those who stay need: the answer has their envelopes."""
        given = self._repository.granted(peer)
        models = [context for context in given if names is None or context.name in names]
        if not models:  # nor is a cluster key made to find that out
            return Taken([], "", {})
        keys = self._repository.keys
        revocations = [keys.revoke(peer, context) for context in models]
        for context in models:
            keys.current(context)
        envelopes = {context.name: {other: self._envelope(context, other) for other in keys.peers(context)} for context in models}
        return Taken([context.name for context in models], "; ".join(map(str, revocations)), envelopes)

    def accept(self, envelope: str) -> dict[str, Any]:
        """Keep the keys that another lab granted this one.

        Raises: BadEnvelopeError: it is for another lab, or damaged; ConflictError: keys for this lab's own model.
        """
        try:
            data = base64.b64decode("".join(envelope.split()), validate=True)
        except (binascii.Error, ValueError):
            raise BadEnvelopeError("an envelope is base64 text, as `tether allow` prints it: this is something else") from None
        accepted = self._repository.keys.accept(data, self._identity())
        return {"publisher": accepted.context.publisher, "name": accepted.context.name, "new_keys": len(accepted.keys)}

    def rotate(self) -> dict[str, Any]:
        """A new cluster key; every model key is wrapped by it, the old one deleted, no model touched."""
        rotation = self._repository.keys.rotate_cluster()
        return {"cluster_key": rotation.cluster_key, "rewrapped": rotation.rewrapped, "resumed": rotation.resumed}

    def _envelope(self, context: ModelContext, peer: str) -> str:
        return base64.b64encode(self._repository.keys.grant(context, peer)).decode()
