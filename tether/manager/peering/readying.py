"""Another lab's version, made ready to run on this lab's workers: brought here if it is not, allowed to be loaded, loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import structlog

from tether.errors import InternalError, QueueFullError, TetherError, UnknownVersionError
from tether.manager.peering.listing import content_of_rows
from tether.manager.peering.looking import check_trust
from tether.manager.peering.own_workers import OwnWorkers
from tether.manager.peering.pulling import Pulling, Wish
from tether.store import Repository, VersionRecord
from tether.swarm.feeds.entries import Content
from tether.types import Digest, ModelRef, ModelVersion

__all__ = ["Readiness", "Readying", "Wanted"]

log = structlog.get_logger("tether.manager")
_MOST: Final = 64
"""Versions that are made ready at a time: each may be a download and a sandbox."""
_UNASKED: Final = 15.0
"""Seconds after which what nobody asks for any more is not made ready: who wants it asks again as soon as it is answered."""

Ask = Callable[[str, str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Peer, method, JSON value → JSON value. Raises: TetherError."""


class Wanted(msgspec.Struct, frozen=True):
    """What is asked of `capacity`: how a model stands here."""

    model: str
    """By its publisher's name for it, or, of this lab's own, as in a URL."""
    version: int | None = None
    digest: str = ""
    """Of the version's manifest; "" only where the model is this lab's own."""
    load: bool = False
    """Whether it is to be made ready."""
    wait: float = 0.0
    """Seconds for that; how far it is then is the answer."""


class Readiness(msgspec.Struct, frozen=True):
    """The answer."""

    slots: int
    """Free ones."""
    queue: float
    """Seconds until a request that comes now would begin."""
    cached: bool
    """Whether all of the version is here."""
    loaded: bool
    """Whether a worker has it in memory."""
    error: tuple[str, str] | None = None
    """Code and text: why it can't be made ready."""


@dataclass(slots=True)
class _Job:
    """A version that is being made ready."""

    task: asyncio.Task[None]
    asking: int = 0
    """Questions that wait for it."""
    alarm: asyncio.TimerHandle | None = None
    """Ends it, while there are none."""

    def asked(self) -> None:
        """One more waits for it."""
        self.asking += 1
        self.unwind()

    def answered(self) -> None:
        """One less."""
        self.asking -= 1
        if not self.asking and not self.task.done():
            self.alarm = asyncio.get_running_loop().call_later(_UNASKED, self.task.cancel)

    def unwind(self) -> None:
        """It does not end for want of questions."""
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None


class Readying:
    """Of one lab. Belongs to one event loop."""

    def __init__(self, repository: Repository, pulling: Pulling, ask: Ask, workers: OwnWorkers, changed: Callable[[], None]) -> None:
        """`changed`: to be called when the catalog is another one."""
        self._repository, self._pulling, self._ask = repository, pulling, ask
        self._workers, self._changed = workers, changed
        self._jobs: dict[tuple[str, str], _Job] = {}
        """By publisher and digest."""

    async def aclose(self) -> None:
        """Make nothing ready any more; what came stays."""
        tasks = [job.task for job in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self, publisher: str) -> None:
        """Make nothing of this publisher's ready any more; what came stays."""
        for (whose, _), job in self._jobs.items():
            if whose == publisher:
                job.task.cancel()

    async def record(self, publisher: str, wanted: Wanted) -> VersionRecord | None:
        """The version, if it is here."""
        return await asyncio.to_thread(self._record, publisher, wanted)

    async def ready(self, publisher: str, wanted: Wanted, wait: float) -> TetherError | None:
        """Have it made ready, and wait for that, or so long; why it can't be. One is made ready once, however many ask for it, and no
        longer than somebody asks.
        """
        key = (publisher, wanted.digest)
        job = self._jobs.get(key)
        if job is None:
            if len(self._jobs) >= _MOST:
                return QueueFullError(f"{_MOST} versions are being made ready here: ask again later")
            task = asyncio.create_task(self._make_ready(publisher, wanted), name=f"ready-{wanted.digest[:8]}")
            job = self._jobs[key] = _Job(task)
            task.add_done_callback(lambda _: self._ended(key))
        job.asked()
        try:
            await asyncio.wait([job.task], timeout=wait)
        finally:
            job.answered()
        return _error_of(job.task) if job.task.done() and not job.task.cancelled() else None

    def _ended(self, key: tuple[str, str]) -> None:
        job = self._jobs.pop(key)
        job.unwind()
        if not job.task.cancelled():
            job.task.exception()  # who asked may be gone; asked again, it is tried again

    async def _make_ready(self, publisher: str, wanted: Wanted) -> None:
        record = await self.record(publisher, wanted) or await self._bring(publisher, wanted)
        await asyncio.to_thread(self._check_open, record, publisher)
        await self._workers.load(ModelVersion(record.name, record.version, record.digest))

    async def _bring(self, publisher: str, wanted: Wanted) -> VersionRecord:
        """This one version, from its publisher, as any that is kept here; nothing follows of it."""
        content = content_of_rows((await self._ask(publisher, "models", {"names": [wanted.model]})).get("models", ()))
        model = content.models.get(wanted.model)
        if model is None or Digest(wanted.digest) not in {version.digest for version in model.versions.values()}:
            raise UnknownVersionError(f"the lab wants a version of {wanted.model} run that it says it does not have: it may be deleted")
        try:
            wish = Wish(publisher, Content({wanted.model: model}), frozenset({Digest(wanted.digest)}))
            (record, *_) = await self._pulling.pull(wish, [publisher])
        finally:
            self._changed()
        return record

    def _record(self, publisher: str, wanted: Wanted) -> VersionRecord | None:
        try:
            return self._repository.resolve(ModelRef(wanted.model, sha=wanted.digest), publisher)
        except LookupError:
            return None

    def _check_open(self, record: VersionRecord, publisher: str) -> None:
        """Raises: UntrustedCodeError, LockedModelError: nothing is trusted here since it is lent."""
        manifest = self._repository.manifest(record.digest)
        check_trust(self._repository, record.name, publisher, manifest)


def _error_of(job: asyncio.Task[None]) -> TetherError | None:
    error = job.exception()
    if error is None or isinstance(error, TetherError):
        return error
    log.error("a version could not be made ready", error=repr(error), exc_info=error)
    return InternalError(f"{type(error).__name__}: the log of the lab that lends has the traceback")
