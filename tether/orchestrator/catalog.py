"""Pure: what is published, as the manager that writes told it last, and which manager that is."""

from __future__ import annotations

from collections.abc import Iterable

from tether.events import CatalogChanged, CatalogModel
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import ModelVersion

__all__ = ["KnownCatalog"]


class KnownCatalog:
    """It stays when the manager goes: what is loaded serves on."""

    def __init__(self) -> None:
        self.models: dict[str, CatalogModel] = {}
        self.published: set[ModelVersion] = set()
        self.count = 0
        self.manager: str | None = None
        """Address; None: it is away."""
        self.stream = 0
        self.informed = False
        """Whether a manager has told of its catalog since the start."""
        self._term = 0

    def is_late(self, event: CatalogChanged) -> bool:
        """Whether it was still under way from a manager that was replaced."""
        return event.stream < self.stream or event.term < self._term

    def take(self, event: CatalogChanged) -> tuple[set[str], set[ModelVersion]]:
        """The names that mean or say something else now, and their versions, before and now."""
        before, self.models = self.models, event.models
        self._term, self.stream, self.manager, self.count = event.term, event.stream, event.manager, event.count
        self.informed = True
        names = {name for name, entry in event.models.items() if before.get(name) != entry} | (before.keys() - event.models.keys())
        was = _versions(before[name] for name in names if name in before)
        now = _versions(event.models[name] for name in names if name in event.models)
        self.published -= was
        self.published |= now
        return names, was | now

    def end(self) -> None:
        """The manager went away."""
        self.manager = None

    def serving(self, name: str) -> ServingSettings:
        """How a model is to be served."""
        entry = self.models.get(name)
        return DEFAULTS if entry is None else entry.serving

    def is_default(self, model: ModelVersion) -> bool:
        """Whether its name means this version."""
        entry = self.models.get(model.name)
        return entry is not None and entry.default == model.version

    def version(self, text: str) -> ModelVersion | None:
        """The version that is written `name:number`, if it is published."""
        name, _, number = text.rpartition(":")
        entry = self.models.get(name)
        found = entry.versions.get(int(number)) if entry is not None and number.isdecimal() else None
        return None if found is None else found[0]


def _versions(entries: Iterable[CatalogModel]) -> set[ModelVersion]:
    return {model for entry in entries for model, _ in entry.versions.values()}
