"""A lab that changes while it serves: the part of `Operations` that rolls out versions, drains workers and starts them again."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Final

import msgspec

from tether import ports
from tether.errors import BadInputError, DeadlineExceededError, ServiceUnavailableError, UnknownWorkerError
from tether.lab.objects import WorkerInfo, described
from tether.types import ModelRef

__all__ = ["Drained", "Rolling", "RolloutState"]

_WAIT: Final = 10.0
"""Seconds that one call waits; they are repeated."""
_LOOK: Final = 0.1
"""Seconds between looks for a worker that is started again."""


class RolloutState(msgspec.Struct, frozen=True, kw_only=True):
    """How the latest rollout of a model stood when it was asked for."""

    model: str
    version: int
    """The new one."""
    before: int
    """What the name meant when it began."""
    state: str
    """loading, shadow, canary; promoted: the name means the new version; reverted: by itself, `reason` says why; aborted."""
    weight: float = 0.0
    """Share of the requests that the new version answers."""
    shadow: float = 0.0
    """Share of them that is copied to it."""
    steps: tuple[float, ...] = ()
    every: float = 0.0
    """Seconds of each step."""
    begun: float = 0.0
    """Unix time."""
    reason: str = ""

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended."""
        return self.state in {"loading", "shadow", "canary"}

    def __str__(self) -> str:
        share = f" {self.weight:.0%}" if self.weight else ""
        return f"{self.model}:{self.version} in place of {self.before}: {self.state}{share}" + (f" ({self.reason})" if self.reason else "")

    def __repr__(self) -> str:
        return f"<Rollout {self}>"


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that takes no more requests, or is about to."""

    worker: str
    state: str
    """drained: it has nothing any more; draining: it still has `models`; silent: it does not answer, and may have requests still."""
    models: tuple[str, ...] = ()
    pid: int = 0

    @property
    def goes_on(self) -> bool:
        """Whether it may have requests still."""
        return self.state in {"draining", "silent"}

    def __repr__(self) -> str:
        return f"<Worker {self.worker}: {self.state}>"


class Rolling(ABC):
    """New versions step by step, workers one by one."""

    @property
    @abstractmethod
    def _roller(self) -> ports.Rolling:
        """Raises: ServiceUnavailableError: the lab has no gateway; UnsupportedError: it is another one than one's own."""

    @abstractmethod
    async def workers(self) -> dict[str, WorkerInfo]:
        """As `Operations` has it."""

    async def rollout(  # noqa: PLR0913 (all that can be said of a rollout)
        self,
        name: str,
        version: int | None = None,
        *,
        steps: Sequence[float] = (0.05, 0.25, 1.0),
        every: float = 30.0,
        requests: int = 0,
        shadow: bool | float = False,
        errors: float = 0.01,
        slower: float = 2.0,
        allow_nan: bool = False,
    ) -> RolloutState:
        """Put `version` in the place of what the name means, step by step, while both serve. Without a version: how the latest stands.

        It is loaded beside the old one; then each of `steps` has it answer that share of the requests, for `every` seconds and until it
        answered `requests` of them; at last the alias `prod` means it. With `shadow` it first gets copies of all requests, or of a share
        of them, whose answers are thrown away. It goes back by itself when it does worse than the old one at the same time: when it fails
        `errors` (a share) more of its requests, takes `slower` times as long, or answers NaN to inputs that have none. What it fails is
        answered by the old one, if both are pure. Requests that name a version, or another alias, go where they did.

        Raises: UnknownModelError, UnknownVersionError; ConflictError: the name means that version already, or another one is being rolled
        out; BadInputError; NotFoundError: none was rolled out.
        """
        model = _url_name(name)
        if version is None:
            return described(RolloutState, await self._roller.rollout(model))
        numbers = {"every": every, "shadow": shadow, "errors": errors, "slower": slower}
        terms = {"version": version, "steps": _shares(steps), "requests": requests, "allow_nan": allow_nan}
        terms |= {name: _number(name, value) for name, value in numbers.items()}
        return described(RolloutState, await self._roller.begin_rollout(model, terms))

    async def abort_rollout(self, name: str) -> RolloutState:
        """Go back: from now on the name means what it meant. Does nothing where no rollout goes on; after one, `rollback` goes back."""
        return described(RolloutState, await self._roller.end_rollout(_url_name(name)))

    async def drain(self, worker: str, *, patience: float = 30.0, timeout: float | None = None) -> Drained:  # noqa: ASYNC109 (the caller's)
        """Have a worker take no more requests: what it has is placed elsewhere first, then it answers what it was asked.

        What no other worker has after `patience` seconds goes all the same. Returns when it has nothing any more, or after `timeout`
        seconds (None: `patience`, and a minute). It then stays as it is, until `undrain`, or it or the orchestrator is started again.

        Raises: UnknownWorkerError; UnsupportedError: it is another lab's; BadInputError.
        """
        most = _seconds("patience", patience) + 60.0 if timeout is None else _seconds("timeout", timeout)
        end = asyncio.get_running_loop().time() + most
        while True:
            left = end - asyncio.get_running_loop().time()
            done = described(Drained, await self._roller.drain(str(worker), patience, max(min(left, _WAIT), 0.0)))
            if not done.goes_on or left <= 0:
                return done

    async def undrain(self, worker: str) -> None:
        """Have a worker go on that was drained."""
        await self._roller.undrain(str(worker))

    async def restart(self, *workers: str, patience: float = 30.0, timeout: float = 120.0) -> list[str]:  # noqa: ASYNC109 (the caller's)
        """Start workers again, one by one, while the lab serves; all of the lab's own, if none is named. Their names, in order.

        Each is drained, ended, and back before it is the next one's turn, with as many copies of its models in the lab as before, if they
        are there within `patience` seconds. Who looks after them starts them: the lab's supervisor, Kubernetes, Dask's nanny.

        Raises: UnknownWorkerError; BadInputError; ServiceUnavailableError: one does not answer; DeadlineExceededError: one was not back
        after `timeout` seconds. The others are left alone then.
        """
        patience, timeout = _seconds("patience", patience), _seconds("timeout", timeout)
        own = [each.id for each in (await self.workers()).values() if each.transport == "unix" and each.state != "lost"]
        chosen = list(workers) or own
        if strange := [worker for worker in chosen if worker not in own]:
            raise UnknownWorkerError(f"the lab has no worker {strange[0]!r} of its own now; it has {', '.join(own) or 'none'}")
        for worker in chosen:
            await self._restart(worker, patience, timeout)
        return chosen

    async def _restart(self, worker: str, patience: float, timeout: float) -> None:  # noqa: ASYNC109 (as above)
        before = await self.workers()
        copies = _copies(before.values(), before[worker].models)
        await self.drain(worker, patience=patience)
        ended = described(Drained, await self._roller.restart_worker(worker))
        try:
            async with asyncio.timeout(timeout):
                while not self._is_back(now := await self._seen(), worker, ended.pid):  # noqa: ASYNC110 (nothing tells it)
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            raise DeadlineExceededError(
                f"{worker} was not back after {timeout:g} s, the workers after it were left alone; "
                f"`tether status` shows whether it runs, `tether logs {worker}` why not"
            ) from None
        with suppress(TimeoutError):  # there may be no room for as many copies as before
            async with asyncio.timeout(patience):
                while copies - _copies(now.values(), copies):
                    await asyncio.sleep(_LOOK)
                    now = await self._seen()

    async def _seen(self) -> dict[str, WorkerInfo]:
        """The workers; none while nobody knows."""
        try:
            return await self.workers()
        except ServiceUnavailableError:
            return {}

    @staticmethod
    def _is_back(workers: Mapping[str, WorkerInfo], worker: str, pid: int) -> bool:
        """As another process than the one that ended."""
        now = workers.get(worker)
        return now is not None and now.state == "running" and now.pid != pid


def _copies(workers: Iterable[WorkerInfo], models: Collection[str]) -> Counter[str]:
    """How many workers that take requests have each of these."""
    return Counter(model for worker in workers if worker.state == "running" for model in worker.models if model in models)


def _url_name(name: str) -> str:
    ref = ModelRef.parse(name)
    return f"{ref.publisher}~{ref.name}" if ref.publisher else ref.name


def _shares(steps: object) -> list[float]:
    """Raises: BadInputError: they are no list of numbers."""
    if not isinstance(steps, Iterable):
        raise BadInputError(f"steps must be shares, as (0.05, 0.25, 1), not {repr(steps)[:80]}")
    return [_number("a step", step) for step in steps]


def _number(name: str, value: object) -> float:
    """Raises: BadInputError: it is none."""
    if not isinstance(value, Real) or math.isnan(value):
        raise BadInputError(f"{name} must be a number, not {repr(value)[:80]}")
    return float(value)


def _seconds(name: str, value: object) -> float:
    """Raises: BadInputError: it is no time to wait."""
    seconds = _number(name, value)
    if seconds < 0:
        raise BadInputError(f"{name} must be seconds, from 0 on, not {seconds:g}")
    return seconds
