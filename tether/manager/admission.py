"""Who is let in from outside, as people ask for it: invitations, what keys may do, the models they can open. JSON values in and out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from tether.errors import BadAddressError, BadKeyError, BadNameError, BadScopeError, BadTermsError, TetherError
from tether.manager.grants import Grants, Taken
from tether.security.access import Access, Peer
from tether.security.addresses import SCHEME, Address, Link, public_key
from tether.security.identity import Identity
from tether.security.invitations import EXPIRES, Invitation, Invitations, seconds_of
from tether.security.scopes import Scopes
from tether.store import Repository
from tether.swarm.records.records import Record, beginning
from tether.types import model_name

__all__ = ["Admission", "Neighbour", "Neighbourhood"]

_DECRYPT = "decrypt"
_MOST_AUDIT = 10_000
"""Lines of one answer: 2 MB."""
_LIKE_A_KEY = 40
"""Characters from which on a word is meant as a key or an address: people's names for people are shorter."""


class Neighbour(NamedTuple):
    """A lab as the swarm shows it now."""

    peer: str
    """Its key, hex."""
    route: str | None = None
    """How it is connected: direct, punched, relayed; None: it is not."""
    round_trip: float | None = None
    record: Record | None = None
    """What it says of itself; None: nothing that was found and is still good."""
    is_met: bool = False
    """Whether this lab keeps models of it, holds copies with it, or connected to it because somebody here wanted that."""


Neighbourhood = Callable[[Collection[str]], Awaitable[Sequence[Neighbour]]]


