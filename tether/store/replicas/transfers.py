"""Carries out what `fetching` decides, on one event loop: asks sources, checks every byte, hands it to all who wait."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar, assert_never

import structlog

from tether.errors import ChunkMissingError, ServiceUnavailableError, TetherError
from tether.ports import BlobSource, SignedManifest
from tether.store.format.layout import BLOB_NBYTES
from tether.store.format.manifest import digest_of
from tether.store.replicas.fetching import (
    AHEAD,
    Abandon,
    Absent,
    Arrived,
    Ask,
    Event,
    Failed,
    Fetching,
    FetchRules,
    GiveUp,
    Instruction,
    Lied,
    Wanted,
)
from tether.store.replicas.searching import answers, is_genuine
from tether.types import Digest

__all__ = ["Traffic", "Transfers"]

log = structlog.get_logger("tether.store")
Answer = TypeVar("Answer")
Look = Callable[[Wanted], bytes | None]
"""Gives a blob that is here already, verified; None: it has to be fetched. Blocks."""
Keep = Callable[[Digest, bytes], None]
"""Stores a verified blob. Blocks."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one source gave so far."""

    source: str
    blobs: int = 0
    nbytes_fetched: int = 0
    """Of blobs and manifests that were what they should be."""
    failures: int = 0
    """Calls that it did not answer."""
    banned: bool = False
    """It gave other bytes than it was asked for, and is not asked again."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A blob on its way, once for all who want it."""

    wanted: Wanted
    urgency: int
    done: asyncio.Future[bytes]
    waiting: int = 0
    asked: bool = False
    """Whether `fetching` knows of it: from when it is known not to be here until it came."""
    came: bool = False
    """It is being stored."""


