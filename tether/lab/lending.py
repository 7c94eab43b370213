"""Workers that are lent to other labs, and by them: the part of `Operations` that says to whom, and by whom."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from tether import ports
from tether.lab.objects import described
from tether.security.addresses import SCHEME, Link

__all__ = ["Borrowing", "Lending", "Loan"]


class Loan(msgspec.Struct, frozen=True):
    """Workers that this lab lends to another one."""

    publisher: str
    """The other lab's key, hex."""
    models: str
    """Glob of the models, all its own, that they run."""
    state: str
    """registered: they stand in the other lab's routing table; waiting: they don't, `error` says why."""
    slots: int | None = None
    """Requests that they take at a time; None: not known before there is a worker."""
    worker: str | None = None
    """What they are called there."""
    error: tuple[str, str] | None = None
    """Code and text."""


class Borrowing(msgspec.Struct, frozen=True):
    """Workers that another lab lends to this one; as one, since which of them runs a request is decided there."""

    worker: str
    """As `workers` has them."""
    publisher: str
    """The other lab's key, hex."""
    models: str
    """Glob of this lab's models that they run."""
    slots: int
    """Requests that they take at a time."""
    free: int
    """Slots that were free a second ago."""
    queue: float
    """Seconds until a request that comes now would begin."""
    gpus: int = 0
    loaded: int = 0
    """Models, of whomever, that are in memory there."""


class Lending(ABC):
    """This lab's workers for others, and others' for this one."""

    @property
    @abstractmethod
    def _lender(self) -> ports.Lending:
        """Raises: ServiceUnavailableError: the lab has no gateway; UnsupportedError: it is another one than one's own."""

    @abstractmethod
    async def join(self, url: str) -> list[str]:
        """As `Replicating` has it."""

    async def lend(self, lab: str, models: str = "*", slots: int | None = None) -> Loan:
        """Lend this lab's workers to another one, for its own models: requests there run here where its own workers are gone or busy.

        `lab`: a petname, a key, an address, or an invitation with scope `register`. `models`: a glob of its models. `slots`: requests that
        it may have run here at a time; else what the workers take. That lab may then call here what runs those models, and nothing else;
        it gives this one the versions that it is to run. Code is run only if its publisher is trusted for that (`trust`).

        Raises: as `join`; ForbiddenError: that lab takes no workers of this one; PeerNotFoundError, PeerUnreachableError: it, or the way
        back from there, is not there; NoWorkerError: none runs here; BadInputError; UnsupportedError: this lab is not on the swarm.
        """
        if lab.startswith(SCHEME):
            link = Link.parse(lab)
            if link.secret is not None:
                await self.join(lab)
            lab = str(link.address)
        return described(Loan, await self._lender.lend(lab, models, slots))

    async def lendings(self) -> list[Loan]:
        """What is lent, and how it stands."""
        return [described(Loan, row) for row in await self._lender.lendings()]

    async def end_lending(self, lab: str) -> None:
        """Lend that lab no workers any more; what of its models is here stays, and nobody there may run it."""
        await self._lender.end_lending(lab)

    async def borrowings(self) -> list[Borrowing]:
        """The workers that other labs lend to this one now."""
        return [described(Borrowing, row) for row in await self._lender.borrowings()]
