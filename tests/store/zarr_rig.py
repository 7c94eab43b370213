"""A store that zarr's suite takes for writable: what is set goes to a draft, each change is published, all reading is VersionStore's."""

import weakref
from pathlib import Path

import msgspec
from store_models import LAB

from tether.errors import BadModelError
from tether.store import DraftStore, Repository, VersionStore
from tether.store.hierarchy.draft import WEIGHTS_ONLY
from tether.store.hierarchy.reading import VersionReader
from tether.types import Digest

EMPTY = Digest("0" * 64)


class Published:
    """Versions of a repository, and one that has no keys: a manifest can't be that empty."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with Repository.open(root, own=LAB.public):
            pass
        self._reading = Repository.open(root, read_only=True)
        self.read_array = self._reading.read_array
        weakref.finalize(self, self._reading.close)  # the suite pickles stores and drops what comes back

    def manifest(self, digest):
        return msgspec.structs.replace(WEIGHTS_ONLY, arrays=()) if digest == EMPTY else self._reading.manifest(digest)

    def publish(self, draft: DraftStore) -> Digest:
        with Repository.open(self.root, own=LAB.public) as repository:
            try:
                return draft.publish(repository, "suite", LAB).digest
            except BadModelError:
                return EMPTY

    def __eq__(self, value):
        return isinstance(value, Published) and self.root == value.root

    def __hash__(self):
        return hash(self.root)

    def __reduce__(self):
        return Published, (self.root,)


class PublishingStore(VersionStore):
    """Writes are what no version allows, so they are this class's own; every read goes through VersionStore, opened anew after a write."""

    supports_writes = True
    supports_deletes = True

    def __init__(self, versions: Published, draft: DraftStore, *, read_only: bool = False) -> None:
        super().__init__(versions, EMPTY)
        self._read_only = read_only
        self.draft = draft
        self.reopen()

    def reopen(self):
        self._reader = VersionReader(self._reader.versions, self._reader.versions.publish(self.draft))

    def __reduce__(self):
        return type(self), (self._reader.versions, self.draft)

    def with_read_only(self, read_only=False):
        return type(self)(self._reader.versions, self.draft, read_only=read_only)

    async def set(self, key, value):
        self._check_writable()
        await self.draft.set(key, value)
        self.reopen()

    async def _set_many(self, values):
        for key, value in values:
            await self.draft.set(key, value)
        self.reopen()

    async def set_if_not_exists(self, key, value):
        await self.draft.set_if_not_exists(key, value)
        self.reopen()

    async def delete(self, key):
        self._check_writable()
        await self.draft.delete(key)
        self.reopen()

    async def delete_dir(self, prefix):
        await self.draft.delete_dir(prefix)
        self.reopen()

    async def clear(self):
        await self.draft.clear()
        self.reopen()
