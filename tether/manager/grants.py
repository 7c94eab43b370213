"""Who may open the lab's encrypted models, and the rotation of what protects the keys: JSON values in and out. Blocks."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from tether.errors import BadEnvelopeError, BadNameError
from tether.security.identity import Identity
from tether.store import Repository
from tether.store.format.encrypted import ModelContext
from tether.types import model_name

__all__ = ["Grants"]

_DECRYPT = "decrypt:"


class Grants:
    """Of one lab."""

    def __init__(self, repository: Repository, identity: Identity) -> None:
        self._repository, self._identity = repository, identity

    def allow(self, peer: str, scopes: Sequence[str]) -> dict[str, Any]:
        """Envelopes with the keys of the models that `scopes` (`decrypt:NAME`) name, which only `peer` can open.

        Raises: BadNameError: another scope; BadKeyError: `peer` is no public key; LockedModelError: no model key of that name.
        """
        contexts = self._contexts(scopes)
        envelopes = {context.name: self._envelope(context, peer) for context in contexts}
        return {"peer": peer, "scopes": list(scopes), "envelopes": envelopes}

    def revoke(self, peer: str, scopes: Sequence[str]) -> dict[str, Any]:
        """Take models from a peer. Later versions get a new key, which those who stay need: the answer has their envelopes.

        Raises: BadNameError.
        """
        keys = self._repository.keys
        revocations = [keys.revoke(peer, context) for context in self._contexts(scopes)]
        models = [context for revocation in revocations for context in revocation.models]
        for context in models:
            keys.current(context)
        envelopes = {context.name: {other: self._envelope(context, other) for other in keys.peers(context)} for context in models}
        message = "; ".join(str(revocation) for revocation in revocations)
        return {"peer": peer, "models": [context.name for context in models], "message": message, "envelopes": envelopes}

    def accept(self, envelope: str) -> dict[str, Any]:
        """Keep the keys that another lab granted this one.

        Raises: BadEnvelopeError: it is for another lab, or damaged; ConflictError: keys for this lab's own model.
        """
        try:
            data = base64.b64decode("".join(envelope.split()), validate=True)
        except (binascii.Error, ValueError):
            raise BadEnvelopeError("an envelope is base64 text, as `tether allow` prints it: this is something else") from None
        accepted = self._repository.keys.accept(data, self._identity)
        return {"publisher": accepted.context.publisher, "name": accepted.context.name, "new_keys": len(accepted.keys)}

    def rotate(self) -> dict[str, Any]:
        """A new cluster key; every model key is wrapped by it, the old one deleted, no model touched."""
        rotation = self._repository.keys.rotate_cluster()
        return {"cluster_key": rotation.cluster_key, "rewrapped": rotation.rewrapped, "resumed": rotation.resumed}

    def _envelope(self, context: ModelContext, peer: str) -> str:
        return base64.b64encode(self._repository.keys.grant(context, peer)).decode()

    def _contexts(self, scopes: Sequence[str]) -> list[ModelContext]:
        wrong = [scope for scope in scopes if not scope.startswith(_DECRYPT)]
        if wrong or not scopes:
            raise BadNameError(f"unknown scope {', '.join(wrong)[:200]!r}: give decrypt:NAME, the name of one encrypted model")
        return [ModelContext(self._identity.public, model_name(scope.removeprefix(_DECRYPT))) for scope in dict.fromkeys(scopes)]
