"""Pure: the routing table that the orchestrator pushes and every gateway holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

import msgspec

from tether.errors import UnknownModelError, UnknownVersionError
from tether.ports import Endpoint
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import ModelInfo, ModelVersion, WorkerId, WorkerMemory, WorkerSite

__all__ = ["Canary", "ModelEntry", "Route", "State", "Table", "TableChange", "VersionEntry", "WorkerEntry"]

State = Literal["unloaded", "loading", "ready", "failed"]
_Name = TypeVar("_Name", bound=str)
_Entry = TypeVar("_Entry")


class Route(msgspec.Struct, frozen=True):
    """One worker that has the version in memory."""

    worker: WorkerId
    endpoint: Endpoint
    """Where the gateway sends to; of a lent worker, a socket of the manager that has the line to it."""
    slots: int | None = None
    """Of a lent worker: requests that it takes at a time. None: a worker of this lab."""
    load_seconds: float = 0.0
    """What loading it there took. 0: the worker did not say."""


class Canary(msgspec.Struct, frozen=True):
    """A version that is being rolled out, and its share of the requests that would get the one that the name means."""

    version: int
    weight: float = 0.0
    """Share that it answers; what it fails is answered by the other one, where both are pure."""
    shadow: float = 0.0
    """Share that is copied to it; nobody waits for what it answers."""


class VersionEntry(msgspec.Struct, frozen=True):
    """One published version and where it is loaded."""

    model: ModelVersion
    info: ModelInfo
    state: State = "unloaded"
    routes: tuple[Route, ...] = ()
    """Those to lent workers last."""
    reason: str = ""
    """Why it is not loaded, where a load failed or waits for room."""
    poison: dict[str, float] = {}
    """Marks of inputs that are not run (`quarantine.py`) → until when, Unix time. It is for people: the orchestrator takes them out."""
    is_isolated: bool = False
    """Whether it runs in a process of its own on every worker, since it may be what ended some."""
    canary: Canary | None = None
    """What takes requests from it that name no version. It stands here since gateways look here anyway: no rollout, no cost."""


class ModelEntry(msgspec.Struct, frozen=True):
    """One model: its versions and the version that a bare name means."""

    name: str
    default: int
    """What a name without a version means: `@prod` where that alias exists, else `@latest`."""
    versions: dict[int, VersionEntry]
    aliases: dict[str, int]
    serving: ServingSettings = DEFAULTS


class WorkerEntry(msgspec.Struct, frozen=True):
    """One worker as the orchestrator sees it."""

    id: WorkerId
    address: str
    """Of a lent worker: `swarm://` and the public key of its lab."""
    pid: int
    """Of a lent worker: the number of its registration."""
    state: Literal["running", "silent", "draining", "drained", "lost"]
    since: float
    """Unix time of the last change of state."""
    gpus: int = 0
    models: tuple[str, ...] = ()
    """`name:version` of what it has in memory."""
    transport: Literal["unix", "swarm"] = "unix"
    """How requests come to it; `swarm`: another lab lends it."""
    slots: int | None = None
    """Of a lent worker: requests that it takes at a time."""
    peer: str | None = None
    """Of a lent worker: the public key of its lab, hex."""
    memory: WorkerMemory | None = None
    """What its models take, as it was when one of them came or went last. None: it did not say."""
    site: WorkerSite = WorkerSite()
    """Its region and labels."""


class Table(msgspec.Struct, frozen=True):
    """A snapshot of all that a gateway needs. Digests repeat where two names share a version's bytes."""

    seq: int = 0
    models: dict[str, ModelEntry] = {}
    workers: dict[WorkerId, WorkerEntry] = {}
    catalog: int = 0
    """The catalog's change count that `models` reflects: a publish is answered once its own change is here."""
    manager: str | None = None
    """Address of the model manager; None while none is registered."""
    epoch: int = 0
    """Of the orchestrator's process: another one counts anew, and knows of this one's decisions only what it is told."""

    def follows(self, before: Table) -> bool:
        """Whether it is a later one of the same orchestrator."""
        return self.epoch == before.epoch and self.seq > before.seq

    def amended(self, change: TableChange) -> Table:
        """The table that follows. They share what did not change: it costs copies of two dicts at most (70 µs for 10,000 models)."""
        models, workers = _amended(self.models, change.models), _amended(self.workers, change.workers)
        return Table(change.seq, models, workers, change.catalog, change.manager, self.epoch)

    def part(self, change: TableChange) -> Table:
        """Of it, the models and workers that the change is about: enough to tell what became of them."""
        models = {name: self.models[name] for name in change.models if name in self.models}
        workers = {worker: self.workers[worker] for worker in change.workers if worker in self.workers}
        return Table(self.seq, models, workers, self.catalog, self.manager, self.epoch)

    @property
    def endpoints(self) -> set[Endpoint]:
        """All that routes lead to."""
        models = self.models.values()
        return {route.endpoint for model in models for version in model.versions.values() for route in version.routes}

    def resolve(self, name: str, version: str | None = None) -> VersionEntry:
        """The version that a URL means: `name`, `name@alias`; `version` as in `/versions/{v}`.

        Raises: UnknownModelError, UnknownVersionError.
        """
        bare, at, alias = name.partition("@")
        entry = self.models.get(bare)
        if entry is None:
            raise UnknownModelError(f"model {bare!r} is not found; GET /tether/v1/models or `tether models` lists what there is")
        if version is not None:
            number = int(version) if version.isdecimal() and len(version) < 10 else 0  # noqa: PLR2004 (ModelRef: 9 digits)
        else:
            number = entry.aliases.get(alias, 0) if at else entry.default
        found = entry.versions.get(number)
        if found is None:
            wanted = f"version {version}" if version is not None else f"alias {alias!r}"
            raise UnknownVersionError(f"model {bare!r}, {wanted} is not found; it has versions {_listed(entry)}")
        return found


class TableChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """What makes a table the next one: of models and workers those that are another now, None for what is gone."""

    seq: int
    """Of the table that it makes, of the one with the number before."""
    catalog: int = 0
    """This and `manager`: as of the table that it makes."""
    manager: str | None = None
    models: dict[str, ModelEntry | None] = {}
    workers: dict[WorkerId, WorkerEntry | None] = {}


def _amended(before: dict[_Name, _Entry], changes: Mapping[_Name, _Entry | None]) -> dict[_Name, _Entry]:
    if not changes:
        return before
    after = before.copy()
    for name, entry in changes.items():
        if entry is None:
            after.pop(name, None)
        else:
            after[name] = entry
    return after


def _listed(entry: ModelEntry) -> str:
    return ", ".join(map(str, sorted(entry.versions))) or "none"