class Admission:
    """Of one lab. Changes go to followers with the next state of the catalog, so each counts as a change of that."""

    NAMES: ClassVar[tuple[str, ...]] = (
        "address",
        "invite",
        "invitations",
        "revoke_invitation",
        "enrol",
        "allow",
        "disallow",
        "ban",
        "unban",
        "peers",
        "name_peer",
        "audit",
        "envelope",
        "accept",
        "rotate",
    )

    def __init__(self, repository: Repository, access: Access, identity: Callable[[], Identity]) -> None:
        self.access, self.registry = access, Invitations(access)
        self._repository, self._identity = repository, identity
        self._grants = Grants(repository, identity)
        self.neighbourhood: Neighbourhood = _nobody_there
        """Keys that people here know → what the swarm shows of them, and of others. Awaited on the event loop."""
        self.check_reachable: Callable[[], None] = _reachable
        """Whether others can come at all. Raises: UnsupportedError, MissingDependencyError: this manager can't be on the swarm."""
        self.be_found: Callable[[], Awaitable[None]] = _found
        """Returns once others can find this lab, or that takes too long: an invitation is often opened at once."""

    # --- asked by people

    async def address(self) -> dict[str, Any]:
        key = self._identity().public
        return {"address": str(Address(key)), "publisher": key}

    async def invite(self, scopes: Sequence[str], expires: str | float = EXPIRES, uses: int = 1, label: str = "") -> dict[str, Any]:
        """As the port says. Raises: BadScopeError, BadTermsError, BadNameError, ConflictError; as `check_reachable`."""
        invited = await asyncio.to_thread(self._invite, scopes, expires, uses, label)
        await self.be_found()
        return invited

    async def invitations(self) -> list[dict[str, Any]]:
        return await asyncio.to_thread(lambda: [_invitation_row(each) for each in self.registry.list()])

    async def revoke_invitation(self, invitation: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._revoke_invitation, invitation)

    async def allow(self, peer: str, scopes: Sequence[str], label: str | None = None) -> dict[str, Any]:
        """As the port says. `peer`: a key, an address, a petname or a label."""
        return await asyncio.to_thread(self._allow, peer, scopes, label)

    async def disallow(self, peer: str, scopes: Sequence[str] | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._disallow, peer, scopes)

    async def ban(self, peer: str, reason: str) -> dict[str, Any]:
        """Speak with it no more. It keeps what it was allowed for the day on which it is forgiven."""
        return await asyncio.to_thread(self._ban, peer, reason)

    async def unban(self, peer: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._unban, peer)

    async def peers(self) -> list[dict[str, Any]]:
        known, petnames = await asyncio.to_thread(self._known)
        found = {each.peer: each for each in await self.neighbourhood(known.keys() | petnames.keys())}
        names = await asyncio.to_thread(self._names) if any(each.record for each in found.values()) else {}
        keys = sorted((known.keys() | petnames.keys() | found.keys()) - {self._identity().public})
        return [_peer_row(key, known.get(key), petnames.get(key)) | _seen_row(found.get(key), names) for key in keys]

    async def name_peer(self, peer: str, petname: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._name_peer, peer, petname)

    async def audit(self, most: int = 100) -> list[dict[str, Any]]:
        """The latest changes, oldest first."""
        lines = await asyncio.to_thread(self.access.audit, max(1, min(most, _MOST_AUDIT)))
        return [line._asdict() for line in lines]

    async def accept(self, envelope: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._grants.accept, envelope)

    async def rotate(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._grants.rotate)

    # --- asked by peers

    async def enrol(self, secret: str, peer: str) -> dict[str, Any]:
        """Let the holder of a key (hex; proven by the handshake) in. Raises: as `Invitations.enrol`."""
        return await asyncio.to_thread(self._enrol, secret, peer)

    async def envelope(self, peer: str, name: str) -> dict[str, Any]:
        """For a peer that may open a model: its keys, as they are now. Raises: ForbiddenError, UnknownModelError; LockedModelError."""
        self.access.check(peer, "envelope", name)
        return {"envelope": await asyncio.to_thread(self._grants.envelope, peer, name)}

    # --- how

    def _invite(self, scopes: Sequence[str], expires: str | float, uses: int, label: str) -> dict[str, Any]:
        self.check_reachable()
        secret = self.registry.invite(Scopes.parse(scopes), expires=_seconds(expires), uses=uses, label=label)
        self._repository.touch()
        return {"url": Link(Address(self._identity().public), secret).url} | _invitation_row(self.registry.get(secret.id))

    def _revoke_invitation(self, invitation: str) -> dict[str, Any]:
        revoked = self.registry.revoke(invitation)
        self._repository.touch()
        return _invitation_row(revoked)

    def _allow(self, peer: str, scopes: Sequence[str], label: str | None) -> dict[str, Any]:
        key, added = self._other(peer), Scopes.parse(scopes)
        if not added:
            raise BadScopeError("nothing was given: name at least one scope, such as infer:digits")
        # Envelopes first, which fail where a model has no keys; for who is banned none are made, and `allow` says why.
        names = [] if self.access.is_banned(key) else _to_decrypt(added)
        envelopes = {name: self._grants.envelope(key, name) for name in names}
        held = self.access.allow(key, added, label)
        self._repository.touch()
        return {"peer": key, "scopes": held.texts(), "envelopes": envelopes, "note": self._unreachable(added)}

    def _unreachable(self, added: Scopes) -> str | None:
        """Why nobody can make use of scopes; those to decrypt go with an envelope, by hand."""
        if all(scope.verb == _DECRYPT for scope in added):
            return None
        try:
            self.check_reachable()
        except TetherError as error:
            return f"remembered, but nobody can come now: {error}"
        return None

    def _disallow(self, peer: str, scopes: Sequence[str] | None) -> dict[str, Any]:
        key = self.key_of(peer)
        if scopes is None:
            revocation = self.access.revoke(key)
            gone, left = revocation.scopes, Scopes()
        else:
            gone = Scopes.parse(scopes)
            if not gone:
                raise BadScopeError("nothing was named: give the scopes to take, or none at all to take everything")
            left = self.access.disallow(key, gone)
        taken = self._grants.revoke(key, None if scopes is None else _to_decrypt(gone))
        self._repository.touch()
        invitations = self._ways_back(key, gone)
        message = _told(key, gone, left, taken, invitations)
        answer = {"peer": key, "taken": gone.texts(), "scopes": left.texts(), "invitations": invitations, "message": message}
        return answer | {"models": taken.models, "envelopes": taken.envelopes}

    def _ways_back(self, key: str, gone: Scopes) -> list[str]:
        """Invitations that the key came by, and by which another key could still get some of what was taken."""
        now = self.access.clock()
        usable = [each for each in self.access.file.invitations_of(key) if each.problem(now) is None]
        return [each.id for each in usable if set(each.scopes.split()) & set(gone.texts())]

    def _ban(self, peer: str, reason: str) -> dict[str, Any]:
        key = self._other(peer)
        self.access.ban(key, reason)
        self._repository.touch()
        return _peer_row(key, self.access.find(key), self._repository.publishers().get(key))

    def _unban(self, peer: str) -> dict[str, Any]:
        key = self.key_of(peer)
        self.access.unban(key)
        self._repository.touch()
        return _peer_row(key, self.access.find(key), self._repository.publishers().get(key))

    def _enrol(self, secret: str, peer: str) -> dict[str, Any]:
        before = self.access.file.commits
        scopes = self.registry.enrol(secret, peer)
        if self.access.file.commits != before:  # who comes with every connection is known already, and changes nothing
            self._repository.touch()
        return {"publisher": self._identity().public, "scopes": scopes.texts()}

    def _known(self) -> tuple[dict[str, Peer], dict[str, str]]:
        return {peer.key: peer for peer in self.access.peers()}, self._repository.publishers()

    def _names(self) -> dict[str, str]:
        """How the digests of the versions here begin, in records → what the model is called here."""
        return {beginning(version.digest): model.name for model in self._repository.models() for version in model.versions}

    def _name_peer(self, peer: str, petname: str) -> dict[str, Any]:
        key = self._other(peer)
        self._repository.name_publisher(key, petname)
        return {"peer": key, "petname": petname}

    def _other(self, peer: str) -> str:
        """Raises: as `_key`; BadKeyError: it is this lab itself."""
        key = self.key_of(peer)
        if key == self._identity().public:
            raise BadKeyError("that is this lab's own key: give the one of the lab that you mean, `tether status` shows it there")
        return key

    def key_of(self, peer: str) -> str:
        """The key that a person named: by itself, as an address, by a petname, or by a label that one peer alone has.

        Raises: BadKeyError; BadAddressError: it is none of these, or several peers have the label.
        """
        try:
            return public_key(peer)
        except BadAddressError as error:
            named = _petname(peer)
            keys = [key for key, petname in self._repository.publishers().items() if named is not None and petname == named]
            keys = keys or [each.key for each in self.access.peers() if each.label and each.label == peer]
            if len(keys) == 1:
                return keys[0]
            raise _nobody(peer, keys, error) from error


