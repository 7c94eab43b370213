"""Pure: how a new version takes the place of the one that a model's name means, step by step, or goes back.

The manager keeps what was asked for and how it ended (`Rollout`, beside the settings of the model); what happens in between is made here,
from what gateways saw. An orchestrator that begins anew begins each rollout anew that has not ended.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from msgspec import structs

from tether.events import CatalogModel, GatewayLoad, VersionLoad
from tether.orchestrator.instructions import EndRollout
from tether.routing.table import Canary, VersionEntry
from tether.serving_settings import Rollout
from tether.types import ModelVersion

__all__ = ["Rollouts", "Tally", "objection"]

_LOADING: Final = 600.0
"""Seconds for a worker to have the new version: the first one, and another one when none has it any more."""
_SPREAD: Final = 15.0
"""Seconds after it in which further workers may get it before it takes requests of all those that have the old one."""
_WINDOW, _LATELY = 60.0, 10.0
"""Seconds of which the two versions are compared: what happens seldom, and what goes wrong late."""
_KEPT: Final = 20
"""Requests of the new version that are looked at however long they took to come."""
_FAILURES, _ALL_FAILED = 3, 2
"""Failed requests that are no chance; if none was answered."""
_ANSWERS, _MANY = 4, 20
"""Answers from which times are compared; from which they are compared closely."""
_NOISE, _LITTLE_NOISE = 0.05, 0.01
"""Seconds that few answers, or many, may take longer whatever the share is: another process was in the way."""
_SILENCE: Final = 3.0
"""Seconds without any answer to requests that are open."""
_OFTEN: Final = 10
"""One in so many answers may be slow by chance: the slowest are not counted."""

_TO_LOAD: Final = -2
_IN_SHADOW: Final = -1
"""What comes before the first step."""

Versions = Callable[[ModelVersion], VersionEntry | None]
"""A version as the table has it; None: it is gone, as the catalog will say."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of one version in a while."""

    answered: int = 0
    failed: int = 0
    seconds: float = 0.0
    slowest: tuple[float, ...] = ()
    """The slowest answer of each interval."""

    @classmethod
    def of(cls, loads: Iterable[VersionLoad]) -> Tally:
        """All of these together."""
        seen = list(loads)
        return cls(
            sum(load.answered for load in seen),
            sum(load.failed + load.worse for load in seen),
            sum(load.seconds for load in seen),
            tuple(load.slowest for load in seen if load.answered),
        )

    @property
    def mean(self) -> float | None:
        """Seconds of an answer, without the slowest tenth; None: there are too few."""
        if self.answered < _ANSWERS:
            return None
        left_out = sorted(self.slowest, reverse=True)[: max(1, self.answered // _OFTEN)]
        left = self.answered - len(left_out)
        return max(self.seconds - sum(left_out), 0.0) / left if left else None

    @property
    def share(self) -> float:
        """Of requests that failed."""
        return self.failed / max(self.answered + self.failed, 1)


def objection(rollout: Rollout, new: Tally, old: Tally) -> str | None:
    """What speaks against the new version, which had its requests at the same time as the old one; None: nothing."""
    is_chance = new.failed < (_FAILURES if new.answered else _ALL_FAILED)
    if not is_chance and new.share > old.share + rollout.errors:
        return f"{new.failed} of {new.answered + new.failed} requests failed, and {old.failed} of {old.answered + old.failed} of the other"
    took, usual = new.mean, old.mean
    noise = _LITTLE_NOISE if new.answered >= _MANY else _NOISE
    if took is not None and usual is not None and took > max(usual * rollout.slower, usual + noise):
        return f"it takes {_milliseconds(took)} for an answer, version {rollout.before} {_milliseconds(usual)}"
    return None


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _together(one: VersionLoad, other: VersionLoad) -> VersionLoad:
    """What counts here of both."""
    return VersionLoad(
        one.answered + other.answered,
        one.failed + other.failed,
        seconds=one.seconds + other.seconds,
        slowest=max(one.slowest, other.slowest),
        worse=one.worse + other.worse,
    )


def _requests(load: VersionLoad) -> int:
    return load.answered + load.failed + load.worse


class _Trial:
    """One rollout that goes on."""

    def __init__(self, rollout: Rollout, new: ModelVersion, old: ModelVersion, now: float) -> None:
        self.rollout, self.new, self.old = rollout, new, old
        self.step, self.since = _TO_LOAD, now
        self._answered = 0
        """By the new version, in this step."""
        self._seen: deque[tuple[float, VersionLoad, VersionLoad]] = deque()
        """Second by second, when, and what gateways saw of the new version and of the old one."""
        self._silent: dict[str, float] = {}
        """Gateway → seconds in which the new version has answered it nothing that it waits for, as it told."""
        self._usual = Tally()
        """What came of the old version when it had requests last: in the end the new one has them all."""
        self._ready: float | None = None
        """When the first worker had the new version."""
        self._held = now
        """When a worker had it last, or it began."""

    @property
    def canary(self) -> Canary | None:
        """What gateways are to do; None: to leave the new version alone."""
        if self.rollout.state not in {"running", "promoted"}:
            return None
        if self.step == _IN_SHADOW:
            return Canary(self.new.version, shadow=self.rollout.shadow)
        return Canary(self.new.version, self.rollout.steps[self.step]) if self.step >= 0 else None

    def take(self, told: GatewayLoad, now: float) -> None:
        """What a gateway saw of both."""
        new, old = (told.versions.get(model, VersionLoad()) for model in (self.new, self.old))
        if self._seen and int(self._seen[-1][0]) == int(now):
            at, new_before, old_before = self._seen.pop()
            self._seen.append((at, _together(new_before, new), _together(old_before, old)))
        else:
            self._seen.append((now, new, old))
        self._answered += new.answered
        if (new.open or new.worse) and not (new.answered or new.failed):
            self._silent[told.gateway] = self._silent.get(told.gateway, 0.0) + told.seconds
        else:
            self._silent.pop(told.gateway, None)
        recent = sum(_requests(each) for _, each, _ in self._seen)
        while self._seen and now - self._seen[0][0] > _WINDOW and recent > _KEPT:
            _, gone, _ = self._seen.popleft()
            recent -= _requests(gone)
        if len(self._seen) > 2 * _WINDOW:  # weeks of a version that hardly gets any
            self._seen = deque(each for each in self._seen if now - each[0] <= _WINDOW or _requests(each[1]))

    def proceed(self, new: VersionEntry, old: VersionEntry, now: float) -> Rollout | None:
        """To the next step, if it is time; the rollout as it ended, if it did."""
        if reason := self._objection(new, now):
            return self._ended("reverted", reason)
        if not new.routes:  # those who ask get the old version; nothing is decided meanwhile
            return self._await_a_worker(new, now)
        self._held = now
        if self.step == _TO_LOAD:
            self._await_copies(new, old, now)
            return None
        if now - self.since < self.rollout.every or self._answered < self.rollout.requests:
            return None
        if self.step + 1 == len(self.rollout.steps):
            return self._ended("promoted")
        self._enter(self.step + 1, now)
        return None

    def _objection(self, new: VersionEntry, now: float) -> str | None:
        if new.state == "failed":
            return f"it can't be loaded: {new.reason}"
        if self.step == _TO_LOAD or not self._seen:
            return None
        old = Tally.of(old for _, _, old in self._seen)
        self._usual = self._usual if old.mean is None else old
        patience = max(_SILENCE, self.rollout.slower * max(self._usual.slowest, default=0.0))
        if max(self._silent.values(), default=0.0) >= patience:
            return f"it has not answered for {patience:.3g} s"
        return self._compared(now - _LATELY) or self._compared(-math.inf)

    def _compared(self, since: float) -> str | None:
        seen = [(new, old) for at, new, old in self._seen if at > since]
        old = Tally.of(old for _, old in seen)
        return objection(self.rollout, Tally.of(new for new, _ in seen), self._usual if old.mean is None else old)

    def _await_a_worker(self, new: VersionEntry, now: float) -> Rollout | None:
        if now - self._held < _LOADING:
            return None
        return self._ended("reverted", f"it was not loaded within {_LOADING:g} s: {new.reason or 'no worker took it'}")

    def _await_copies(self, new: VersionEntry, old: VersionEntry, now: float) -> None:
        """As many workers as have the old version are to have it: it may get all of that one's requests."""
        self._ready = now if self._ready is None else self._ready
        if len(new.routes) >= len(old.routes) or now - self._ready >= _SPREAD:
            self._enter(_IN_SHADOW if self.rollout.shadow else 0, now)

    def _enter(self, step: int, now: float) -> None:
        self.step, self.since, self._answered = step, now, 0

    def _ended(self, state: Literal["promoted", "reverted", "aborted"], reason: str = "") -> Rollout:
        self.rollout = structs.replace(self.rollout, state=state, reason=reason)
        return self.rollout


class Rollouts:
    """All that go on: one a model at most."""

    def __init__(self) -> None:
        self._trials: dict[str, _Trial] = {}
        self._ending: dict[str, Rollout] = {}
        """What ended, and of which the catalog does not say so yet."""
        self._ended: list[EndRollout] = []
        """What of that nobody was told."""

    def __bool__(self) -> bool:
        """Whether there are any: where not, nothing here need be asked."""
        return bool(self._trials or self._ended)

    def follow(self, catalog: Mapping[str, CatalogModel], now: float) -> None:
        """The catalog is another one: take up what began, forget what is over."""
        running = {name: entry for name, entry in catalog.items() if entry.serving.rollout and entry.serving.rollout.state == "running"}
        self._trials = {name: trial for name, trial in self._trials.items() if name in running}
        self._ending = {name: rollout for name, rollout in self._ending.items() if name in running}
        for name, entry in running.items():
            self._follow(name, entry, now)

    def _follow(self, name: str, entry: CatalogModel, now: float) -> None:
        rollout, ending = entry.serving.rollout, self._ending.get(name)
        if rollout is None or (ending is not None and ending.begun == rollout.begun and not _is_void(ending, entry)):
            return
        self._ending.pop(name, None)
        if (ended := _ended_by_hand(rollout, entry)) is not None:
            self._trials.pop(name, None)
            self._end(name, ended)
        elif (trial := self._trials.get(name)) is None or trial.rollout != rollout:
            new, old = entry.versions[rollout.version][0], entry.versions[rollout.before][0]
            self._trials[name] = _Trial(rollout, new, old, now)

    def _end(self, name: str, rollout: Rollout) -> None:
        self._ending[name] = rollout
        self._ended.append(EndRollout(name, rollout))

    def take(self, told: GatewayLoad, now: float) -> None:
        """What a gateway saw."""
        for trial in self._trials.values():
            if trial.new in told.versions or trial.old in told.versions:
                trial.take(told, now)

    def proceed(self, versions: Versions, now: float) -> list[EndRollout]:
        """Each to its next step, if it is time; those that ended since the last time."""
        for name, trial in self._trials.items():
            new, old = versions(trial.new), versions(trial.old)
            if trial.rollout.state == "running" and new is not None and old is not None:
                rollout = trial.proceed(new, old, now)
                if rollout is not None:
                    self._end(name, rollout)
        ended, self._ended = self._ended, []
        return ended

    @property
    def wanted(self) -> set[ModelVersion]:
        """Versions that are to be loaded."""
        return {trial.new for trial in self._trials.values() if trial.rollout.state in {"running", "promoted"}}

    @property
    def is_waiting(self) -> bool:
        """Whether time alone may take one further."""
        return any(trial.rollout.state == "running" for trial in self._trials.values())

    @property
    def versions(self) -> set[ModelVersion]:
        """Those that others take requests from, or are about to."""
        return {trial.old for trial in self._trials.values()}

    def entry(self, version: VersionEntry) -> VersionEntry:
        """As gateways are told of it."""
        trial = self._trials.get(version.model.name)
        if trial is None or trial.old != version.model or trial.canary is None:
            return version
        return structs.replace(version, canary=trial.canary)

    def is_due(self, ended: EndRollout) -> bool:
        """Whether that is still to be written: the catalog does not say it yet, nor was another one begun."""
        return self._ending.get(ended.model) == ended.rollout


def _is_void(ending: Rollout, entry: CatalogModel) -> bool:
    """Whether the name can't mean the new version any more, which was deleted before it was written that it is to."""
    return ending.state == "promoted" and ending.version not in entry.versions


def _ended_by_hand(rollout: Rollout, entry: CatalogModel) -> Rollout | None:
    """As it is to be written, where somebody moved what the name means, or deleted a version."""
    if entry.default == rollout.version:
        return structs.replace(rollout, state="promoted")
    if entry.default != rollout.before:
        return structs.replace(rollout, state="aborted", reason=f"the name means version {entry.default} now")
    gone = [number for number in (rollout.version, rollout.before) if number not in entry.versions]
    return structs.replace(rollout, state="aborted", reason=f"version {gone[0]} is gone") if gone else None
