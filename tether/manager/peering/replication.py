"""Pure: which labs are to hold a copy of which model, when a lost copy is made anew, and in which order.

Every lab decides for itself, from what the others say that they hold; who sees the same decides the same, so nobody has to be asked, and
the loss of whoever published stops nothing. Copies that are there count, wherever chance put them: a lab that comes changes nothing, one
that goes costs one new copy of each model that it held. Who gets that is drawn by rendezvous hashing (Thaler, Ravishankar 1998), less those
that have no room or are elsewhere than the policy says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import msgspec
from blake3 import blake3

from tether.errors import BadInputError

__all__ = ["PATIENCE", "Copies", "Copy", "Plan", "Policy", "Presence", "Site", "plan"]

PATIENCE = 10.0
"""Seconds without a word after which a lab's copies count as lost: a restart takes five, and thirty are allowed until the copy is there."""
_ASLEEP = 5.0
"""Seconds between two ticks from which on it was this host that was away."""
_MAX_COPIES = 1000
_MAX_PLACES = 64
"""Regions, labs that are pinned, and characters of each: a policy has to fit into an entry of a feed."""


class Policy(msgspec.Struct, frozen=True):
    """How many copies of a model there are to be, and where."""

    copies: int = 1
    """In all, the publisher's too."""
    regions: tuple[str, ...] = ()
    """Only there, spread over them; none: anywhere, spread over all."""
    pin: tuple[str, ...] = ()
    """Keys of labs that are to hold it in any case; they count as copies."""
    budget: int | None = None
    """Bytes that all copies together may take; one copy is always kept."""

    def checked(self) -> Policy:
        """Raises: BadInputError: it makes no sense."""
        if not 1 <= self.copies <= _MAX_COPIES or (self.budget is not None and self.budget < 0):
            raise BadInputError(f"a policy asks for 1 to {_MAX_COPIES} copies, and for a budget in bytes or none")
        if max(len(self.regions), len(self.pin)) > _MAX_PLACES or any(len(each) > _MAX_PLACES for each in (*self.regions, *self.pin)):
            raise BadInputError(f"a policy names at most {_MAX_PLACES} regions of so many characters, and labs by their keys")
        return self

    def wanted(self, nbytes: int) -> int:
        """Copies of a model of this size that the budget allows."""
        return self.copies if self.budget is None or nbytes == 0 else max(1, min(self.copies, self.budget // nbytes))


@dataclass(frozen=True, slots=True)
class Site:
    """A lab that holds copies, as it describes itself."""

    peer: str
    """Its key, hex."""
    region: str = ""
    room: int | None = None
    """Bytes that it gives for copies, what it has included; None: no bound."""


@dataclass(frozen=True, slots=True)
class Copies:
    """A model (a version of it), and who has it now."""

    model: str
    """Its digest, or what else is unique."""
    nbytes: int
    policy: Policy = field(default_factory=Policy)
    held: AbstractSet[str] = frozenset()
    """Keys of labs that have all of it, away ones too."""
    coming: AbstractSet[str] = frozenset()
    """Keys of labs that have begun to fetch it: another choice now would move what is under way."""
    refusing: AbstractSet[str] = frozenset()
    """Keys of labs that can't take it: it goes elsewhere."""
    fixed: AbstractSet[str] = frozenset()
    """Keys of labs that never drop it: its publisher."""

    def rank(self, peer: str) -> tuple[bool, bool, bool, bytes]:
        """Of two labs that have it, or begun, the lower one keeps it."""
        return peer not in self.policy.pin, peer not in self.fixed, peer not in self.held, _lot(self.model, peer)


@dataclass(frozen=True, slots=True)
class Copy:
    """To be made."""

    model: str
    to: str
    sources: tuple[str, ...]
    """Labs that are here and have it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Who is to hold what."""

    holders: dict[str, tuple[str, ...]]
    """Model → labs, sorted."""
    fetch: tuple[Copy, ...]
    """What is missing, rarest first: of what has fewest copies the next loss would be the last."""
    surplus: tuple[tuple[str, str], ...]
    """Model and lab that need not hold it any more. `leaving` says when it may drop it."""
    short: dict[str, str]
    """Model → why it has fewer copies than its policy asks for, for people."""

    def fetched_by(self, peer: str) -> list[Copy]:
        """What a lab has to do, in order."""
        return [copy for copy in self.fetch if copy.to == peer]


def plan(models: Iterable[Copies], sites: Collection[Site]) -> Plan:
    """Who is to hold what. `sites`: those that are here now (`Presence`)."""
    ordered = sorted(models, key=lambda copies: copies.model)
    work = _Planning({site.peer: site for site in sites}, ordered)
    for copies in ordered:
        work.keep(copies)
    for copies in sorted(ordered, key=lambda copies: (len(work.here(copies)), copies.model)):
        work.complete(copies)
    return work.finished()


class _Planning:
    """One plan in the making."""

    def __init__(self, sites: Mapping[str, Site], models: Sequence[Copies]) -> None:
        self._sites = sites
        self._used = dict.fromkeys(sites, 0)
        self._holders: dict[str, list[str]] = {}
        self._fetch: list[Copy] = []
        self._surplus: list[tuple[str, str]] = []
        self._short: dict[str, str] = {}
        for copies in models:
            for peer in (copies.held | copies.coming) & sites.keys():
                self._used[peer] += copies.nbytes

    def here(self, copies: Copies) -> list[str]:
        """Labs that have it and are here."""
        return sorted(copies.held & self._sites.keys())

    def keep(self, copies: Copies) -> None:
        """Of the copies that are there, or coming, as many as are wanted: pinned ones, those that stay anyway, whole ones, then by lot."""
        wanted = copies.policy.wanted(copies.nbytes)
        there = [peer for peer in (copies.held | (copies.coming - copies.refusing)) & self._sites.keys() if self._fits(copies, peer)]
        ranked = sorted(there, key=copies.rank)
        pinned = sum(peer in copies.policy.pin for peer in ranked)
        self._holders[copies.model] = ranked[: max(wanted, pinned)]

    def complete(self, copies: Copies) -> None:
        """Find places for the copies that are missing, and see who has one too many."""
        holders = self._holders[copies.model]
        for peer in sorted((set(copies.policy.pin) & self._sites.keys()) - set(holders) - copies.refusing):
            self._place(copies, peer)  # who is pinned has said so; room or not
        while len(holders) < copies.policy.wanted(copies.nbytes):
            best = self._best(copies)
            if best is None:
                self._short[copies.model] = self._reason(copies)
                break
            self._place(copies, best)
        self._fetch += [Copy(copies.model, peer, tuple(self.here(copies))) for peer in sorted(holders) if peer not in copies.held]
        whole = [peer for peer in holders if peer in copies.held]
        if len(whole) >= copies.policy.wanted(copies.nbytes):  # before that, nobody is one too many
            self._surplus += [(copies.model, peer) for peer in self.here(copies) if peer not in holders]

    def _place(self, copies: Copies, peer: str) -> None:
        self._holders[copies.model].append(peer)
        if peer not in copies.held and peer not in copies.coming:
            self._used[peer] += copies.nbytes

    def _best(self, copies: Copies) -> str | None:
        """Where the next copy goes: a region that has fewest of them, then by lot."""
        holders = self._holders[copies.model]
        regions = [self._sites[peer].region for peer in holders]
        fitting = [peer for peer in self._sites if peer not in holders and peer not in copies.refusing and self._fits(copies, peer)]
        free = [peer for peer in fitting if self._has_room(copies, peer)]
        return min(free, key=lambda peer: (regions.count(self._sites[peer].region), _lot(copies.model, peer)), default=None)

    def _fits(self, copies: Copies, peer: str) -> bool:
        policy = copies.policy
        return peer in policy.pin or not policy.regions or self._sites[peer].region in policy.regions

    def _has_room(self, copies: Copies, peer: str) -> bool:
        room = self._sites[peer].room
        return room is None or peer in copies.held or self._used[peer] + copies.nbytes <= room

    def _reason(self, copies: Copies) -> str:
        wanted, count = copies.policy.wanted(copies.nbytes), len(self._holders[copies.model])
        fitting = [peer for peer in self._sites if self._fits(copies, peer) and peer not in copies.refusing - copies.held]
        where = f" in {', '.join(copies.policy.regions)}" if copies.policy.regions else ""
        able = " and can take it" if copies.refusing else ""
        why = (
            f"{len(fitting)} labs{where} are here{able}"
            if len(fitting) < wanted
            else f"no room for {copies.nbytes} bytes at the others{where}"
        )
        return f"{count} of {wanted} copies: {why}"

    def finished(self) -> Plan:
        order = sorted(self._fetch, key=lambda copy: (not copy.sources, len(copy.sources), copy.model, copy.to))
        holders = {model: tuple(sorted(peers)) for model, peers in sorted(self._holders.items())}
        return Plan(holders, tuple(order), tuple(sorted(self._surplus)), self._short)


def _lot(model: str, peer: str) -> bytes:
    """The lowest wins."""
    return blake3(f"{model}\0{peer}".encode()).digest()


class Presence:
    """Which labs are here. Times are of a monotonic clock, which may have stood still while the host slept."""

    def __init__(self, now: float) -> None:
        self._heard: dict[str, float] = {}
        self._ticked = now

    def heard(self, peer: str, now: float) -> None:
        """It answered, or sent something."""
        self._heard[peer] = now

    def left(self, peer: str) -> None:
        """It said that it goes, or was banned."""
        self._heard.pop(peer, None)

    def here(self, now: float) -> frozenset[str]:
        """Call it each second or so: who was heard of a moment ago. After a sleep of this host's everybody has another moment."""
        if now - self._ticked > _ASLEEP:
            self._heard = dict.fromkeys(self._heard, now)
        self._ticked = now
        self._heard = {peer: at for peer, at in self._heard.items() if now - at < PATIENCE}
        return frozenset(self._heard)
