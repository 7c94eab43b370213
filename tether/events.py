"""What happened in a cluster, as frozen values: the orchestrator's state changes through these only."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import ModelInfo, ModelVersion, WorkerId, WorkerMemory, WorkerSite

__all__ = [
    "CatalogChanged",
    "CatalogModel",
    "Claim",
    "Event",
    "Evicting",
    "GatewayLoad",
    "Holding",
    "InputCondemned",
    "LentChanged",
    "LentWorker",
    "LoadCut",
    "LoadFailed",
    "Loaded",
    "ManagerLeft",
    "ModelWanted",
    "QuarantineCleared",
    "Standing",
    "Tick",
    "Unloaded",
    "VersionIsolated",
    "VersionLoad",
    "WorkerBack",
    "WorkerJoined",
    "WorkerLeft",
    "WorkerSilent",
]


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One model of the manager's catalog."""

    name: str
    default: int
    aliases: dict[str, int]
    versions: dict[int, tuple[ModelVersion, ModelInfo]]
    serving: ServingSettings = DEFAULTS


class Holding(msgspec.Struct, frozen=True):
    """A version that a worker has in memory."""

    model: ModelVersion
    endpoint: str
    serving: ServingSettings


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker registered: a new process, or one that went on while the orchestrator was away."""

    worker: WorkerId
    address: str
    pid: int
    gpus: int
    memory: WorkerMemory | None = None
    """None: nothing is known of it."""
    site: WorkerSite = field(default_factory=WorkerSite)
    holdings: tuple[Holding, ...] = ()
    """What it has in memory; what it was loading when the orchestrator went is not among it."""


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """The worker's connection ended: killed, stopped or cut off. Dask tells of it before another worker may join at the address."""

    address: str
    for_good: bool = False
    """Whether it was sent away, since the lab needs fewer."""


@dataclass(frozen=True, slots=True)
class WorkerSilent:
    """The worker answers no pings: it is stopped, has no time, or is cut off. What it has in memory is there still."""

    address: str


@dataclass(frozen=True, slots=True)
class WorkerBack:
    """A silent worker answers again."""

    address: str


@dataclass(frozen=True, slots=True)
class CatalogChanged:
    """The manager registered, or something was published, moved or deleted."""

    manager: str
    count: int
    """The catalog's change count."""
    models: dict[str, CatalogModel]
    stream: int
    """Number of who told it: a manager's connection, in one term. Addresses are fixed ports, so only this tells it from the one before."""
    term: int = 0
    """Of the lease under which it was told."""


class LentWorker(msgspec.Struct, frozen=True):
    """Another lab that runs models for this one: which of its own workers does is its gateway's business."""

    id: WorkerId
    """Given by the manager that has the line to it; no worker of this lab has that name."""
    peer: str
    """The lab's public key, hex."""
    number: int
    """Of this registration: another one of the same lab has nothing loaded, as another process of a worker has not."""
    gpus: int
    slots: int
    """Requests that it takes at a time."""
    models: str = "*"
    """Glob of this lab's own models that it runs, as of a scope."""
    closed: tuple[str, ...] = ()
    """Endpoints of versions that it has no more, until they are loaded there again."""


@dataclass(frozen=True, slots=True)
class LentChanged:
    """The manager told which labs lend workers to this one now: all of them."""

    stream: int
    """As of the catalog that was told before."""
    workers: tuple[LentWorker, ...]


@dataclass(frozen=True, slots=True)
class ManagerLeft:
    """A connection of the manager ended; what is loaded serves on, but for lent workers: the line to those is the manager's."""

    stream: int


@dataclass(frozen=True, slots=True)
class ModelWanted:
    """A gateway has a request for a version that no worker holds."""

    model: ModelVersion


class VersionLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one gateway saw of one version in an interval."""

    answered: int = 0
    """Requests, with what they asked for or with a refusal that is their own fault."""
    failed: int = 0
    """Requests that ended in an error of the model, its worker, or its deadline."""
    refused: int = 0
    """Requests that found no room."""
    seconds: float = 0.0
    """From admission to answer, of the answered together."""
    slowest: float = 0.0
    """Seconds of the slowest answer."""
    open: int = 0
    """Requests that had no answer at the interval's end."""
    worse: int = 0
    """Requests that it failed, as a version that is being rolled out, and the version before answered, or had answered."""
    right: int = 0
    """Answers of any time whose labels came in the interval, and said that they were right."""
    wrong: int = 0
    """The same, wrong."""


@dataclass(frozen=True, slots=True)
class GatewayLoad:
    """What a gateway saw in the last `seconds`; told each second in which it saw anything."""

    gateway: str
    """Name of the process, another one after each start."""
    seconds: float
    versions: dict[ModelVersion, VersionLoad]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker has the version in memory and answers at `endpoint`."""

    address: str
    """As in `Load`."""
    pid: int
    """Of the process that was asked: the next one of this name has the same address. Of a lent worker: its `number`."""
    model: ModelVersion
    endpoint: str
    memory: WorkerMemory | None = None
    """What the worker's models take now."""
    seconds: float = 0.0
    """What it took, fetching and a first run included, waiting for room not. 0: it did not say."""


@dataclass(frozen=True, slots=True)
class Evicting:
    """A worker is about to free the version, since others need the room or nobody asked for it; it answers what is sent there before."""

    address: str
    pid: int
    model: ModelVersion
    endpoint: str
    """Of which load: the answer to it may be on its way still."""
    memory: WorkerMemory


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
    memory: WorkerMemory | None = None


@dataclass(frozen=True, slots=True)
class VersionIsolated:
    """A version may be what ended workers: it is to run in a process of its own."""

    model: ModelVersion


@dataclass(frozen=True, slots=True)
class InputCondemned:
    """An input of a version ends the process that runs it."""

    model: ModelVersion
    mark: str
    """Of the input (`routing.quarantine`)."""


@dataclass(frozen=True, slots=True)
class QuarantineCleared:
    """An operator wants nothing held against inputs of a model any more, nor against its versions."""

    model: str


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """Somebody wants a worker of the lab to take no more requests, or is about to end it; or wants it to go on."""

    worker: WorkerId
    patience: float | None
    """Seconds in which what it has is placed elsewhere before it goes all the same. None: it is to go on."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    WorkerJoined
    | WorkerLeft
    | WorkerSilent
    | WorkerBack
    | CatalogChanged
    | LentChanged
    | ManagerLeft
    | ModelWanted
    | GatewayLoad
    | Loaded
    | LoadFailed
    | LoadCut
    | Evicting
    | Unloaded
    | VersionIsolated
    | InputCondemned
    | QuarantineCleared
    | DrainAsked
    | Tick
)


class Claim(msgspec.Struct, frozen=True):
    """How a manager stands, as it tells the orchestrator when it comes and every second."""

    member: str
    """Its store's name, which outlives the process."""
    address: str
    holds: int = 0
    """The term in which it writes, as far as it was told; 0: in none."""
    term: int = 0
    """The latest that it knows of."""
    wrote: int = 0
    """The latest in which it wrote: it has all of that."""
    position: tuple[int, int] = (0, 0)
    """Term and number of the last change that is durable in its store."""
    in_step: tuple[str, ...] = ()
    """Of a writer: the followers without which it acknowledges nothing."""
    forced: bool = False
    """Whether a person said that it is to write, though nobody can tell that it has all."""
    released: bool = False
    """Whether it gives up the lease: it ends."""


class Standing(msgspec.Struct, frozen=True):
    """What the orchestrator answers to every claim."""

    term: int
    writer: str | None
    """Member who holds the lease of this term."""
    address: str | None
    """Where the writer is; None: it is away."""
    in_step: tuple[str, ...]
    """Of the last claim of the writer: who may take its place."""
    lease: float
    """Seconds from a claim of the writer's to when another may be chosen."""
