"""Which requests may be what ends workers: what this gateway saw, and what the orchestrator remembers for all of them.

A model that runs in its worker's process takes that with it, so whoever was on the way there is suspected; one that runs in a process of
its own, as code formats do, ended no worker.  The second time the request goes on alone, in a process of the model's own, and the version
is isolated on all workers: from then on its inputs cost their own process only (`worker/serving.py` tells which one it was).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import msgspec

from tether.errors import ModelDiedError, PoisonInputError
from tether.ports import Hop, HopReply, Undelivered
from tether.routing.quarantine import LIVES, Quarantine, mark_of
from tether.routing.table import Route, Table, VersionEntry
from tether.telemetry.clock import steady_time
from tether.types import ModelVersion
from tether.wire.oip import encode_error

__all__ = ["TELLING", "Suspicion"]

TELLING = frozenset({PoisonInputError.http_status, ModelDiedError.http_status})
"""Statuses of the answers that `judged` needs to see."""
_POISON, _DIED = (f'"code":"{error.code}"'.encode() for error in (PoisonInputError, ModelDiedError))
"""In a body of ours no text can hold these: quotes in it are escaped."""


class _Died(msgspec.Struct):
    details: list[bool] = []


class Suspicion:
    """Of one gateway. `tell` passes on that a version is to be isolated (None), or an input of it condemned; it does not block."""

    def __init__(self, tell: Callable[[ModelVersion, str | None], None], clock: Callable[[], float] = steady_time) -> None:
        self._tell, self._clock = tell, clock
        self._seen = Quarantine()
        self._isolated: set[ModelVersion] = set()
        self._held: set[ModelVersion] = set()
        """Of which the orchestrator remembers something."""

    def admitted(self, entry: VersionEntry, hop: Hop) -> Hop:
        """The request as it may be sent. Costs nothing where nothing is held against any input of the version.

        Raises: PoisonInputError.
        """
        model = entry.model
        if not entry.poison and not self._seen.concerns(model):
            return hop
        mark, now = mark_of(hop.body, hop.header_nbytes), self._clock()
        if mark in entry.poison or self._seen.is_condemned(model, mark, now):
            raise PoisonInputError(
                f"this input ended the process of {model} twice and is not run again: change it, or mend the model and publish that; "
                f"`tether quarantine --clear {model.name}` lets it run once more"
            )
        return self._alone(hop) if self._seen.deaths(model, mark, now) >= LIVES else hop

    def lost(self, entry: VersionEntry, route: Route, hop: Hop) -> Hop:
        """Its worker went away: the request as it may be sent again."""
        if entry.info.code or route.slots is not None:
            return hop
        deaths = self._seen.died(entry.model, mark_of(hop.body, hop.header_nbytes), self._clock())
        if deaths < LIVES:
            return hop
        if entry.model not in self._isolated:
            self._isolated.add(entry.model)
            self._tell(entry.model, None)
        return self._alone(hop)

    def judged(self, entry: VersionEntry, hop: Hop, reply: HopReply) -> HopReply | Undelivered:
        """The answer as it is given, after what it says of the input was noted; LOST: something else ended the process that had it."""
        model = entry.model
        if reply.status == PoisonInputError.http_status and _POISON in reply.body:
            self._condemn(model, hop)
        elif reply.status == ModelDiedError.http_status and _DIED in reply.body:
            return self._died(entry, hop, reply)
        elif hop.alone and reply.status < 500:  # noqa: PLR2004 (it ran)
            self._seen.survived(model, mark_of(hop.body, hop.header_nbytes))
        return reply

    def _died(self, entry: VersionEntry, hop: Hop, reply: HopReply) -> HopReply | Undelivered:
        """A model that is not pure ran it once, alone: whether it does again is up to who asks."""
        model = entry.model
        if msgspec.json.decode(reply.body, type=_Died).details != [True]:
            return Undelivered.LOST if entry.info.pure else reply
        if self._seen.died(model, mark_of(hop.body, hop.header_nbytes), self._clock()) < LIVES:
            return reply
        self._condemn(model, hop)
        error = PoisonInputError(f"this input ended the process of {model} twice and is not run again: change it, or mend the model")
        return HopReply(error.http_status, encode_error(error))

    def _condemn(self, model: ModelVersion, hop: Hop) -> None:
        mark = mark_of(hop.body, hop.header_nbytes)
        if self._seen.condemn(model, mark, self._clock()):
            self._tell(model, mark)

    def _alone(self, hop: Hop) -> Hop:
        return hop if hop.alone else replace(hop, alone=True)

    def follow(self, before: Table, after: Table) -> None:
        """The table is another one, or a part of it is: that part.

        What is held no more was forgiven; an orchestrator that begins anew is told all that is known here.
        """
        versions = (version for model in after.models.values() for version in model.versions.values())
        held = {version.model for version in versions if version.poison or version.is_isolated}
        if not after.follows(before):
            self._tell_all()
            self._held = held
            return
        names = before.models.keys() | after.models.keys()
        over = {model for model in self._held if model.name in names} - held
        self.forgive(over)
        self._held = (self._held - over) | held

    def forgive(self, models: Iterable[ModelVersion]) -> None:
        """Nothing is held here any more against inputs of these, whether the orchestrator was told of it or not."""
        forgiven = set(models)
        self._seen.forget(forgiven)
        self._isolated -= forgiven

    def holds(self, model: ModelVersion, mark: str | None) -> bool:
        """Whether what was to be told is still so."""
        return model in self._isolated if mark is None else self._seen.is_condemned(model, mark, self._clock())

    def _tell_all(self) -> None:
        for model in self._isolated:
            self._tell(model, None)
        for model, marks in self._seen.condemned(self._clock()).items():
            for mark in marks:
                self._tell(model, mark)
