"""What a lab shows: models, versions, workers, its state. Frozen; their HTML has no ids, times or ports, so that notebooks compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeVar

import msgspec

from tether.errors import RemoteError
from tether.lab.sizes import size_text
from tether.types import TensorSpec

__all__ = [
    "AliasMove",
    "Model",
    "Problem",
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


class Version(msgspec.Struct, frozen=True, kw_only=True):
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
    tags: dict[str, str] = {}
    info: _Info = _Info()
    example: bool = False
    """Whether example tensors were published with it."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.info.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.info.outputs

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"

    def __repr__(self) -> str:
        parts = [part for part in (self.framework or "", size_text(self.nbytes) if self.nbytes else "") if part]
        return f"<Version {self}{': ' + ', '.join(parts) if parts else ''}>"

    def _repr_html_(self) -> str:
        rows = [
            ("framework", self.framework or ""),
            ("size", size_text(self.nbytes)),
            ("inputs", _tensors(self.inputs)),
            ("outputs", _tensors(self.outputs)),
            ("tags", _pairs(self.tags)),
        ]
        return html_table(str(self), (), [row for row in rows if row[1]])


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One model as it was when it was asked for; ask again for its present state."""

    name: str
    default: int = 0
    """The version that the bare name means."""
    aliases: dict[str, int] = {}
    versions: tuple[Version, ...] = ()

    def __post_init__(self) -> None:
        named = tuple(version if version.name else msgspec.structs.replace(version, name=self.name) for version in self.versions)
        msgspec.structs.force_setattr(self, "versions", named)

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

    def __repr__(self) -> str:
        return f"<Worker {self.id}: {self.state or 'unknown'}{f', {self.gpus} GPU' if self.gpus else ''}>"

    def _repr_html_(self) -> str:
        return html_table(self.id, (), [("state", self.state), ("GPUs", str(self.gpus)), ("models", ", ".join(self.models))])


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

    def __repr__(self) -> str:
        states = ", ".join(f"{service.name} {service.state}" for service in self.services)
        return f"<Status: {states or 'no services'}; {len(self.workers)} workers, {len(self.models)} models>"

    def _repr_html_(self) -> str:
        services = html_table("services", ("name", "role", "state"), [(each.name, each.role, each.state) for each in self.services])
        workers = html_table(
            "workers",
            ("name", "state", "GPUs", "models"),
            [(each.id, each.state, str(each.gpus), ", ".join(each.models)) for each in self.workers],
        )
        models = html_table("models", ("name", "versions"), [(each.name, str(len(each.versions))) for each in self.models])
        return services + workers + models


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
