"""What happened in a cluster, as frozen values: the orchestrator's state changes through these only."""

from __future__ import annotations

from dataclasses import dataclass

from tether.types import ModelInfo, ModelVersion, WorkerId

__all__ = [
    "CatalogChanged",
    "CatalogModel",
    "Event",
    "LoadCut",
    "LoadFailed",
    "Loaded",
    "ManagerLeft",
    "ModelWanted",
    "Tick",
    "Unloaded",
    "WorkerJoined",
    "WorkerLeft",
]


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One model of the manager's catalog."""

    name: str
    default: int
    aliases: dict[str, int]
    versions: dict[int, tuple[ModelVersion, ModelInfo]]


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker registered; it has nothing in memory yet."""

    worker: WorkerId
    address: str
    pid: int
    gpus: int


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """The worker's connection ended: killed, stopped or cut off. Dask tells of it before another worker may join at the address."""

    address: str


@dataclass(frozen=True, slots=True)
class CatalogChanged:
    """The manager registered, or something was published, moved or deleted."""

    manager: str
    count: int
    """The catalog's change count."""
    models: dict[str, CatalogModel]
    stream: int
    """Number of the connection that told it. Addresses are fixed ports, so only this tells a manager from the one before it."""


@dataclass(frozen=True, slots=True)
class ManagerLeft:
    """A connection of the manager ended; what is loaded serves on."""

    stream: int


@dataclass(frozen=True, slots=True)
class ModelWanted:
    """A gateway has a request for a version that no worker holds."""

    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker has the version in memory and answers at `endpoint`."""

    address: str
    pid: int
    """Of the process that was asked: the next one of this name has the same address."""
    model: ModelVersion
    endpoint: str


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A worker could not load the version."""

    address: str
    pid: int
    model: ModelVersion
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class LoadCut:
    """The connection ended before the worker answered: nothing is known of the version, and mostly the worker is dead."""

    address: str
    pid: int
    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A worker freed the version."""

    address: str
    pid: int
    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = WorkerJoined | WorkerLeft | CatalogChanged | ManagerLeft | ModelWanted | Loaded | LoadFailed | LoadCut | Unloaded | Tick
