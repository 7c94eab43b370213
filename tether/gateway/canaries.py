"""Requests of a rollout: which of them the new version answers, or gets a copy of; what it fails goes on at the old one.

A request that names no version is one of the model's, and is drawn when it is sent first: each gateway gives the new version its share
exactly, and requests of one session always the same version. The answer of a copy is thrown away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol
from zlib import crc32

from tether.gateway.calls import Call, Trial, session_of, verdict_of
from tether.gateway.traffic import Traffic, VersionTraffic
from tether.ports import Hop, HopReply
from tether.routing.health import Verdict
from tether.routing.load import found_no_room
from tether.routing.table import Canary, Table, VersionEntry
from tether.types import ModelVersion
from tether.wire.frames import OK

__all__ = ["Canaries"]


class Infer(Protocol):
    """As `Dispatch.infer`."""

    def __call__(self, model: str, version: str | None, hop: Hop, done: Callable[[HopReply], None], /) -> Callable[[], None]: ...


class Canaries:
    """Of one gateway. `infer` sends the copies."""

    def __init__(self, traffic: Traffic, infer: Infer) -> None:
        self._traffic, self._infer = traffic, infer
        self._dues: dict[tuple[ModelVersion, bool], float] = {}
        """Old version, whether it is about copies → how much of a request the new one is owed."""
        self._has_tried = False

    def chosen(self, call: Call, old: VersionEntry, table: Table) -> VersionEntry:
        """The version that is to answer, of a model that is being rolled out: `old` is what the request names."""
        trial = call.trial
        if trial is None and self._is_drawn(call, old):
            trial = call.trial = self._drawn(call, old, table)
        if trial is None or not trial.is_tried:
            return old
        new = table.models[old.model.name].versions.get(trial.new.version)
        if new is None or not new.routes or call.tries or call.losses:
            self._give_back(call, trial)
            return old
        return new

    def takes_back(self, call: Call, reply: HopReply) -> bool:
        """Whether this is not the answer, since the old version may have a better one: the call is to be tried again."""
        trial = call.trial
        if trial is None:
            return False
        if trial.is_tried:
            if reply.status == OK or not self._may_go_back(call):
                return False
            self._give_back(call, trial)
            if found_no_room(reply.status, reply.body):
                trial.blamed = None
            return True
        trial.is_answered = reply.status == OK
        self._blame(trial)
        return False

    def returning(self, calls: set[Call], table: Table) -> list[Call]:
        """Those that are to be tried again, since the new version that has them was taken back."""
        if not self._has_tried:
            return []
        tried = [call for call in calls if call.trial is not None and call.trial.is_tried]
        self._has_tried = bool(tried)
        over = [call for call in tried if call.trial is not None and _is_over(call.trial.new, table) and self._may_go_back(call)]
        for call in over:
            if call.trial is not None:
                self._give_back(call, call.trial)
        return over

    def _is_drawn(self, call: Call, old: VersionEntry) -> bool:
        _, at, alias = call.name.partition("@")
        return call.version is None and (not at or alias == "prod") and not call.tries and not call.losses and old.canary is not None

    def _drawn(self, call: Call, old: VersionEntry, table: Table) -> Trial | None:
        canary, versions = old.canary, table.models[old.model.name].versions
        new = None if canary is None else versions.get(canary.version)
        if canary is None or new is None or not new.routes:
            return None
        if canary.shadow and call.parts is None and new.info.pure and self._is_due(old.model, canary.shadow, is_copy=True):
            trial = Trial(new.model, is_tried=False)
            asyncio.get_running_loop().call_soon(self._copy, call.hop, trial, self._traffic.of(new, table))
            return trial
        if not self._is_chosen(call, old.model, canary):
            return None
        self._has_tried = True
        return Trial(new.model, is_tried=True)

    def _is_chosen(self, call: Call, old: ModelVersion, canary: Canary) -> bool:
        if session := session_of(call.hop):
            return crc32(session) < canary.weight * (1 << 32)
        return self._is_due(old, canary.weight, is_copy=False)

    def _is_due(self, old: ModelVersion, share: float, *, is_copy: bool) -> bool:
        due = self._dues.get((old, is_copy), 0.0) + share
        is_due = due >= 1.0
        self._dues[old, is_copy] = due - is_due
        return is_due

    def _may_go_back(self, call: Call) -> bool:
        """Whether it does no harm that the new version ran it, and it is not too late."""
        has_begun = call.parts is not None and call.parts.have_begun
        return not has_begun and call.entry is not None and call.entry.info.pure and time.monotonic() < call.deadline

    def _give_back(self, call: Call, trial: Trial) -> None:
        """As if it came only now."""
        trial.is_tried, trial.blamed = False, call.traffic
        call.avoid, call.tries, call.losses, call.doubted, call.fallback = [], 0, 0, None, None
        call.begun, call.needs_token, call.hop = time.monotonic(), False, replace(call.hop, alone=False)

    def _copy(self, hop: Hop, trial: Trial, traffic: VersionTraffic) -> None:
        def done(reply: HopReply) -> None:
            """What counts as failed anyway is not counted twice."""
            is_refusal = reply.status != OK and reply.status < 500 and verdict_of(reply) is Verdict.NEUTRAL  # noqa: PLR2004 (4xx)
            if is_refusal and not found_no_room(reply.status, reply.body):
                trial.blamed = traffic
                self._blame(trial)

        self._infer(trial.new.name, str(trial.new.version), hop, done)

    def _blame(self, trial: Trial) -> None:
        """The new version failed what the old one did not."""
        if trial.is_answered and trial.blamed is not None:
            trial.blamed.load.worse += 1
            trial.blamed = None


def _is_over(new: ModelVersion, table: Table) -> bool:
    """Whether the version is no canary any more, and not promoted either."""
    entry = table.models.get(new.name)
    if entry is None or entry.default == new.version:
        return False
    canary = entry.versions[entry.default].canary if entry.default in entry.versions else None
    return canary is None or canary.version != new.version
