"""A store that fetches what it lacks: local blobs first, else the first source that has them; nothing is fetched twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tether.errors import ChunkAlteredError, ChunkMissingError
from tether.ports import BlobSource
from tether.store.format.encrypted import open_blob, vault_of
from tether.store.format.layout import slices
from tether.store.format.manifest import ArrayEntry, Manifest, decode
from tether.store.format.records import VersionRecord
from tether.store.loading import tensors_of
from tether.store.packing.blobs import cut_out
from tether.store.repair import RepairReport
from tether.store.replicas.background import Background
from tether.store.replicas.fetching import NEEDED, FetchRules, Wanted
from tether.store.replicas.held import Held
from tether.store.replicas.replication import OnProgress, Progress, Replication
from tether.store.replicas.streaming import Watcher, flat, in_file_order, new_tensor
from tether.store.replicas.transfers import Traffic
from tether.store.repository import Repository
from tether.types import Array, Digest, ModelRef

__all__ = ["Progress", "Replicated"]

Answer = TypeVar("Answer")


class Replicated:
    """A repository and where its blobs may come from. Methods block and may be called from any thread; `a…` ones are for any event loop.

    Every blob is verified, whoever gave it. What was fetched is staged in the repository, where its pack will have it, and stays over a
    crash; beside a repository that is open for reading only, 32 MiB of it are kept in memory.
    Closing this closes the sources, not the repository.

    Reading methods raise ChunkMissingError (no source has it; names the blob, the array and who was asked), ServiceUnavailableError
    (who may have it did not answer in time: what came is kept) and what the repository's own raise.
    """

    def __init__(self, local: Repository, sources: Sequence[BlobSource], rules: FetchRules | None = None) -> None:
        """`sources`: the preferred first."""
        self.local, self.sources, self.rules = local, tuple(sources), rules or FetchRules()
        self._held = Held(local)
        self._work = Replication(self._held, self.sources, self.rules)
        self._loop = Background("fetching")

    def __eq__(self, value: object) -> bool:
        return isinstance(value, Replicated) and (self.local.root, self._names()) == (value.local.root, value._names())

    def __hash__(self) -> int:
        return hash((self.local.root, self._names()))

    def __reduce__(self) -> tuple[Callable[..., Replicated], tuple[Path, tuple[BlobSource, ...], FetchRules]]:
        return _reopen, (self.local.root, self.sources, self.rules)

    def __repr__(self) -> str:
        return f"Replicated({str(self.local.root)!r}, from {', '.join(self._names()) or 'nowhere'})"

    def _names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop fetching and close the sources; a second call does nothing."""
        self._loop.close(self._work.aclose())

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run a coroutine on the loop that the sources belong to, and wait for it: for what else they can be asked."""
        return self._loop.run(work)

    def traffic(self) -> tuple[Traffic, ...]:
        """What each source gave so far."""
        return self._work.transfers.traffic()

    @property
    def damaged(self) -> int:
        """Local blobs that were found altered, and asked of the sources."""
        return self._held.damaged

    # --- reading

    def manifest_bytes(self, digest: Digest) -> bytes:
        """The canonical bytes, from here or a source."""
        return self._held.manifest_bytes(digest) or self._loop.run(self._work.signed(digest)).data

    def manifest(self, digest: Digest) -> Manifest:
        """What a version is made of; of an encrypted one what the repository's own would be. Raises: LockedModelError besides."""
        return self.local.opened(self.public_manifest(digest), self.read_blob)

    def public_manifest(self, digest: Digest) -> Manifest:
        """What its publisher signed."""
        return decode(self.manifest_bytes(digest))

    def read_blob(self, digest: Digest, path: str = "") -> bytes:
        """A blob; `path` is the array that needs it and is named in errors."""
        wanted = Wanted(digest, 0, path)
        found = self._held.look(wanted)
        return found if found is not None else self._loop.run(self._work.transfers.fetch(wanted, NEEDED))

    def read_array(self, array: ArrayEntry, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an array.

        Blobs that hold them are fetched, and while it is read from its start on, some ahead: never beyond the array.
        """
        try:
            return self.local.read_array(array, start, stop)
        except (ChunkMissingError, ChunkAlteredError):
            if vault_of(array) is not None:
                return b"".join(self._opened_parts(array, start, stop))
            return self._loop.run(self._work.span(array, start, stop))

    def _opened_parts(self, array: ArrayEntry, start: int, stop: int) -> Iterator[bytes]:
        """Of an encrypted array, a blob at a time."""
        for index, piece in slices([segment.nbytes for segment in array.segments], start, stop):
            segment = array.segments[index]
            blob = open_blob(array, segment.digest, self.read_blob(segment.digest, array.path))
            yield bytes(cut_out(blob, segment.digest, segment.offset + piece.offset, piece.nbytes, array.path))

    async def aread_array(self, array: ArrayEntry, start: int, stop: int) -> bytes:
        """As `read_array`."""
        if vault_of(array) is not None:
            return await asyncio.to_thread(self.read_array, array, start, stop)
        return await self._loop.run_async(self._work.span(array, start, stop))

    def load_tensors(self, digest: Digest, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Weights as read-only arrays: mapped where the version is here, else in memory as they come. Raises: NotFoundError besides."""
        chosen = None if names is None else list(names)
        if self._is_encrypted(digest):
            tensors = tensors_of(self.manifest(digest), chosen)
            return {name: self._tensor(array) for name, array in tensors.items()}
        return self._loop.run(self._work.load_tensors(digest, chosen))

    def _is_encrypted(self, digest: Digest) -> bool:
        return self.public_manifest(digest).encryption is not None

    def _tensor(self, array: ArrayEntry) -> Array:
        tensor = new_tensor(array)
        flat(tensor)[:] = self.read_array(array, 0, array.nbytes)
        tensor.flags.writeable = False
        return tensor

    async def aload_tensors(self, digest: Digest, names: Iterable[str] | None = None) -> dict[str, Array]:
        """As `load_tensors`."""
        chosen = None if names is None else list(names)
        if await asyncio.to_thread(self._is_encrypted, digest):
            return await asyncio.to_thread(self.load_tensors, digest, chosen)
        return await self._loop.run_async(self._work.load_tensors(digest, chosen))

    def stream_tensors(self, digest: Digest, names: Iterable[str] | None = None) -> AsyncGenerator[tuple[str, Array], None]:
        """Weights as read-only arrays, in the order of the files, each as soon as all of it came; what comes next is fetched meanwhile.

        Use it in an `async for`; with `contextlib.aclosing` where that may end early. Raises: NotFoundError besides.
        """
        return self._streamed(digest, None if names is None else list(names))

    async def _streamed(self, digest: Digest, names: Sequence[str] | None) -> AsyncGenerator[tuple[str, Array], None]:
        if await asyncio.to_thread(self._is_encrypted, digest):
            manifest = await asyncio.to_thread(self.manifest, digest)
            for name, array in in_file_order(manifest, tensors_of(manifest, names)).items():
                yield name, await asyncio.to_thread(self._tensor, array)
            return
        async with aclosing(self._loop.iterate(self._work.stream_tensors(digest, names))) as tensors:
            async for tensor in tensors:
                yield tensor

    # --- versions

    def checkout(
        self, digest: Digest, name: str | None = None, on_progress: OnProgress | None = None, watcher: Watcher | None = None
    ) -> Path:
        """A folder with the version's files, read-only, every byte verified in this call.

        One that is not here yet is written while its blobs come, and ready with the last of them; it is then published in the
        repository behind the caller's back, under `name`. Of an encrypted one the ciphertext is fetched and published first, then the
        files are made in memory, as by `Repository.checkout`. `watcher`: told of the files while they are written, which happens in none
        of the other cases, nor for one who joins a checkout that goes on. Raises: BadNameError: there is none; NoSpaceError,
        LockedModelError besides.
        """
        if self._is_encrypted(digest):
            self.replicate(digest, name, on_progress)
            return self.local.checkout(digest)
        return self._loop.run(self._work.checkout(digest, name, on_progress, watcher))

    async def acheckout(self, digest: Digest, name: str | None = None, on_progress: OnProgress | None = None) -> Path:
        """As `checkout`."""
        if await asyncio.to_thread(self._is_encrypted, digest):
            return await asyncio.to_thread(self.checkout, digest, name, on_progress)
        return await self._loop.run_async(self._work.checkout(digest, name, on_progress))

    def replicate(self, digest: Digest, name: str | None = None, on_progress: OnProgress | None = None) -> VersionRecord:
        """Fetch all that is lacking of a version and make it one of the repository, durably, as its publisher signed it.

        `name`: of the model, where the version is not known here. Cancelled or killed, what came is kept, and the next call goes on there.
        Raises: BadNameError, BadSignatureError, MalformedManifestError, NoSpaceError besides.
        """
        return self._loop.run(self._work.replicate(digest, name, on_progress))

    async def areplicate(self, digest: Digest, name: str | None = None, on_progress: OnProgress | None = None) -> VersionRecord:
        """As `replicate`."""
        return await self._loop.run_async(self._work.replicate(digest, name, on_progress))

    async def ahold(self, digests: Sequence[Digest]) -> None:
        """Fetch all that is lacking of some versions and make it durable here, without naming them: `Repository.mirror` does.

        Raises: as `replicate`, of the first that failed; of none anything was made durable then.
        """
        await self._loop.run_async(self._work.hold(digests))

    def repair(self, ref: ModelRef | None = None) -> RepairReport:
        """Read a version (None: everything) and fetch again what is missing or altered."""
        return self._loop.run(self._work.repair(ref))

    async def arepair(self, ref: ModelRef | None = None) -> RepairReport:
        """As `repair`."""
        return await self._loop.run_async(self._work.repair(ref))


def _reopen(root: Path, sources: tuple[BlobSource, ...], rules: FetchRules) -> Replicated:
    return Replicated(Repository.open(root, read_only=True), sources, rules)
