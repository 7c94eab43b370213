"""How an encrypted version comes into a store: what is put in is encrypted on its way, so that no plaintext is ever staged.

Whoever publishes speaks of plaintext by its digests, as for a plain version; the catalog's table of seals says which of it is here
already, so that the next version sends only what changed and an interrupted one goes on. `Intake` is what both ways have in common.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from tether.errors import DigestMismatchError, PayloadTooLargeError
from tether.store.encryption.model_keys import SealIndex
from tether.store.format.encrypted import ModelContext, ModelKey, Opener, Sealed, Sealer, on_ciphertext, seal_manifest
from tether.store.format.layout import BLOB_NBYTES, Piece
from tether.store.format.manifest import ArrayEntry, Manifest, Seal, digest_of, encode
from tether.store.format.packs import missing as missing_blob
from tether.store.packing.files import cut_bytes, cut_file
from tether.store.packing.parallel import buffer
from tether.store.packing.staging import Planned
from tether.store.repository import Repository
from tether.types import Digest, model_name

__all__ = ["Intake", "PlainIntake", "SealedIntake", "Sealing"]

_FRESH = 64
"""Seals that wait to be written down together: 256 MiB of a model. A crash costs no more than sending those again."""
_PAUSE = 2.0
"""Seconds after which they are, even if they are few."""


class Intake(Protocol):
    """Where the blobs of a version go before it is published. Digests are of plaintext. Any thread."""

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """What a publisher has to send."""
        ...

    def plan(self, arrays: Iterable[ArrayEntry]) -> None:
        """Keep room for what is to come."""
        ...

    def read(self, digest: Digest) -> bytes:
        """The plain bytes of a blob that was put in. Raises: ChunkMissingError, ChunkAlteredError."""
        ...

    def add_file(self, path: Path, name: str, ranges: Sequence[Piece] = ()) -> ArrayEntry:
        """Cut a file on this machine and put it in, as `name`."""
        ...

    def add_bytes(self, name: str, data: bytes) -> ArrayEntry:
        """The same for one that is in memory."""
        ...

    def finished(self, manifest: Manifest) -> bytes:
        """The canonical bytes to sign and publish, for a manifest over what was put in."""
        ...

    def settle(self) -> None:
        """It was published."""
        ...


class PlainIntake:
    """Of a version that is not encrypted: the repository's own."""

    def __init__(self, repository: Repository) -> None:
        self.missing, self.plan = repository.missing, repository.plan
        self.read, self.add_file, self.add_bytes = repository.read_draft_blob, repository.add_file, repository.add_bytes

    def finished(self, manifest: Manifest) -> bytes:
        """As it is."""
        return encode(manifest)

    def settle(self) -> None:
        """Nothing is left to do."""


