"""What a lab keeps of others: the part of `Operations` that is about other labs' models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from time import monotonic

import msgspec

from tether import ports
from tether.errors import (
    BadInputError,
    DeadlineExceededError,
    MalformedFeedError,
    MalformedManifestError,
    RequestError,
    TetherError,
    from_code,
)
from tether.lab.objects import described, html_table
from tether.lab.sizes import size_text
from tether.security.addresses import SCHEME, Link
from tether.types import ModelRef

__all__ = ["OnReplica", "Replica", "Replicating"]

_STEP = 0.25
"""Seconds between looks while somebody is shown how far it is."""
_WAIT = 10.0
"""Seconds for one answer, where nobody is."""
_SILENCE = 15.0
"""Seconds without a byte, and with a reason for that, until one who set no time is told: a lab that just starts again is back by then."""


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """A model of another lab that is kept here."""

    publisher: str
    """The key of the lab whose model it is, hex."""
    model: str
    """As that lab calls it; `*`: all of its models."""
    versions: tuple[str, ...] = ()
    """As they are called here: `alice~digits:1`."""
    done: bool = False
    """Whether all of it that there is now is here."""
    fraction: float = 0.0
    """How much of it, 0 to 1."""
    done_nbytes: int = 0
    nbytes: int = 0
    rate: float = 0.0
    """Bytes a second, of late."""
    peers: int = 0
    """Labs that give something now."""
    error: tuple[str, str] | None = None
    """Code and text: why it does not come; it is tried again."""

    @property
    def name(self) -> str:
        """What the model is called here; "" before anything of it is."""
        return self.versions[0].rpartition(":")[0] if self.versions else ""

    def __str__(self) -> str:
        if self.done:
            return f"{self.name or self.model}: {len(self.versions)} version{'' if len(self.versions) == 1 else 's'} here"
        how = f"{self.fraction:.0%} of {size_text(self.nbytes)}"
        if self.error is None:
            return f"{self.model}: {how}"
        return f"{self.model}: {how}, then: {self.error[1]}" if self.nbytes else f"{self.model} does not come: {self.error[1]}"

    def __repr__(self) -> str:
        return f"<Replica {self}>"

    def _repr_html_(self) -> str:
        return html_table(
            "replica", ("model", "versions here", "of it here"), [(self.model, ", ".join(self.versions), f"{self.fraction:.0%}")]
        )


OnReplica = Callable[[Replica], None]
"""Told how far it is."""


class Replicating(ABC):
    """Models of other labs, kept here up to date."""

    @property
    @abstractmethod
    def _keeper(self) -> ports.Replicating:
        """Raises: ServiceUnavailableError: the lab has no gateway."""

    @property
    @abstractmethod
    def _elsewhere(self) -> str | None:
        """The address of the lab that is asked, where that is another one than keeps models; None: it is one's own."""

    async def join(self, url: str) -> list[str]:
        """Find another lab by its address, `tether://…`; with an invitation, be let in there. Gives all that this lab may do there, now.

        Raises: BadAddressError; PeerNotFoundError, PeerUnreachableError; BadInvitationError; ForbiddenError: it does not let this lab in.
        """
        return list(described(_Joined, await self._keeper.join(url)).scopes or ())

    async def replicate(
        self,
        model: str,
        source: str | None = None,
        *,
        via: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (what came by then is kept, and the rest goes on coming)
        progress: OnReplica | None = None,
    ) -> Replica:
        """Keep a model of another lab here, with all its versions, from now on: what is published there, or moved, is so here soon after.

        `model`: "digits" of the lab that this one is connected to, or `alice/digits`; "*" all of them. `source`: whose it is: a petname,
        a key, an address or an invitation. `via`: a lab that has it, too. Bytes come from every lab that has them, verified.
        Waits until all of it is here, at most `timeout` seconds, without one until nothing has come for long and it is known why: it is
        tried again all the same, until `release`, and `replicas()` says how far it is.

        Raises: UnknownModelError, ForbiddenError; UntrustedCodeError: it could run code, `tether trust` its publisher before;
        DeadlineExceededError; PeerNotFoundError, PeerUnreachableError: the lab can't be found.
        """
        publisher, name = await self._whose(model, source)
        clock, silence = _Clock(timeout), _Silence()
        while True:
            wait = clock.left(_WAIT if progress is None else _STEP)
            state = described(Replica, await self._keeper.replicate(publisher, name, via, wait))
            if progress is not None:
                progress(state)
            if state.done:
                return state
            if (refusal := _refusal(state)) is not None:
                raise refusal
            if clock.is_over:
                why = f" ({state.error[1]})" if state.error else ""
                raise DeadlineExceededError(f"after {timeout:g} s {state.fraction:.0%} of {model} is here{why}; the rest goes on coming")
            if timeout is None and silence.is_long(state):
                raise _stuck(state)

    async def replicas(self) -> list[Replica]:
        """What is kept of other labs."""
        return [described(Replica, row) for row in await self._keeper.replications()]

    async def release(self, model: str, source: str | None = None) -> None:
        """Keep it no longer up to date; what is here stays until it is deleted."""
        await self._keeper.release(*await self._whose(model, source))

    async def _whose(self, model: str, source: str | None) -> tuple[str, str]:
        """Publisher and name. Raises: BadInputError: it is not said whose it is."""
        name, publisher = model, None
        if model != "*":
            ref = ModelRef.parse(model)
            if (ref.version, ref.alias, ref.sha) != (None, None, None):
                raise BadInputError(f"{model!r} names a version: a model is kept with all of its versions, give its name alone")
            name, publisher = ref.name, ref.publisher
        if publisher and source:
            raise BadInputError(f"{model!r} and source= both say whose it is: give one of them")
        whose = source or publisher or self._elsewhere
        if whose is None:
            raise BadInputError(f"whose {model!r}? Give source=, a lab's address or petname, or write it as publisher/{name}")
        if whose.startswith(SCHEME):
            link = Link.parse(whose)
            if link.secret is not None:
                await self.join(whose)
            whose = str(link.address)
        return whose, name


class _Joined(msgspec.Struct, frozen=True):
    publisher: str
    scopes: list[str] | None = None


def _refusal(state: Replica) -> TetherError | None:
    """What waiting does not mend."""
    error = None if state.error is None else from_code(*state.error)
    return error if isinstance(error, RequestError | MalformedFeedError | MalformedManifestError) else None


def _stuck(state: Replica) -> TetherError:
    code, why = state.error or ("internal", "nobody says why")
    return from_code(code, f"{why} It is tried again from time to time: `tether replicate` shows it, with --release it ends")


class _Silence:
    """Since when nothing has come."""

    def __init__(self) -> None:
        self._nbytes, self._since = 0, monotonic()

    def is_long(self, state: Replica) -> bool:
        """With a reason: without one it is being looked for."""
        if state.done_nbytes != self._nbytes:
            self._nbytes, self._since = state.done_nbytes, monotonic()
        return state.error is not None and monotonic() > self._since + _SILENCE


class _Clock:
    """How much of a time is left."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else monotonic() + seconds

    def left(self, most: float) -> float:
        return most if self._end is None else max(0.0, min(most, self._end - monotonic()))

    @property
    def is_over(self) -> bool:
        return self._end is not None and monotonic() >= self._end
