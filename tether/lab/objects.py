"""What a lab shows: models, versions, workers, its state. Frozen; their HTML has no ids, times or ports, so that notebooks compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from tether.errors import RemoteError, UnsupportedError
from tether.lab.sizes import size_text
from tether.lab.swarm_state import SwarmState
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import TensorSpec, WorkerMemory

if TYPE_CHECKING:
    from tether.store.hierarchy.zarr import Weights

__all__ = [
    "AliasMove",
    "Change",
    "Collection",
    "Diff",
    "Model",
    "Problem",
    "Repair",
    "Service",
    "Status",
    "Verification",
    "Version",
    "WorkerInfo",
    "described",
    "html_table",
]


S = TypeVar("S", bound=msgspec.Struct)


class _Info(msgspec.Struct, frozen=True, kw_only=True):
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    format: str = ""
    requirements: tuple[str, ...] = ()
    streams: bool = False


class Version(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """One published version. `str()` gives the reference that `infer` takes: `digits:2`."""

    name: str = ""
    version: int
    digest: str
    """BLAKE3 of the manifest: the same bytes have the same digest everywhere."""
    created: float = 0.0
    """Unix time of the publish."""
    nbytes: int = 0
    framework: str | None = ""
    """None: its manifest is damaged, see `verify`."""
    state: str = ""
    """unloaded, loading, ready, failed."""
    reason: str = ""
    """Why it failed."""
    isolated: bool = False
    """Whether it runs in a process of its own, since it may be what ended workers."""
    poison: int = 0
    """How many inputs are not run, since they ended its process (`tether quarantine`)."""
    tags: dict[str, str] = {}
    info: _Info = _Info()
    example: bool = False
    """Whether example tensors were published with it."""
    encrypted: bool = False
    """Whether its files are stored encrypted."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.info.inputs

    @property
    def streams(self) -> bool:
        """Whether it answers in parts (`Lab.stream`)."""
        return self.info.streams

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.info.outputs

    @property
    def weights(self) -> Weights:
        """Name → zarr array. Reading one fetches its own bytes only, verified; `nbytes_read` counts them.

        Raises: UnsupportedError: this object was not asked of a lab (it was unpickled, say).
        """
        if "weights" not in self.__dict__:
            self.__dict__["weights"] = self._of_lab("open_weights")()
        found: Weights = self.__dict__["weights"]
        return found

    def kvstore(self, path: str = "") -> dict[str, Any]:
        """The spec with which tensorstore opens the version, or the array or group at a zarr path of it, as a zarr3 driver's `kvstore`.

        It reads from the gateway and holds the API key of this lab's connection: who gets the one has the other.

        Raises: UnsupportedError: as `weights`.
        """
        spec: dict[str, Any] = self._of_lab("kvstore")(path)
        return spec

    def _of_lab(self, what: str) -> Callable[..., Any]:
        if what not in self.__dict__:
            raise UnsupportedError(f"this description of {self} came without its lab: ask for lab.models[{self.name!r}] again")
        found: Callable[..., Any] = self.__dict__[what]
        return found

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"

    def __repr__(self) -> str:
        shown = (self.framework or "", size_text(self.nbytes) if self.nbytes else "", "encrypted" if self.encrypted else "")
        parts = [part for part in shown if part]
        return f"<Version {self}{': ' + ', '.join(parts) if parts else ''}>"

    def _repr_html_(self) -> str:
        rows = [
            ("framework", self.framework or ""),
            ("size", size_text(self.nbytes)),
            ("inputs", _tensors(self.inputs)),
            ("outputs", _tensors(self.outputs)),
            ("tags", _pairs(self.tags)),
            ("encrypted", "yes" if self.encrypted else ""),
        ]
        return html_table(str(self), (), [row for row in rows if row[1]])


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One model as it was when it was asked for; ask again for its present state."""

    name: str
    default: int = 0
    """The version that the bare name means."""
    aliases: dict[str, int] = {}
    versions: tuple[Version, ...] = ()
    serving: ServingSettings = DEFAULTS
    """How its lab serves it: what `serve` said."""

    def __post_init__(self) -> None:
        named = tuple(version if version.name else msgspec.structs.replace(version, name=self.name) for version in self.versions)
        msgspec.structs.force_setattr(self, "versions", named)

    @property
    def weights(self) -> Weights:
        """Those of the version that the bare name means."""
        return self[self.default].weights

    def __getitem__(self, version: int | str) -> Version:
        """By number or alias. Raises: KeyError."""
        number = self.aliases.get(version) if isinstance(version, str) else version
        for candidate in self.versions:
            if candidate.version == number:
                return candidate
        raise KeyError(version)

    def __repr__(self) -> str:
        aliases = f", {_pairs(self.aliases)}" if self.aliases else ""
        return f"<Model {self.name}: {len(self.versions)} version{'s' * (len(self.versions) != 1)}{aliases}>"

    def _repr_html_(self) -> str:
        rows = [
            (str(each.version), each.framework or "", size_text(each.nbytes), self._names(each), _pairs(each.tags))
            for each in self.versions
        ]
        return html_table(self.name, ("version", "framework", "size", "aliases", "tags"), rows)

    def _names(self, version: Version) -> str:
        return ", ".join(sorted(alias for alias, number in self.aliases.items() if number == version.version))


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor or file that is not the same in both versions."""

    name: str
    kind: str
    """added, removed, changed; retyped: another shape or element type."""
    before: str = ""
    """`float32[64, 10]`; a file's is its size in bytes."""
    after: str = ""
    relative: float | None = None
    """‖after − before‖ / ‖before‖ of a changed tensor; None where that is no finite number."""
    largest: float | None = None
    """max |after − before|."""
    share: float | None = None
    """Of the elements, how many differ: 0 to 1."""

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}{'' if self.relative is None else f' by {self.relative:.2%}'}"


