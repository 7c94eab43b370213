"""Pure: what the orchestrator has others do. The plugin carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from tether.routing.table import Table, TableChange
from tether.serving_settings import DEFAULTS, Rollout, ServingSettings
from tether.types import ModelVersion

__all__ = ["Configure", "EndRollout", "Instruction", "Isolate", "Load", "Push", "Unload"]


@dataclass(frozen=True, slots=True)
class Load:
    """Tell the worker to load the version; what comes of it is `Loaded`, `LoadFailed` or `LoadCut`, with the same `address` and `pid`."""

    address: str
    """Of a lent worker: its id."""
    pid: int
    model: ModelVersion
    manager: str | None = None
    """Of a lent worker: the address of the manager that has the line to it."""
    serving: ServingSettings = DEFAULTS
    """A lent worker is not told: how it serves is its lab's matter."""


@dataclass(frozen=True, slots=True)
class Unload:
    """Tell the worker to free the version; it answers with `Unloaded`. Fields as of `Load`."""

    address: str
    pid: int
    model: ModelVersion
    manager: str | None = None


@dataclass(frozen=True, slots=True)
class Isolate:
    """Tell a worker of the lab to run the version in a process of its own, from now until it is unloaded. Nothing comes of it."""

    address: str
    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Configure:
    """Tell a worker of the lab to serve a version that it has like this from now on. It is told in the order in which this is said."""

    address: str
    pid: int
    model: ModelVersion
    serving: ServingSettings


@dataclass(frozen=True, slots=True)
class EndRollout:
    """Have the manager write how a rollout ended, and if it was promoted first let the alias `prod` mean the new version."""

    model: str
    rollout: Rollout
    """As it is to be written."""


@dataclass(frozen=True, slots=True)
class Push:
    """Tell every gateway what changed in the table."""

    table: Table
    """As it is now."""
    change: TableChange
    """What made it so from the one before."""


Instruction = Load | Unload | Configure | Isolate | EndRollout | Push
