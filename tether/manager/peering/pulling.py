"""Brings versions of another lab into this store: found, fetched from all who have them, looked at, and then named as its feed does.

Each step is durable for itself, and none is done twice: what came of a version is kept when it is cut off, a version that came is one here
whatever becomes of the next, and an alias moves when what it points at is here. Nothing of a code format is fetched from a publisher who is
not trusted for code; nothing is a version here that was not looked at.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog

from tether.errors import ConflictError, MalformedFeedError, NoSpaceError, TetherError
from tether.manager.peering.downloading import Connect, Download, DownloadRules, Liar, Order
from tether.manager.peering.feed_content import states_of, wanted
from tether.manager.peering.finding import Finder
from tether.manager.peering.jobs import Job, OnProgress, Told
from tether.manager.peering.looking import check_trust, look
from tether.manager.peering.refusals import Refusals
from tether.manager.peering.sources import Sources
from tether.ports import SignedManifest
from tether.store import Manifest, Repository, VersionRecord, decode
from tether.store.index.mirror_tables import ModelState
from tether.store.packing.disk import disk_errors
from tether.store.replicas.streaming import file_order, wanted_of
from tether.swarm.feeds.entries import Content, FeedModel, FeedVersion
from tether.swarm.wire.bandwidth import TokenBucket
from tether.types import Digest

__all__ = ["OnProgress", "PullOptions", "Pulling", "Rim", "Wish"]

log = structlog.get_logger("tether.manager")
P = ParamSpec("P")
T = TypeVar("T")
_AT_ONCE = 4
"""Models that come in side by side, where many are small."""
_LABEL_DIGITS = 12
"""As the catalog calls a publisher that was given no petname."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be here of another publisher."""

    publisher: str
    """Key, hex."""
    content: Content
    """Its feed, less the models that are not wanted: what the catalog is to say of the others."""
    digests: frozenset[Digest] | None = None
    """Versions; None: all of these models. What is here already stays here."""


def _arriving(_: str, __: SignedManifest) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Rim:
    """Who is told what happens."""

    arriving: Callable[[str, SignedManifest], AbstractContextManager[None]] = _arriving
    """A version of a model (as in a URL) is coming: `RepositoryShelf.arriving`."""
    came: Callable[[Digest, Sequence[int]], None] = lambda _, __: None
    """Blobs of a version are here, by their places in its manifest: for `BlobConnection.announce`."""
    liar: Callable[[str, TetherError], None] = lambda _, __: None
    """A peer gave something else than it was asked for: for `Access.ban`."""


@dataclass(frozen=True, slots=True)
class PullOptions:
    """How it is done; the defaults suit a lab alone."""

    own: str = ""
    """This lab's key: labs that fetch at the same time each begin elsewhere by it."""
    downlink: TokenBucket = field(default_factory=TokenBucket)
    """The cap that all downloads share."""
    rules: DownloadRules = field(default_factory=DownloadRules)
    rim: Rim = field(default_factory=Rim)


