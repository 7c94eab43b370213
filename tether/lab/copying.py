"""Copies of models in several labs: the part of `Operations` that says how many, and tells where they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from tether import ports
from tether.lab.objects import described, html_table
from tether.security.addresses import SCHEME, Link
from tether.types import ModelRef

__all__ = ["Copies", "Copying", "Holder", "Holding", "Policy"]


class Policy(msgspec.Struct, frozen=True):
    """How many copies of a model there are to be, and where."""

    copies: int = 1
    regions: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    """Keys of labs that are to have it in any case."""
    budget: int | None = None
    """Bytes that all copies together may take."""


class Holding(msgspec.Struct, frozen=True):
    """A lab for which this one holds copies."""

    publisher: str
    region: str = ""
    room: int | None = None


class Holder(msgspec.Struct, frozen=True):
    """A lab that has a model, or gets it."""

    peer: str
    """Its key, hex."""
    state: str
    """whole, coming; surplus: whole, one too many for an hour, and dropped when enough others say that they keep theirs."""
    here: bool
    """Whether it was heard of in the last ten seconds."""
    own: bool = False
    petname: str | None = None

    def __str__(self) -> str:
        return "this lab" if self.own else self.petname or self.peer[:12]


class Copies(msgspec.Struct, frozen=True):
    """Where a model is."""

    model: str
    policy: Policy | None = None
    """None: nothing was agreed, or this lab takes no part in it."""
    labs: tuple[Holder, ...] = ()
    short: str | None = None
    """Why there are fewer than agreed."""

    @property
    def whole(self) -> int:
        """Copies that can be had now."""
        return sum(each.state in {"whole", "surplus"} and each.here for each in self.labs)

    def rows(self) -> list[tuple[str, str]]:
        """Lab and state, for tables."""
        return [(str(each), each.state if each.here else f"{each.state}, away") for each in self.labs]

    def __repr__(self) -> str:
        where = ", ".join(f"{lab} ({state})" for lab, state in self.rows())
        wanted = "" if self.policy is None else f" of {self.policy.copies}"
        return f"<Copies of {self.model}: {self.whole}{wanted}: {where or 'nothing agreed'}>"

    def _repr_html_(self) -> str:
        return html_table(f"copies of {self.model}", ("lab", "copy"), self.rows())


class Copying(ABC):
    """Copies of this lab's models elsewhere, and of others' here."""

    @property
    @abstractmethod
    def _copier(self) -> ports.Copying:
        """Raises: ServiceUnavailableError: the lab has no gateway; UnsupportedError: it is another one than one's own."""

    @abstractmethod
    async def join(self, url: str) -> list[str]:
        """As `Replicating` has it."""

    async def policy(
        self, model: str, copies: int = 1, *, regions: Sequence[str] = (), pin: Sequence[str] = (), budget: int | None = None
    ) -> Policy:
        """Say how many copies of one of this lab's models there are to be, in all; "*": of each that has no policy of its own.

        They are held by labs that `replicate` without a model was given to and that chose to (`hold`): these make a lost copy anew by
        themselves, also when this lab is gone. `regions`: only there; then this lab's own copy does not count. `pin`: labs that are to
        have it in any case. `budget`: bytes that all copies may take. One copy, and nothing else: as without a policy.

        Raises: BadInputError; BadNameError; BadKeyError: `pin`.
        """
        wanted = Policy(copies, tuple(regions), tuple(pin), budget)
        answer = await self._copier.set_policy(model, None if wanted == Policy() else msgspec.to_builtins(wanted))
        return described(_Agreed, answer).policy or Policy()

    async def policies(self) -> dict[str, Policy]:
        """Model → what was agreed; "*": all others."""
        return {name: described(Policy, row) for name, row in (await self._copier.policies()).items()}

    async def hold(self, source: str, *, region: str = "", room: int | None = None) -> Holding:
        """Hold copies of another lab's models here, as its policies say: those that it falls to this lab to hold are fetched, and kept.

        `source`: a petname, a key, an address, or an invitation with scope `replicate` for everything. `region`: where this lab is, in
        that lab's words. `room`: bytes that it gives for them. Others that hold copies for that lab get its models from here, too.

        Raises: as `join`; ForbiddenError: that lab does not allow it; PeerNotFoundError, PeerUnreachableError; BadInputError.
        """
        if source.startswith(SCHEME):
            link = Link.parse(source)
            if link.secret is not None:
                await self.join(source)
            source = str(link.address)
        return described(Holding, await self._copier.hold(source, region, room))

    async def holdings(self) -> list[Holding]:
        """The labs for which this one holds copies."""
        return [described(Holding, row) for row in await self._copier.holdings()]

    async def end_holding(self, source: str) -> None:
        """Hold no copies for that lab any more: others take over; what is here stays until it is deleted."""
        await self._copier.end_holding(source)

    async def copies(self, model: str) -> Copies:
        """Which labs have a model for whose copies there is a policy, as they say. Raises: UnknownModelError."""
        ref = ModelRef.parse(model)
        return described(Copies, await self._copier.copies(f"{ref.publisher}~{ref.name}" if ref.publisher else ref.name))


class _Agreed(msgspec.Struct, frozen=True):
    policy: Policy | None = None
