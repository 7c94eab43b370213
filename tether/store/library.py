"""What readers do with a store: find versions by name, and read their bytes, verified."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path

from tether.errors import ChunkAlteredError, ChunkMissingError, ConflictError, StoreError
from tether.store.checkout import Checkouts, export
from tether.store.encryption.keeper import Keeper
from tether.store.encryption.model_keys import ModelKeys, SealIndex, granted, has_keys
from tether.store.format import packs
from tether.store.format.encrypted import ModelContext, ModelKey
from tether.store.format.manifest import MAX_NBYTES, ArrayEntry, Manifest, decode, digest_of, is_digest
from tether.store.format.records import ModelRecord, VersionRecord
from tether.store.index.catalog import Catalog
from tether.store.index.signatures import Signatures
from tether.store.loading import file_array, tensor_arrays, tensors_of
from tether.store.packing.blobs import Blobs
from tether.store.packing.disk import disk_errors
from tether.store.packing.parallel import buffer
from tether.types import Array, Digest, ModelRef

__all__ = ["Library"]


class Library:
    """The reading half of a `Repository`."""

    def __init__(self, root: Path, clock: Callable[[], float], *, read_only: bool) -> None:
        self.root = root
        self._read_only = read_only
        self._clock = clock
        self._catalog = Catalog(root / "catalog.sqlite", read_only=read_only)
        self._blobs = Blobs(root / "packs", self._catalog)
        self._checkouts = Checkouts(root / "cache", self._blobs)
        self._keeper = Keeper(self._catalog, self._blobs, root.parent / "keys")
        self._signatures = Signatures(self._catalog.signature_of, self.manifest_bytes)

    @property
    def read_only(self) -> bool:
        return self._read_only

    def _check_writable(self) -> None:
        if self._read_only:
            raise ConflictError("this store is open for reading only: the manager of its data folder writes it")

    # --- names

    def resolve(self, ref: ModelRef, publisher: str | None = None) -> VersionRecord:
        """The version that a reference means; a bare name means `@prod` where that exists, else `@latest`. `publisher`: a key (hex).

        Raises: UnknownModelError, UnknownVersionError, UnknownAliasError; ConflictError: several publishers have the name; StoreError: the
        catalog names what the publisher did not sign.
        """
        record = self._catalog.resolve(ref, publisher)
        self._signatures.check(record)
        return record

    def models(self) -> list[ModelRecord]:
        """All models with their versions and aliases, sorted by name."""
        return self._catalog.models()

    def publishers(self) -> dict[str, str]:
        """Petnames by key."""
        return self._catalog.publishers()

    def versions_of(self, digest: Digest) -> list[VersionRecord]:
        """All versions, of whatever models, that this manifest is; the lab's own first. A millisecond for ten thousand versions."""
        return self._catalog.versions_of(digest)

    def signature(self, digest: Digest, publisher: str) -> bytes | None:
        """The publisher's signature of the manifest; None where it published no such version."""
        return self._catalog.signature(digest, publisher)

    def change_count(self) -> int:
        """Grows with each change of the catalog, by any process: 10 µs, for watchers to poll."""
        return self._catalog.change_count()

    # --- bytes

    def is_stored(self, digest: Digest) -> bool:
        """Whether a pack holds the blob."""
        return self._blobs.nbytes(digest) is not None

    def stored(self, digests: Iterable[Digest]) -> set[Digest]:
        """Those of them that a pack holds."""
        return set(self._blobs.locate(digests))

    def read_blob(self, digest: Digest, path: str = "") -> bytes:
        """The verified bytes of a stored blob; `path` is the array that needs it and is named in the error.

        Raises: ChunkMissingError, ChunkAlteredError.
        """
        _check_digest(digest, path)
        return self._blobs.read(digest, path)

    def read_blob_into(self, digest: Digest, view: memoryview, path: str = "") -> memoryview:
        """The same into memory of the caller's, at least as long as the blob (4 MiB always are); gives the part that holds it."""
        _check_digest(digest, path)
        return self._blobs.read_into(digest, view, path)

    def read_array(self, array: ArrayEntry, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an array. Raises: ChunkMissingError, ChunkAlteredError."""
        return self._blobs.span(array, start, stop)

    def read_plain_blob(self, array: ArrayEntry, digest: Digest) -> bytes:
        """A blob that the array names, decrypted where the array is encrypted. Raises: ChunkMissingError, ChunkAlteredError."""
        with buffer() as view:
            return bytes(self._blobs.open_into(array, digest, view))

    def manifest_bytes(self, digest: Digest) -> bytes:
        """The canonical bytes, verified. Raises: ChunkMissingError, ChunkAlteredError."""
        path = f"manifests/{digest[:64]}"
        _check_digest(digest, path)
        try:
            with disk_errors(self.root / path), (self.root / path).open("rb") as file:
                data = file.read(MAX_NBYTES + 1)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise ChunkMissingError(f"manifest {digest} is not in the store: publish or replicate it again", digest, path) from None
            raise
        if digest_of(data) != digest:
            raise ChunkAlteredError(f"manifest {digest} was altered on disk: publish or replicate the version again", digest, path)
        return data

    def manifest(self, digest: Digest) -> Manifest:
        """What a version is made of; its arrays are read as plain ones, also where it is encrypted and this lab has the key.

        Raises: ChunkMissingError, ChunkAlteredError; LockedModelError: it is encrypted, and this lab can't open it.
        """
        return self.opened(self.public_manifest(digest), self._blobs.read)

    def opened(self, public: Manifest, read_blob: Callable[[Digest], bytes]) -> Manifest:
        """The true manifest for one that was signed, which need not be published here. Raises: as `manifest`, and `read_blob`."""
        return public if public.encryption is None else self._keeper.unlocked(public, public.encryption, read_blob)

    def public_manifest(self, digest: Digest) -> Manifest:
        """What its publisher signed: of an encrypted version blobs and sizes. For those who handle blobs as they are stored."""
        return decode(self.manifest_bytes(digest))

    def keep_keys_in(self, folder: Path) -> None:
        """Name the folder of the cluster keys; before one is used."""
        self._keeper.folder = folder

    def key_of(self, digest: Digest) -> tuple[ModelKey, ModelContext] | None:
        """What opens a version; None: it is not encrypted. Raises: LockedModelError, ClusterKeyMissingError, ChunkMissingError."""
        encryption = self.public_manifest(digest).encryption
        return None if encryption is None else self._keeper.key(encryption.key)

    def lend_key(self, key: ModelKey, context: ModelContext) -> None:
        """Know a key for the life of this process; it is not written down."""
        self._keeper.lend(key, context)

    @property
    def keys(self) -> ModelKeys:
        """The keys of encrypted models. Raises: ConfigError, StoreError: the folder of cluster keys can't be used."""
        return self._keeper.keys

    def has_keys(self, context: ModelContext) -> bool:
        """Whether something of a model was encrypted before."""
        return has_keys(self._catalog, context)

    def granted(self, peer: str) -> tuple[ModelContext, ...]:
        """The models whose keys a peer (key, hex) was given."""
        return granted(self._catalog, peer)

    def seal_index(self, key: ModelKey) -> SealIndex:
        """What was encrypted with a model key before."""
        return SealIndex(self._catalog, key)

    # --- versions

    def load_tensors(
        self, version: Digest | Manifest, names: Iterable[str] | None = None, *, threads: int | None = None
    ) -> dict[str, Array]:
        """Weights as read-only arrays, mapped from the packs where they lie there in one piece; every byte is verified in this call.

        Raises: NotFoundError: no tensor of such a name; ChunkMissingError, ChunkAlteredError.
        """
        manifest = version if isinstance(version, Manifest) else self.manifest(version)
        with closing(tensor_arrays(self._blobs, tensors_of(manifest, names), threads, together=True)) as found:
            return dict(found)

    def iter_tensors(
        self, version: Digest | Manifest, names: Iterable[str] | None = None, *, threads: int | None = None
    ) -> Generator[tuple[str, Array]]:
        """The same, each as soon as it was verified, in the order of the disk. Used at once, it is still in the processor's cache."""
        manifest = version if isinstance(version, Manifest) else self.manifest(version)
        return tensor_arrays(self._blobs, tensors_of(manifest, names), threads)

    def load_file(self, version: Digest | Manifest, path: str, *, threads: int | None = None) -> memoryview:
        """The bytes of one file, read-only, by its relative path; mapped and verified as `load_tensors` does.

        Raises: NotFoundError: no such file; ChunkMissingError, ChunkAlteredError.
        """
        manifest = version if isinstance(version, Manifest) else self.manifest(version)
        return file_array(self._blobs, manifest, path, threads).data

    def checkout(self, digest: Digest) -> Path:
        """A folder with the version's files, every byte verified in this call; mended where it was altered. Read-only for all.

        An encrypted version's lies in memory, is for this process's user alone, and gone with `discard`, `close` or this process.

        Raises: ChunkMissingError, ChunkAlteredError, NoSpaceError; LockedModelError: it is encrypted, and this lab can't open it;
        ConfigError: it is, and there is no tmpfs.
        """
        public = self.public_manifest(digest)
        if public.encryption is None:
            return self._checkouts.provide(digest, public)
        return self._keeper.checkout(digest, self.opened(public, self._blobs.read))

    def discard(self, digest: Digest) -> None:
        """Remove the version's checkout from the cache."""
        if is_digest(digest):
            self._keeper.discard(digest)
            self._checkouts.discard(digest)

    def export(self, ref: ModelRef, directory: Path) -> VersionRecord:
        """Write the model's files as they were published to a new or empty folder.

        Raises: ConflictError: it is not empty; the errors of `resolve` and `checkout`.
        """
        record = self.resolve(ref)
        export(self._blobs, self.manifest(record.digest), directory)
        return record


def _check_digest(digest: Digest, path: str) -> None:
    if not is_digest(digest):
        raise packs.missing(Digest(digest[:64]), path)
