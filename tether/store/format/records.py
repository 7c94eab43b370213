"""Pure: what the store answers, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import Digest

__all__ = ["AliasChange", "ModelRecord", "NewVersion", "Problem", "Published", "Report", "VersionRecord"]


class VersionRecord(msgspec.Struct, frozen=True):
    """One version as the catalog knows it."""

    name: str
    """As in a URL: `digits` where it is the lab's own, else `<publisher's label>~digits`."""
    publisher: str
    """Ed25519 public key, hex."""
    version: int
    digest: Digest
    """Of the manifest."""
    created: float
    """Unix time of the publish here."""
    nbytes: int
    """Sum of the files' sizes."""
    tags: dict[str, str]


class ModelRecord(msgspec.Struct, frozen=True):
    """One model, its versions in order, its aliases."""

    name: str
    publisher: str
    versions: tuple[VersionRecord, ...]
    aliases: dict[str, int]
    serving: ServingSettings = DEFAULTS
    """How this lab serves it: no part of what was published."""

    @property
    def default(self) -> int:
        """What the bare name means: `@prod` where it exists, else `@latest`."""
        return self.aliases.get("prod") or self.aliases["latest"]


class AliasChange(NamedTuple):
    """An alias that was moved."""

    alias: str
    before: int | None
    after: int


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version that is to be entered in the catalog."""

    name: str
    publisher: str
    digest: Digest
    signature: bytes
    nbytes: int
    created: float
    aliases: tuple[str, ...]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a publish."""

    version: int
    digest: Digest
    created: bool
    """False: these bytes were this version already, and nothing was stored."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Damage that a verify found."""

    path: str
    """`name:version/array`, or the pack."""
    digest: Digest
    code: str
    """Of the error that a reader would get."""
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a verify saw."""

    checked: int
    """Blobs and manifests that were read."""
    nbytes: int
    problems: tuple[Problem, ...]
