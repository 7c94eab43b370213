"""Brings the blobs of one version here from many peers at once: carries out what `sources` decides, on one event loop."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import structlog

from tether.errors import (
    ChunkMissingError,
    DigestMismatchError,
    ForbiddenError,
    PayloadTooLargeError,
    ServiceUnavailableError,
    TetherError,
    WrongBytesError,
)
from tether.manager.peering.sources import Asking, Sources
from tether.ports import BlobSource
from tether.store.replicas.fetching import Wanted
from tether.types import Digest

__all__ = ["Came", "Connect", "Download", "DownloadRules", "Keep", "Liar", "Mapped", "Order"]

log = structlog.get_logger("tether.manager")
Connect = Callable[[str], Awaitable[BlobSource]]
"""Gives what a peer (key, hex) has, connecting to it where that is not done: asked again when a call to it failed."""
Keep = Callable[[Digest, bytes], Awaitable[None]]
"""Stages a blob. Raises: DigestMismatchError, PayloadTooLargeError: it is another one; NoSpaceError, StoreError."""
Came = Callable[[int], None]
Liar = Callable[[str, TetherError], None]
_TICK = 0.25
"""Seconds between looks at what stalls."""
_AT_ONCE = 3
"""Peers that are asked for one blob at the same time, where none of them gives it."""


@runtime_checkable
class Mapped(Protocol):
    """A source that says beforehand what it has; one that does not is taken to have all."""

    async def bitmap(self, digest: Digest, count: int) -> list[bool] | None:
        """Which blobs of a version, in the manifest's order; None: not the version."""
        ...


@dataclass(frozen=True, slots=True)
class DownloadRules:
    """How patient it is."""

    poll: float = 1.0
    """Seconds after which a peer that has not all is asked again what it has: `Download.gained` is faster, where that is told."""
    blob_patience: float = 300.0
    """Seconds for one blob, from one peer: 14 KB/s. Others that have it are asked after two."""
    give_up: float = 30.0
    """Seconds in which nobody can be asked for what is missing."""
    lacking: float = 5.0
    """The same, where all peers are there and say that they don't have it."""
    rests: tuple[float, ...] = (0.1, 0.4, 1.0, 2.0, 5.0)
    """Seconds before a peer is connected to again, after failures in a row."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to come."""

    version: Digest
    publisher: str
    """Key, hex: where all who want the version go, so it is spared."""
    blobs: tuple[Wanted, ...]
    """All of the version, in its manifest's order."""
    missing: frozenset[int]
    """Places of those that are not here."""


