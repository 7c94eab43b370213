"""Whom a lab lets in from outside, and what for: the part of `Operations` that is about other people."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from tether import ports
from tether.errors import BadScopeError
from tether.lab.objects import described
from tether.lab.outsiders import Allowed, AuditLine, Invitation, PeerInfo, Revoked

__all__ = ["Admitting"]


class Admitting(ABC):
    """A lab and its neighbours.

    A peer is named by its key, its address (`tether://…`), the petname that it was given here, or a label that it alone has.
    """

    @property
    @abstractmethod
    def _door(self) -> ports.Admitting:
        """Raises: ServiceUnavailableError: the lab has no gateway; UnsupportedError: it is not one's own."""

    async def address(self) -> str:
        """`tether://…`: how other labs find this one. It identifies the lab; it admits nobody."""
        return described(_Address, await self._door.address()).address

    async def invite(
        self,
        model: str | None = None,
        scope: str | Sequence[str] = "infer",
        *,
        expires: str | float = "30d",
        uses: int = 1,
        label: str = "",
    ) -> Invitation:
        """Make a link that lets a colleague in: `lab.invite("digits")` to run that model. She opens it with `tether.connect(url)`, once.

        `scope`: a verb (infer, models, publish, replicate, decrypt) for `model`, for every model where there is none; or whole scopes,
        such as `["infer:digits*", "replicate:digits*"]`. `expires`: "90s", "12h", "30d", seconds, or "never". `uses`: how many keys may
        come by it. `label`: who it is for. The link's secret is in the answer only.

        Raises: BadScopeError, BadTermsError, BadNameError: `label`; UnsupportedError: the lab was started without the swarm, so that nobody
        could come by it; MissingDependencyError: PythonMonkey is not installed where its manager runs.
        """
        scopes = _scopes(model, scope)
        return described(Invitation, await self._door.invite(scopes, expires, uses, label))

    async def invitations(self) -> list[Invitation]:
        """All that were made, oldest first, without their links."""
        return [described(Invitation, row) for row in await self._door.invitations()]

    async def revoke_invitation(self, invitation: str) -> Invitation:
        """Let nobody in by it any more, by its id. Who came by it stays: `disallow` sends them away. Raises: NotFoundError."""
        return described(Invitation, await self._door.revoke_invitation(invitation))

    async def peers(self) -> dict[str, PeerInfo]:
        """Everybody who was let in, sent away, named, or is connected, by key."""
        found = [described(PeerInfo, row) for row in await self._door.peers()]
        return {peer.peer: peer for peer in sorted(found, key=lambda peer: peer.peer)}

    async def allow(self, peer: str, scopes: str | Sequence[str], label: str | None = None) -> Allowed:
        """Let the holder of a key do more, without an invitation: `lab.allow(key, "infer:digits")`.

        With `decrypt:NAME` the answer has an envelope: text that the peer alone can open, with `accept`.

        Raises: BadKeyError, BadAddressError, BadScopeError; LockedModelError: no model of the name is encrypted; ForbiddenError: banned.
        """
        return described(Allowed, await self._door.allow(peer, _listed(scopes), label))

    async def disallow(self, peer: str, scopes: str | Sequence[str] | None = None) -> Revoked:
        """Take scopes back, all of them where none is named; calls that run end at once.

        Of encrypted models later versions get a new key; what the peer has, it keeps. The answer says by which invitations it could come
        back under another key.

        Raises: NotFoundError; ScopeStillOpenError: another scope would still open the same (`infer` is wider than `infer:digits`): nothing
        was taken.
        """
        return described(Revoked, await self._door.disallow(peer, None if scopes is None else _listed(scopes)))

    async def ban(self, peer: str, reason: str = "by hand") -> PeerInfo:
        """Speak with a key no more at all, whatever it was allowed."""
        return described(PeerInfo, await self._door.ban(peer, reason))

    async def unban(self, peer: str) -> PeerInfo:
        """Forgive it: it may again what it was allowed. Raises: NotFoundError."""
        return described(PeerInfo, await self._door.unban(peer))

    async def name_peer(self, peer: str, petname: str) -> None:
        """Call a lab by a name of your own: its models are `petname/name` then. Raises: BadNameError; ConflictError: another has it."""
        await self._door.name_peer(peer, petname)

    async def audit(self, most: int = 100) -> list[AuditLine]:
        """The latest changes of who may do what, oldest first."""
        return [described(AuditLine, row) for row in await self._door.audit(most)]

    async def rotate(self) -> str:
        """Replace the cluster key, which protects the keys of all encrypted models; gives the new one's id. Back its file up."""
        return described(_Rotated, await self._door.rotate()).cluster_key


class _Address(msgspec.Struct, frozen=True):
    address: str


class _Rotated(msgspec.Struct, frozen=True):
    cluster_key: str


def _scopes(model: str | None, scope: str | Sequence[str]) -> list[str]:
    """Verbs are for the model, whole scopes are as they are. Raises: BadScopeError: the model is in none of them."""
    scopes = [each if ":" in each or model is None else f"{each}:{model}" for each in _listed(scope)]
    if model is not None and not any(each.partition(":")[2] == model for each in scopes):
        raise BadScopeError(f"none of {', '.join(scopes)} is for {model!r}: name the model there, or leave it out here")
    return scopes


def _listed(scopes: str | Sequence[str]) -> list[str]:
    return [scopes] if isinstance(scopes, str) else list(scopes)
