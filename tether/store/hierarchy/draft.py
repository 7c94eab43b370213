"""A writable zarr v3 store for what is being published: any key, any value; publishing makes it a version, key for key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from tether.errors import BadModelError, ConflictError
from tether.security.identity import Identity
from tether.security.volatile import VolatileFolder
from tether.store.format.layout import FILES, KEYS, TENSORS, path_problem
from tether.store.format.manifest import ArrayEntry, Manifest, Segment, digest_of, signed_message
from tether.store.format.records import Published
from tether.store.hierarchy import dtypes
from tether.store.hierarchy.drafts import Draft, Value
from tether.store.hierarchy.zarr import span_of
from tether.store.repository import Repository
from tether.store.sealing import Intake, PlainIntake, SealedIntake, Sealing
from tether.types import Digest, ModelInfo, model_name

if TYPE_CHECKING:
    from typing import Self

__all__ = ["WEIGHTS_ONLY", "DraftStore", "Put"]

Put = Callable[[Digest, bytes], object]
"""Stages a blob: `Repository.put_blob`, or a client's upload."""

WEIGHTS_ONLY = Manifest(
    framework="custom",
    entry="",
    info=ModelInfo("custom", "custom", (), (), batched=False, pure=False, code=False),
    arrays=(),
)
"""What a version is that holds nothing but what was written: arrays to read, no model to run."""
_SMALL = 64 * 1024
"""Smaller values share a blob with those that follow, until it has this size, as small tensors do (layout.py)."""

dtypes.register()


