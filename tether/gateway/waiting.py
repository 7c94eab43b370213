"""Requests that no worker has: they wait until their version is loaded somewhere, or until another try is due."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

import structlog

from tether.errors import InternalError, LoadFailedError, TetherError, from_code
from tether.gateway.calls import Call
from tether.routing.table import Table, VersionEntry
from tether.types import ModelVersion

__all__ = ["Placing", "Waiting", "load_error"]

log = structlog.get_logger("tether.gateway")


class Placing(Protocol):
    """Of the orchestrator: that it places models."""

    async def want(self, model: ModelVersion) -> tuple[str, str]:
        """Ask for a version to be loaded: its state after placement, and the reason when it failed.

        Raises: ServiceUnavailableError: the orchestrator does not answer.
        """
        ...


class Waiting:
    """Of one gateway. `spawn` runs in the background, `fail` answers with an error. Who was answered meanwhile is its caller's matter."""

    def __init__(
        self, placing: Placing, spawn: Callable[[Coroutine[Any, Any, None]], None], fail: Callable[[Call, TetherError], None]
    ) -> None:
        self._placing, self._spawn, self._fail = placing, spawn, fail
        self._calls: dict[ModelVersion, deque[Call]] = {}
        self._used: set[ModelVersion] = set()
        """Versions asked for since the start: a new orchestrator is told of them."""

    def __len__(self) -> int:
        return sum(map(len, self._calls.values()))

    def for_placement(self, call: Call, entry: VersionEntry) -> None:
        """Nobody has the version: the orchestrator is asked for it, once for all who wait."""
        is_first = entry.model not in self._calls
        self.for_another_try(call, entry)
        self._used.add(entry.model)
        if is_first and entry.state != "loading":
            self._spawn(self._want(entry.model))

    def for_another_try(self, call: Call, entry: VersionEntry) -> None:
        """There is nobody else now."""
        self._calls.setdefault(entry.model, deque()).append(call)

    def take(self, is_due: Callable[[Call], bool]) -> list[Call]:
        """Those that may be tried again; the others stay."""
        waiting, self._calls = self._calls, {}
        due: list[Call] = []
        for model, calls in waiting.items():
            for call in calls:
                if is_due(call):
                    due.append(call)
                else:
                    self._calls.setdefault(model, deque()).append(call)
        return due

    def drop(self, is_over: Callable[[Call], bool]) -> None:
        """Forget those that were answered or cancelled meanwhile."""
        for model, calls in list(self._calls.items()):
            kept = deque(call for call in calls if not is_over(call))
            if kept:
                self._calls[model] = kept
            else:
                del self._calls[model]

    def follow(self, before: Table, after: Table) -> None:
        """What others put out of memory is not to be placed again by a new one. Both of one orchestrator: tables, or parts of them."""
        was = {version.model for entry in before.models.values() for version in entry.versions.values()}
        versions = (version for entry in after.models.values() for version in entry.versions.values())
        self._used -= was - {version.model for version in versions if version.state != "unloaded"} - self._calls.keys()

    def used(self) -> list[ModelVersion]:
        """What a new orchestrator must place again."""
        return list(self._used)

    async def _want(self, model: ModelVersion) -> None:
        try:
            state, reason = await self._placing.want(model)
        except TetherError as error:
            self._fail_all(model, error)
            return
        except Exception:
            log.exception("asking for a model failed", model=str(model))
            self._fail_all(model, InternalError("the gateway failed to ask for the model; its log has the traceback"))
            return
        if state == "failed":
            self._fail_all(model, load_error(model, reason))

    def _fail_all(self, model: ModelVersion, error: TetherError) -> None:
        calls: Iterable[Call] = self._calls.pop(model, ())
        for call in calls:
            self._fail(call, error)


def load_error(model: ModelVersion, reason: str) -> TetherError:
    """What the worker said, as the same error of the tree."""
    code, _, message = reason.partition(": ")
    error = from_code(code, f"{model} can't be loaded: {message}")
    return error if type(error) is not TetherError else LoadFailedError(f"{model} can't be loaded: {reason}")
