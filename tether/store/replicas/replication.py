"""Brings versions here from other places, on one event loop: whole, as a checkout that grows, tensor by tensor, or the bytes of a read."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Container, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from tether.errors import BadNameError, ChunkAlteredError, ChunkMissingError, ServiceUnavailableError, UnknownVersionError
from tether.ports import BlobSource, SignedManifest
from tether.store.format.layout import slices
from tether.store.format.manifest import ArrayEntry, Manifest, Segment, decode
from tether.store.format.records import VersionRecord
from tether.store.loading import tensors_of
from tether.store.repair import RepairReport
from tether.store.replicas import streaming
from tether.store.replicas.fetching import NEEDED, WHOLE, FetchRules, Wanted
from tether.store.replicas.held import Held
from tether.store.replicas.transfers import Traffic, Transfers
from tether.types import Array, Digest, ModelRef

__all__ = ["OnProgress", "Progress", "Replication"]

log = structlog.get_logger("tether.store")
Answer = TypeVar("Answer")
_AT_ONCE = 4
"""Versions that come down side by side, where many are small."""
_KEPT = 64
"""Manifests that are remembered of versions that are not published here, and arrays whose reading is followed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a version has come."""

    digest: Digest
    """Of its manifest."""
    nbytes: int
    """Of all its blobs."""
    here_nbytes: int
    """Of those that are here."""
    traffic: tuple[Traffic, ...]
    """What each source gave since the store was opened, for this version and others."""


OnProgress = Callable[[Progress], None]
"""Called on the fetching thread: to be quick."""


class Replication:
    """The asynchronous half of `Replicated`. Belongs to one event loop."""

    def __init__(self, held: Held, sources: Sequence[BlobSource], rules: FetchRules) -> None:
        self._held, self._rules = held, rules
        self.transfers = Transfers(sources, held.look, held.keep, rules)
        # Not the threads of the transfers: a repair waits for what those do.
        self._threads = ThreadPoolExecutor(4, "replicate")
        self._works: dict[tuple[str, Digest], _Work] = {}
        self._publishing: dict[Digest, asyncio.Task[None]] = {}
        self._manifests: OrderedDict[Digest, SignedManifest] = OrderedDict()
        self._read_to: OrderedDict[tuple[Any, ...], int] = OrderedDict()

    async def aclose(self) -> None:
        """End what goes on; what came is kept."""
        works = [work.task for work in self._works.values()]
        for work in works:
            work.cancel()
        await asyncio.gather(*works, *self._publishing.values(), return_exceptions=True)
        await self.transfers.aclose()
        self._threads.shutdown(wait=False)

    async def _in_thread(self, work: Callable[..., Answer], *arguments: Any) -> Answer:
        """One who is cancelled leaves when the thread is done: nothing is half written then."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.gather(future, return_exceptions=True)
            raise

    async def _once(self, what: str, digest: Digest, work: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """`work`, once for all who ask for it at the same time; it is cancelled with the last of them."""
        shared = self._works.get((what, digest))
        if shared is None:
            shared = self._works[what, digest] = _Work(asyncio.create_task(work()))
            shared.task.add_done_callback(lambda _: self._works.pop((what, digest), None))
        shared.waiting += 1
        try:
            answer: Answer = await asyncio.shield(shared.task)
            return answer
        finally:
            shared.waiting -= 1
            if not shared.waiting and not shared.task.done():
                shared.task.cancel()
                await asyncio.gather(shared.task, return_exceptions=True)

    # --- manifests

    async def signed(self, digest: Digest) -> SignedManifest:
        """A version as it was signed, from here or from a source. Raises: ChunkMissingError, ServiceUnavailableError."""
        found = await self._in_thread(self._held.whole, digest) or self._manifests.get(digest)
        if found is None:
            found = await self._once("manifest", digest, lambda: self.transfers.manifest(digest))
            self._manifests[digest] = found
            if len(self._manifests) > _KEPT:
                self._manifests.popitem(last=False)
        return found

    # --- whole versions

    async def replicate(self, digest: Digest, name: str | None, on_progress: OnProgress | None) -> VersionRecord:
        """Fetch what is lacking and publish the version here, as it was signed; `name`: that of the model, if it is not known here."""
        return await self._once("replicate", digest, lambda: self._replicate(digest, name, on_progress))

    async def _replicate(self, digest: Digest, name: str | None, on_progress: OnProgress | None) -> VersionRecord:
        await self._settled(digest)
        record = await self._in_thread(self._held.record, digest)
        signed = await self.signed(digest)
        coming = _Coming(digest, decode(signed.data), on_progress)
        lacking = set(await self._in_thread(self._held.local.missing, [wanted.digest for wanted in coming.blobs]))
        if record is not None and not lacking:
            return record
        name = _name_of(digest, name, record)
        async with aclosing(self._blobs(coming, lacking)) as blobs:
            async for _ in blobs:
                pass
        await self._in_thread(self._held.publish, name, signed)
        return await self._published(digest)

    async def hold(self, digests: Sequence[Digest]) -> None:
        """As `Replicated.ahold`."""
        room = asyncio.Semaphore(_AT_ONCE)

        async def staged(digest: Digest) -> SignedManifest:
            async with room:
                return await self._staged(digest)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(staged(digest)) for digest in digests]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        await self._in_thread(self._held.local.hold, [task.result() for task in tasks])

    async def _staged(self, digest: Digest) -> SignedManifest:
        signed = await self.signed(digest)
        coming = _Coming(digest, decode(signed.data), None)
        lacking = set(await self._in_thread(self._held.local.missing, [wanted.digest for wanted in coming.blobs]))
        async with aclosing(self._blobs(coming, lacking)) as blobs:
            async for _ in blobs:
                pass
        return signed

    async def _published(self, digest: Digest) -> VersionRecord:
        record = await self._in_thread(self._held.record, digest)
        if record is None:
            raise UnknownVersionError(f"version {digest[:12]} was deleted just now; replicate it again if it is needed")
        return record

    async def _blobs(self, coming: _Coming, lacking: Container[Digest]) -> AsyncGenerator[tuple[Wanted, bytes], None]:
        """The lacking blobs in the order of the files, each where its pack will have it; says how far it is."""
        if not self._held.local.read_only:
            await self._in_thread(self._held.local.plan, streaming.file_order(coming.manifest))
        wants = [wanted for wanted in coming.blobs if wanted.digest in lacking]
        here = coming.nbytes - sum(wanted.nbytes for wanted in wants)
        coming.tell(here, self.transfers.traffic())
        async with aclosing(self.transfers.in_order(wants, WHOLE)) as blobs:
            async for wanted, data in blobs:
                yield wanted, data
                here += wanted.nbytes
                coming.tell(here, self.transfers.traffic())

    async def checkout(
        self, digest: Digest, name: str | None, on_progress: OnProgress | None, watcher: streaming.Watcher | None = None
    ) -> Path:
        """A folder with the version's files, verified; while they come they are written there, and published afterwards."""
        return await self._once("checkout", digest, lambda: self._checkout(digest, name, on_progress, watcher))

    async def _checkout(self, digest: Digest, name: str | None, on_progress: OnProgress | None, watcher: streaming.Watcher | None) -> Path:
        await self._settled(digest)
        record = await self._in_thread(self._held.record, digest)
        if record is None and not self._held.local.read_only:
            name = _name_of(digest, name, record)
            signed = await self.signed(digest)
            target = await self._assembled(_Coming(digest, decode(signed.data), on_progress), watcher)
            self._publish_behind(digest, name, signed)
            if target is not None:
                return target
            await self._settled(digest)
            record = await self._published(digest)
        return await self._mending(record, self._held.local.checkout, digest)

    async def _assembled(self, coming: _Coming, watcher: streaming.Watcher | None) -> Path | None:
        """The checkout, written as the blobs come; None: there is one of an earlier time, which is to be checked."""
        target = self._held.local.root / "cache" / coming.digest
        assembly = streaming.Assembly(target, list(coming.manifest.files()), watcher)
        coming.blobs = streaming.smallest_first(coming.manifest, coming.blobs)
        await self._in_thread(assembly.begin)
        try:
            async with aclosing(self._blobs(coming, {wanted.digest for wanted in coming.blobs})) as blobs:
                async for wanted, data in blobs:
                    await self._in_thread(assembly.write, wanted.digest, data)
            return target if await self._in_thread(assembly.finish) else None
        except BaseException:
            await self._in_thread(assembly.abandon)
            raise

    def _publish_behind(self, digest: Digest, name: str, signed: SignedManifest) -> None:
        """While the caller uses the checkout. Where it fails, the blobs stay staged and the next call publishes them."""

        def done(task: asyncio.Task[None]) -> None:
            del self._publishing[digest]
            error = None if task.cancelled() else task.exception()
            if error is not None:
                log.warning("fetched version not published yet", digest=digest, error=f"{type(error).__name__}: {error}")

        task = self._publishing[digest] = asyncio.create_task(self._in_thread(self._held.publish, name, signed))
        task.add_done_callback(done)

    async def _settled(self, digest: Digest) -> None:
        """Wait for the publish behind a checkout, whatever comes of it."""
        publishing = self._publishing.get(digest)
        if publishing is not None:
            await asyncio.wait([publishing])

    # --- parts of versions

    async def span(self, array: ArrayEntry, start: int, stop: int) -> bytes:
        """As `Replicated.read_array`."""
        pieces = list(slices([segment.nbytes for segment in array.segments], start, stop))
        touched = streaming.wants([_part(array, (array.segments[index] for index, _ in pieces))])
        ahead = self._ahead(array, start, stop, pieces[-1][0] + 1) if pieces else []
        found = {}
        async with aclosing(self.transfers.in_order(touched, NEEDED)) as blobs:
            async for wanted, data in blobs:
                found[wanted.digest] = data
        self.transfers.read_ahead(ahead)  # not before: what is waited for goes first
        await self._mend()
        parts = []
        for index, piece in pieces:
            segment = array.segments[index]
            whole = streaming.cut_out(found[segment.digest], segment, array.path)
            parts.append(whole[piece.offset : piece.offset + piece.nbytes])
        return b"".join(parts)

    def _ahead(self, array: ArrayEntry, start: int, stop: int, index: int) -> list[Wanted]:
        """The blobs from segment `index` on, if the array was read from its beginning to here; never beyond the array."""
        key = (array.path, array.segments[:1])
        known = self._read_to.pop(key, 0)
        self._read_to[key] = max(known, stop) if start <= known else known
        if len(self._read_to) > _KEPT:
            self._read_to.popitem(last=False)
        chosen: list[Segment] = []
        nbytes = self._rules.max_nbytes if start <= known else 0
        for segment in array.segments[index:]:
            if nbytes <= 0:
                break
            chosen.append(segment)
            nbytes -= segment.nbytes
        return streaming.wants([_part(array, chosen)])

    async def stream_tensors(self, digest: Digest, names: Iterable[str] | None) -> AsyncGenerator[tuple[str, Array], None]:
        """As `Replicated.stream_tensors`."""
        manifest = decode((await self.signed(digest)).data)
        tensors = streaming.in_file_order(manifest, tensors_of(manifest, names))
        for name, array in tensors.items():
            if not array.segments:
                yield name, streaming.new_tensor(array)
        parts = list(streaming.parts_of(tensors))
        async with aclosing(self.transfers.in_order(streaming.turns(parts), NEEDED)) as blobs:
            blob, held = b"", None
            for part in parts:
                if part.segment.digest != held:
                    wanted, blob = await anext(blobs)
                    held = wanted.digest
                if part.offset == 0:
                    tensor = streaming.new_tensor(part.array)
                    room = streaming.flat(tensor)
                room[part.offset : part.offset + part.segment.nbytes] = streaming.cut_out(blob, part.segment, part.array.path)
                if part.is_last:
                    tensor.flags.writeable = False
                    yield part.name, tensor
        await self._mend()

    async def load_tensors(self, digest: Digest, names: Sequence[str] | None) -> dict[str, Array]:
        """As `Replicated.load_tensors`."""
        record = await self._in_thread(self._held.record, digest)
        if record is not None:
            return await self._mending(record, self._held.local.load_tensors, digest, names)
        async with aclosing(self.stream_tensors(digest, names)) as tensors:
            return {name: tensor async for name, tensor in tensors}

    # --- damage

    async def _mending(self, record: VersionRecord | None, work: Callable[..., Answer], digest: Digest, *arguments: Any) -> Answer:
        """`work`, and again after a repair where it met damage."""
        try:
            return await self._in_thread(work, digest, *arguments)
        except (ChunkMissingError, ChunkAlteredError):
            if record is None or self._held.local.read_only:
                raise
        report = await self.repair(ModelRef.parse(f"{record.name}:{record.version}"))
        log.warning("version mended", model=record.name, version=record.version, repaired=len(report.repaired), failed=len(report.failed))
        return await self._in_thread(work, digest, *arguments)

    async def repair(self, ref: ModelRef | None) -> RepairReport:
        """As `Replicated.repair`."""
        loop = asyncio.get_running_loop()

        def fetched(digest: Digest) -> bytes | None:
            return asyncio.run_coroutine_threadsafe(self._any(digest), loop).result()

        return await self._in_thread(self._held.local.repair, fetched, ref)

    async def _any(self, digest: Digest) -> bytes | None:
        """A blob or a manifest that is damaged here, from a source; None: nobody has it."""
        try:
            if await self._in_thread(self._held.record, digest) is not None:
                return (await self.transfers.manifest(digest)).data
            return await self.transfers.fetch(Wanted(digest, 0, ""), WHOLE)
        except (ChunkMissingError, ServiceUnavailableError) as error:
            log.warning("not repaired", digest=digest, error=str(error))
            return None

    async def _mend(self) -> None:
        """After a read that met damage."""
        if self._held.mended:
            await self._in_thread(self._held.settle)


@dataclass(slots=True, eq=False)
class _Work:
    """What several wait for."""

    task: asyncio.Task[Any]
    waiting: int = 0


class _Coming:
    """A version that is on its way, and who is told."""

    def __init__(self, digest: Digest, manifest: Manifest, on_progress: OnProgress | None) -> None:
        self.digest, self.manifest = digest, manifest
        self.blobs = streaming.wanted_of(manifest)
        self.nbytes = sum(wanted.nbytes for wanted in self.blobs)
        self._on_progress = on_progress

    def tell(self, here_nbytes: int, traffic: tuple[Traffic, ...]) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(self.digest, self.nbytes, here_nbytes, traffic))


def _name_of(digest: Digest, name: str | None, record: VersionRecord | None) -> str:
    """What a version will be called here. Raises: BadNameError: nobody said."""
    if record is not None:
        return ModelRef.parse(record.name).name
    if name is None:
        raise BadNameError(f"version {digest[:12]} is not published here yet and a manifest holds no name: say which model it is, name=…")
    return ModelRef.parse(name).name


def _part(array: ArrayEntry, segments: Iterable[Segment]) -> ArrayEntry:
    return ArrayEntry(array.path, array.dtype, array.shape, tuple(segments))
