"""Opens the encrypted versions of one store: finds their keys, and keeps their files in memory where a library wants files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from tether.security.keyring import Keyring
from tether.security.volatile import VolatileFolder
from tether.store.checkout import Checkouts
from tether.store.encryption.model_keys import ModelKeys, key_row
from tether.store.format.encrypted import ModelContext, ModelKey, unlocked
from tether.store.format.manifest import Encryption, Manifest
from tether.store.index.catalog import Catalog
from tether.store.packing.blobs import Blobs
from tether.types import Digest

__all__ = ["Keeper"]


class Keeper:
    """What a store needs for encrypted versions; costs nothing where there are none. Any thread."""

    def __init__(self, catalog: Catalog, blobs: Blobs, folder: Path) -> None:
        """`folder`: of the cluster keys."""
        self.folder = folder
        self._catalog, self._blobs = catalog, blobs
        self._lock = threading.Lock()
        self._files: tuple[VolatileFolder, Checkouts] | None = None
        self._lent: dict[str, tuple[ModelKey, ModelContext]] = {}

    @cached_property
    def keys(self) -> ModelKeys:
        """The model keys. Makes the folder, and the first cluster key, if there is none. Raises: ConfigError, StoreError."""
        return ModelKeys(self._catalog, Keyring.open(self.folder))

    def forget(self) -> None:
        """Look at the folder of cluster keys again: others came."""
        self.__dict__.pop("keys", None)

    def unlocked(self, public: Manifest, encryption: Encryption, read_blob: Callable[[Digest], bytes]) -> Manifest:
        """The true manifest of an encrypted version; `read_blob` gives ciphertext.

        Raises: LockedModelError: this lab has no key for it; ClusterKeyMissingError: it has, and can't use it; ChunkMissingError,
        ChunkAlteredError, MalformedManifestError.
        """
        return unlocked(public, *self.key(encryption.key), read_blob)

    def key(self, key: str) -> tuple[ModelKey, ModelContext]:
        """The key of this id, and the model that it is for. Raises: LockedModelError, ClusterKeyMissingError, StoreError."""
        lent = self._lent.get(key)
        if lent is not None:
            return lent
        context = key_row(self._catalog, key).context  # first: who was given no key needs no folder of keys
        return self.keys.get(key), context

    def lend(self, key: ModelKey, context: ModelContext) -> None:
        """Know a key for the life of this process, as a worker does that works for a lab on another host; it is not written down."""
        self._lent[key.id] = key, context

    def checkout(self, digest: Digest, manifest: Manifest) -> Path:
        """The version's files in memory; until `discard`, `close`, or the end of this process.

        Raises: ChunkMissingError, ChunkAlteredError, ConfigError: there is no tmpfs; NoSpaceError: it is full; StoreError.
        """
        with self._lock:
            if self._files is None:
                folder = VolatileFolder.create("checkout")
                self._files = folder, Checkouts(folder.path, self._blobs)
            folder, checkouts = self._files
        with folder.errors():
            return checkouts.provide(digest, manifest)

    def discard(self, digest: Digest) -> None:
        """Remove a version's files from memory. What is mapped or open stays readable for those who have it."""
        files = self._files
        if files is not None:
            files[1].discard(digest)

    def close(self) -> None:
        """Remove all of them."""
        with self._lock:
            files, self._files = self._files, None
        if files is not None:
            files[0].close()