class Download:
    """One version on its way. Belongs to one loop, and is run once."""

    def __init__(self, order: Order, connect: Connect, keep: Keep, sources: Sources, rules: DownloadRules) -> None:
        """`sources`: a new one for this version."""
        self._order, self._connect, self._keep, self._sources, self._rules = order, connect, keep, sources, rules
        self._sizes = [wanted.nbytes for wanted in order.blobs]
        self._missing = set(order.missing)
        self._givers: dict[str, BlobSource] = {}
        self._lost: dict[str, asyncio.Event] = {}
        self._asked: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._askings: Counter[int] = Counter()
        """Index → how many peers are asked for it; only those that some are."""
        self._wake = asyncio.Event()
        self._on_came: Came = lambda _: None
        self._on_liar: Liar = lambda _, __: None

    @property
    def peers(self) -> int:
        """How many are connected and take part."""
        return len(self._givers)

    def gained(self, peer: str, indices: Iterable[int]) -> None:
        """A peer told that it has more of the version."""
        self._sources.gained(peer, indices, _now())
        self._wake.set()

    async def run(self, peers: Sequence[str], on_came: Came, on_liar: Liar) -> None:
        """Return when all is here; cancelled or failed, what came is kept. `on_liar`: a peer gave something else than it was asked for.

        Raises: ChunkMissingError: no peer has all that is missing; ServiceUnavailableError: none can be asked; what `keep` raises.
        """
        self._on_came, self._on_liar = on_came, on_liar
        self._sources.expected([peer for peer in peers if peer != self._order.publisher], _now())
        try:
            async with asyncio.TaskGroup() as group:
                members = [group.create_task(self._member(peer)) for peer in peers]
                try:
                    await self._until_all_came(group, members)
                finally:
                    for task in (*members, *self._asked.values()):
                        task.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _until_all_came(self, group: asyncio.TaskGroup, members: Sequence[asyncio.Task[None]]) -> None:
        idle_since = _now()
        while self._missing:
            self._ask_more(group)
            if self._asked:
                idle_since = _now()
            else:
                self._check_hope(_now() - idle_since, [task for task in members if not task.done()])
            self._wake.clear()
            try:
                async with asyncio.timeout(_TICK):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _check_hope(self, idle: float, members: Sequence[asyncio.Task[None]]) -> None:
        """Raises: ChunkMissingError, ServiceUnavailableError: there is none."""
        version, count = self._order.version, len(self._missing)
        lacking = self._sources.lacking(sorted(self._missing))
        if lacking and len(self._givers) == len(members) > 0 and idle >= self._rules.lacking:
            wanted = self._order.blobs[lacking[0]]
            raise ChunkMissingError(
                f"none of the {len(members)} peers that are there has {len(lacking)} blobs of version {version[:12]} (the first is needed "
                f"by {wanted.path}): what came so far is kept; try again when a lab is there that has all of it",
                wanted.digest,
                wanted.path,
            )
        if not members or idle >= self._rules.give_up:
            raise ServiceUnavailableError(
                f"no peer can be asked for the {count} missing blobs of version {version[:12]}: see with `tether peers` who is reached and "
                "allows it, then try again; what came so far is kept"
            )

    # --- asking

    def _ask_more(self, group: asyncio.TaskGroup) -> None:
        now = _now()
        free = self._missing.difference(self._askings)
        askings: list[Asking | None] = [*self._sources.next(free, self._sizes, now)]
        askings += [self._sources.ask(index, self._sizes[index], now) for index in self._late(now)]
        for asking in askings:
            if asking is not None:
                self._askings[asking.index] += 1
                task = self._asked[asking.peer, asking.index] = group.create_task(self._ask(asking))
                task.add_done_callback(functools.partial(self._ended, asking))

    def _late(self, now: float) -> list[int]:
        return [index for index in self._sources.stalled(now) if self._askings[index] < _AT_ONCE]

    def _ended(self, asking: Asking, task: asyncio.Task[None]) -> None:
        self._askings[asking.index] -= 1
        if not self._askings[asking.index]:
            del self._askings[asking.index]
        if self._asked.get((asking.peer, asking.index)) is task:
            del self._asked[asking.peer, asking.index]
        self._wake.set()

    async def _ask(self, asking: Asking) -> None:
        peer, index = asking.peer, asking.index
        await asyncio.sleep(asking.wait)
        data = await self._given(peer, index)
        if data is None:
            return
        try:
            await self._keep(self._order.blobs[index].digest, data)
        except (DigestMismatchError, PayloadTooLargeError) as error:
            self._lied(peer, WrongBytesError(f"peer {peer} gave other bytes for blob {self._order.blobs[index].digest}: {error}"))
            return
        for other in self._sources.arrived(peer, index, _now()):
            self._take_back(other, index)
        if index in self._missing:
            self._missing.discard(index)
            self._on_came(index)

    async def _given(self, peer: str, index: int) -> bytes | None:
        """What the peer gave; None: nothing, which is noted."""
        wanted = self._order.blobs[index]
        try:
            async with asyncio.timeout(self._rules.blob_patience):
                data = await self._givers[peer].fetch(wanted.digest, wanted.nbytes)
        except WrongBytesError as error:
            self._lied(peer, error)
        except ForbiddenError:
            self._sources.absent(peer, index)
        except Exception as error:  # also of a source of somebody else's making: the others are asked
            self._failed(peer, index, error)
        else:
            if data is None:
                self._sources.absent(peer, index)
            return data
        return None

    def _lied(self, peer: str, error: TetherError) -> None:
        if peer not in self._sources.liars:
            log.warning("peer gave wrong bytes and is not asked again", peer=peer, version=self._order.version, error=str(error))
            for index in self._sources.lied(peer):
                self._take_back(peer, index)
            self._on_liar(peer, error)
        self._lose(peer)

    def _failed(self, peer: str, index: int, error: Exception) -> None:
        log.info("peer failed", peer=peer, version=self._order.version, error=f"{type(error).__name__}: {error}")
        self._sources.failed(peer, index, _now())
        self._lose(peer)

    def _take_back(self, peer: str, index: int) -> None:
        task = self._asked.pop((peer, index), None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _lose(self, peer: str) -> None:
        lost = self._lost.get(peer)
        if lost is not None:
            lost.set()

    # --- who takes part

    async def _member(self, peer: str) -> None:
        """Keep a peer in, as long as it does not lie and allows it."""
        failures, rests = 0, self._rules.rests
        while peer not in self._sources.liars:
            came = len(self._missing)
            try:
                await self._take_part(peer)
            except WrongBytesError as error:
                self._lied(peer, error)
            except ForbiddenError as error:
                log.info("peer does not allow it", peer=peer, version=self._order.version, error=str(error))
                self._sources.left(peer)
                return
            except Exception as error:  # as in `_given`
                log.info("peer not reached", peer=peer, version=self._order.version, error=f"{type(error).__name__}: {error}")
                self._sources.left(peer)
            failures = 0 if len(self._missing) < came else failures + 1
            await asyncio.sleep(rests[min(failures, len(rests)) - 1] if failures else rests[0])

    async def _take_part(self, peer: str) -> None:
        """Return when it lied, or calls to it fail. Raises: what connecting and asking what it has raise."""
        async with asyncio.timeout(self._rules.give_up):
            source = await self._connect(peer)
            has = await self._has(source)
        lost = self._lost[peer] = asyncio.Event()
        self._givers[peer] = source
        self._sources.joined(peer, has, _now(), is_origin=peer == self._order.publisher)
        self._wake.set()
        try:
            while True:
                has_failed = await self._fails(lost)
                if has_failed and (peer in self._sources.liars or not isinstance(source, Mapped)):
                    return
                if has_failed or not all(has):
                    has = await self._polled(peer, source, has)
        finally:
            del self._givers[peer]
            for index in self._sources.left(peer):
                self._take_back(peer, index)
            self._wake.set()

    async def _fails(self, lost: asyncio.Event) -> bool:
        """Whether a call to it failed, of late."""
        try:
            async with asyncio.timeout(self._rules.poll):
                await lost.wait()
        except TimeoutError:
            return False
        lost.clear()
        return True

    async def _polled(self, peer: str, source: BlobSource, has: list[bool]) -> list[bool]:
        """What it has now, and told if it is more. Raises: as `_has`: it is gone, then."""
        now_has = await self._has(source)
        if now_has != has:  # what it said before and did not give is not believed again
            self.gained(peer, [index for index, (is_there, was) in enumerate(zip(now_has, has, strict=True)) if is_there and not was])
        return now_has

    async def _has(self, source: BlobSource) -> list[bool]:
        count = len(self._sizes)
        if not isinstance(source, Mapped):
            return [True] * count
        return await source.bitmap(self._order.version, count) or [False] * count


def _now() -> float:
    return asyncio.get_running_loop().time()
