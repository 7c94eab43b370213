"""What a replica has of its versions: reads the repository, keeps what was fetched, makes good copies take the place of damaged ones."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

import structlog

from tether.errors import ChunkAlteredError, ChunkMissingError
from tether.ports import SignedManifest
from tether.store.format.records import VersionRecord
from tether.store.replicas.fetching import Wanted
from tether.store.repository import Repository
from tether.types import Digest, ModelRef

__all__ = ["Held"]

log = structlog.get_logger("tether.store")
_MEMORY = 32 << 20
"""Bytes of fetched blobs that are kept where the repository can't be written."""


class Held:
    """One repository, as those who fetch see it. Methods block and may be called from any thread."""

    def __init__(self, local: Repository) -> None:
        self.local = local
        self.damaged = 0
        """Blobs that were found altered."""
        self._lock = threading.Lock()
        self._memory: OrderedDict[Digest, bytes] = OrderedDict()
        self._nbytes = 0
        self._altered: set[Digest] = set()
        self._mended: set[Digest] = set()

    def look(self, wanted: Wanted) -> bytes | None:
        """A blob's verified bytes, if it is here and whole. Raises: StoreError: the disk refuses."""
        with self._lock:
            found = self._memory.get(wanted.digest)
        if found is not None:
            return found
        try:
            return self.local.read_draft_blob(wanted.digest)
        except ChunkAlteredError:
            self._note_damage(wanted)
        except ChunkMissingError:
            pass
        return None

    def _note_damage(self, wanted: Wanted) -> None:
        with self._lock:
            self.damaged += wanted.digest not in self._altered
            self._altered.add(wanted.digest)
        log.warning("stored blob altered; it is fetched again", blob=wanted.digest, path=wanted.path, store=str(self.local.root))

    def keep(self, digest: Digest, data: bytes) -> None:
        """Stage a verified blob; it survives this process. Raises: NoSpaceError, StoreError."""
        if not self.local.read_only:
            self.local.put_blob(digest, data)
        with self._lock:
            if digest in self._altered:
                self._altered.discard(digest)
                self._mended.add(digest)
            if self.local.read_only:
                self._remember(digest, data)

    def _remember(self, digest: Digest, data: bytes) -> None:
        self._nbytes += len(data) - len(self._memory.pop(digest, b""))
        self._memory[digest] = data
        while self._nbytes > _MEMORY and len(self._memory) > 1:
            self._nbytes -= len(self._memory.popitem(last=False)[1])

    @property
    def mended(self) -> bool:
        """Whether `settle` has something to do."""
        return bool(self._mended)

    def settle(self) -> None:
        """Make the fetched copies of damaged blobs durable: publishing a known version again stores what was staged of it."""
        with self._lock:
            mended, self._mended = self._mended, set()
        if not mended or self.local.read_only:
            return
        for record in self._records():
            try:
                named = not mended.isdisjoint(self.local.public_manifest(record.digest).blobs())
            except (ChunkMissingError, ChunkAlteredError):
                continue
            if named:
                self.publish(ModelRef.parse(record.name).name, self.signed(record))

    # --- versions

    def _records(self) -> Iterable[VersionRecord]:
        return (version for model in self.local.models() for version in model.versions)

    def record(self, digest: Digest) -> VersionRecord | None:
        """The version of this manifest that is published here; None: there is none."""
        return next((version for version in self._records() if version.digest == digest), None)

    def manifest_bytes(self, digest: Digest) -> bytes | None:
        """A version's manifest, if it is here and whole."""
        try:
            return self.local.manifest_bytes(digest)
        except (ChunkMissingError, ChunkAlteredError):
            return None

    def whole(self, digest: Digest) -> SignedManifest | None:
        """The version as it was signed, if it is published here and its manifest is whole."""
        record = self.record(digest)
        return None if record is None or self.manifest_bytes(digest) is None else self.signed(record)

    def signed(self, record: VersionRecord) -> SignedManifest:
        """A version of this repository as it was signed. Raises: ChunkMissingError, ChunkAlteredError."""
        signature = self.local.signature(record.digest, record.publisher) or b""
        return SignedManifest(self.local.manifest_bytes(record.digest), record.publisher, signature)

    def publish(self, name: str, signed: SignedManifest) -> None:
        """Make it a version of this repository, durably. Raises: as `Repository.publish`."""
        self.local.publish(name, signed.data, signed.publisher, signed.signature)
