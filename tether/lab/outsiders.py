"""What a lab shows of those outside of it: invitations, peers, what was given and taken. Frozen, as the other objects."""

from __future__ import annotations

from html import escape

import msgspec

from tether.lab.objects import html_table
from tether.lab.sizes import size_text

__all__ = ["Allowed", "AuditLine", "Invitation", "PeerGpus", "PeerInfo", "Revoked"]


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """An invitation. One that was just made has its `url`: all that a colleague needs, for `tether.connect(url)`; `str()` gives it."""

    id: str
    """By which it is revoked."""
    url: str = ""
    """With the secret. Nothing else has it: one that is lost is revoked, and another one made."""
    scopes: tuple[str, ...] = ()
    label: str = ""
    created: float = 0.0
    expires: float | None = None
    """Unix time; None: never."""
    uses: int = 1
    peers: tuple[str, ...] = ()
    """Keys that came by it."""
    problem: str | None = None
    """Why it admits nobody any more: "was used", "has expired", "was revoked"."""

    def __str__(self) -> str:
        return self.url or f"invitation {self.id}"

    def __repr__(self) -> str:
        state = self.problem or f"{len(self.peers)} of {self.uses} used"
        return f"<Invitation {self.url or self.id}: {', '.join(self.scopes)}, {state}>"

    def _repr_html_(self) -> str:
        """With the link, where there is one: it is what is to be copied."""
        rows = [
            ("scopes", ", ".join(self.scopes)),
            ("label", self.label),
            ("uses", f"{len(self.peers)} of {self.uses}"),
            ("", self.problem or ""),
        ]
        link = f"<pre>{escape(self.url)}</pre>" if self.url else ""
        return html_table("invitation", (), [row for row in rows if row[1]]) + link


class PeerGpus(msgspec.Struct, frozen=True):
    """Cards of one kind that a lab says it has."""

    name: str
    count: int
    nbytes: int
    """Memory of one."""

    def __str__(self) -> str:
        return f"{self.count} × {self.name}, {size_text(self.nbytes)}"


class PeerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Another lab, or a colleague's notebook, as this lab knows it by its key."""

    peer: str
    """Its public key, hex."""
    address: str = ""
    """The same as people write it."""
    label: str = ""
    """Of the invitation that it came by."""
    petname: str | None = None
    """The name that was given to it here: its models are `petname/name`."""
    scopes: tuple[str, ...] = ()
    """What it may do here."""
    since: float | None = None
    """Unix time; None: it was never let in."""
    revoked: float | None = None
    """When everything was taken from it."""
    banned: str | None = None
    """Why it is not spoken with."""
    route: str | None = None
    """How it is connected now: direct, punched, relayed; None: it is not."""
    round_trip: float | None = None
    """Seconds."""
    stranger: bool = False
    """Whether nobody here ever let it in, named it, or wanted anything of it: it is merely connected, or says that it holds models."""
    versions: int | None = None
    """How many it says it holds; None, as all below: it says nothing of itself that was found and is not too old."""
    models: tuple[str, ...] = ()
    """Of these the models that this lab knows by their bytes, as they are called here; of a lab that holds much, some are told."""
    region: str = ""
    gpus: tuple[PeerGpus, ...] = ()
    load: int | None = None
    """Per cent of its workers' time, in tens."""
    serves: bool | None = None
    """Whether it runs models for others, who have the scope."""
    said: float | None = None
    """When it said so, Unix time."""

    @property
    def name(self) -> str:
        """For people: petname, else label, else the beginning of its key."""
        return self.petname or self.label or self.peer[:12]

    @property
    def state(self) -> str:
        """banned, sent away, allowed, or known: it has no scopes."""
        if self.banned is not None:
            return "banned"
        if self.revoked is not None:
            return "sent away"
        return "allowed" if self.scopes else "known"

    @property
    def holds(self) -> str:
        """For people: "3: digits, faces"."""
        return ": ".join(filter(None, ("" if self.versions is None else str(self.versions), ", ".join(self.models))))

    @property
    def cards(self) -> str:
        """For people."""
        return "; ".join(map(str, self.gpus))

    @property
    def busy(self) -> str:
        """Its load, for people."""
        return "" if self.load is None else f"{self.load} %"

    def __repr__(self) -> str:
        connected = "" if self.route is None else f", connected ({self.route})"
        return f"<Peer {self.name}: {', '.join(self.scopes) or self.state}{connected}>"

    def _repr_html_(self) -> str:
        rows = [("state", self.state), ("scopes", ", ".join(self.scopes)), ("connected", self.route or ""), ("holds", self.holds)]
        rows += [("region", self.region), ("GPUs", self.cards), ("load", self.busy)]
        return html_table(self.petname or self.label or "peer", (), [row for row in rows if row[1]])


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer may do now."""

    peer: str
    scopes: tuple[str, ...] = ()
    """All of them."""
    envelopes: dict[str, str] = {}
    """For each encrypted model that was given just now a text that the peer alone can open, with `accept`."""
    note: str | None = None
    """Why it can't make use of that now: the lab was started without the swarm."""

    def __repr__(self) -> str:
        return f"<Allowed: {self.peer[:12]} may {', '.join(self.scopes)}{f'; {self.note}' if self.note else ''}>"


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """What was taken from a peer."""

    peer: str
    taken: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    """What is left."""
    invitations: tuple[str, ...] = ()
    """Ids of those that it came by and that can still be used, by another key: `revoke_invitation` ends them."""
    models: tuple[str, ...] = ()
    """Encrypted ones whose later versions have a new key."""
    message: str = ""
    """All of this for people."""
    envelopes: dict[str, dict[str, str]] = {}
    """With the new keys, for those who keep the model: model → public key → envelope."""

    def __repr__(self) -> str:
        return f"<Revoked: {', '.join(self.taken) or 'nothing'} from {self.peer[:12]}; {', '.join(self.scopes) or 'nothing'} left>"


class AuditLine(msgspec.Struct, frozen=True, kw_only=True):
    """One change of who may do what."""

    at: float
    """Unix time."""
    action: str
    subject: str
    """A peer's key, or an invitation's id."""
    detail: str = ""

    def __repr__(self) -> str:
        return f"<{self.action} {self.subject[:12]}: {self.detail}>"