class DraftStore(Store):
    """The draft of one name in a store's folder (`Repository.root`). Threads and processes of this host may write it together: Dask may.

    Pickles as (folder, name); equal where these are. It stays until `discard`, also when its process ends or it was published. It is not in
    any version's way: only publishing reads it. Raises, everywhere: StoreError, NoSpaceError: of the disk.

    What is written lies in it in plain. A draft of a version that is to be encrypted is begun with `encrypted`: it lies in memory.
    """

    supports_writes = True
    supports_deletes = True
    supports_partial_writes = False
    supports_listing = True

    def __init__(self, root: Path, name: str, *, read_only: bool = False, in_memory: bool = False) -> None:
        """`in_memory`: for `encrypted`. Raises: BadNameError: `name` is not one that a model could have."""
        super().__init__(read_only=read_only)
        self._draft = Draft(root, name, in_memory=in_memory)
        self._memory: VolatileFolder | None = None
        """The folder of a draft in memory, where this process began it."""

    @classmethod
    def encrypted(cls, name: str) -> Self:
        """Begin a draft of a version that is published encrypted. It lies in memory, for processes of this user and host, and is gone with
        `discard` or the end of this process.

        Raises: BadNameError; ConfigError: there is no tmpfs; NoSpaceError: it is full; StoreError.
        """
        model_name(name)
        memory = VolatileFolder.create("draft")
        draft = cls(memory.path, name, in_memory=True)
        draft._memory = memory
        return draft

    @property
    def is_encrypted(self) -> bool:
        """Whether it lies in memory and is published encrypted."""
        return self._draft.in_memory

    def __eq__(self, value: object) -> bool:
        return isinstance(value, DraftStore) and self._draft.folder == value._draft.folder

    def __hash__(self) -> int:
        return hash(self._draft.folder)

    def __reduce__(self) -> tuple[Callable[..., DraftStore], tuple[type[DraftStore], Path, str, bool, bool]]:
        return _reopen, (type(self), self._draft.root, self._draft.name, self.read_only, self.is_encrypted)

    def __repr__(self) -> str:
        return f"DraftStore({str(self._draft.root)!r}, {self._draft.name!r}{', in_memory=True' if self.is_encrypted else ''})"

    def with_read_only(self, read_only: bool = False) -> Self:
        """Another one on the same draft, not open yet."""
        other = type(self)(self._draft.root, self._draft.name, read_only=read_only, in_memory=self.is_encrypted)
        other._memory = self._memory  # noqa: SLF001 (of its own kind)
        return other

    # --- values

    def get_sync(self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value, or the range of it, verified; None where it was not set. Raises: ChunkAlteredError."""
        data = self._draft.read(key, span_of(byte_range))
        return None if data is None else (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    def set_sync(self, key: str, value: Buffer) -> None:
        """All readers see the old value or this one. Raises: BadNameError: the key is not valid Unicode."""
        self._check_writable()
        if not isinstance(value, Buffer):
            raise TypeError(f"DraftStore.set(): `value` must be a Buffer instance. Got an instance of {type(value)} instead.")
        self._draft.write(key, value.to_bytes())

    def delete_sync(self, key: str) -> None:
        """What was not set needs no deleting."""
        self._check_writable()
        self._draft.delete(key)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """As `get_sync`, in a thread, as all that follow: they wait for the disk and for other writers."""
        await self._ensured()
        return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def set(self, key: str, value: Buffer) -> None:
        await self._ensured()
        await asyncio.to_thread(self.set_sync, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Of several writers at once one sets it, whatever process they are in."""
        await self._ensured()
        self._check_writable()
        await asyncio.to_thread(self._draft.write, key, value.to_bytes(), replace=False)

    async def delete(self, key: str) -> None:
        await self._ensured()
        await asyncio.to_thread(self.delete_sync, key)

    async def delete_dir(self, prefix: str) -> None:
        self._check_writable()
        folder = prefix.rstrip("/")
        await asyncio.to_thread(self._draft.delete_under, f"{folder}/" if folder else "")

    async def clear(self) -> None:
        await self.delete_dir("")

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._draft.size, key) is not None

    async def getsize(self, key: str) -> int:
        """Raises: FileNotFoundError: no such key (zarr's contract)."""
        size = await asyncio.to_thread(self._draft.size, key)
        if size is None:
            raise FileNotFoundError(key)
        return size

    async def _ensured(self) -> None:
        if not self._is_open:
            await self._open()

    # --- listing

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in await asyncio.to_thread(lambda: [*self._draft.keys(prefix)]):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in await asyncio.to_thread(lambda: [*self._draft.children(prefix.rstrip("/"))]):
            yield name

    # --- publishing

    def entries(self, put: Put) -> tuple[ArrayEntry, ...]:
        """Give each value's bytes to `put` as blobs; returns the entries for a manifest, in order.

        Raises: BadModelError: empty, or a key that no version can hold; ConflictError: somebody wrote meanwhile; ChunkAlteredError.
        """
        values = self._draft.values()
        if not values:
            raise BadModelError(f"draft {self._draft.name} is empty: write arrays to it, then publish it")
        for key, _ in values:
            problem = path_problem(f"{KEYS}/{key}")
            if problem:
                raise BadModelError(f"key {key[:200]!r} of draft {self._draft.name} {problem}: name the node otherwise and write it again")
        blobs = _Blobs(put)
        segments = [blobs.add(value, self._draft.pieces(key, value)) for key, value in values]
        blobs.flush()
        return tuple(
            ArrayEntry(f"{KEYS}/{key}", "uint8", (value.nbytes,), tuple(parts))
            for (key, value), parts in zip(values, segments, strict=True)
        )

    def publish(  # noqa: PLR0913 (all that can be said of a version)
        self,
        repository: Repository,
        name: str,
        identity: Identity,
        *,
        about: Manifest = WEIGHTS_ONLY,
        alias: Sequence[str] = (),
        tags: Mapping[str, str] | None = None,
        encrypt: bool | None = None,
    ) -> Published:
        """Make what was written so far a version of `name`; the draft stays. Its writers should be done.

        `about` says what else the version is: framework, info, entry, attributes, and arrays of files and tensors beside the written keys;
        of an encrypted version they were put in by `Sealing`. `encrypt`: None: as the draft was begun; False: in plain whatever it, or the
        model, was before.

        Raises: BadModelError: empty, or a key that no version, or none with these files, can hold; ConflictError: somebody wrote meanwhile,
        or it can't be encrypted as the model or `encrypt` want it; what `Repository.publish` raises.
        """
        sealed = self._sealed(Sealing(repository, identity.public), name, encrypt)
        entries = self.entries(sealed.put if sealed else repository.put_blob)
        if about.arrays:
            self._check_beside(entries)
        intake: Intake = sealed or PlainIntake(repository)
        intake.missing(segment.digest for array in about.arrays for segment in array.segments)  # it meets what was sealed before
        data = intake.finished(msgspec.structs.replace(about, arrays=(*about.arrays, *entries)))
        published = repository.publish(name, data, identity.public, identity.sign(signed_message(data)), alias=alias, tags=tags)
        intake.settle()
        return published

    def _sealed(self, sealing: Sealing, name: str, encrypt: bool | None) -> SealedIntake | None:
        """What encrypts it; None: it is published in plain. What lies on a disk in plain is not called encrypted afterwards."""
        if self.is_encrypted:
            return None if encrypt is False else sealing.intake(name)
        if encrypt or (encrypt is None and sealing.is_used(name)):
            reason = "encrypt=True" if encrypt else f"{name} is encrypted"
            raise ConflictError(
                f"{reason}, and draft {self._draft.name} lies on the disk in plain: begin one with DraftStore.encrypted({name!r}), write "
                "into that and discard this one; if the version may be stored for all to read, publish it with encrypt=False"
            )
        return None

    def _check_beside(self, entries: Sequence[ArrayEntry]) -> None:
        for entry in entries:
            key = entry.path.removeprefix(f"{KEYS}/")
            if key.partition("/")[0] in {FILES, TENSORS}:
                raise BadModelError(f"key {key[:200]!r} is among the version's own {FILES} and {TENSORS}: write it to another group")

    def discard(self) -> None:
        """Remove the draft: all keys, all values. Who still writes into it writes into nothing."""
        self._check_writable()
        self._draft.discard()
        if self._memory is not None:
            self._memory.close()


class _Blobs:
    """Values as segments of blobs: large ones in blobs of their own, small ones together."""

    def __init__(self, put: Put) -> None:
        self._put = put
        self._open: list[tuple[list[Segment], bytes]] = []
        """Values of the blob that is being filled, each with the list that its segment goes to."""

    def add(self, value: Value, pieces: Iterator[tuple[Digest, bytes]]) -> list[Segment]:
        """The value's segments; those of a small one come into the list when its blob is full."""
        segments: list[Segment] = []
        for digest, data in pieces:
            if value.nbytes < _SMALL:
                self._open.append((segments, data))
            else:
                self._put(digest, data)
                segments.append(Segment(digest, 0, len(data)))
        if sum(len(data) for _, data in self._open) >= _SMALL:
            self.flush()
        return segments

    def flush(self) -> None:
        if not self._open:
            return
        blob = b"".join(data for _, data in self._open)
        digest, offset = digest_of(blob), 0
        self._put(digest, blob)
        for segments, data in self._open:
            segments.append(Segment(digest, offset, len(data)))
            offset += len(data)
        self._open.clear()


def _reopen(cls: type[DraftStore], root: Path, name: str, read_only: bool, in_memory: bool) -> DraftStore:
    return cls(root, name, read_only=read_only, in_memory=in_memory)
