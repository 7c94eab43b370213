"""From a decoded URL to an answer: resolve the model, pick a worker, send, try again where that is safe, keep the deadline."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import structlog

from tether.errors import DeadlineExceededError, InternalError, LoadFailedError, NoWorkerError, TetherError, WorkerLostError, from_code
from tether.gateway.contacts import ContactWatch
from tether.gateway.event_log import EventLog
from tether.gateway.parts import Parts
from tether.gateway.suspicion import TELLING, Suspicion
from tether.gateway.transport import UnixTransport
from tether.ports import Endpoint, Hop, HopReply, Management, Undelivered
from tether.routing.policies import least_outstanding
from tether.routing.table import Route, Table, VersionEntry
from tether.types import ModelVersion
from tether.wire.oip import encode_error
from tether.wire.ring import Ring

__all__ = ["ControlPlane", "Dispatch"]

log = structlog.get_logger("tether.gateway")
Done = Callable[[HopReply], None]
_RING_NBYTES = 256 << 20
"""Room for a few of the largest bodies; pages are taken only when touched."""
_SETTLE = 5.0
"""Seconds that an answer about a change waits for the table."""
_LOSSES = 5
"""Workers that may go away with one request before it is given up; after two it runs where it ends none (`suspicion.py`)."""
_SWEEP = 0.05
"""Seconds between looks for open requests past their deadline, and for those that can be tried again."""


class ControlPlane(Protocol):
    """What the gateway needs of the orchestrator."""

    async def want(self, model: ModelVersion) -> tuple[str, str]:
        """Ask for a version to be loaded: its state after placement, and the reason when it failed.

        Raises: ServiceUnavailableError: the orchestrator does not answer.
        """
        ...

    async def quarantine(self, model: ModelVersion, mark: str | None) -> None:
        """An input of a version is not to be run any more, on any gateway; None: the version is to run in a process of its own.

        Raises: ServiceUnavailableError.
        """
        ...

    async def forgive(self, model: str) -> None:
        """Nothing is held any more against inputs of this model, nor against its versions. Raises: ServiceUnavailableError."""
        ...

    async def status(self) -> dict[str, Any]:
        """The services of the lab, as `tether status --json` prints them."""
        ...

    async def vitals(self) -> dict[str, Any]:
        """By worker, what it uses and what its models did. Raises: ServiceUnavailableError: the orchestrator does not answer."""
        ...


class _Call:
    """One request from admission to its reply."""

    __slots__ = ("abandon", "avoid", "deadline", "done", "entry", "hop", "losses", "name", "parts", "version")

    def __init__(self, name: str, version: str | None, hop: Hop, done: Done) -> None:
        self.name, self.version, self.hop, self.done = name, version, hop, done
        self.deadline = time.monotonic() + hop.timeout
        self.parts: Parts | None = None
        """Of an answer that comes in parts."""
        self.losses = 0
        self.avoid: list[Route] = []
        self.abandon: Callable[[], None] | None = None
        self.entry: VersionEntry | None = None


class Dispatch:
    """Requests of this gateway to workers. Everything runs on one loop; `infer` never blocks."""

    def __init__(self, control: ControlPlane, management: Management) -> None:
        self.table = Table()
        self.management = management
        self.events = EventLog()
        self._contacts = ContactWatch(self.events, management)
        self._control = control
        self._ring = _make_ring()
        self._transports: dict[Endpoint, UnixTransport] = {}
        self._pending: dict[ModelVersion, deque[_Call]] = {}
        """Calls that wait for their version to be loaded somewhere."""
        self._suspicion = Suspicion(lambda model, mark: self._spawn(self._tell(model, mark)))
        self._open: set[_Call] = set()
        self._pushed = asyncio.Event()
        self._used: set[ModelVersion] = set()
        """Versions asked for since the start: a new orchestrator is told of them."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def status(self) -> dict[str, Any]:
        """The services of the lab."""
        return await self._control.status()

    async def vitals(self) -> dict[str, Any]:
        """By worker, what it uses and what its models did. Raises: ServiceUnavailableError."""
        return await self._control.vitals()

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
        return self._begin(_Call(model, version, hop, done))

    def stream(self, model: str, version: str | None, hop: Hop, parts: Parts, done: Done) -> Callable[[], None]:
        """As `infer`, with an answer in parts: the reply that `done` gets ends it, with one more part if it is 200 and has a body."""
        call = _Call(model, version, hop, done)
        call.parts = parts
        return self._begin(call)

    def _begin(self, call: _Call) -> Callable[[], None]:
        self._open.add(call)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP, self._sweep)
        self._attempt(call)
        return lambda: self._cancel(call)

    def replace_table(self, table: Table) -> None:
        """A push from the orchestrator."""
        before, self.table = self.table, table
        self._suspicion.follow(before, table)
        self.events.see(table)
        self._pushed.set()
        self._forget_evicted(before)
        live = {route.endpoint for entry in table.models.values() for version in entry.versions.values() for route in version.routes}
        for endpoint in [endpoint for endpoint in self._transports if endpoint not in live]:
            transport = self._transports[endpoint]
            if transport.closed or transport.in_flight == 0:
                del self._transports[endpoint]
                transport.close()
        waiting, self._pending = self._pending, {}
        for calls in waiting.values():
            for call in calls:
                if call in self._open:
                    self._attempt(call)

    def _forget_evicted(self, before: Table) -> None:
        """What others put out of memory is not to be placed again by a new orchestrator, of which no version is loaded yet."""
        if self.table.seq > before.seq:
            versions = (version for entry in self.table.models.values() for version in entry.versions.values())
            self._used &= {version.model for version in versions if version.state != "unloaded"} | self._pending.keys()

    def used(self) -> list[ModelVersion]:
        """What a new orchestrator must place again."""
        return list(self._used)

    def close(self) -> None:
        """Drop the connections and the ring; the end."""
        self._contacts.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for task in self._tasks:
            task.cancel()
        for transport in list(self._transports.values()):
            transport.close()
        if self._ring is not None:
            self._ring.close()

    def _attempt(self, call: _Call) -> None:
        try:
            entry = call.entry = self.table.resolve(call.name, call.version)
            call.hop = self._suspicion.admitted(entry, call.hop)
        except TetherError as error:
            self._fail(call, error)
            return
        route = least_outstanding(entry.routes, self._outstanding, call.avoid)
        if route is None:
            self._await_placement(call, entry)
            return
        transport, parts = self._transport(route), call.parts
        if parts is None:
            call.abandon = transport.send(call.hop, lambda reply: self._replied(call, route, reply))
        else:
            sent = transport.stream(call.hop, parts.came, lambda reply: self._replied(call, route, reply))
            call.abandon = sent.cancel
            parts.sent(sent.taken)

    def _outstanding(self, route: Route) -> int:
        transport = self._transports.get(route.endpoint)
        return transport.in_flight if transport is not None and not transport.closed else 0

    def _transport(self, route: Route) -> UnixTransport:
        transport = self._transports.get(route.endpoint)
        if transport is None or transport.closed:
            transport = self._transports[route.endpoint] = UnixTransport(route.endpoint, self._ring)
        return transport

    def _replied(self, call: _Call, route: Route, reply: HopReply | Undelivered) -> None:
        if isinstance(reply, HopReply) and call.entry is not None and (reply.status in TELLING or call.hop.alone):
            reply = self._suspicion.judged(call.entry, call.hop, reply)
        if isinstance(reply, HopReply):
            self._finish(call, reply)
            return
        call.avoid.append(route)
        if reply is Undelivered.NOT_SENT:
            call.abandon = None
            self._retry(call)
        else:
            self._lost(call, route)

    def _lost(self, call: _Call, route: Route) -> None:
        """The worker may have run it: only a pure model is asked again."""
        call.losses += 1
        entry = call.entry
        if call.parts is not None and call.parts.have_begun:
            self._fail(call, WorkerLostError("the worker went away in the middle of the stream: only you know whether to ask again"))
            return
        if entry is not None:
            call.hop = self._suspicion.lost(entry, route, call.hop)
        if entry is None or not entry.info.pure:
            self._fail(
                call, WorkerLostError("the worker went away; the model is not pure, so only you know whether to send the request again")
            )
        elif call.losses >= _LOSSES:
            self._fail(call, WorkerLostError(f"{call.losses} workers went away while they had this request; try again later"))
        else:
            self._retry(call)

    def _retry(self, call: _Call) -> None:
        """On another worker at once; if there is no other, soon, on whichever there is then."""
        entry = call.entry
        if entry is None or call not in self._open:
            return
        if any(route not in call.avoid for route in entry.routes):
            self._attempt(call)
        else:
            self._pending.setdefault(entry.model, deque()).append(call)

    def _await_placement(self, call: _Call, entry: VersionEntry) -> None:
        first = entry.model not in self._pending
        self._pending.setdefault(entry.model, deque()).append(call)
        self._used.add(entry.model)
        if first and entry.state != "loading":
            self._spawn(self._want(entry.model))

    async def _want(self, model: ModelVersion) -> None:
        try:
            state, reason = await self._control.want(model)
        except TetherError as error:
            self._fail_pending(model, error)
            return
        except Exception:
            log.exception("asking for a model failed", model=str(model))
            self._fail_pending(model, InternalError("the gateway failed to ask for the model; its log has the traceback"))
            return
        if state == "failed":
            self._fail_pending(model, _load_error(model, reason))

    async def _tell(self, model: ModelVersion, mark: str | None) -> None:
        """Who does not hear it is told when it is back (`Suspicion.follow`)."""
        try:
            await self._control.quarantine(model, mark)
        except TetherError as error:
            log.warning("the orchestrator was not told of a quarantine", model=str(model), error=str(error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _fail_pending(self, model: ModelVersion, error: TetherError) -> None:
        for call in self._pending.pop(model, ()):
            self._fail(call, error)

    def _sweep(self) -> None:
        now = time.monotonic()
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP, self._sweep) if self._open else None
        for call in [call for call in self._open if call.deadline < now or (call.parts is not None and call.parts.are_late(now))]:
            if call.abandon is not None:
                call.abandon()
            self._fail(call, self._late(call))
        self._retry_pending()

    def _retry_pending(self) -> None:
        """Forget what was answered or cancelled meanwhile; try again what a worker of the table may take.

        A connection can end while its worker stays in the table, so the table need not change first.
        """
        waiting, self._pending = self._pending, {}
        for model, calls in waiting.items():
            for call in [call for call in calls if call in self._open]:
                if call.entry is not None and call.entry.routes:
                    self._attempt(call)
                else:
                    self._pending.setdefault(model, deque()).append(call)

    def _late(self, call: _Call) -> TetherError:
        patience = call.parts.patience if call.parts is not None else None
        waited = f"no answer within {patience or call.hop.timeout:g} s"
        if call.abandon is not None:
            return DeadlineExceededError(f"{waited}; give a longer timeout or a smaller batch")
        if reason := self._shortage(call):
            return _load_error(reason[0], reason[1])
        return NoWorkerError(f"{waited}: no worker holds {call.name!r}; `tether status` shows the workers, `tether logs orchestrator` why")

    def _shortage(self, call: _Call) -> tuple[ModelVersion, str] | None:
        """Why the version is still waited for, if a worker has said it."""
        with contextlib.suppress(TetherError):
            entry = self.table.resolve(call.name, call.version)
            return (entry.model, entry.reason) if entry.reason else None
        return None

    def _cancel(self, call: _Call) -> None:
        if call in self._open:
            self._open.discard(call)
            if call.abandon is not None:
                call.abandon()

    def _fail(self, call: _Call, error: TetherError) -> None:
        self._finish(call, HopReply(error.http_status, encode_error(error)))

    def _finish(self, call: _Call, reply: HopReply) -> None:
        if call in self._open:
            self._open.discard(call)
            try:
                call.done(reply)
            except Exception:  # what it answers to is gone; the others on this connection are not
                log.exception("an answer could not be given")


def _load_error(model: ModelVersion, reason: str) -> TetherError:
    """What the worker said, as the same error of the tree."""
    code, _, message = reason.partition(": ")
    error = from_code(code, f"{model} can't be loaded: {message}")
    return error if type(error) is not TetherError else LoadFailedError(f"{model} can't be loaded: {reason}")


def _make_ring() -> Ring | None:
    """None where the platform has no memfd: large bodies then travel in frames."""
    try:
        return Ring(_RING_NBYTES)
    except (AttributeError, OSError):
        return None