class Transfers:
    """All fetching into one store. Belongs to the event loop that makes the first call."""

    def __init__(self, sources: Sequence[BlobSource], look: Look, keep: Keep, rules: FetchRules) -> None:
        self._sources, self._look, self._keep, self._rules = sources, look, keep, rules
        self._fetching = Fetching([source.in_flight for source in sources], rules)
        self._traffic = [Traffic(source.name) for source in sources]
        self._flights: dict[Digest, _Flight] = {}
        self._asking: dict[tuple[int, Digest], asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._closed = False
        # Hashing and writing let go of the interpreter; two keep up with 2 GB/s.
        self._threads = ThreadPoolExecutor(2, "fetch")

    def traffic(self) -> tuple[Traffic, ...]:
        """What each source gave; from any thread."""
        return tuple(self._traffic)

    async def in_thread(self, work: Callable[..., Answer], *arguments: Any) -> Answer:
        """As `asyncio.to_thread`, in the threads of this object."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    # --- blobs

    async def fetch(self, wanted: Wanted, urgency: int) -> bytes:
        """The verified bytes, from here or from a source; once, however many ask. Cancelled, the others still get theirs.

        Raises: ChunkMissingError: no source has it; ServiceUnavailableError: one that may have it did not answer in time;
        NoSpaceError, StoreError: it came and could not be kept.
        """
        flight = self._flight(wanted, urgency)
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.done)
        finally:
            flight.waiting -= 1
            if not flight.waiting and flight.urgency != AHEAD:
                self._land(flight)

    def read_ahead(self, wants: Iterable[Wanted]) -> None:
        """Fetch these too, behind all that somebody waits for."""
        for wanted in wants:
            self._flight(wanted, AHEAD)

    async def in_order(self, wants: Iterable[Wanted], urgency: int) -> AsyncGenerator[tuple[Wanted, bytes], None]:
        """Each blob in its turn, those behind it being fetched meanwhile, `max_nbytes` of them. Ended early, it cancels those."""
        coming = deque[tuple[Wanted, asyncio.Task[bytes]]]()
        nbytes, source = 0, iter(wants)
        try:
            while True:
                while nbytes < self._rules.max_nbytes and (wanted := next(source, None)) is not None:
                    coming.append((wanted, asyncio.create_task(self.fetch(wanted, urgency))))
                    nbytes += wanted.nbytes
                if not coming:
                    return
                wanted, task = coming[0]
                await asyncio.wait([task])  # whose cancelling is for `finally`: alone, it would make room for the next asking
                coming.popleft()
                nbytes -= wanted.nbytes
                yield wanted, task.result()
        finally:
            await _cancelled(task for _, task in reversed(coming))  # the last first: no room is made for one that ends as well

    def _flight(self, wanted: Wanted, urgency: int) -> _Flight:
        flight = self._flights.get(wanted.digest)
        if flight is None:
            flight = _Flight(wanted, urgency, asyncio.get_running_loop().create_future())
            flight.done.add_done_callback(_seen)
            self._flights[wanted.digest] = flight
            self._spawn(self._depart(flight))
        elif urgency < flight.urgency:
            flight.urgency = urgency
            if flight.asked:
                self._act(self._fetching.want(wanted, urgency, _now()))
        return flight

    async def _depart(self, flight: _Flight) -> None:
        """Look here first, inside of the flight: who asks when it has just landed finds the blob and does not fetch it again."""
        try:
            data = await self.in_thread(self._look, flight.wanted)
        except Exception as error:  # whoever waits is told
            self._fail(flight, error)
            return
        if data is not None:
            self._succeed(flight, data)
        elif not self._closed and self._flights.get(flight.wanted.digest) is flight:
            flight.asked = True
            self._act(self._fetching.want(flight.wanted, flight.urgency, _now()))

    def _succeed(self, flight: _Flight, data: bytes) -> None:
        if self._flights.get(flight.wanted.digest) is flight:
            del self._flights[flight.wanted.digest]
        if not flight.done.done():
            flight.done.set_result(data)

    def _fail(self, flight: _Flight, error: Exception) -> None:
        if self._flights.get(flight.wanted.digest) is flight:
            del self._flights[flight.wanted.digest]
        if not flight.done.done():
            flight.done.set_exception(error)

    def _land(self, flight: _Flight) -> None:
        """Nobody waits any more."""
        if flight.came or flight.done.done() or self._flights.get(flight.wanted.digest) is not flight:
            return
        del self._flights[flight.wanted.digest]
        flight.done.cancel()
        self._act(self._fetching.unwant(flight.wanted.digest, _now()))

    # --- instructions

    def _act(self, instructions: Iterable[Instruction]) -> None:
        if self._closed:
            return
        for instruction in instructions:
            match instruction:
                case Ask(source, wanted):
                    self._asking[source, wanted.digest] = self._spawn(self._ask(source, wanted))
                case Abandon(source, digest):
                    task = self._asking.pop((source, digest), None)
                    if task is not None:
                        task.cancel()
                case GiveUp(wanted, silent):
                    self._give_up(wanted, silent)
                case _:
                    assert_never(instruction)
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        now = _now()
        due = self._fetching.next_tick(now)
        self._alarm = None if due is None else asyncio.get_running_loop().call_later(max(0.001, due - now), self._tick)

    def _tick(self) -> None:
        self._act(self._fetching.tick(_now()))

    def _give_up(self, wanted: Wanted, silent: tuple[int, ...]) -> None:
        flight = self._flights.get(wanted.digest)
        if flight is not None:
            self._fail(flight, self._not_found(f"blob {wanted.digest} (needed by {wanted.path})", wanted, silent))

    def _not_found(self, what: str, wanted: Wanted, silent: Sequence[int]) -> TetherError:
        if silent:
            names = ", ".join(self._sources[number].name for number in silent)
            return ServiceUnavailableError(
                f"{what} is not in this store and {names} did not give it within {self._rules.give_up:g} s: "
                "see whether that runs and is reached, then try again; what came so far is kept"
            )
        asked = ", ".join(traffic.source + (" (gave wrong bytes)" if traffic.banned else "") for traffic in self._traffic)
        advice = f"none of the sources has it ({asked})" if asked else "there is no source to fetch it from"
        return ChunkMissingError(f"{what} is not in this store and {advice}: publish or replicate it again", wanted.digest, wanted.path)

    async def _ask(self, number: int, wanted: Wanted) -> None:
        """One call to one source."""
        data, event = await self._answer(number, wanted)
        if self._asking.pop((number, wanted.digest), None) is None:
            return  # abandoned at this moment
        flight = self._flights.get(wanted.digest)
        if flight is not None and isinstance(event, Arrived):
            flight.asked, flight.came = False, True
        self._act(self._fetching.handle(event, _now()))
        if flight is not None and flight.came:
            await self._store(flight, data)

    async def _answer(self, number: int, wanted: Wanted) -> tuple[bytes, Event]:
        source, digest = self._sources[number], wanted.digest
        try:
            data = await source.fetch(digest, wanted.nbytes)
        except Exception as error:  # of somebody else's making, too: the others are asked
            self._note_failure(number, error)
            return b"", Failed(number, digest)
        if data is None:
            return b"", Absent(number, digest)
        if len(data) > BLOB_NBYTES or await self.in_thread(digest_of, data) != digest:
            self._note_lie(number, digest)
            return b"", Lied(number, digest)
        traffic = self._traffic[number]
        self._traffic[number] = replace(traffic, blobs=traffic.blobs + 1, nbytes_fetched=traffic.nbytes_fetched + len(data))
        return data, Arrived(number, digest)

    async def _store(self, flight: _Flight, data: bytes) -> None:
        try:
            await self.in_thread(self._keep, flight.wanted.digest, data)
        except Exception as error:  # whoever waits is told
            self._fail(flight, error)
        else:
            self._succeed(flight, data)

    def _note_failure(self, number: int, error: Exception) -> None:
        traffic = self._traffic[number]
        self._traffic[number] = replace(traffic, failures=traffic.failures + 1)
        log.info("source failed", source=traffic.source, error=f"{type(error).__name__}: {error}")

    def _note_lie(self, number: int, digest: Digest) -> None:
        traffic = self._traffic[number]
        self._traffic[number] = replace(traffic, banned=True)
        log.warning("source banned: it gave something else than the digest says", source=traffic.source, digest=digest)

    # --- manifests

    async def manifest(self, digest: Digest) -> SignedManifest:
        """A version as its publisher signed it, checked; the next source is asked where one lacks it, lies, fails, or takes too long.

        Raises: ChunkMissingError: no source has it; ServiceUnavailableError: one that may have it did not answer in time.
        """
        end, rests = _now() + self._rules.give_up, iter(self._rules.rests)
        while True:
            found, silent = await self._manifest_of_any(digest, end)
            if found is not None:
                return found
            rest = next(rests, self._rules.rests[-1])
            if not silent or _now() + rest >= end:
                raise self._not_found(f"manifest {digest}", Wanted(digest, 0, f"manifests/{digest}"), silent)
            await asyncio.sleep(rest)

    async def _manifest_of_any(self, digest: Digest, end: float) -> tuple[SignedManifest | None, list[int]]:
        """The first good answer, and else those that did not answer."""
        left = {number: source for number, source in enumerate(self._sources) if not self._traffic[number].banned}
        silent = list(left)
        async with aclosing(answers(left, digest, self._rules.patience, end)) as coming:
            async for number, answer in coming:
                if isinstance(answer, TetherError):
                    self._note_failure(number, answer)
                    continue
                silent.remove(number)
                if answer is not None and self._is_good(number, answer, digest):
                    return answer, []
        return None, silent

    def _is_good(self, number: int, found: SignedManifest, digest: Digest) -> bool:
        if is_genuine(found, digest):
            traffic = self._traffic[number]
            self._traffic[number] = replace(traffic, nbytes_fetched=traffic.nbytes_fetched + len(found.data))
            return True
        self._note_lie(number, digest)
        self._act(self._fetching.handle(Lied(number, digest), _now()))
        return False

    # --- ending

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """End all askings, let what came be stored, close the sources."""
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        asking = list(self._asking.values())
        self._asking.clear()
        await _cancelled(asking)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for flight in self._flights.values():
            flight.done.cancel()
        self._flights.clear()
        await asyncio.gather(*(source.aclose() for source in self._sources), return_exceptions=True)
        self._threads.shutdown(wait=False)


def _now() -> float:
    return time.monotonic()


def _seen(future: asyncio.Future[bytes]) -> None:
    """What was read ahead may fail with nobody waiting: that is no news for the loop's log."""
    if not future.cancelled():
        future.exception()


async def _cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    every = list(tasks)
    for task in every:
        task.cancel()
    await asyncio.gather(*every, return_exceptions=True)
