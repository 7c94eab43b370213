"""A manager as one of several: it claims the lease again and again, feeds those who follow it, or follows the one who has the lease.

A change is acknowledged when it is durable with every follower that counts as being in step. So who takes over has all that was
acknowledged, whatever the clocks did: a writer that lost the lease gets no follower's word any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from tether.errors import NotWriterError, ServiceUnavailableError
from tether.events import Claim, LentWorker, Standing
from tether.manager import secrets, small_files
from tether.manager.feed import Changes, Followers
from tether.manager.following import Channel, Follower, Lab
from tether.manager.tenure import Tenure
from tether.store import Repository
from tether.telemetry.clock import boot_clock

__all__ = ["Membership", "Signal"]

log = structlog.get_logger("tether.manager")
_RENEW = 1.0
"""Seconds between claims, and between looks at the catalog's change count, for changes that did not come through this process."""
_ANSWER = 10.0
"""Seconds that the orchestrator may take; longer, and it is connected to anew."""
_LOOK = 0.25
"""Seconds between looks at the clock while a change waits to be acknowledged."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What the orchestrator knows of this manager, in this term and over this connection."""

    count: int = -1
    """Of the catalog."""
    lent: tuple[LentWorker, ...] = ()


class Signal:
    """Something changed. Who waits takes `event` first, then looks, then waits: nothing is missed between."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def fire(self) -> None:
        """Wake all who wait."""
        self.event.set()
        self.event = asyncio.Event()

    async def within(self, event: asyncio.Event, seconds: float) -> None:
        """Wait for the `event` that was taken, or so long."""
        await _first(event, None, seconds)


class Membership:
    """One manager's part in its cluster. Belongs to one event loop."""

    def __init__(
        self, repository: Repository, tenure: Tenure, follower: Follower, catalog: Callable[[], dict[str, Any]], signal: Signal
    ) -> None:
        """`catalog`: what the orchestrator is told of it."""
        self._repository, self._tenure, self._follower = repository, tenure, follower
        self._catalog, self._signal = catalog, signal
        self._followers = Followers()
        self._feeds = 0
        self._following: tuple[str, asyncio.Task[None]] | None = None
        self._missed = False
        """Whether it was said that nobody writes."""
        self._changing = 0
        """Changes that are being made."""
        self._lent: tuple[LentWorker, ...] = ()

    async def aclose(self) -> None:
        """Follow nobody any more."""
        await self._stop_following()

    @property
    def rests(self) -> bool:
        """Whether this manager follows another one, and has all that it was told of. From any thread."""
        return self._following is not None and not self._tenure.holds and not self._follower.is_applying

    # --- the orchestrator

    def tell_lent(self, workers: tuple[LentWorker, ...]) -> None:
        """These labs lend workers to this one now: the orchestrator is to know, while this manager writes."""
        self._lent = workers
        self._signal.fire()

    async def converse(self, comm: Channel) -> None:
        """Claim and be answered until the connection ends. Cancelled, it gives the lease back."""
        answering = asyncio.ensure_future(comm.read())
        told, first = _Told(), {"op": "tether_manager", "reply": False}
        try:
            while True:
                event = self._signal.event
                message, told = await self._message(told)
                await comm.write(first | message)
                async with asyncio.timeout(_ANSWER):
                    answer = await asyncio.shield(answering)
                answering, first = asyncio.ensure_future(comm.read()), {}
                standing = msgspec.msgpack.decode(answer["standing"], type=Standing)
                if self._tenure.answered(standing):
                    await self._begin(standing.term)
                    told = _Told()
                    continue
                await self._attend(standing)
                await _first(event, answering, _RENEW)
                if answering.done():
                    answering.result()
        except asyncio.CancelledError:
            await self._release(comm)
            raise
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _message(self, told: _Told) -> tuple[dict[str, Any], _Told]:
        """The claim, and catalog and lent workers where they are not as they were told; a catalog is at least as new as its count."""
        footing = await asyncio.to_thread(self._repository.footing)
        now = boot_clock()
        if self._tenure.holds:
            self._tenure.require(self._followers.in_step(now))
        dropped = self._followers.lagging(self._tenure.required, now)
        if dropped:
            log.warning("follower out of step", members=sorted(dropped))
        message: dict[str, Any] = {"claim": msgspec.msgpack.encode(self._tenure.claim(footing.position, dropped, now))}
        if not self._tenure.holds:
            return message, told
        now_told = _Told(footing.position[1], self._lent)
        if now_told.count != told.count:
            message |= {"count": now_told.count, "catalog": await asyncio.to_thread(self._catalog_bytes)}
        if now_told.lent != told.lent:
            message["lent"] = msgspec.msgpack.encode(now_told.lent)
        return message, now_told

    def _catalog_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self._catalog())

    async def _begin(self, term: int) -> None:
        await self._stop_following()
        await asyncio.to_thread(self._repository.begin_term, term)
        self._followers = Followers()
        self._tenure.begin(term)
        self._signal.fire()
        log.info("this manager writes", term=term)

    async def _attend(self, standing: Standing) -> None:
        """Follow the writer, if that is another one. Raises: what ended the following: this store can't be a follower of that lab."""
        if self._following is not None and self._following[1].done():
            self._following[1].result()
        if self._tenure.holds:
            return
        if standing.address is None or standing.writer == self._tenure.member:
            self._note_absence(standing)
            return
        self._missed = False
        if self._following is None or self._following[0] != standing.address:
            await self._stop_following()
            log.info("this manager follows", writer=standing.address, term=standing.term)
            self._following = standing.address, asyncio.create_task(self._follow(standing.address))

    def _note_absence(self, standing: Standing) -> None:
        if self._missed or self._tenure.member in standing.in_step:
            return
        self._missed = True
        advice = "start the manager that wrote; if it is gone for good, start this one with --take-over"
        log.warning("nobody writes, and this manager may lack something", wrote=standing.writer, term=standing.term, advice=advice)

    async def _follow(self, address: str) -> None:
        """Not before the last change of its own was made: the store says the same as the writer's then, and stays so."""
        while self._changing:
            await _first(self._signal.event, None, _LOOK)
        await self._follower.run(address, self._tenure.member)

    async def _stop_following(self) -> None:
        following, self._following = self._following, None
        if following is not None:
            following[1].cancel()
            await asyncio.gather(following[1], return_exceptions=True)

    async def _release(self, comm: Channel) -> None:
        """Whoever is in step takes over at once, instead of when the lease has run out."""
        self._tenure.stop()
        claim = Claim(self._tenure.member, "", released=True)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_RENEW):
                await comm.write({"claim": msgspec.msgpack.encode(claim)})

    # --- changes

    def check(self) -> None:
        """Raises: NotWriterError: this manager may not write now."""
        self._tenure.check(boot_clock())

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Make a change in the body; leaves when it can be answered for.

        Raises: NotWriterError: nothing was done; ServiceUnavailableError: another manager takes over; whether it has the change, nobody
        knows.
        """
        term = self._tenure.check(boot_clock())
        self._changing += 1
        try:
            yield
        finally:
            self._changing -= 1
            self._signal.fire()
        await self._acknowledge(await asyncio.to_thread(self._repository.change_count), term)

    async def _acknowledge(self, change: int, term: int) -> None:
        while True:
            event = self._signal.event
            if not self._tenure.is_valid(boot_clock()) or self._tenure.holds != term:
                raise ServiceUnavailableError("another manager takes over, before all had this change: call again, the same call is safe")
            if self._followers.have(self._tenure.required | self._followers.awaited, change):
                self._followers.acknowledged = max(self._followers.acknowledged, change)
                return
            await _first(event, None, _LOOK)

    # --- followers

    async def feed(self, comm: Channel, member: str, lab: Lab) -> None:
        """Send a follower the catalog, and who may do what, now and after each change, while this manager writes."""
        try:
            term, followers = self._tenure.check(boot_clock()), self._followers
        except NotWriterError as error:
            await comm.write({"error": [error.code, *error.args]})
            return
        self._feeds += 1
        connection = self._feeds
        followers.joined(member, connection, boot_clock())
        await comm.write({"term": term, "lab": lab.public})
        hearing = asyncio.ensure_future(self._hear(comm, member, followers))
        try:
            await self._send_changes(comm, member, followers, lab, hearing)
        finally:
            followers.left(member, connection, boot_clock())
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)

    async def _send_changes(self, comm: Channel, member: str, followers: Followers, lab: Lab, hearing: asyncio.Future[None]) -> None:
        changes, sent, files = Changes(), -1, dict[str, bytes]()
        root = self._repository.root.parent
        while followers is self._followers and self._tenure.holds and not hearing.done():
            event = self._signal.event
            if followers.is_idle(member) and await asyncio.to_thread(self._is_news, sent, files):
                state = changes.since(await asyncio.to_thread(self._repository.snapshot))
                sent = state.change
                access = changes.access_since(await asyncio.to_thread(lab.access.file.state))
                before, files = files, await asyncio.to_thread(small_files.read, root)  # after the change that counts them
                others = {"keys": secrets.cluster_keys(root / "keys")} | ({} if files == before else {"files": files})
                followers.sent(member, sent, boot_clock())
                parts = {"state": state} if access is None else {"state": state, "access": access}
                await comm.write({name: msgspec.msgpack.encode(part) for name, part in parts.items()} | others)
            await _first(event, hearing, _RENEW)

    def _is_news(self, sent: int, files: dict[str, bytes]) -> bool:
        return self._repository.change_count() != sent or small_files.read(self._repository.root.parent) != files

    async def _hear(self, comm: Channel, member: str, followers: Followers) -> None:
        while True:
            heard = await comm.read()
            if "busy" in heard:
                followers.busy(member, heard["busy"], boot_clock())
            else:
                followers.applied(member, heard["applied"], boot_clock())
            self._signal.fire()


async def _first(event: asyncio.Event, other: asyncio.Future[Any] | None, timeout: float) -> None:  # noqa: ASYNC109 (nothing is raised)
    """Wait for one of them, or so long."""
    waiting: asyncio.Future[Any] = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([waiting, other] if other is not None else [waiting], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
