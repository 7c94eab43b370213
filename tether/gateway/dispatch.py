"""From a decoded URL to an answer: resolve the model, pick a worker, send, wait where there is none, keep the deadline."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import structlog

from tether.errors import DeadlineExceededError, NoWorkerError, TetherError
from tether.events import GatewayLoad
from tether.gateway.calls import Call, Done, session_of
from tether.gateway.canaries import Canaries
from tether.gateway.contacts import ContactWatch
from tether.gateway.event_log import EventLog
from tether.gateway.lines import Lines
from tether.gateway.parts import Parts
from tether.gateway.retry_after import retry_after
from tether.gateway.suspicion import Suspicion
from tether.gateway.traffic import Traffic
from tether.gateway.tries import Tries
from tether.gateway.waiting import Placing, Waiting, load_error
from tether.ports import Hop, HopReply, Management
from tether.routing.budget import backoff
from tether.routing.health import SILENCE
from tether.routing.shedding import Shedding
from tether.routing.steering import Steering
from tether.routing.table import Table, TableChange, VersionEntry, WorkerEntry
from tether.telemetry.steering_metrics import STEERING
from tether.types import ModelVersion
from tether.wire.oip import encode_error

__all__ = ["ControlPlane", "Dispatch"]

log = structlog.get_logger("tether.gateway")
_SETTLE = 5.0
"""Seconds that an answer about a change waits for the table."""
_CANCELLED = 499
"""Status of a request that nobody waits for."""
_REPEATED = 5.0
"""Seconds after which the orchestrator is told again what it did not hear."""
_SWEEP = 0.05
"""Seconds between looks for open requests past their deadline, and for those that can be tried again."""


class ControlPlane(Placing, Protocol):
    """What the gateway needs of the orchestrator."""

    async def quarantine(self, model: ModelVersion, mark: str | None) -> None:
        """An input of a version is not to be run any more, on any gateway; None: the version is to run in a process of its own.

        Raises: ServiceUnavailableError.
        """
        ...

    async def forgive(self, model: str) -> None:
        """Nothing is held any more against inputs of this model, nor against its versions. Raises: ServiceUnavailableError."""
        ...

    async def explain(self, model: str) -> list[dict[str, Any]]:
        """Why each version of a model is where it is. Raises: ServiceUnavailableError."""
        ...

    async def drain(self, worker: str, patience: float | None, wait: float) -> WorkerEntry:
        """As `ports.Rolling.drain`; None: have it go on. Raises: ServiceUnavailableError, UnknownWorkerError, UnsupportedError."""
        ...

    async def restart_worker(self, worker: str) -> WorkerEntry:
        """As `ports.Rolling.restart_worker`. Raises: as `drain`."""
        ...

    async def load(self, load: GatewayLoad) -> None:
        """Tell what this gateway saw lately. Raises: ServiceUnavailableError."""
        ...

    async def status(self) -> dict[str, Any]:
        """The services of the lab, as `tether status --json` prints them."""
        ...

    async def vitals(self) -> dict[str, Any]:
        """By worker, what it uses and what its models did. Raises: ServiceUnavailableError: the orchestrator does not answer."""
        ...


class Dispatch:
    """Requests of this gateway to workers. Everything runs on one loop; `infer` never blocks."""

    def __init__(self, control: ControlPlane, management: Management, region: str = "") -> None:
        """`region`: where the gateway is, for models whose policy asks for it."""
        self.table = Table()
        self.management = management
        self.events = EventLog()
        self._contacts = ContactWatch(self.events, management)
        self._control = control
        self._shedding = Shedding()
        self._suspicion = Suspicion(lambda model, mark: self._spawn(self._tell(model, mark)))
        self._lines = Lines()
        self._traffic = Traffic(self._lines, self.events, lambda load: self._spawn(self._report(load)), region)
        self._tries = Tries(self, self._lines, self._suspicion)
        self._canaries = Canaries(self._traffic, self.infer)
        self._waiting = Waiting(control, self._spawn, self.fail)
        self._open: set[Call] = set()
        self._pushed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def status(self) -> dict[str, Any]:
        """The services of the lab."""
        return await self._control.status()

    def labelled(self, entry: VersionEntry, right: int, wrong: int) -> None:
        """Labels came for answers of a version."""
        self._traffic.labelled(entry, self.table, right, wrong)

    async def vitals(self) -> dict[str, Any]:
        """By worker, what it uses and what its models did. Raises: ServiceUnavailableError."""
        return await self._control.vitals()

    async def explain(self, model: str) -> list[dict[str, Any]]:
        """As `ControlPlane.explain`."""
        return await self._control.explain(model)

    async def drain(self, worker: str, patience: float | None, wait: float) -> WorkerEntry:
        """As `ControlPlane.drain`."""
        return await self._control.drain(worker, patience, wait)

    async def restart_worker(self, worker: str) -> WorkerEntry:
        """As `ControlPlane.restart_worker`."""
        return await self._control.restart_worker(worker)

    async def forgive(self, model: str) -> None:
        """As `ControlPlane.forgive`, and what it was never told of. Returns when the table says so, as `reflects`."""
        await self._control.forgive(model)
        self._suspicion.forgive(version.model for version in self._versions(model))
        await self._until(lambda: not any(version.poison or version.is_isolated for version in self._versions(model)))

    def _versions(self, model: str) -> list[VersionEntry]:
        entry = self.table.models.get(model)
        return [] if entry is None else list(entry.versions.values())

    async def reflects(self, change: int) -> None:
        """Wait until the table has what the catalog had after `change`, so that who published a model can call it at once.

        Returns all the same after a while: the orchestrator may be away, and the change is durable.
        """
        await self._until(lambda: self.table.catalog >= change)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE):
                while not is_so():
                    self._pushed.clear()
                    await self._pushed.wait()

    def infer(self, model: str, version: str | None, hop: Hop, done: Done) -> Callable[[], None]:
        """Answer one request: `done` is called once, on the loop's thread, perhaps before this returns. The result cancels it."""
        return self._begin(Call(model, version, hop, done))

    def stream(self, model: str, version: str | None, hop: Hop, parts: Parts, done: Done) -> Callable[[], None]:
        """As `infer`, with an answer in parts: the reply that `done` gets ends it, with one more part if it is 200 and has a body."""
        call = Call(model, version, hop, done)
        call.parts = parts
        return self._begin(call)

    def _begin(self, call: Call) -> Callable[[], None]:
        self._open.add(call)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP, self._sweep)
        self._attempt(call, call.begun)
        return lambda: self._cancel(call)

    def replace_table(self, table: Table, change: TableChange | None = None) -> None:
        """A push from the orchestrator. `change`: what made it of the one that is here; None: it may be another one altogether."""
        before, self.table = self.table, table
        was, now = (before, table) if change is None else (before.part(change), table.part(change))
        self._suspicion.follow(was, now)
        self._shedding.follow(table)
        self._traffic.follow(table)
        self.events.see(table, change)
        self._pushed.set()
        if table.follows(before):  # of a new one no version is loaded yet
            self._waiting.follow(was, now)
        self._lines.follow(was.endpoints, now.endpoints)
        self._rescue(before)
        for call in self._canaries.returning(self._open, table):
            self._begin_again(call)
        self._try_again(time.monotonic(), is_other_table=True)

    def used(self) -> list[ModelVersion]:
        """What a new orchestrator must place again."""
        return self._waiting.used()

    def close(self) -> None:
        """Drop the connections and the ring; the end."""
        self._contacts.close()
        self._traffic.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for task in self._tasks:
            task.cancel()
        self._lines.close()

    def answer(self, call: Call, reply: HopReply) -> None:
        """As `Caller.answer`. Whatever else is under way is taken back."""
        if call.trial is not None and call in self._open and self._canaries.takes_back(call, reply):
            self._begin_again(call)
        elif call in self._open:
            self._leave(call, reply.status, reply.body)
            try:
                call.done(reply)
            except Exception:  # what it answers to is gone; the others on this connection are not
                log.exception("an answer could not be given")

    def fail(self, call: Call, error: TetherError) -> None:
        """As `Caller.fail`."""
        self.answer(call, HopReply(error.http_status, encode_error(error), retry_after=retry_after(error)))

    def again(self, call: Call, now: float, *, is_free: bool) -> None:
        """As `Caller.again`: at another worker at once; if there is no other, or the retry budget is spent, after a while."""
        traffic, entry = call.traffic, call.entry
        if call not in self._open or traffic is None or entry is None:
            return
        call.tries += 1
        if traffic.steering.has_other(call.avoid) and (is_free or traffic.steering.budget.take(now)):
            self._attempt(call, now, is_retry=not is_free)
            return
        call.needs_token, call.not_before = not is_free, now + backoff(call.tries, self._traffic.chance)
        self._waiting.for_another_try(call, entry)

    def _attempt(self, call: Call, now: float, *, is_retry: bool = False) -> None:
        try:
            entry = self.table.resolve(call.name, call.version)
            if entry.canary is not None or call.trial is not None:
                entry = self._canaries.chosen(call, entry, self.table)
            call.entry = entry
            call.hop = self._suspicion.admitted(entry, call.hop)
            steering = self._steering(call, entry)  # first, so that who finds no place is counted: more workers are started by it
            if call.place is None and call.parts is None:
                call.place = self._shedding.admitted(self.table, entry, call.hop, call.begun)
        except TetherError as error:
            self.fail(call, error)
            return
        track = steering.choose(session_of(call.hop) if steering.has_sessions else b"", call.avoid, now)
        if track is None:
            self._waiting.for_placement(call, entry)
            return
        if is_retry:
            STEERING.count("retries", entry.model.name, "lost")
        self._tries.send(call, track, now, is_retry=is_retry)
        if steering.hedging is not None and call.hedging is None:
            self._tries.hedge_soon(call)

    def _begin_again(self, call: Call) -> None:
        """At another version."""
        now = time.monotonic()
        self._tries.let_go(call, now)
        call.hedging = None
        self._attempt(call, now)

    def _steering(self, call: Call, entry: VersionEntry) -> Steering:
        """Of the version that it means; it may mean another one than at its first try."""
        traffic = self._traffic.of(entry, self.table)
        if call.traffic is not traffic:
            if call.traffic is not None:
                call.traffic.load.open -= 1
            call.traffic = traffic
            self._traffic.began(traffic)
        return traffic.steering

    def _rescue(self, before: Table) -> None:
        """What a worker has that fell silent goes on at another one. Its connection stays: it may answer still."""
        workers = self.table.workers.values()
        silent = {worker.id for worker in workers if worker.state == "silent"} if self.table.workers is not before.workers else set()
        if silent:
            now = time.monotonic()
            for call in [call for call in self._open if len(call.live) == 1 and call.live[0].track.route.worker in silent]:
                self._tries.send_elsewhere(call, now)

    def _try_again(self, now: float, *, is_other_table: bool = False) -> None:
        """Forget what was answered or cancelled meanwhile; try again what a worker of the table may take.

        A connection can end while its worker stays in the table, so the table need not change first.
        """
        self._waiting.drop(lambda call: call not in self._open)
        for call in self._waiting.take(lambda call: self._is_due(call, now, is_other_table=is_other_table)):
            is_retry, call.needs_token = call.needs_token, False
            if call in self._open and not call.live:  # else a rollout that ended had it begin again meanwhile
                self._attempt(call, now, is_retry=is_retry)

    def _is_due(self, call: Call, now: float, *, is_other_table: bool) -> bool:
        if not is_other_table and (call.entry is None or not call.entry.routes or now < call.not_before):
            return False
        return not call.needs_token or call.traffic is None or call.traffic.steering.budget.take(now)

    async def _tell(self, model: ModelVersion, mark: str | None) -> None:
        """Until it was heard, or is so no more."""
        while self._suspicion.holds(model, mark):
            try:
                await self._control.quarantine(model, mark)
                return
            except TetherError as error:
                log.warning("the orchestrator was not told of a quarantine", model=str(model), error=str(error))
            await asyncio.sleep(_REPEATED)

    async def _report(self, load: GatewayLoad) -> None:
        """What is not heard is out of date by the next time."""
        with contextlib.suppress(TetherError):
            await self._control.load(load)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _sweep(self) -> None:
        now = time.monotonic()
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP, self._sweep) if self._open else None
        longest = now - SILENCE
        for call in list(self._open):
            if call.deadline < now or (call.parts is not None and call.parts.are_late(now)):
                self.fail(call, self._late(call))
            elif call.begun < longest:
                self._tries.look(call, now)
        self._try_again(now)

    def _late(self, call: Call) -> TetherError:
        patience = call.parts.patience if call.parts is not None else None
        waited = f"no answer within {patience or call.hop.timeout:g} s"
        if call.live or call.losses:
            return DeadlineExceededError(f"{waited}; give a longer timeout or a smaller batch")
        if reason := self._shortage(call):
            return load_error(reason[0], reason[1])
        return NoWorkerError(f"{waited}: no worker holds {call.name!r}; `tether status` shows the workers, `tether logs orchestrator` why")

    def _shortage(self, call: Call) -> tuple[ModelVersion, str] | None:
        """Why the version is still waited for, if a worker has said it."""
        with contextlib.suppress(TetherError):
            entry = self.table.resolve(call.name, call.version)
            return (entry.model, entry.reason) if entry.reason else None
        return None

    def _cancel(self, call: Call) -> None:
        if call in self._open:
            self._leave(call, _CANCELLED)

    def _leave(self, call: Call, status: int, body: bytes = b"") -> None:
        now = time.monotonic()
        self._open.discard(call)
        if call.live or call.hedging is not None:
            self._tries.let_go(call, now)
        if call.place is not None:
            call.place.leave(now, status)
        if call.traffic is not None:
            call.traffic.load.ended(status, body, now - call.begun)