def _reachable() -> None:
    """Of a manager without a swarm's part: nothing is known against it."""


def _nobody(named: str, keys: Sequence[str], error: BadAddressError) -> BadAddressError:
    """Why a word stands for no key; what looks like an address is told what is wrong with it."""
    if keys:
        return BadAddressError(f"{named!r} is the label of {len(keys)} peers: name one by its key ({', '.join(keys)})")
    if named.lower().startswith(SCHEME) or len(named) >= _LIKE_A_KEY:
        return error
    return BadAddressError(f"nobody is called {named[:80]!r} here: give a key, an address, or a name that `tether peers` shows")


def _petname(text: str) -> str | None:
    try:
        return model_name(text)
    except BadNameError:
        return None


def _seconds(expires: str | float) -> float | None:
    """Raises: BadTermsError."""
    if isinstance(expires, str):
        return seconds_of(expires)
    if isinstance(expires, bool) or not isinstance(expires, int | float):
        raise BadTermsError("an invitation expires after a span of time (90s, 45m, 12h, 30d), a number of seconds, or never")
    return float(expires)


def _to_decrypt(scopes: Scopes) -> list[str]:
    """The models that they open the encryption of."""
    return [scope.models for scope in scopes if scope.verb == _DECRYPT]


def _told(key: str, gone: Scopes, left: Scopes, taken: Taken, invitations: Sequence[str]) -> str:
    """What a disallow did and did not do, for people."""
    parts = [f"{key} may no longer {', '.join(gone.texts()) or 'do anything'}; what is left: {', '.join(left.texts()) or 'nothing'}"]
    if taken.message:
        parts.append(taken.message)
    if invitations:
        parts.append(
            f"who holds invitation {', '.join(invitations)}, by which it came, could come by another key: `tether invite --revoke` ends it"
        )
    return "; ".join(parts)


def _invitation_row(made: Invitation) -> dict[str, Any]:
    return {
        "id": made.id,
        "scopes": made.scopes.texts(),
        "label": made.label,
        "created": made.created,
        "expires": made.expires,
        "uses": made.uses,
        "peers": list(made.peers),
        "problem": made.problem,
    }


def _peer_row(key: str, known: Peer | None, petname: str | None) -> dict[str, Any]:
    return {
        "peer": key,
        "address": str(Address(key)),
        "label": known.label if known else "",
        "petname": petname,
        "scopes": known.scopes.texts() if known else [],
        "since": known.since if known else None,
        "revoked": known.revoked if known else None,
        "banned": known.banned if known else None,
        "stranger": known is None and petname is None,
    }


def _seen_row(seen: Neighbour | None, names: Mapping[str, str]) -> dict[str, Any]:
    """`names`: as `Admission._names`. What nobody said is null, or empty."""
    if seen is None:
        seen = Neighbour("")
    row: dict[str, Any] = {"route": seen.route, "round_trip": seen.round_trip} | ({"stranger": False} if seen.is_met else {})
    record = seen.record
    if record is None:
        return row | {"versions": None, "models": [], "region": "", "gpus": [], "load": None, "serves": None, "said": None}
    return row | {
        "versions": record.count,
        "models": sorted({names[each] for each in record.beginnings if each in names}),
        "region": record.region,
        "gpus": [{"name": gpu.name, "count": gpu.count, "nbytes": gpu.nbytes} for gpu in record.gpus],
        "load": record.load,
        "serves": record.serves,
        "said": record.issued,
    }


async def _found() -> None:
    """Nobody looks for a manager without a swarm's part."""


async def _nobody_there(_: Collection[str]) -> Sequence[Neighbour]:
    return ()
