"""The model store on one disk: publishes, resolves, checks out, verifies. Its parts decide; this puts them in order."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from tether.errors import (
    ChunkAlteredError,
    ChunkMissingError,
    ConflictError,
    FormatTooNewError,
    MalformedManifestError,
    MissingBlobsError,
    StoreError,
)
from tether.security.identity import verify as verify_signature
from tether.store import packs
from tether.store.blobs import Blobs
from tether.store.catalog import Catalog
from tether.store.checkout import Checkouts, export
from tether.store.disk import PARTIAL, disk_errors, sync_folder, write_atomically
from tether.store.files import cut_bytes, cut_files
from tether.store.manifest import ArrayEntry, Manifest, decode, digest_of, is_digest, signed_message
from tether.store.records import AliasChange, ModelRecord, NewVersion, Published, Report, VersionRecord
from tether.store.staging import Staging
from tether.store.verification import verify
from tether.types import Digest, ModelRef, model_name

__all__ = ["FORMAT", "Repository"]

FORMAT = 1
"""Of the data folder: what lies where, the pack format, the catalog's tables."""
_FOLDERS = ("packs", "staging", "manifests", "cache")
_MAX_TAGS_NBYTES = 64 * 1024


class Repository:
    """A store. One process writes; any number read it meanwhile. Methods may be called from any thread.

    Each method raises StoreError (NoSpaceError where the disk is full) when the disk refuses; what was acknowledged before stays.
    """

    def __init__(self, root: Path, lock: IO[str] | None, clock: Callable[[], float]) -> None:
        """Use `open`. `lock`: the held writer's lock; None reads only."""
        self.root = root
        self._lock = lock
        self._clock = clock
        self._publishing = threading.Lock()
        self._catalog = Catalog(root / "catalog.sqlite", read_only=lock is None)
        self._blobs = Blobs(root / "packs", self._catalog)
        self._staging = Staging(root / "staging")
        self._checkouts = Checkouts(root / "cache", self._blobs)

    @classmethod
    def open(cls, root: Path, *, read_only: bool = False, own: str | None = None, clock: Callable[[], float] = time.time) -> Self:
        """Open the store in a folder; a writer makes it if need be, and clears away what an earlier one left when it died.

        `own` is the public key (hex) of this lab: the publisher that bare names mean first. It is remembered.

        Raises: FormatTooNewError: a newer Tether wrote it; ConflictError: another process writes here; StoreError; NoSpaceError.
        """
        root = root.absolute()
        _check_format(root, required=read_only)
        if read_only:
            return cls(root, None, clock)
        with disk_errors(root):
            for name in _FOLDERS:
                (root / name).mkdir(parents=True, exist_ok=True)
            lock = _take_lock(root / "writer.lock")
        try:
            repository = cls(root, lock, clock)
            repository._start(own)
        except BaseException:
            lock.close()
            raise
        return repository

    def _start(self, own: str | None) -> None:
        with disk_errors(self.root):
            if not (self.root / "format").exists():
                write_atomically(self.root / "format", f"{FORMAT}\n".encode(), "format")
            for folder in ("packs", "manifests"):
                for path in (self.root / folder).glob(f"*{PARTIAL}"):
                    path.unlink(missing_ok=True)
            sync_folder(self.root)
        if own is not None and own != self._catalog.own():
            self._catalog.set_own(own)
        self._adopt_packs()
        self._staging.sweep(self.is_stored, self._clock())
        self._checkouts.sweep()

    def _adopt_packs(self) -> None:
        """Enter packs that the catalog does not know: a publish died before its commit, or the index was lost.

        None is ever deleted: the catalog may be the older of the two (restored from a backup).
        """
        known = self._catalog.packs()
        found = {path.name: index for path in self._pack_files() if path.name not in known and (index := _scan(path)) is not None}
        if found:
            self._catalog.add_packs(found)

    def _pack_files(self) -> list[Path]:
        """Oldest first: of two copies of a blob the index keeps the later one, which was written because the other was damaged."""
        with disk_errors(self.root / "packs"):
            return sorted((self.root / "packs").glob(f"*{packs.SUFFIX}"), key=lambda path: path.stat().st_mtime)

    def close(self) -> None:
        """Give up the files and the writer's lock; a second call does nothing."""
        self._catalog.close()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Repository({str(self.root)!r}{', read_only=True' if self.read_only else ''})"

    @property
    def read_only(self) -> bool:
        return self._lock is None

    def _check_writable(self) -> None:
        if self.read_only:
            raise ConflictError("this store is open for reading only: the manager of its data folder writes it")

    # --- blobs

    def put_blob(self, digest: Digest, data: bytes) -> None:
        """Stage a blob until a publish names it; nothing is written where it is stored and whole.

        Raises: PayloadTooLargeError: over 4 MiB; DigestMismatchError; NoSpaceError.
        """
        self._check_writable()
        if not self._is_whole(digest) or digest_of(data) != digest:
            self._staging.put(digest, data)

    def _is_whole(self, digest: Digest) -> bool:
        """Read it, so that publishing a model again heals what was damaged."""
        try:
            self.read_blob(digest)
        except (ChunkMissingError, ChunkAlteredError):
            return False
        return True

    def is_stored(self, digest: Digest) -> bool:
        """Whether a pack holds the blob."""
        return self._blobs.nbytes(digest) is not None

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """Those that are neither stored nor staged: what a publisher has to send."""
        return [digest for digest in dict.fromkeys(digests) if self._blob_nbytes(digest) is None]

    def _blob_nbytes(self, digest: Digest) -> int | None:
        if not is_digest(digest):
            return None
        stored = self._blobs.nbytes(digest)
        return stored if stored is not None else self._staging.nbytes(digest)

    def read_blob(self, digest: Digest, path: str = "") -> bytes:
        """The verified bytes of a stored blob; `path` is the array that needs it and is named in the error.

        Raises: ChunkMissingError, ChunkAlteredError.
        """
        if not is_digest(digest):
            raise packs.missing(Digest(digest[:64]), path)
        return self._blobs.read(digest, path)

    def read_draft_blob(self, digest: Digest) -> bytes:
        """The verified bytes of a blob that a publish may name: staged, else stored. Raises: ChunkMissingError, ChunkAlteredError."""
        staged = self._staging.read(digest) if is_digest(digest) else None
        return staged if staged is not None else self.read_blob(digest)

    def read_array(self, array: ArrayEntry, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an array. Raises: ChunkMissingError, ChunkAlteredError."""
        return self._blobs.span(array, start, stop)

    def add_files(self, source: Path) -> list[ArrayEntry]:
        """Cut a model on this disk, a file or a folder, and stage its blobs; gives the arrays for its manifest.

        Raises: NoModelFileError, BadModelError: links, special files, impossible names; NoSpaceError.
        """
        self._check_writable()
        return cut_files(source, self.put_blob)

    def add_bytes(self, name: str, data: bytes) -> ArrayEntry:
        """The same for one file that is in memory; `name` is its relative path, `.tether/…` for what is not the model's own."""
        self._check_writable()
        return cut_bytes(name, data, self.put_blob)

    def clear_staging(self) -> None:
        """Give up all uploads that were not published: frees space on a full disk."""
        self._check_writable()
        self._staging.clear()

    # --- versions

    def publish(
        self,
        name: str,
        manifest: bytes,
        publisher: str,
        signature: bytes,
        *,
        alias: Sequence[str] = (),
        tags: Mapping[str, str] | None = None,
    ) -> Published:
        """Make a version of the staged and stored blobs that the manifest names; durable when it returns.

        `manifest`: canonical bytes; `publisher`: key (hex) that signed them. The aliases are moved to the version also where these bytes
        were one already; `latest` and tags are not.

        Raises: MalformedManifestError, BadSignatureError, BadNameError; MissingBlobsError: `args[1]` lists what to upload first;
        NoSpaceError: nothing was published, what is staged stays.
        """
        self._check_writable()
        parsed = decode(manifest)
        verify_signature(publisher, signed_message(manifest), signature)
        new = NewVersion(
            name=model_name(name),
            publisher=publisher,
            digest=digest_of(manifest),
            signature=signature,
            nbytes=parsed.nbytes,
            created=self._clock(),
            aliases=tuple(_checked_alias(text) for text in alias),
            tags=_checked_tags(tags or {}),
        )
        with self._publishing:
            known = self._catalog.version_of(publisher, name, new.digest)
            if known is not None:
                self._heal(new.digest, manifest, parsed)
                self._catalog.set_alias(ModelRef(name), new.aliases, known, publisher)
                return Published(known, new.digest, created=False)
            return Published(self._commit(new, manifest, parsed), new.digest, created=True)

    def _commit(self, new: NewVersion, manifest: bytes, parsed: Manifest) -> int:
        """The pack, then the manifest, then one transaction: whatever is cut off leaves no version behind, or a whole one."""
        self._check_blobs(parsed)
        written = self._pack_staged(parsed.blobs())
        self._write_manifest(new.digest, manifest)
        version = self._catalog.add_version(new, written)
        self._staging.remove(parsed.blobs())
        return version

    def _heal(self, digest: Digest, manifest: bytes, parsed: Manifest) -> None:
        """Store again what `put_blob` found damaged of a version that exists; mostly nothing."""
        written = self._pack_staged(parsed.blobs())
        if written:
            self._catalog.add_packs(written)
            self._staging.remove(parsed.blobs())
        try:
            self.manifest_bytes(digest)
        except (ChunkMissingError, ChunkAlteredError):
            self._write_manifest(digest, manifest)

    def _pack_staged(self, blobs: Iterable[Digest]) -> dict[str, list[packs.Located]]:
        staged = [digest for digest in blobs if self._staging.nbytes(digest) is not None]
        if not staged:
            return {}
        with disk_errors(self.root / "packs"):
            return dict([packs.write_pack(self.root / "packs", staged, self._staging.read)])

    def _write_manifest(self, digest: Digest, manifest: bytes) -> None:
        path = self.root / "manifests" / digest
        with disk_errors(path):
            write_atomically(path, manifest, "manifest")

    def _check_blobs(self, manifest: Manifest) -> None:
        sizes = {digest: self._blob_nbytes(digest) for digest in manifest.blobs()}
        lacking = [digest for digest, nbytes in sizes.items() if nbytes is None]
        if lacking:
            raise MissingBlobsError(f"{len(lacking)} blobs are not here yet: upload them, then send the manifest again", lacking)
        for array in manifest.arrays:
            for segment in array.segments:
                if segment.offset + segment.nbytes > (sizes[segment.digest] or 0):
                    raise MalformedManifestError(f"malformed manifest: array {array.path[:200]!r} has a segment outside of its blob")

    def resolve(self, ref: ModelRef, publisher: str | None = None) -> VersionRecord:
        """The version that a reference means; a bare name means `@prod` where that exists, else `@latest`. `publisher`: a key (hex).

        Raises: UnknownModelError, UnknownVersionError, UnknownAliasError; ConflictError: several publishers have the name.
        """
        return self._catalog.resolve(ref, publisher)

    def models(self) -> list[ModelRecord]:
        """All models with their versions and aliases, sorted by name."""
        return self._catalog.models()

    def delete_version(self, name: str, version: int) -> None:
        """Forget a version; its number is not given again. `latest` falls back to the newest that is left.

        Raises: UnknownModelError, UnknownVersionError; ConflictError: an alias points at it.
        """
        self._check_writable()
        self._catalog.delete_version(_bare(name), version)

    def signature(self, digest: Digest, publisher: str) -> bytes | None:
        """The publisher's signature of the manifest; None where it published no such version."""
        return self._catalog.signature(digest, publisher)

    def manifest_bytes(self, digest: Digest) -> bytes:
        """The canonical bytes, verified. Raises: ChunkMissingError, ChunkAlteredError."""
        path = f"manifests/{digest[:64]}"
        if not is_digest(digest):
            raise packs.missing(Digest(digest[:64]), path)
        try:
            with disk_errors(self.root / path):
                data = (self.root / path).read_bytes()
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise ChunkMissingError(f"manifest {digest} is not in the store: publish or replicate it again", digest, path) from None
            raise
        if digest_of(data) != digest:
            raise ChunkAlteredError(f"manifest {digest} was altered on disk: publish or replicate the version again", digest, path)
        return data

    def manifest(self, digest: Digest) -> Manifest:
        """What a version is made of. Raises: ChunkMissingError, ChunkAlteredError."""
        return decode(self.manifest_bytes(digest))

    def checkout(self, digest: Digest) -> Path:
        """A folder with the version's files, every byte verified in this call; mended where it was altered. Read-only for all.

        Raises: ChunkMissingError, ChunkAlteredError, NoSpaceError.
        """
        return self._checkouts.provide(digest, self.manifest(digest))

    def discard(self, digest: Digest) -> None:
        """Remove the version's checkout from the cache."""
        if is_digest(digest):
            self._checkouts.discard(digest)

    def export(self, ref: ModelRef, directory: Path) -> VersionRecord:
        """Write the model's files as they were published to a new or empty folder.

        Raises: ConflictError: it is not empty; the errors of `resolve` and `checkout`.
        """
        record = self.resolve(ref)
        export(self._blobs, self.manifest(record.digest), directory)
        return record

    def verify(self, ref: ModelRef | None = None) -> Report:
        """Read every byte of a version (None: of all versions and packs) and say what is damaged. Raises for an unknown `ref` only."""
        versions = [self.resolve(ref)] if ref else [version for model in self.models() for version in model.versions]
        return verify(versions, self.manifest_bytes, self._blobs, [] if ref else self._pack_files())

    def rebuild_index(self) -> int:
        """Forget where blobs lie and read it from the packs again; gives how many packs there are. Broken packs are left out."""
        self._check_writable()
        with self._publishing:
            found = {path.name: index for path in self._pack_files() if (index := _scan(path)) is not None}
            self._catalog.add_packs(found, replace=True)
        return len(found)

    # --- aliases, publishers, watchers

    def set_alias(self, name: str, alias: str, version: int) -> AliasChange:
        """Point an alias at a version. `name` as in a URL. Raises: BadNameError, UnknownModelError, UnknownVersionError."""
        self._check_writable()
        (change,) = self._catalog.set_alias(_bare(name), [_checked_alias(alias)], version)
        return change

    def delete_alias(self, name: str, alias: str) -> None:
        """Raises: UnknownModelError, UnknownAliasError; ConflictError: `latest` stays."""
        self._check_writable()
        self._catalog.delete_alias(_bare(name), alias)

    def rollback(self, name: str, alias: str | None = None) -> AliasChange:
        """Move an alias (None: the one that the bare name means) back to what it was before; called again it goes further back.

        Raises: UnknownModelError, UnknownAliasError; ConflictError: there is nothing before.
        """
        self._check_writable()
        return self._catalog.rollback(_bare(name), alias)

    def name_publisher(self, publisher: str, label: str) -> None:
        """Give another lab's key (hex) a petname: `label/name`. Raises: BadNameError; ConflictError: it is taken."""
        self._check_writable()
        self._catalog.name_publisher(publisher, label)

    def trust(self, publisher: str, scopes: Sequence[str]) -> None:
        """Add scopes (`code`, …) to what a publisher is trusted for."""
        self._check_writable()
        self._catalog.trust(publisher, scopes)

    def distrust(self, publisher: str, scopes: Sequence[str]) -> None:
        """Take scopes away again."""
        self._check_writable()
        self._catalog.distrust(publisher, scopes)

    def trusted(self, publisher: str, scope: str) -> bool:
        """Whether a publisher is trusted for a scope; the lab's own is for all."""
        return self._catalog.trusted(publisher, scope)

    def change_count(self) -> int:
        """Grows with each change of the catalog, by any process: 10 µs, for watchers to poll."""
        return self._catalog.change_count()


def _check_format(root: Path, *, required: bool) -> None:
    path = root / "format"
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        if required:
            raise StoreError(f"there is no store at {root}: start the lab (`tether up`) or name its data folder with --data") from None
        return
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} can't be read ({error}): restore it (it holds the number {FORMAT})") from error
    if not text.strip().isdecimal():
        raise StoreError(f"{path} holds no format number: restore it (it holds the number {FORMAT})")
    if int(text) > FORMAT:
        raise FormatTooNewError(f"the data folder {root} has format {int(text)}; this Tether understands up to {FORMAT}: update Tether")


def _take_lock(path: Path) -> IO[str]:
    """Held until closed, and by no process that died. Raises: ConflictError: naming the process that holds it."""
    file = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(32).strip() or "unknown"
        file.close()
        raise ConflictError(f"process {holder} already writes the store {path.parent}: stop it, or open the store for reading") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _scan(path: Path) -> list[packs.Located] | None:
    """A pack's index; None where it is broken, which `verify` reports."""
    try:
        return packs.scan(path)
    except StoreError:
        return None


def _bare(name: str) -> ModelRef:
    ref = ModelRef.parse(name)
    return ModelRef(ref.name, ref.publisher)


def _checked_alias(alias: str) -> str:
    ModelRef.parse(f"model@{alias}")
    return alias


def _checked_tags(tags: Mapping[str, str]) -> dict[str, str]:
    nbytes = sum(len(key) + len(value) for key, value in tags.items())
    if nbytes > _MAX_TAGS_NBYTES:
        raise MalformedManifestError(f"tags of {nbytes} characters: at most {_MAX_TAGS_NBYTES}; keep what is longer in a file")
    return dict(tags)
