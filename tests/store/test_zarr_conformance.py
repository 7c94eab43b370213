"""zarr's own suite for stores (zarr.testing.store): a draft passes all of it, a version the half that reads."""

import pytest
from zarr.core.buffer import cpu
from zarr.testing.store import StoreTests
from zarr_rig import Published, PublishingStore

from tether.store import DraftStore


class TestDraftStore(StoreTests[DraftStore, cpu.Buffer]):
    store_cls = DraftStore
    buffer_cls = cpu.Buffer

    async def set(self, store, key, value):
        store._draft.write(key, value.to_bytes())

    async def get(self, store, key):
        return self.buffer_cls.from_bytes(store._draft.read(key))

    @pytest.fixture
    def store_kwargs(self, tmp_path):
        return {"root": tmp_path, "name": "suite"}

    def test_store_repr(self, store):
        assert repr(store) == f"DraftStore({str(store._draft.root)!r}, 'suite')"

    def test_store_supports_writes(self, store):
        assert store.supports_writes

    def test_store_supports_listing(self, store):
        assert store.supports_listing


class TestVersionStore(StoreTests[PublishingStore, cpu.Buffer]):
    """Each value that the suite sets is published, and read back through the version that this made."""

    store_cls = PublishingStore
    buffer_cls = cpu.Buffer

    async def set(self, store, key, value):
        store.draft._draft.write(key, value.to_bytes())
        store.reopen()

    async def get(self, store, key):
        return self.buffer_cls.from_bytes(store._reader.read(key))

    @pytest.fixture
    def store_kwargs(self, tmp_path):
        return {"versions": Published(tmp_path), "draft": DraftStore(tmp_path, "suite")}

    def test_store_repr(self, store):
        assert repr(store).startswith("VersionStore(")

    def test_store_supports_writes(self, store):
        assert store.supports_writes  # the rig's; test_version_store.py has VersionStore's own refusals

    def test_store_supports_listing(self, store):
        assert store.supports_listing
