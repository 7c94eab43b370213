"""Pure: versions that run in processes of their own since they may be what ended workers, and inputs that no gateway lets through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import assert_never

from msgspec import structs

from tether.events import InputCondemned, QuarantineCleared, VersionIsolated
from tether.orchestrator.registry import KnownWorker
from tether.routing.quarantine import Quarantine
from tether.routing.table import VersionEntry
from tether.types import ModelVersion

__all__ = ["Isolation"]

_SECONDS = 3600.0
"""That a version is isolated: it costs memory, and a tenth of a millisecond a batch; if it was to blame, another worker ends after that."""


class Isolation:
    """Of the orchestrator. It is not written down: gateways tell a new orchestrator what they know."""

    def __init__(self) -> None:
        self._quarantine = Quarantine()
        self._isolated: dict[ModelVersion, float] = {}
        """Until when."""
        self._moved: set[str] = set()
        """Endpoints whose worker was told that the version there is isolated."""
        self._poison: dict[ModelVersion, dict[str, float]] = {}
        """Marks, and until when."""
        self._told: dict[ModelVersion, tuple[bool, dict[str, float]]] = {}
        """Whether it is isolated, and its marks: as gateways are told."""
        self._is_new = False
        """Whether something came that was not settled."""

    def __bool__(self) -> bool:
        """Whether there is anything to settle: mostly not."""
        return bool(self._isolated or self._poison or self._is_new)

    def take(self, event: VersionIsolated | InputCondemned | QuarantineCleared, now: float) -> None:
        """What a gateway found out, or an operator decided."""
        self._is_new = True
        match event:
            case VersionIsolated(model):
                self._isolated[model] = now + _SECONDS
            case InputCondemned(model, mark):
                self._quarantine.condemn(model, mark, now)
            case QuarantineCleared(name):
                cleared = {model for model in (*self._isolated, *self._poison) if model.name == name}
                self._quarantine.forget(cleared)
                self._isolated = {model: until for model, until in self._isolated.items() if model not in cleared}
            case _:
                assert_never(event)

    def settle(self, published: Collection[ModelVersion], now: float) -> set[ModelVersion]:
        """What is over is forgotten, so is what is published no more. The versions of which gateways are to be told something else now."""
        self._is_new, before = False, self._told
        self._isolated = {model: until for model, until in self._isolated.items() if now < until and model in published}
        poison = self._quarantine.condemned(now)
        self._quarantine.forget(model for model in poison if model not in published)
        self._poison = {model: marks for model, marks in poison.items() if model in published}
        self._told = after = {model: (model in self._isolated, self._poison.get(model, {})) for model in (*self._isolated, *self._poison)}
        return {model for model in before.keys() | after.keys() if before.get(model) != after.get(model)}

    def moves(self, having: Callable[[ModelVersion], Iterable[KnownWorker]]) -> list[tuple[KnownWorker, ModelVersion]]:
        """Which of the lab's own workers are to be told, of which version; each once. `having`: those that have a version in memory."""
        if not self._isolated:
            return []
        due = [(worker, model, worker.loaded[model]) for model in self._isolated for worker in having(model) if worker.lent is None]
        found = [(worker, model) for worker, model, endpoint in due if endpoint not in self._moved]
        self._moved = {endpoint for _, _, endpoint in due}
        return found

    def entry(self, version: VersionEntry) -> VersionEntry:
        """As gateways are told of it."""
        if version.model not in self._told:
            return version
        is_isolated, marks = self._told[version.model]
        return structs.replace(version, poison=marks, is_isolated=is_isolated)