class Diff(msgspec.Struct, frozen=True, kw_only=True):
    """What changed from one version of a model to another."""

    name: str
    before: int
    after: int
    tensors: tuple[Change, ...] = ()
    files: tuple[Change, ...] = ()
    unchanged: int = 0
    """Tensors that are the same, byte for byte."""
    shared_nbytes: int = 0
    """Of the second version, what it shares with the first: kept once."""
    new_nbytes: int = 0

    def __repr__(self) -> str:
        changes = Counter(change.kind for change in self.tensors)
        parts = [f"{count} {kind}" for kind, count in sorted(changes.items())] + [f"{self.unchanged} unchanged"]
        return f"<Diff {self.name}:{self.before} → {self.after}: {', '.join(parts)} tensors, {size_text(self.new_nbytes)} new>"

    def rows(self) -> list[tuple[str, str, str, str, str, str, str]]:
        """The tensors as a table: name, kind, before, after, relative change, largest change, share of the elements."""
        return [
            (each.name, each.kind, each.before, each.after, _figure(each.relative), _figure(each.largest), _share(each.share))
            for each in self.tensors
        ]

    def _repr_html_(self) -> str:
        head = ("tensor", "", "before", "after", "relative change", "largest change", "elements")
        return html_table(f"{self.name}:{self.before} → {self.name}:{self.after}", head, self.rows())


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


class Repair(msgspec.Struct, frozen=True, kw_only=True):
    """What became of damage; true where none is left. Digests of blobs and manifests."""

    found: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    """What nobody had."""
    paths: dict[str, str] = {}
    """By digest the zarr path that needs what nobody had, where that is known."""
    advice: tuple[str, ...] = ()
    """What to do about it, for people."""

    def __bool__(self) -> bool:
        return not self.failed

    def __repr__(self) -> str:
        return f"<Repair: {len(self.found)} damaged, {len(self.repaired)} mended, {len(self.failed)} not>"


