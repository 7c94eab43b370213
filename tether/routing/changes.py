"""Pure: what happened between two looks at a lab: at its routing table, and at the labs that it has to do with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tether.routing.lab_events import Kind, LabEvent
from tether.routing.table import State, Table, VersionEntry
from tether.serving_settings import Rollout

__all__ = ["Contacts", "Facts", "changes", "encounters"]

_STATES: Mapping[State, Kind] = {"loading": Kind.LOADING, "ready": Kind.LOADED, "failed": Kind.FAILED, "unloaded": Kind.UNLOADED}

_ROLLOUTS: Mapping[str, Kind] = {
    "running": Kind.ROLLOUT_BEGUN,
    "promoted": Kind.ROLLOUT_PROMOTED,
    "reverted": Kind.ROLLOUT_REVERTED,
    "aborted": Kind.ROLLOUT_ABORTED,
}
_THERE = {"running", "draining", "drained"}


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a table, what one is told when it changes."""

    versions: Mapping[tuple[str, int], tuple[State, str]]
    """Model and number → its state, and why."""
    aliases: Mapping[tuple[str, str], int]
    """Model and alias → number."""
    workers: frozenset[str]
    isolated: frozenset[tuple[str, int]] = frozenset()
    poison: frozenset[tuple[str, int, str]] = frozenset()
    """Model, number, mark of an input."""
    took: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """Of what is loaded, model and number → seconds of the longest of its loads, where they are known."""
    rollouts: Mapping[tuple[str, float], Rollout] = field(default_factory=dict)
    """Model and when it began → the rollout, as it is written."""

    @classmethod
    def of(cls, table: Table) -> Facts:
        models = table.models.values()
        return cls(
            {(model.name, number): (each.state, each.reason) for model in models for number, each in model.versions.items()},
            {(model.name, alias): number for model in models for alias, number in model.aliases.items()},
            frozenset(worker.id for worker in table.workers.values() if worker.state in _THERE),
            frozenset((model.name, number) for model in models for number, each in model.versions.items() if each.is_isolated),
            frozenset((model.name, number, mark) for model in models for number, each in model.versions.items() for mark in each.poison),
            {(model.name, number): took for model in models for number, each in model.versions.items() if (took := _longest_load(each))},
            {(model.name, rollout.begun): rollout for model in models if (rollout := model.serving.rollout) is not None},
        )


def _longest_load(version: VersionEntry) -> float:
    return max((route.load_seconds for route in version.routes), default=0.0)


@dataclass(frozen=True, slots=True)
class Contacts:
    """Other labs, by their keys."""

    admitted: frozenset[str]
    """That may do something here."""
    connected: frozenset[str]


def changes(before: Facts, after: Facts, seq: int, at: float) -> list[LabEvent]:
    """What happened, in an order in which it makes sense; `seq` of the last event before, `at` in Unix seconds."""
    happened = [
        *_versions(before, after),
        *_aliases(before, after),
        *_states(before, after),
        *_rollouts(before, after),
        *_held(before, after),
        *_workers(before, after),
    ]
    return _numbered(happened, seq, at)


def encounters(before: Contacts, after: Contacts, seq: int, at: float) -> list[LabEvent]:
    """As `changes`."""
    happened = [
        *_each(Kind.PEER_ADMITTED, "peer", after.admitted - before.admitted),
        *_each(Kind.PEER_CONNECTED, "peer", after.connected - before.connected),
        *_each(Kind.PEER_GONE, "peer", before.connected - after.connected),
    ]
    return _numbered(happened, seq, at)


def _numbered(happened: list[dict[str, Any]], seq: int, at: float) -> list[LabEvent]:
    return [LabEvent(seq=number, at=at, **fields) for number, fields in enumerate(happened, seq + 1)]


def _each(kind: Kind, field: str, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    return ({"kind": kind, field: name} for name in sorted(names))


def _versions(before: Facts, after: Facts) -> Iterator[dict[str, Any]]:
    for kind, names in (
        (Kind.PUBLISHED, after.versions.keys() - before.versions.keys()),
        (Kind.DELETED, before.versions.keys() - after.versions.keys()),
    ):
        yield from ({"kind": kind, "model": model, "version": number} for model, number in sorted(names))


def _aliases(before: Facts, after: Facts) -> Iterator[dict[str, Any]]:
    for model, alias in _different(before.aliases, after.aliases):
        yield {"kind": Kind.ALIAS, "model": model, "alias": alias, "version": after.aliases.get((model, alias))}


def _states(before: Facts, after: Facts) -> Iterator[dict[str, Any]]:
    known = {key: before.versions.get(key, ("unloaded", "")) for key in after.versions}
    for model, number in _different(known, after.versions):
        state, reason = after.versions[model, number]
        took = after.took.get((model, number)) if state == "ready" else None
        yield {"kind": _STATES[state], "model": model, "version": number, "reason": reason or None, "seconds": took}


def _rollouts(before: Facts, after: Facts) -> Iterator[dict[str, Any]]:
    for key in _different(before.rollouts, after.rollouts):
        if (rollout := after.rollouts.get(key)) is not None:
            yield {"kind": _ROLLOUTS[rollout.state], "model": key[0], "version": rollout.version, "reason": rollout.reason or None}


def _held(before: Facts, after: Facts) -> Iterator[dict[str, Any]]:
    """What is over by itself is not told."""
    for model, number in sorted(after.isolated - before.isolated):
        yield {"kind": Kind.ISOLATED, "model": model, "version": number}
    for model, number, mark in sorted(after.poison - before.poison):
        yield {"kind": Kind.CONDEMNED, "model": model, "version": number, "reason": mark}


def _workers(before: Facts, after: Facts) -> Iterator[dict[str, Any]]:
    yield from _each(Kind.WORKER_LOST, "worker", before.workers - after.workers)
    yield from _each(Kind.WORKER_JOINED, "worker", after.workers - before.workers)


def _different(before: Mapping[tuple[str, Any], Any], after: Mapping[tuple[str, Any], Any]) -> Iterable[tuple[str, Any]]:
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