class Sealing:
    """Encrypts for the models of one lab."""

    def __init__(self, repository: Repository, publisher: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`publisher`: the lab's own public key, hex."""
        self._repository, self._publisher, self._clock = repository, publisher, clock
        self._lock = threading.Lock()
        self._seals: dict[str, _Seals] = {}

    def context(self, name: str) -> ModelContext:
        """Raises: BadNameError."""
        return ModelContext(self._publisher, model_name(name))

    def is_used(self, name: str) -> bool:
        """Whether something of the model was encrypted before."""
        return self._repository.has_keys(self.context(name))

    def put_blob(self, name: str, digest: Digest, data: bytes) -> None:
        """Stage a blob for a model. Raises: PayloadTooLargeError, DigestMismatchError, NoSpaceError, ClusterKeyMissingError, StoreError."""
        if len(data) > BLOB_NBYTES:
            raise PayloadTooLargeError(f"a blob of {len(data)} bytes: cut files every {BLOB_NBYTES} bytes")
        if digest_of(data) != digest:
            raise DigestMismatchError(f"the bytes sent as blob {digest[:64]!r} have another BLAKE3 digest: send them again", digest[:64])
        self.intake(name).put(digest, data)

    def intake(self, name: str) -> SealedIntake:
        """For one publish of a model, with the key that is current now. Raises: BadNameError, ClusterKeyMissingError, StoreError."""
        context = self.context(name)
        key = self._repository.keys.current(context)
        with self._lock:
            seals = self._seals.get(key.id)
            if seals is None:
                seals = self._seals[key.id] = _Seals(self._repository.seal_index(key), self._clock)
        return SealedIntake(self._repository, key, context, seals)


class SealedIntake:
    """Of an encrypted version."""

    def __init__(self, repository: Repository, key: ModelKey, context: ModelContext, seals: _Seals) -> None:
        self._repository, self._key, self._context, self._known = repository, key, context, seals
        self._sealer, self._opener = Sealer(key, context), Opener(key, context)
        self._seals: dict[Digest, Seal] = {}
        """What this publish met so far."""

    def put(self, digest: Digest, data: bytes | memoryview) -> None:
        """Encrypt a blob, whose digest was checked, and stage it. The same bytes give the same blob, and are not written twice."""
        with buffer() as view:
            seal = self._stage(self._sealer.seal(data, view))
        self._seals[digest] = seal
        self._known.add(digest, seal)

    def _stage(self, sealed: Sealed) -> Seal:
        self._repository.put_blob(sealed.seal.digest, bytes(sealed.ciphertext))
        return sealed.seal

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """As `Intake` says. What was sent before and can't be found any more is asked for again."""
        self._known.flush()
        return self.needs(digests)

    def plan(self, arrays: Iterable[ArrayEntry]) -> None:
        """No room is kept: what ciphertext will be called is not known yet, and it is never mapped in place."""

    def read(self, digest: Digest) -> bytes:
        """As `Intake` says."""
        seal = self._seals.get(digest)
        if seal is None:
            raise missing_blob(digest, "")
        return bytes(self._opener.open(seal, self._repository.read_draft_blob(seal.digest)))

    def add_file(self, path: Path, name: str, ranges: Sequence[Piece] = ()) -> ArrayEntry:
        """As `Intake` says."""
        return cut_file(path, name, self, ranges)

    def add_bytes(self, name: str, data: bytes) -> ArrayEntry:
        """As `Intake` says."""
        return cut_bytes(name, data, self.put)

    def needs(self, digests: Iterable[Digest]) -> list[Digest]:
        """For `files.cut_file`: which pieces of a file are to be put in. Asked so often that nothing is written down for it."""
        wanted = list(dict.fromkeys(digests))
        self._seals |= self._known.find(digest for digest in wanted if digest not in self._seals)
        gone = set(self._repository.missing(self._seals[digest].digest for digest in wanted if digest in self._seals))
        return [digest for digest in wanted if digest not in self._seals or self._seals[digest].digest in gone]

    def place(self, blobs: Sequence[Planned]) -> Callable[[Sequence[memoryview]], None]:
        """For `files.cut_file`: what takes the pieces."""

        def put(parts: Sequence[memoryview]) -> None:
            for blob, part in zip(blobs, parts, strict=True):
                self.put(blob.digest, part)

        return put

    def finished(self, manifest: Manifest) -> bytes:
        """As `Intake` says: the public manifest; the private part is staged.

        Raises: MissingBlobsError, MalformedManifestError, NoSpaceError, StoreError.
        """
        arrays = on_ciphertext(manifest.arrays, self._seals)
        true = msgspec.structs.replace(manifest, arrays=arrays)
        public, private = seal_manifest(true, self._seals.values(), self._key, self._context)
        for sealed in private:
            self._stage(sealed)
        return encode(public)

    def settle(self) -> None:
        """As `Intake` says."""
        self._known.flush()


class _Seals:
    """What was sealed with one key: in the catalog, and since. Any thread."""

    def __init__(self, index: SealIndex, clock: Callable[[], float]) -> None:
        self._index, self._clock = index, clock
        self._lock = threading.Lock()
        self._fresh: dict[Digest, Seal] = {}
        self._written = clock()

    def find(self, digests: Iterable[Digest]) -> dict[Digest, Seal]:
        wanted = list(digests)
        with self._lock:
            fresh = {digest: self._fresh[digest] for digest in wanted if digest in self._fresh}
        return self._index.find(digest for digest in wanted if digest not in fresh) | fresh

    def add(self, digest: Digest, seal: Seal) -> None:
        with self._lock:
            self._fresh[digest] = seal
            due = len(self._fresh) >= _FRESH or self._clock() - self._written > _PAUSE
        if due:
            self.flush()

    def flush(self) -> None:
        """Write down what is fresh, in one transaction."""
        with self._lock:
            fresh = dict(self._fresh)
            self._written = self._clock()
        if fresh:
            self._index.add(fresh)
            with self._lock:
                for digest in fresh:
                    self._fresh.pop(digest, None)