class Collection(msgspec.Struct, frozen=True, kw_only=True):
    """What a garbage collection did, or would do."""

    dry_run: bool = False
    freed_nbytes: int = 0
    later_nbytes: int = 0
    """What is only kept because it is young."""
    lines: tuple[str, ...] = ()
    """What and why, for people."""

    def __repr__(self) -> str:
        return f"<Collection: {size_text(self.freed_nbytes)} {'would be ' if self.dry_run else ''}freed>"

    def __str__(self) -> str:
        return "\n".join(self.lines)


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as the orchestrator saw it last."""

    id: str
    state: str = ""
    gpus: int = 0
    models: tuple[str, ...] = ()
    """`name:version` of what it has in memory."""
    address: str = ""
    pid: int = 0
    since: float = 0.0
    """Unix time of the last change of state."""
    transport: str = "unix"
    """How requests come to it; `swarm`: another lab lends it."""
    slots: int | None = None
    """Of a lent worker: requests that it takes at a time."""
    peer: str | None = None
    """Of a lent worker: the public key of its lab, hex."""
    memory: WorkerMemory | None = None
    """What its models take; None: it did not say. Not in the HTML: it differs from machine to machine."""

    @property
    def room(self) -> str:
        """What its models take of what they may, for a table."""
        if self.memory is None:
            return ""
        used = size_text(self.memory.used)
        return f"{used} of {size_text(self.memory.budget)}" if self.memory.budget else used

    @property
    def way(self) -> str:
        """How requests come to it, for a table: `unix`, `swarm 3f0c2a91d4e7…`."""
        return self.transport if self.peer is None else f"{self.transport} {self.peer[:12]}…"

    def __repr__(self) -> str:
        lent = "" if self.peer is None else f", {self.way}"
        return f"<Worker {self.id}: {self.state or 'unknown'}{f', {self.gpus} GPU' if self.gpus else ''}{lent}>"

    def _repr_html_(self) -> str:
        rows = [("state", self.state), ("transport", self.way), ("GPUs", str(self.gpus)), ("models", ", ".join(self.models))]
        return html_table(self.id, (), rows)


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the lab."""

    name: str
    role: str = ""
    pid: int | None = None
    """None: it does not run now."""
    address: str = ""
    state: str = ""
    since: float = 0.0
    restarts: int = 0
    error: str = ""
    """How the process before this one ended; "": this is the first one."""

    def __repr__(self) -> str:
        return f"<Service {self.name}: {self.state or 'unknown'}>"


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The lab at one moment."""

    gateway: str = ""
    data: str = ""
    address: str | None = None
    services: tuple[Service, ...] = ()
    workers: tuple[WorkerInfo, ...] = ()
    models: tuple[Model, ...] = ()
    swarm: SwarmState = SwarmState()

    def __repr__(self) -> str:
        states = ", ".join(f"{service.name} {service.state}" for service in self.services)
        return f"<Status: {states or 'no services'}; {len(self.workers)} workers, {len(self.models)} models; swarm {self.swarm.state}>"

    def _repr_html_(self) -> str:
        services = html_table("services", ("name", "role", "state"), [(each.name, each.role, each.state) for each in self.services])
        workers = html_table(
            "workers",
            ("name", "state", "transport", "GPUs", "models"),
            [(each.id, each.state, each.way, str(each.gpus), ", ".join(each.models)) for each in self.workers],
        )
        models = html_table("models", ("name", "versions"), [(each.name, str(len(each.versions))) for each in self.models])
        return services + workers + models + html_table("swarm", (), [("state", self.swarm.summary)])


class AliasMove(msgspec.Struct, frozen=True, kw_only=True, rename={"before": "from", "after": "to"}):
    """An alias that a rollback moved."""

    alias: str
    before: int | None = None
    after: int

    def __repr__(self) -> str:
        return f"<{self.alias}: {self.before} → {self.after}>"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Damage that a verification found."""

    path: str
    digest: str = ""
    code: str = ""
    error: str = ""


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification saw; true where nothing is wrong."""

    ok: bool
    checked: int = 0
    """Blobs that were read."""
    nbytes: int = 0
    problems: tuple[Problem, ...] = ()

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        found = "all well" if self.ok else f"{len(self.problems)} problems"
        return f"<Verification: {found}, {self.checked} blobs, {size_text(self.nbytes)}>"

    def _repr_html_(self) -> str:
        title = "verified: all well" if self.ok else f"verified: {len(self.problems)} problems"
        return html_table(title, ("path", "problem"), [(problem.path, problem.error) for problem in self.problems])


def described(kind: type[S], value: Any) -> S:
    """The gateway's JSON as one of these. Raises: RemoteError: it does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RemoteError(f"the gateway's answer is not a {kind.__name__}: {error}; do its version and this one differ?") from error


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, everything escaped."""
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption>{top}{body}</table>"


def tensor_text(spec: TensorSpec) -> str:
    """One tensor for people.

    >>> tensor_text(TensorSpec("x", "FP32", (-1, 3)))
    'x FP32[?, 3]'
    """
    return f"{spec.name} {spec.datatype}[{', '.join('?' if size < 0 else str(size) for size in spec.shape)}]"


def _tensors(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(tensor_text, specs))


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={values[key]}" for key in sorted(values))
