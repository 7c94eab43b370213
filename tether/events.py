"""What happened in a cluster, as frozen values: the orchestrator's state changes through these only."""

from __future__ import annotations

from dataclasses import dataclass

from tether.types import ModelInfo, ModelVersion, WorkerId

__all__ = [
    "CatalogChanged",
    "CatalogModel",
    "Event",
    "LoadFailed",
    "Loaded",
    "ManagerLeft",
    "ModelWanted",
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
    """The worker's connection ended: killed, stopped or cut off."""

    address: str


@dataclass(frozen=True, slots=True)
class CatalogChanged:
    """The manager registered, or something was published, moved or deleted."""

    manager: str
    count: int
    """The catalog's change count."""
    models: dict[str, CatalogModel]


@dataclass(frozen=True, slots=True)
class ManagerLeft:
    """The manager's connection ended; what is loaded serves on."""

    manager: str


@dataclass(frozen=True, slots=True)
class ModelWanted:
    """A gateway has a request for a version that no worker holds."""

    model: ModelVersion


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker has the version in memory and answers at `endpoint`."""

    address: str
    model: ModelVersion
    endpoint: str


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A worker could not load the version."""

    address: str
    model: ModelVersion
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A worker freed the version."""

    address: str
    model: ModelVersion


Event = WorkerJoined | WorkerLeft | CatalogChanged | ManagerLeft | ModelWanted | Loaded | LoadFailed | Unloaded
