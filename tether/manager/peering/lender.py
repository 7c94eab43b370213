"""Lends this lab's workers to others: registers there until it is confirmed, and again when that is lost; says how they stand, and runs."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import msgspec
import structlog

from tether.errors import (
    BadInputError,
    ForbiddenError,
    MalformedRequestError,
    NoWorkerError,
    ServiceUnavailableError,
    TetherError,
    UnsupportedError,
)
from tether.manager.asking import Operation
from tether.manager.operations import Operations
from tether.manager.peering.lendings import Lending, Lendings
from tether.manager.peering.lent_state import EVERY, INTERVAL, Offer, Vitals
from tether.manager.peering.loans import Loans
from tether.manager.peering.own_workers import OwnWorkers
from tether.manager.peering.readying import Readiness, Readying, Wanted
from tether.manager.peering.turnstile import Turnstile
from tether.security.addresses import Address
from tether.types import ModelVersion

__all__ = ["Lender", "Line"]

log = structlog.get_logger("tether.swarm")
_REGISTER: Final = 25.0
"""Seconds for one registration, finding the lab and its way back included."""
_GOODBYE: Final = 5.0
_UNHEARD: Final = 3.5 * INTERVAL
"""Seconds without a question of the other lab's after which it has forgotten this one, or lost it."""
_LOOK: Final = 0.5
"""Seconds between looks at that, and at the own workers."""
_AGAIN, _AT_LAST = 0.5, 30.0
"""Seconds until a registration that failed is tried again: at first, and at most."""
_DIGEST: Final = re.compile("[0-9a-f]{64}")
_MOST_WAIT: Final = 20.0
"""Seconds for which an answer about a version may be held back."""


@dataclass(frozen=True, slots=True)
class Line:
    """What a lender has while its lab is on the swarm."""

    request: Callable[[str, str, bytes, float], Awaitable[bytes]]
    """Peer, method, value, seconds → answer. Raises: TetherError."""
    welcome: Callable[[str], None]
    """Told of a key that may do more since: what is open with it is bounded as of a stranger's."""
    readying: Readying


