"""What drains and rollouts do outside: handlers for those who ask for them, and what the manager is to write. Glue only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec
import structlog

from tether.errors import ServiceUnavailableError, TetherError, UnknownWorkerError, UnsupportedError, from_code
from tether.events import DrainAsked
from tether.orchestrator.instructions import EndRollout
from tether.orchestrator.state import ControlState
from tether.routing.table import WorkerEntry
from tether.types import WorkerId

__all__ = ["Rolling"]

log = structlog.get_logger("tether.orchestrator")
_AGAIN: Final = 1.0
"""Seconds until the manager is told again how a rollout ended, if the catalog does not say so by then."""
_PROMPT: Final = 5.0
"""Seconds for a worker to hear that it is to end: one that is stopped hears nothing, and who asks waits ten."""
_PROD: Final = "prod"


class Rolling:
    """`call` gives the handlers at an address; `changed` is notified of each other table; `is_watched`: whether a gateway follows."""

    def __init__(
        self,
        state: ControlState,
        handle: Callable[[DrainAsked], None],
        call: Callable[[str], Any],
        changed: asyncio.Condition,
        is_watched: Callable[[], bool],
    ) -> None:
        self._state, self._handle, self._call, self._changed, self._is_watched = state, handle, call, changed, is_watched

    def handlers(self) -> dict[str, Callable[..., Awaitable[dict[str, Any]]]]:
        """Of the scheduler."""
        return {"tether_drain": self._drain, "tether_restart": self._restart}

    async def _drain(self, worker: str, within: float | None, wait: float = 0.0, *, ends: bool = False) -> dict[str, Any]:
        """Answered when it has nothing any more, or after `wait` seconds. `ends`: the worker itself asks, since it was told to end."""
        try:
            entry = self._own(worker)
        except TetherError as error:
            return {"error": [error.code, str(error)]}
        if ends and not self._is_watched():  # nobody sends it anything
            return _told(entry)
        self._handle(DrainAsked(WorkerId(worker), within))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait), self._changed:
                await self._changed.wait_for(lambda: self._has_left(entry))
        return _told(self._state.table.workers.get(entry.id, entry))

    def _has_left(self, worker: WorkerEntry) -> bool:
        """One that does not answer may have requests still."""
        now = self._state.table.workers.get(worker.id)
        return now is None or now.pid != worker.pid or now.state not in {"draining", "silent"}

    def _own(self, worker: str) -> WorkerEntry:
        """Raises: UnknownWorkerError, UnsupportedError."""
        entry = self._state.table.workers.get(WorkerId(worker))
        if entry is None or entry.state == "lost":
            there = sorted(each.id for each in self._state.table.workers.values() if each.state != "lost")
            raise UnknownWorkerError(f"the lab has no worker {worker[:80]!r} now; it has {', '.join(there) or 'none'}")
        if entry.transport != "unix":
            raise UnsupportedError(f"{worker} is another lab's: that one drains it, or ends what it lends (`tether lend --end`, there)")
        return entry

    async def _restart(self, worker: str) -> dict[str, Any]:
        try:
            entry = self._own(worker)
            await self._end(entry)
        except TetherError as error:
            return {"error": [error.code, str(error)]}
        return _told(entry)

    async def _end(self, worker: WorkerEntry) -> None:
        """Raises: ServiceUnavailableError: it does not answer."""
        try:
            async with asyncio.timeout(_PROMPT):
                with contextlib.suppress(OSError):  # it has ended before it could answer
                    await self._call(worker.address).tether_end()
        except TimeoutError:
            raise ServiceUnavailableError(
                f"{worker.id} does not answer, it may be stopped: end its process, {worker.pid}, by hand, or ask again"
            ) from None

    async def end(self, ended: EndRollout) -> None:
        """Until the catalog says so: a manager that is away is told when it is back."""
        log.info("rollout ended", model=ended.model, version=ended.rollout.version, state=ended.rollout.state, reason=ended.rollout.reason)
        while self._state.is_due(ended):
            try:
                await self._write(ended)
            except (OSError, TetherError) as error:
                log.warning("the end of a rollout is not written yet", model=ended.model, error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(_AGAIN)

    async def _write(self, ended: EndRollout) -> None:
        """Raises: OSError: the manager does not answer; what it answers as an error of the tree."""
        model, manager = self._state.table.models.get(ended.model), self._state.table.manager
        if model is None or manager is None:
            return
        operations, rollout = self._call(manager), ended.rollout
        if rollout.state == "promoted" and model.default != rollout.version:
            _check(await operations.tether_set_alias(name=ended.model, alias=_PROD, version=rollout.version))
        _check(await operations.tether_set_serving(name=ended.model, changes={"rollout": msgspec.to_builtins(rollout)}))


def _told(entry: WorkerEntry) -> dict[str, Any]:
    return {"worker": msgspec.msgpack.encode(entry)}


def _check(answer: Mapping[str, Any]) -> None:
    """Raises: what the manager answers as an error of the tree."""
    if "error" in answer:
        code, *args = answer["error"]
        raise from_code(code, *args)