class Pulling:
    """All that comes in from other labs. Belongs to one event loop."""

    def __init__(self, repository: Repository, connect: Connect, workspace: Path, options: PullOptions | None = None) -> None:
        """`connect`: `downloading.Connect`; `workspace`: a folder for what is in between, emptied now."""
        shutil.rmtree(workspace, ignore_errors=True)
        self._repository, self._connect, self._workspace = repository, connect, workspace
        self._options = options or PullOptions()
        self._threads = ThreadPoolExecutor(4, "pull")
        self._jobs: dict[tuple[str, str], Job] = {}
        self._downloads: dict[Digest, Download] = {}
        self._refusals = Refusals()

    def close(self) -> None:
        """End the threads. Pulls that go on are their callers' to cancel, before."""
        self._threads.shutdown(wait=False)

    @property
    def coming(self) -> Collection[Digest]:
        """Versions whose blobs are being fetched."""
        return self._downloads.keys()

    def gained(self, peer: str, digest: Digest, indices: Sequence[int]) -> None:
        """A peer told that it has more of a version (`BlobConnection`'s `on_have`). Without it peers are asked each second."""
        download = self._downloads.get(digest)
        if download is not None:
            download.gained(peer, indices)

    def forgive(self, publisher: str, name: str | None = None) -> None:
        """Try again what was refused of a model, by its publisher's name for it; None: of all its models."""
        self._refusals.forget(publisher, name)

    async def pull(self, wish: Wish, peers: Sequence[str], on_progress: OnProgress | None = None) -> tuple[VersionRecord, ...]:
        """Bring here what is wished for, from the peers (keys) that have it; gives the versions, as they are called here.

        A model comes once, however many ask for it: whoever comes second is told how far it is, and has what is left then. One model's
        failure stops no other. Cancelled or killed, what came is kept, and the next call goes on there.

        Raises: UntrustedCodeError; ChunkMissingError, ServiceUnavailableError: what is missing can't be had now; ForbiddenError: no peer
        allows it; BadModelError and its kin: it was looked at, and refused; MalformedFeedError, MalformedManifestError, ConflictError: the
        publisher contradicts itself; NoSpaceError, StoreError. The first of several; the others are in the log. What was refused is so at
        once when it is asked for again, until its publisher is trusted otherwise, or `forgive`.
        """
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(name: str) -> tuple[VersionRecord, ...]:
            async with room:
                return await self._model(wish, name, peers, on_progress)

        results = await asyncio.gather(*(one(name) for name in wish.content.models), return_exceptions=True)
        errors = {name: each for name, each in zip(wish.content.models, results, strict=True) if isinstance(each, BaseException)}
        for name, error in errors.items():
            log.warning("model not replicated", publisher=wish.publisher, model=name, error=f"{type(error).__name__}: {error}")
        if errors:
            raise next(iter(errors.values()))
        return tuple(record for found in results if not isinstance(found, BaseException) for record in found)

    # --- a model

    async def _model(self, wish: Wish, name: str, peers: Sequence[str], on_progress: OnProgress | None) -> tuple[VersionRecord, ...]:
        job = self._jobs.setdefault((wish.publisher, name), Job(name))
        told = Told(on_progress)
        job.told.append(told)
        try:
            async with job.turn:
                records = await self._bring(wish, name, peers, job)
            told.finish(name)
            return records
        finally:
            job.told.remove(told)
            if not job.told:
                self._jobs.pop((wish.publisher, name), None)

    async def _bring(self, wish: Wish, name: str, peers: Sequence[str], job: Job) -> tuple[VersionRecord, ...]:
        model = wish.content.models[name]
        before = await self._in_thread(self._repository.state_of, wish.publisher, name)
        held = {each.digest: each.signature for each in (before.versions if before else ())}
        lacking = [digest for digest in wanted(wish.content, [name], held) if wish.digests is None or digest in wish.digests]
        versions = {version.digest: version for version in model.versions.values()}
        _check_numbers(wish, name, before)
        job.begin({digest: versions[digest].nbytes for digest in lacking})
        await self._say(wish, name, held)
        for digest in lacking:
            task = _Task(wish.publisher, name, versions[digest], peers, job)
            held[digest] = await self._version(task)
            await self._say(wish, name, held)
        return await self._in_thread(self._records, wish, model, name)

    async def _say(self, wish: Wish, name: str, held: Mapping[Digest, bytes]) -> None:
        """Make the catalog say what the feed does, as far as it is here."""
        before = await self._in_thread(self._repository.state_of, wish.publisher, name)
        known = [before] if before else []
        states = states_of(wish.content, [name], wish.publisher, held, known)
        if list(states) != known and (before is not None or any(state.versions for state in states)):
            await self._in_thread(self._repository.follow, states)

    def _records(self, wish: Wish, model: FeedModel, name: str) -> tuple[VersionRecord, ...]:
        asked = [each.digest for each in model.versions.values() if wish.digests is None or each.digest in wish.digests]
        found = {
            record.version: record for digest in asked for record in self._repository.versions_of(digest) if _is_of(record, wish, name)
        }
        return tuple(found[number] for number in sorted(found))

    # --- a version

    async def _version(self, task: _Task) -> bytes:
        """Bring it here, whole and looked at, and give its signature; what it is called is said afterwards."""
        digest, nbytes = task.version.digest, task.version.nbytes
        trusted = await self._in_thread(self._repository.trusted, task.publisher, "code")
        self._refusals.check(digest, nbytes, trusted=trusted)
        try:
            return await self._brought(task)
        except TetherError as error:
            self._refusals.note((task.publisher, task.name), digest, nbytes, error, trusted=trusted)
            raise

    async def _brought(self, task: _Task) -> bytes:
        digest, nbytes = task.version.digest, task.version.nbytes
        finder = Finder(self._connect, task.liar(self._options.rim), self._options.rules.give_up)
        signed = await finder.find(digest, task.publisher, task.honest())
        manifest = await self._in_thread(decode, signed.data)
        if manifest.nbytes != nbytes:
            raise MalformedFeedError(
                f"{task.name}: the feed of {task.publisher} speaks of {nbytes} bytes, the manifest that it names of {manifest.nbytes}: "
                "nothing was fetched"
            )
        await self._in_thread(check_trust, self._repository, task.name, task.publisher, manifest)
        name = await self._in_thread(self._url_name, task.publisher, task.name)
        with self._options.rim.arriving(name, signed):
            await self._fetch(task, manifest)
        await self._in_thread(self._repository.hold, [signed])
        if not await self._in_thread(self._repository.versions_of, digest):  # else these bytes were looked at before
            await look(self._repository, digest, manifest, self._workspace, self._in_thread)
        return signed.signature

    def _url_name(self, publisher: str, name: str) -> str:
        label = self._repository.publishers().get(publisher, publisher[:_LABEL_DIGITS])
        return f"{label}~{name}"

    async def _fetch(self, task: _Task, manifest: Manifest) -> None:
        digest = task.version.digest
        order = await self._in_thread(self._order, task, manifest)
        task.job.sized(digest, sum(each.nbytes for each in order.blobs))
        task.job.came(digest, sum(each.nbytes for index, each in enumerate(order.blobs) if index not in order.missing))
        task.job.tell(0)
        if not order.missing:
            return
        await self._in_thread(self._repository.plan, file_order(manifest))
        sources = Sources(len(order.blobs), self._options.own, digest, self._options.downlink)
        download = self._downloads[digest] = Download(order, self._connect, self._keep, sources, self._options.rules)

        def came(index: int) -> None:
            task.job.came(digest, order.blobs[index].nbytes)
            task.job.tell(download.peers)
            self._options.rim.came(digest, (index,))

        try:
            await download.run(task.honest(), came, task.liar(self._options.rim))
        finally:
            if self._downloads.get(digest) is download:
                del self._downloads[digest]

    def _order(self, task: _Task, manifest: Manifest) -> Order:
        """Raises: NoSpaceError: there is no room for it."""
        sizes = {wanted.digest: wanted for wanted in wanted_of(manifest)}
        blobs = tuple(sizes[digest] for digest in manifest.blobs())
        gone = set(self._repository.missing(sizes))
        missing = frozenset(index for index, blob in enumerate(blobs) if blob.digest in gone)
        nbytes = sum(blobs[index].nbytes for index in missing)
        with disk_errors(self._repository.root):
            free = shutil.disk_usage(self._repository.root).free
        if nbytes > free:
            raise NoSpaceError(f"{task.name} needs {nbytes} bytes more, and {free} are free: nothing was fetched")
        return Order(task.version.digest, task.publisher, blobs, missing)

    async def _keep(self, digest: Digest, data: bytes) -> None:
        await self._in_thread(self._repository.put_blob, digest, data)

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """One who is cancelled leaves when the thread is done: nothing is half written then."""
        work = asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.gather(work, return_exceptions=True)
            raise


@dataclass(frozen=True, slots=True)
class _Task:
    """A version that is to come."""

    publisher: str
    name: str
    version: FeedVersion
    peers: Sequence[str]
    job: Job

    def honest(self) -> list[str]:
        """Peers that did not lie about this model."""
        return [peer for peer in self.peers if peer not in self.job.liars]

    def liar(self, rim: Rim) -> Liar:
        """What is to be called when one lied."""

        def lied(peer: str, error: TetherError) -> None:
            if peer not in self.job.liars:
                self.job.liars.add(peer)
                rim.liar(peer, error)

        return lied


def _check_numbers(wish: Wish, name: str, before: ModelState | None) -> None:
    """Before a byte is fetched. Raises: ConflictError."""
    there = wish.content.models[name].versions
    for each in before.versions if before else ():
        if each.version in there and there[each.version].digest != each.digest:
            raise ConflictError(
                f"{name}:{each.version} of {wish.publisher} is {each.digest[:12]}… here and {there[each.version].digest[:12]}… in its "
                "feed: delete it here if it was brought in by hand; else the publisher gave a number twice"
            )


def _is_of(record: VersionRecord, wish: Wish, name: str) -> bool:
    return record.publisher == wish.publisher and record.name.rpartition("~")[2] == name
