"""Pure: the routing table that the orchestrator pushes and every gateway holds."""

from __future__ import annotations

from typing import Literal

import msgspec

from tether.errors import UnknownModelError, UnknownVersionError
from tether.ports import Endpoint
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import ModelInfo, ModelVersion, WorkerId, WorkerMemory

__all__ = ["ModelEntry", "Route", "State", "Table", "VersionEntry", "WorkerEntry"]

State = Literal["unloaded", "loading", "ready", "failed"]


class Route(msgspec.Struct, frozen=True):
    """One worker that has the version in memory."""

    worker: WorkerId
    endpoint: Endpoint
    """Where the gateway sends to; of a lent worker, a socket of the manager that has the line to it."""
    slots: int | None = None
    """Of a lent worker: requests that it takes at a time. None: a worker of this lab."""


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
    """Marks of inputs that are not run (`quarantine.py`) → until when, Unix time."""
    is_isolated: bool = False
    """Whether it runs in a process of its own on every worker, since it may be what ended some."""


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
    state: Literal["running", "lost"]
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


class Table(msgspec.Struct, frozen=True):
    """A snapshot of all that a gateway needs. Digests repeat where two names share a version's bytes."""

    seq: int = 0
    models: dict[str, ModelEntry] = {}
    workers: dict[WorkerId, WorkerEntry] = {}
    catalog: int = 0
    """The catalog's change count that `models` reflects: a publish is answered once its own change is here."""
    manager: str | None = None
    """Address of the model manager; None while none is registered."""

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


def _listed(entry: ModelEntry) -> str:
    return ", ".join(map(str, sorted(entry.versions))) or "none"
