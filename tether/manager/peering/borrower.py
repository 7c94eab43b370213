"""Takes the workers that other labs lend: holds the line to each, tells the orchestrator who is there, loads and runs models over it."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import structlog

from tether.errors import (
    DeadlineExceededError,
    ForbiddenError,
    MalformedRequestError,
    NotFoundError,
    PeerFailedError,
    PeerLeavingError,
    PeerNotFoundError,
    PeerUnreachableError,
    ProtocolError,
    ServiceUnavailableError,
    TetherError,
    UnavailableError,
    UnsupportedError,
    from_code,
)
from tether.events import LentWorker
from tether.manager.hops import HopServer
from tether.manager.operations import Operations
from tether.manager.peering import lent_hops
from tether.manager.peering.lent_state import INTERVAL, SILENCE, LentState, Offer, Vitals, worker_of
from tether.manager.peering.loans import Loans
from tether.manager.peering.readying import Readiness, Wanted
from tether.ports import Hop, HopReply, Undelivered
from tether.types import ModelVersion

__all__ = ["Borrower", "Request"]

log = structlog.get_logger("tether.swarm")
_TURN: Final = 0.1
"""Seconds between turns: how late a lab may be asked, or given up."""
_DIAL: Final = 10.0
"""Seconds for finding a lab that is not connected, and its answer."""
_WAIT: Final = 10.0
"""Seconds for which a lab keeps an answer back while it loads."""
_GRACE: Final = 10.0
"""Seconds that it may take longer, in all."""
_AGAIN: Final = 0.5
"""Seconds until it is asked on, where the line failed and was not given up."""

_LAST: Final = 10.0
"""Seconds that requests may still take at a lab that is about to end: as long as it waits for them itself."""


class Request(Protocol):
    """`Node.request`."""

    async def __call__(self, peer: str, method: str, value: bytes, timeout: float, *, patient: bool = True) -> bytes:  # noqa: ASYNC109 (its signature)
        """Raises: TetherError."""
        ...


class _Pong(msgspec.Struct):
    lent: Vitals | None = None
    """None: it lends nothing to this lab."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A version at one lab."""

    peer: str
    number: int
    model: ModelVersion


