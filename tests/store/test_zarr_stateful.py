"""zarr's own state machines (zarr.testing.stateful) on a draft, and beside each step the version that would be published then."""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import numpy as np
import pytest
import zarr
from hypothesis.stateful import invariant, run_state_machine_as_test
from store_models import LAB
from zarr.core.buffer import default_buffer_prototype
from zarr.testing.stateful import ZarrHierarchyStateMachine, ZarrStoreStateMachine

from tether.errors import BadModelError, MalformedManifestError
from tether.store import DraftStore, Repository, VersionStore

PROTOTYPE = default_buffer_prototype()


class OnDraft:
    """Gives a machine a draft of its own in a folder of its own."""

    def __init__(self):
        self.folder = TemporaryDirectory()
        self.draft = DraftStore(Path(self.folder.name), "machine")
        super().__init__(self.draft)

    def teardown(self):
        self.draft.discard()
        self.folder.cleanup()


class DraftStoreMachine(OnDraft, ZarrStoreStateMachine):
    pass


class DraftHierarchyMachine(OnDraft, ZarrHierarchyStateMachine):
    pass


class OnVersions(OnDraft):
    """After each step the draft is published, and the version must have the draft's keys and values, one by one and listed."""

    def __init__(self):
        super().__init__()
        self.repository = Repository.open(Path(self.folder.name), own=LAB.public)
        self.version = None

    def teardown(self):
        self.repository.close()
        super().teardown()

    @invariant()
    def the_version_is_the_draft(self):
        try:
            digest = self.draft.publish(self.repository, "machine", LAB).digest
        except (BadModelError, MalformedManifestError):  # empty, or a key that lies below another: no version can hold those
            return
        if self.version is None or self.version.digest != digest:
            self.version = VersionStore(self.repository, digest)
            asyncio.run(self.compare_keys())
            self.compare_arrays()

    def compare_arrays(self):
        pass

    async def compare_keys(self):
        keys = [key async for key in self.draft.list()]
        assert sorted([key async for key in self.version.list()]) == keys
        for key in keys:
            if key != "zarr.json":
                assert await self.version.get(key, PROTOTYPE) == await self.draft.get(key, PROTOTYPE)
        for folder in {"", *(key.rpartition("/")[0] for key in keys), keys[0].partition("/")[0]}:
            assert sorted([name async for name in self.version.list_dir(folder)]) == sorted(
                [name async for name in self.draft.list_dir(folder)]
            )


class VersionStoreMachine(OnVersions, ZarrStoreStateMachine):
    pass


class VersionHierarchyMachine(OnVersions, ZarrHierarchyStateMachine):
    def compare_arrays(self):
        for path in self.all_arrays:
            np.testing.assert_array_equal(
                zarr.open_array(self.version, path=path, mode="r")[...], zarr.open_array(self.draft, path=path)[...]
            )


@pytest.mark.parametrize(
    ("machine", "examples"),
    [(DraftStoreMachine, 30), (DraftHierarchyMachine, 15), (VersionStoreMachine, 10), (VersionHierarchyMachine, 6)],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
@pytest.mark.filterwarnings("ignore:.*Zarr V3 specification")  # of the types of arrays that the machines make up
def test_a_state_machine_of_zarrs_finds_no_difference(machine, examples):
    settings = hypothesis.settings(max_examples=examples, stateful_step_count=20, suppress_health_check=list(hypothesis.HealthCheck))
    run_state_machine_as_test(machine, settings=settings)
