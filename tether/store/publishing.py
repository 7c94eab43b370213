"""How versions come into a store: blobs are staged where their pack will have them, then pack, manifest and catalog make one version."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tether.errors import ChunkAlteredError, ChunkMissingError, MalformedManifestError, MissingBlobsError
from tether.ports import SignedManifest
from tether.security.identity import verify as verify_signature
from tether.store.collecting.marking import Marker, Surroundings
from tether.store.collecting.promises import Promises
from tether.store.collecting.sharing import LocalPacks, PackFolder, SharedPacks, is_shared
from tether.store.format.layout import Piece
from tether.store.format.manifest import MAX_NBYTES, ArrayEntry, Manifest, Segment, decode, digest_of, is_digest, signed_message
from tether.store.format.packs import Located, Location
from tether.store.format.records import NewVersion, Published
from tether.store.index import collection_tables
from tether.store.library import Library
from tether.store.packing.disk import disk_errors, write_atomically
from tether.store.packing.files import cut_bytes, cut_file, cut_files
from tether.store.packing.staging import Planned, Run, Staging
from tether.types import Digest, ModelRef, model_name

__all__ = ["Publishing"]

_MAX_TAGS_NBYTES = 64 * 1024


class Publishing(Library):
    """The publishing half of a `Repository`."""

    def __init__(self, root: Path, clock: Callable[[], float], *, read_only: bool) -> None:
        super().__init__(root, clock, read_only=read_only)
        self._publishing = threading.Lock()
        self._staging = Staging(root / "staging", root / "packs")
        self._promises = Promises(clock)
        alone = read_only or not is_shared(root)
        self._shared: PackFolder = LocalPacks(root / "packs") if alone else SharedPacks(root, clock)
        self._marker = Marker(self._surroundings)

    @property
    def _surroundings(self) -> Surroundings:
        return Surroundings(
            root=self.root,
            catalog=self._catalog,
            manifest=self.public_manifest,
            publishing=self._publishing,
            unsettled=self._staging.unsettled,
            staged=self._staging.nbytes,
            promises=self._promises,
            shared=self._shared,
            clock=self._clock,
        )

    # --- blobs

    def plan(self, arrays: Iterable[ArrayEntry]) -> None:
        """Keep room for the blobs of these arrays that are neither stored nor staged: in this order, as they lie in their files.

        However they come, they will lie in the pack as if the files had been written in one go.
        """
        self._check_writable()
        blobs = {blob.digest: blob for array in arrays for blob in _planned(array)}
        stored = self._promised(filter(is_digest, blobs))
        self._staging.plan(blob for digest, blob in blobs.items() if is_digest(digest) and digest not in stored)

    def put_blob(self, digest: Digest, data: bytes) -> None:
        """Stage a blob until a publish names it; nothing is written where it is stored and whole.

        Raises: PayloadTooLargeError: over 4 MiB; DigestMismatchError; NoSpaceError.
        """
        self._check_writable()
        if not is_digest(digest) or self._lacking([digest]) or digest_of(data) != digest:
            self._staging.put(digest, data)

    def _lacking(self, digests: Sequence[Digest]) -> set[Digest]:
        """Those that have to be sent. The others are read, so that publishing a model again heals what was damaged."""
        self._check_writable()  # each time: another writer's pieces would come to lie in the same pending pack
        stored = self._promised(digests)
        damaged = {digest for digest, place in stored.items() if not self._blobs.is_whole(digest, place)}
        if damaged and self._marker.look():
            damaged = {digest for digest in damaged if not self._blobs.is_whole(digest)}
        self._promises.release(damaged)
        return {digest for digest in digests if digest not in stored or digest in damaged}

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """Those that are neither stored nor staged: what a publisher has to send."""
        wanted = list(dict.fromkeys(digests))
        stored = self._promised(filter(is_digest, wanted))
        return [digest for digest in wanted if digest not in stored and self._staging.nbytes(digest) is None]

    def _promised(self, digests: Iterable[Digest]) -> dict[Digest, Location]:
        """Where those of them lie that a pack holds. They are not collected for an hour, in which a publish may name them."""
        wanted = list(digests)
        self._promises.note(wanted)
        stored = self._blobs.locate(wanted)
        if len(stored) < len(wanted) and self._marker.look():
            stored = self._blobs.locate(wanted)
        self._promises.release(digest for digest in wanted if digest not in stored)
        return stored

    def staged_nbytes(self, digest: Digest) -> int | None:
        """Size of a blob that was uploaded and not yet published; None: there is none. Nothing is read for it."""
        return self._staging.nbytes(digest)

    def staged_blob(self, digest: Digest) -> bytes | None:
        """The verified bytes of a blob that was uploaded and not yet published; None: there is none."""
        return self._staging.read(digest)

    def read_draft_blob(self, digest: Digest) -> bytes:
        """The verified bytes of a blob that a publish may name: staged, else stored. Raises: ChunkMissingError, ChunkAlteredError."""
        staged = self._staging.read(digest)
        return staged if staged is not None else self.read_blob(digest)

    def add_files(self, source: Path, boundaries: Mapping[str, Sequence[Piece]] | None = None) -> list[ArrayEntry]:
        """Cut a model on this disk, a file or a folder, and stage its blobs; gives the arrays for its manifest.

        `boundaries`: where tensors lie, by relative path (a single file's is its name): they get blobs of their own.

        Raises: NoModelFileError, BadModelError: links, special files, impossible names; NoSpaceError.
        """
        self._check_writable()
        return cut_files(source, _Stager(self._lacking, self._staging), boundaries or {})

    def add_file(self, path: Path, name: str, ranges: Sequence[Piece] = ()) -> ArrayEntry:
        """The same for one file, as `name`: its relative path, `.tether/…` for what is not the model's own."""
        self._check_writable()
        return cut_file(path, name, _Stager(self._lacking, self._staging), ranges)

    def add_bytes(self, name: str, data: bytes) -> ArrayEntry:
        """The same for one file that is in memory."""
        self._check_writable()
        return cut_bytes(name, data, self.put_blob)

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
        _check_signed(SignedManifest(manifest, publisher, signature))
        parsed = decode(manifest)
        new = NewVersion(
            name=model_name(name),
            publisher=publisher,
            digest=digest_of(manifest),
            signature=signature,
            nbytes=parsed.nbytes,
            created=self._clock(),
            aliases=tuple(checked_alias(text) for text in alias),
            tags=_checked_tags(tags or {}),
        )
        self._promised(parsed.blobs())
        with self._publishing:
            known = self._catalog.version_of(publisher, name, new.digest)
            if known is not None:
                self._check_blobs(parsed, parsed.blobs())
                self._heal(new.digest, manifest, parsed)
                self._catalog.set_alias(ModelRef(name), new.aliases, known, publisher)
                return Published(known, new.digest, created=False)
            return Published(self._commit(new, manifest, parsed), new.digest, created=True)

    def hold(self, versions: Sequence[SignedManifest]) -> None:
        """Make what is staged of these durable, in one pack, as no versions yet: `mirror` is about to name them.

        Raises: as `publish`.
        """
        self._check_writable()
        for each in versions:
            _check_signed(each)
        manifests = [decode(each.data) for each in versions]
        blobs = list(dict.fromkeys(digest for manifest in manifests for digest in manifest.blobs()))
        self._promised(blobs)
        with self._publishing:
            for manifest in manifests:
                self._check_blobs(manifest, manifest.blobs())
            self._store(blobs)
            with self._catalog.writing() as db:  # what is named by no version yet counts from now
                for each in versions:
                    collection_tables.remember_manifest(db, digest_of(each.data), self._clock())
            for each in versions:
                self._heal_manifest(digest_of(each.data), each.data)

    def _commit(self, new: NewVersion, manifest: bytes, parsed: Manifest) -> int:
        """The pack, then the manifest, then one transaction: whatever is cut off leaves no version behind, or a whole one."""
        blobs = parsed.blobs()
        self._check_blobs(parsed, blobs)
        written = self._seal(blobs)
        self._write_manifest(new.digest, manifest)
        version = self._catalog.add_version(new, written)
        self._staging.settle(blobs)
        return version

    def _heal(self, digest: Digest, manifest: bytes, parsed: Manifest) -> None:
        """Store again what `put_blob` found damaged of a version that exists; mostly nothing."""
        self._store(parsed.blobs())
        self._heal_manifest(digest, manifest)

    def _heal_manifest(self, digest: Digest, manifest: bytes) -> None:
        try:
            self.manifest_bytes(digest)
        except (ChunkMissingError, ChunkAlteredError):
            self._write_manifest(digest, manifest)

    def _store(self, blobs: Sequence[Digest]) -> None:
        """Make what is staged of these durable, for versions that exist."""
        written = self._seal(blobs)
        if written:
            self._catalog.add_packs(written)
        self._staging.settle(blobs)

    def _seal(self, blobs: Sequence[Digest]) -> dict[str, list[Located]]:
        with disk_errors(self.root / "packs"):
            written = self._staging.seal(blobs)
        self._shared.claim(written)
        return written

    def _write_manifest(self, digest: Digest, manifest: bytes) -> None:
        path = self.root / "manifests" / digest
        with disk_errors(path):
            write_atomically(path, manifest, "manifest")

    def _check_blobs(self, manifest: Manifest, blobs: Sequence[Digest]) -> None:
        staged = {digest: nbytes for digest in blobs if (nbytes := self._staging.nbytes(digest)) is not None}
        stored = self._blobs.locate(digest for digest in blobs if digest not in staged)
        gone = self._shared.lacking({location.pack for location in stored.values()})
        sizes = staged | {digest: location.nbytes for digest, location in stored.items() if location.pack not in gone}
        short = {
            segment.digest: array.path
            for array in manifest.arrays
            for segment in array.segments
            if _ends(segment) > sizes.get(segment.digest, -1)
        }
        lacking = [digest for digest in blobs if digest not in sizes or (digest in short and not self._is_here(digest))]
        if lacking:
            raise MissingBlobsError(f"{len(lacking)} blobs are not here yet: upload them, then send the manifest again", lacking)
        if short:
            path = next(iter(short.values()))
            raise MalformedManifestError(f"malformed manifest: array {path[:200]!r} has a segment outside of its blob")

    def _is_here(self, digest: Digest) -> bool:
        """Whether a blob that is too short for its manifest is all that there is of it, or damaged."""
        return self._staging.read(digest) is not None or self._blobs.is_whole(digest)


class _Stager:
    """Stages the pieces of files on this disk, side by side."""

    def __init__(self, lacking: Callable[[Sequence[Digest]], Collection[Digest]], staging: Staging) -> None:
        self.needs = lacking
        self._staging = staging
        self._run = Run()

    def place(self, blobs: Sequence[Planned]) -> Callable[[Sequence[memoryview]], None]:
        planned = {blob.digest: blob for blob in blobs}
        slots = [self._staging.reserve(blob, self._run) for blob in blobs]

        def write(parts: Sequence[memoryview]) -> None:
            late = self._staging.fill_all((slot, part) for slot, part in zip(slots, parts, strict=True) if slot)
            while late:
                again = [(self._staging.reserve(planned[slot.digest], self._run), part) for slot, part in late]
                late = self._staging.fill_all((slot, part) for slot, part in again if slot)

        return write


def _check_signed(version: SignedManifest) -> None:
    """Before it is parsed: what a stranger sent costs no more than its hash. Raises: MalformedManifestError, BadSignatureError."""
    if len(version.data) > MAX_NBYTES:
        raise MalformedManifestError(f"the manifest has {len(version.data)} bytes; at most {MAX_NBYTES} are allowed")
    verify_signature(version.publisher, signed_message(version.data), version.signature)


def _planned(array: ArrayEntry) -> Iterator[Planned]:
    """The blobs of an array. How long they are is a claim: one of which only a part is named may be longer."""
    offset = 0
    for segment in array.segments:
        yield Planned(segment.digest, segment.offset + segment.nbytes, offset - segment.offset)
        offset += segment.nbytes


def _ends(segment: Segment) -> int:
    return segment.offset + segment.nbytes


def checked_alias(alias: str) -> str:
    """Raises: BadNameError."""
    ModelRef.parse(f"model@{alias}")
    return alias


def _checked_tags(tags: Mapping[str, str]) -> dict[str, str]:
    nbytes = sum(len(key) + len(value) for key, value in tags.items())
    if nbytes > _MAX_TAGS_NBYTES:
        raise MalformedManifestError(f"tags of {nbytes} characters: at most {_MAX_TAGS_NBYTES}; keep what is longer in a file")
    return dict(tags)