@dataclass(slots=True)
class _Registration:
    """With one lab."""

    lending: Lending
    turnstile: Turnstile = field(default_factory=lambda: Turnstile(0))
    told: Offer | None = None
    """What it confirmed; None: nothing."""
    worker: str | None = None
    """What these workers are called there."""
    heard: float = float("-inf")
    """Of its last question."""
    error: TetherError | None = None
    """Why it is not confirmed."""
    task: asyncio.Task[None] | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there may be something else to say, or an answer came."""


class Lender:
    """Of one lab. Belongs to one event loop."""

    NAMES: ClassVar[tuple[str, ...]] = ("lend", "lendings", "end_lending")

    def __init__(self, operations: Operations, lendings: Lendings, loans: Loans) -> None:
        self._operations, self._lendings, self._loans = operations, lendings, loans
        self.workers: OwnWorkers | None = None
        """None where the manager is alone."""
        self.appear: Callable[[], Awaitable[object]] = _nothing
        """Awaited before the first word to another lab: this one is on the swarm then. Raises: it can't be."""
        self._line: Line | None = None
        self._labs: dict[str, _Registration] = {}
        self._retell()

    def handlers(self) -> dict[str, Operation]:
        """What people ask of it, by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    # --- what people ask

    async def lend(self, publisher: str, models: str = EVERY, slots: int | None = None) -> dict[str, Any]:
        """As the port says."""
        key = await asyncio.to_thread(self._operations.admission.key_of, publisher)
        if key == self._operations.public:
            raise BadInputError("this lab's workers run its own models anyway: name the lab that they are to be lent to")
        if self.workers is None:
            raise UnsupportedError("there are no workers to lend: start a lab (`tether up`) on this data folder, and lend again")
        Offer(1, 0, 1 if slots is None else slots, models).checked()
        before = self._lendings.of(key)
        await asyncio.to_thread(self._lendings.lend, Lending(key, models, slots))
        await self._remembered()
        try:
            await self.appear()
            self._hurry(key)
            await self._confirmed(key)
        except TetherError:
            if before is None:
                await self.end_lending(key)
            raise
        return self._row(key)

    async def lendings(self) -> list[dict[str, Any]]:
        """As the port says."""
        return [self._row(each.publisher) for each in self._lendings.all()]

    async def end_lending(self, publisher: str) -> dict[str, Any]:
        """As the port says."""
        key = await asyncio.to_thread(self._operations.admission.key_of, publisher)
        was_told = key in self._labs and self._labs[key].told is not None
        await asyncio.to_thread(self._lendings.end, key)
        await self._remembered()
        if was_told and self._line is not None:
            with contextlib.suppress(TetherError):  # it hears nothing of this lab then, and drops it
                await self._line.request(key, "register", msgspec.json.encode(Offer(0)), _GOODBYE)
        return {"publisher": key}

    async def _remembered(self) -> None:
        self._retell()
        await asyncio.to_thread(self._operations.repository.touch)  # so that followers in step have the file soon

    def _hurry(self, key: str) -> None:
        """Try at once what failed before: a person asks for it again, mostly since they mended why."""
        lab = self._labs.get(key)
        if lab is not None and lab.error is not None:
            lab.error = None
            lab.moved.set()

    async def _confirmed(self, key: str) -> None:
        """Wait for the first answer. Raises: it."""
        lab, clock = self._labs.get(key), asyncio.get_running_loop().time
        end = clock() + _REGISTER + _LOOK
        while lab is not None and lab.told is None and lab.error is None:
            if clock() > end:
                raise ServiceUnavailableError("this lab could not register: it leaves the swarm, call again")
            lab.moved.clear()
            await _unless(lab.moved, _LOOK)
        if lab is not None and lab.error is not None:
            raise _advised(lab.error, self._operations.public)

    def _row(self, key: str) -> dict[str, Any]:
        lending, lab = self._lendings.of(key), self._labs.get(key)
        error = None if lab is None else lab.error
        return {
            "publisher": key,
            "models": EVERY if lending is None else lending.models,
            "slots": lab.told.slots if lab and lab.told else (lending.slots if lending else None),
            "state": "registered" if lab is not None and lab.told is not None else "waiting",
            "worker": None if lab is None else lab.worker,
            "error": None if error is None else [error.code, str(error)],
        }

    # --- while this lab is on the swarm

    def begin(self, line: Line) -> None:
        """Register wherever something is lent."""
        self._line = line
        self._retell()

    def retire(self) -> None:
        """Before `aclose`: register nowhere, and begin no request any more. Those that wait for a slot run elsewhere."""
        for lab in self._labs.values():
            lab.turnstile.leave()
            if lab.task is not None:
                lab.task.cancel()

    async def aclose(self) -> None:
        """Register nowhere any more: the other labs hear nothing, and drop this one."""
        self._line = None
        tasks = [lab.task for lab in self._labs.values() if lab.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._labs.clear()

    def _retell(self) -> None:
        """After each change of what is lent."""
        lendings = {each.publisher: each for each in self._lendings.all()}
        self._loans.terms = {key: each.models for key, each in lendings.items()}
        if self._line is None:
            return
        for key in self._labs.keys() - lendings.keys():
            task = self._labs.pop(key).task
            if task is not None:
                task.cancel()
            self._line.readying.stop(key)
        for key, lending in lendings.items():
            if key not in self._labs:
                self._line.welcome(key)
            lab = self._labs.setdefault(key, _Registration(lending))
            if lab.task is None or lab.lending != lending:
                self._line.readying.stop(key)  # what the terms are still for, is asked for again
                lab.lending, lab.told, lab.error = lending, None, None
                lab.moved.set()
            if lab.task is None:
                lab.task = asyncio.create_task(self._keep(key, lab), name=f"lend-{key[:8]}")

    async def _keep(self, key: str, lab: _Registration) -> None:
        """Registered: until cancelled."""
        pause = _AGAIN
        while True:
            try:
                await self._register(key, lab)
                pause = _AGAIN
                await self._while_heard(lab)
                continue
            except TetherError as error:
                self._failed(key, lab, error)
            except Exception:  # a bug: what else is lent goes on
                log.exception("workers could not be lent", to=key)
                self._failed(key, lab, ServiceUnavailableError("this lab failed to register: its log has the traceback"))
            await _unless(lab.moved, pause)
            pause = min(2 * pause, _AT_LAST)

    async def _register(self, key: str, lab: _Registration) -> None:
        lending = lab.lending
        offer = (await self._own_workers().look()).offer(lending)
        lab.turnstile.resize(offer.slots)
        if not offer.workers and lab.told is None:
            raise NoWorkerError("this lab has no worker that runs, so there is none to lend: `tether status` shows them")
        answer = msgspec.json.decode(await self._request(key, "register", msgspec.json.encode(offer), _REGISTER), type=dict[str, Any])
        now = asyncio.get_running_loop().time()
        if not offer.workers:
            raise NoWorkerError("this lab has no worker that runs now: lending goes on when there is one")
        if lab.lending != lending:  # other terms since: they are not confirmed by this
            return
        if lab.told is None:
            log.info("workers are lent", to=key, workers=offer.workers, slots=offer.slots, models=offer.models)
        lab.told, lab.worker, lab.heard, lab.error = offer, str(answer.get("worker")), now, None
        lab.moved.set()

    async def _while_heard(self, lab: _Registration) -> None:
        """Return when there is something else to say, or the other lab asks no more."""
        told, clock = lab.told, asyncio.get_running_loop().time
        while lab.told is told and clock() - lab.heard < _UNHEARD:
            lab.moved.clear()
            await _unless(lab.moved, _LOOK)
            with contextlib.suppress(ServiceUnavailableError):  # the orchestrator is away: what it said last is good
                if (await self._own_workers().look()).offer(lab.lending) != told:
                    return

    def _failed(self, key: str, lab: _Registration, error: TetherError) -> None:
        if lab.error is None or lab.error.code != error.code:
            log.warning("workers are not lent", to=key, code=error.code, error=str(error))
        lab.told, lab.error = None, error
        if isinstance(error, ForbiddenError) and self._line is not None:  # it takes none any more
            self._line.readying.stop(key)
        lab.moved.set()
        lab.moved.clear()

    def _own_workers(self) -> OwnWorkers:
        if self.workers is None:
            raise NoWorkerError("this manager is alone: start a lab on its data folder, its workers are lent then")
        return self.workers

    async def _request(self, key: str, method: str, value: bytes, seconds: float) -> bytes:
        if self._line is None:
            raise ServiceUnavailableError("this lab is not on the swarm now")
        return await self._line.request(key, method, value, seconds)

    # --- what the other labs ask

    def lends(self, peer: str, model: str) -> bool:
        """Whether a lab's own model, by its name for it, is run here."""
        return self._loans.lends(peer, model)

    def pinged(self, peer: str) -> Vitals | None:
        """How the workers that are lent to a lab stand; None: none are. It asked, so it has not forgotten this lab."""
        lab = self._labs.get(peer)
        if lab is None or not self._loans.lends(peer):
            return None
        lab.heard = asyncio.get_running_loop().time()
        staff = self._own_workers().staff
        return Vitals(lab.turnstile.free, round(lab.turnstile.queue, 3), staff.gpus, len(staff.models))

    def turn(self, peer: str) -> AbstractAsyncContextManager[None]:
        """A slot of those that are lent to a lab, for one request. Raises, when it is entered: QueueFullError."""
        lab = self._labs.get(peer)
        if lab is None:
            raise ForbiddenError("no workers are lent to this lab any more")
        return lab.turnstile.turn()

    async def capacity(self, peer: str, wanted: Wanted) -> Readiness:
        """How a version of a lab to which workers are lent stands here; with `load`, once it is made ready.

        Raises: MalformedRequestError: the digest is none; ServiceUnavailableError.
        """
        if not _DIGEST.fullmatch(wanted.digest):
            raise MalformedRequestError("capacity: the digest of a version's manifest has 64 hex digits")
        line, lab = self._line, self._labs.get(peer)
        if line is None or lab is None:
            raise ServiceUnavailableError("this lab is about to leave the swarm: ask again later")
        error = await line.readying.ready(peer, wanted, min(wanted.wait, _MOST_WAIT)) if wanted.load else None
        record = await line.readying.record(peer, wanted)
        staff = await self._own_workers().look()
        loaded = record is not None and f"{record.name}:{record.version}" in staff.models
        told = None if error is None else (error.code, str(error))
        return Readiness(lab.turnstile.free, round(lab.turnstile.queue, 3), record is not None, loaded, told)

    async def standing(self, model: ModelVersion) -> Readiness:
        """How a version of this lab itself stands, for whoever may run it. Raises: ServiceUnavailableError: the orchestrator is away."""
        if self.workers is None:
            raise ServiceUnavailableError("this lab runs no models: its manager is alone")
        staff = await self.workers.look()
        return Readiness(staff.slots, 0.0, cached=True, loaded=str(model) in staff.models)


def _advised(error: TetherError, own: str) -> TetherError:
    if isinstance(error, ForbiddenError):
        return ForbiddenError(
            f"the lab takes no workers of this one ({error}): ask it for `tether invite --scope register`, "
            f"or for `tether allow {Address(own)} --scope register`"
        )
    return error


async def _unless(event: asyncio.Event, seconds: float) -> None:
    """Wait so long, or until it is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _nothing() -> None:
    pass