class Borrower:
    """Of one lab: `manager.borrowing.Borrowing`. Belongs to one event loop."""

    def __init__(self, operations: Operations, loans: Loans, folder: Path) -> None:
        """`folder`: for sockets."""
        self._operations, self._loans, self._folder = operations, loans, folder
        self.tell: Callable[[tuple[LentWorker, ...]], None] | None = None
        """Told who is there, at each change; None: this manager has no orchestrator, and borrows nothing."""
        self._request: Request | None = None
        self._state = LentState(time.monotonic())
        self._told: tuple[LentWorker, ...] = ()
        self._servers: dict[_Loaded, HopServer | None] = {}
        """None: it is being loaded."""
        self._closed: dict[_Loaded, str] = {}
        """Endpoints of what is not there any more, and was not loaded again."""
        self._loading: dict[_Loaded, asyncio.Task[Path]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- while this lab is on the swarm

    def begin(self, request: Request) -> None:
        """Take what is lent from now on."""
        self._request = request
        self._spawn(self._run())

    async def retire(self, grace: float) -> None:
        """Before `aclose`: no request begins any more, those under way have `grace` seconds."""
        before = set(self._tasks)
        self._state.forget()
        self._settle(grace)
        await asyncio.gather(*(self._tasks - before))

    async def aclose(self) -> None:
        """Take nothing any more; who lends hears nothing, and registers again with whoever comes next."""
        self._request = None
        for task in (*self._tasks, *self._loading.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loading.values(), return_exceptions=True)
        self._state.forget()
        self._settle()
        await asyncio.gather(*self._tasks)

    async def register(self, peer: str, value: bytes) -> bytes:
        """A lab with the scope for it offers workers, or ends that: `register`. It is asked back before it is confirmed.

        Raises: MalformedRequestError, BadInputError; PeerUnreachableError: it can't be asked back; ForbiddenError: it lends nothing to this
        lab; QueueFullError, UnsupportedError; ServiceUnavailableError: this lab left the swarm meanwhile.
        """
        offer = _offered(value)
        if self.tell is None:
            raise UnsupportedError("this lab has no orchestrator that could use workers: its owner has to start one (`tether up`)")
        if not offer.workers:
            self._end(peer, "it lends no more")
            return msgspec.json.encode({"worker": None, "interval": INTERVAL})
        self._state.check_room(peer)
        vitals = await self._asked_back(peer)
        self._operations.access.check(peer, "register")  # it may have been taken back meanwhile
        if self._request is None:
            raise ServiceUnavailableError("this lab leaves the swarm: register again when it is back")
        self._state.register(peer, offer, vitals, time.monotonic())
        if self._settle():
            log.info("workers are borrowed", of=peer, workers=offer.workers, gpus=offer.gpus, slots=offer.slots, models=offer.models)
        return msgspec.json.encode({"worker": worker_of(peer), "interval": INTERVAL})

    def revoked(self, peer: str) -> None:
        """It may lend no more."""
        self._end(peer, "it may no more")

    async def borrowings(self) -> list[dict[str, Any]]:
        """As the port says."""
        return [_row(worker, self._state.vitals_of(worker.peer) or Vitals()) for worker in self._state.workers]

    async def _asked_back(self, peer: str) -> Vitals:
        try:
            vitals = await self._ping(peer, _DIAL)
        except (PeerNotFoundError, PeerUnreachableError, DeadlineExceededError) as error:
            raise PeerUnreachableError(
                f"this lab can't reach the one that lends ({error}): `tether doctor` there says what keeps others from reaching it", "EBACK"
            ) from error
        except ForbiddenError:
            vitals = None
        if vitals is None:
            raise ForbiddenError("the lab that registers lends nothing to this one: `tether lend` there comes first")
        return vitals

    async def _ping(self, peer: str, seconds: float, *, patient: bool = True) -> Vitals | None:
        """Raises: TetherError; ProtocolError: its answer is none."""
        answer = await self._requested(peer, "ping", b"", seconds, patient=patient)
        try:
            return msgspec.json.decode(answer, type=_Pong).lent
        except msgspec.DecodeError as error:
            raise ProtocolError(f"lab {peer} answered a ping with something else: {error}") from None

    async def _run(self) -> None:
        while True:
            turn = self._state.turn(time.monotonic())
            for peer in turn.lost:
                log.warning("a lab that lends workers does not answer: its workers are out", of=peer, seconds=SILENCE)
            if turn.lost:
                self._settle()
            for peer in turn.ask:
                self._spawn(self._ask(peer))
            await asyncio.sleep(_TURN)

    async def _ask(self, peer: str) -> None:
        is_up = self._state.vitals_of(peer) is not None
        try:
            vitals = await self._ping(peer, SILENCE if is_up else _DIAL, patient=not is_up)
        except ForbiddenError:
            vitals = None
        except PeerLeavingError:
            self._leaves(peer)
            self._state.failed(peer, time.monotonic())
            return
        except TetherError as error:
            log.debug("a lab that lends workers did not answer", of=peer, code=error.code)
            self._state.failed(peer, time.monotonic())
            return
        except Exception:  # a bug: it is asked again, and out if that goes on
            log.exception("a lab that lends workers could not be asked", of=peer)
            self._state.failed(peer, time.monotonic())
            return
        if vitals is None:
            self._end(peer, "it lends no more")
            return
        self._state.answered(peer, vitals, time.monotonic())
        if self._settle():
            log.info("a lab that lends workers is back", of=peer)

    def _leaves(self, peer: str) -> None:
        """It takes no requests any more; those that it has it ends."""
        if self._state.leaves(peer, time.monotonic()):
            log.info("a lab that lends workers is about to end: its workers are out", of=peer)
            self._settle(_LAST)

    def _end(self, peer: str, why: str) -> None:
        if self._state.end(peer):
            log.info("workers are borrowed no more", of=peer, why=why)
            self._settle()

    def _settle(self, grace: float = 0.0) -> bool:
        """Tell who is there, where that changed, and close what leads to others; `grace`: seconds for what is under way there."""
        workers = tuple(msgspec.structs.replace(each, closed=self._closed_of(each)) for each in self._state.workers)
        if workers == self._told:
            return False
        self._told = workers
        there = {(each.peer, each.number) for each in workers}
        self._closed = {loaded: endpoint for loaded, endpoint in self._closed.items() if (loaded.peer, loaded.number) in there}
        for loaded in [each for each in self._servers if (each.peer, each.number) not in there]:
            self._drop(loaded, grace)
        if self.tell is not None:
            self.tell(workers)
        return True

    def _closed_of(self, worker: LentWorker) -> tuple[str, ...]:
        return tuple(end for loaded, end in self._closed.items() if (loaded.peer, loaded.number) == (worker.peer, worker.number))

    # --- what the orchestrator asks

    async def load(self, worker: str, number: int, model: ModelVersion) -> Path:
        """As the protocol says. Raises: NotFoundError: this registration is over; UnsupportedError; what the other lab says."""
        loaded = self._loaded(worker, number, model)
        offer = self._state.offer_of(loaded.peer)
        if "~" in model.name or offer is None or not offer.covers(model.name):
            raise UnsupportedError(f"{worker} runs {offer.models if offer else 'nothing'} of this lab's own models, not {model.name}")
        loading = self._loading.get(loaded)
        if loading is None:
            loading = self._loading[loaded] = asyncio.create_task(self._load(loaded), name=f"lent-{model}")
            loading.add_done_callback(functools.partial(self._ended, loaded))
        await asyncio.wait([loading])
        if loading.cancelled():
            raise NotFoundError(f"{worker} went away while it loaded {model}: the table says so soon")
        return loading.result()

    def _ended(self, loaded: _Loaded, loading: asyncio.Task[Path]) -> None:
        self._loading.pop(loaded, None)
        if not loading.cancelled():
            loading.exception()  # who asked may be gone; asked again, it is tried again

    async def unload(self, worker: str, number: int, model: ModelVersion) -> None:
        """As the protocol says. Raises: NotFoundError."""
        self._drop(self._loaded(worker, number, model))

    def _loaded(self, worker: str, number: int, model: ModelVersion) -> _Loaded:
        peer = self._state.peer_of(worker, number)
        if peer is None:
            raise NotFoundError(f"{worker} is not here any more, or registered anew: the table says so soon")
        return _Loaded(peer, number, model)

    async def _load(self, loaded: _Loaded) -> Path:
        server = self._servers.setdefault(loaded, None)
        if server is not None:
            return server.endpoint
        self._open_up(loaded.peer)
        try:
            await self._ready(loaded)
            self._loaded(worker_of(loaded.peer), loaded.number, loaded.model)  # while it loaded, the line may have been lost
            opened = HopServer(self._folder, lambda hop: self._infer(loaded, opened, hop))
            opened.start()
            server = self._servers[loaded] = opened
            if self._closed.pop(loaded, None):
                self._settle()
        finally:
            if server is None:
                self._drop(loaded)
        return server.endpoint

    async def _ready(self, loaded: _Loaded) -> None:
        """Return when the other lab has it loaded. Raises: why it can't; NotFoundError: the line was given up."""
        model = loaded.model
        wanted = Wanted(model.name, model.version, model.digest, load=True, wait=_WAIT)
        clock = asyncio.get_running_loop().time
        while True:
            asked = clock()
            self._loaded(worker_of(loaded.peer), loaded.number, model)
            try:
                answer = await self._asked(loaded.peer, wanted)
            except UnavailableError as error:  # until the line is given up, it may only have been cut
                log.info("a lab that lends workers did not say how far a load is", of=loaded.peer, code=error.code)
                await asyncio.sleep(_AGAIN)
                continue
            if answer.error is not None:
                raise from_code(*answer.error)
            if answer.loaded:
                return
            await asyncio.sleep(asked + _AGAIN - clock())  # where it has not waited itself

    async def _asked(self, peer: str, wanted: Wanted) -> Readiness:
        answer = await self._requested(peer, "capacity", msgspec.json.encode(wanted), _WAIT + _GRACE)
        try:
            return msgspec.json.decode(answer, type=Readiness)
        except msgspec.DecodeError as error:
            raise PeerFailedError(f"lab {peer} does not say how {wanted.model} stands there: {error}", "capacity") from None

    async def _infer(self, loaded: _Loaded, server: HopServer, hop: Hop) -> HopReply | Undelivered:
        """Run one request there; where it is about to end, another worker is not waited for here."""
        try:
            value = lent_hops.asked(hop, self._operations.public, loaded.model)
            answer = await self._requested(loaded.peer, "infer", value, hop.timeout, patient=False)
            return lent_hops.replied(answer, loaded.model)
        except PeerLeavingError as error:
            self._leaves(loaded.peer)
            return lent_hops.failed(error)
        except NotFoundError as error:
            self._gone(loaded, server)
            return lent_hops.failed(error)
        except TetherError as error:
            return lent_hops.failed(error)

    def _gone(self, loaded: _Loaded, server: HopServer) -> None:
        """It was deleted there: the orchestrator is told, and has it loaded again, there or elsewhere."""
        if self._servers.get(loaded) is server:
            log.info("a lab that lends workers has a version no more", of=loaded.peer, version=str(loaded.model))
            self._drop(loaded, _LAST)
            self._closed[loaded] = str(server.endpoint)
            self._settle()

    async def _requested(self, peer: str, method: str, value: bytes, seconds: float, *, patient: bool = True) -> bytes:
        """Raises: PeerUnreachableError: this lab is not on the swarm now; what the other one answers, or the way to it."""
        if self._request is None:
            raise PeerUnreachableError("this lab leaves the swarm: lent workers are there again when it is back", "ECLOSED")
        return await self._request(peer, method, value, seconds, patient=patient)

    def _drop(self, loaded: _Loaded, grace: float = 0.0) -> None:
        server = self._servers.pop(loaded, None)
        self._open_up(loaded.peer)
        loading = self._loading.get(loaded)
        if loading is not None and loading is not asyncio.current_task():
            loading.cancel()
        if server is not None:
            self._spawn(server.retire(grace) if grace else server.aclose())

    def _open_up(self, peer: str) -> None:
        """To a lab that runs models, their versions are open: it has to have them."""
        names = frozenset(each.model.name for each in self._servers if each.peer == peer)
        others = {key: given for key, given in self._loans.given.items() if key != peer}
        self._loans.given = {**others, peer: names} if names else others

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _row(worker: LentWorker, vitals: Vitals) -> dict[str, Any]:
    told = {"worker": worker.id, "publisher": worker.peer, "models": worker.models, "slots": worker.slots}
    return told | {"free": vitals.slots, "queue": vitals.queue, "gpus": worker.gpus, "loaded": vitals.models}


def _offered(value: bytes) -> Offer:
    """Raises: MalformedRequestError, BadInputError: it is none."""
    try:
        return msgspec.json.decode(value, type=Offer).checked()
    except msgspec.DecodeError as error:
        raise MalformedRequestError(f"register: the value is {{workers, gpus, slots, models}}: {error}") from None
