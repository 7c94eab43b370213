"""Versions that end workers move into processes of their own, and every gateway hears which inputs are not run."""

import pytest

from tether.events import (
    CatalogChanged,
    CatalogModel,
    InputCondemned,
    LentChanged,
    LentWorker,
    Loaded,
    ModelWanted,
    QuarantineCleared,
    Tick,
    Unloaded,
    VersionIsolated,
    WorkerJoined,
    WorkerLeft,
)
from tether.orchestrator.state import ControlState, Isolate
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
HOUR = 3600.0


def version(number=1):
    return ModelVersion("digits", number, Digest(f"{number:064x}"))


def catalog(*numbers):
    versions = {number: (version(number), INFO) for number in numbers}
    return CatalogChanged("tls://m", 1, {"digits": CatalogModel("digits", max(numbers), {"latest": max(numbers)}, versions)}, 1)


def joined(number, life=0):
    return WorkerJoined(WorkerId(f"worker-{number}"), f"tls://w{number}", 100 + number + 10 * life, 0)


def loaded(number, life=0):
    return Loaded(f"tls://w{number}", 100 + number + 10 * life, version(), f"/s/{number}-{life}")


class Rig:
    def __init__(self):
        self.state, self.now = ControlState(), 0.0

    def __call__(self, *events):
        """Addresses of the workers that are told to isolate the version."""
        told = [each for event in events for each in self.state.handle(event, self.now)]
        return [each.address for each in told if isinstance(each, Isolate)]

    @property
    def entry(self):
        return self.state.table.resolve("digits", "1")


@pytest.fixture
def rig():
    made = Rig()
    made(catalog(1), joined(1), joined(2), ModelWanted(version()), loaded(1))
    return made


def test_who_has_it_is_told_once_and_who_loads_it_later_is_told_then(rig):
    assert rig(VersionIsolated(version())) == ["tls://w1"]
    assert rig(VersionIsolated(version())) == []
    assert rig(loaded(2)) == ["tls://w2"]
    assert rig.entry.is_isolated


def test_a_worker_that_died_is_told_again_when_it_is_back_and_has_loaded_it(rig):
    rig(VersionIsolated(version()))
    assert rig(WorkerLeft("tls://w1"), joined(1, life=1)) == []
    assert rig(loaded(1, life=1)) == ["tls://w1"]


def test_so_is_one_that_freed_it_and_loaded_it_anew(rig):
    rig(VersionIsolated(version()), Unloaded("tls://w1", 101, version()))
    again = Loaded("tls://w1", 101, version(), "/s/1-again")
    assert rig(again) == ["tls://w1"]


def test_workers_of_another_lab_isolate_by_themselves(rig):
    rig(LentChanged(1, (LentWorker(WorkerId("lent"), "key", 1, 0, 4),)), Loaded("lent", 1, version(), "/s/lent"))
    assert rig(VersionIsolated(version())) == ["tls://w1"]


def test_gateways_hear_which_inputs_are_not_run_and_until_when(rig):
    rig(InputCondemned(version(), "a"))
    rig.now = 100.0
    before = rig.state.table.seq
    rig(InputCondemned(version(), "b"))
    assert rig.entry.poison == {"a": HOUR, "b": HOUR + 100}
    assert rig.state.table.seq == before + 1
    rig.now = HOUR
    rig(Tick())
    assert rig.entry.poison == {"b": HOUR + 100}


def test_isolation_ends_after_an_hour(rig):
    rig(VersionIsolated(version()))
    rig.now = HOUR
    assert rig(loaded(2)) == []
    assert not rig.entry.is_isolated


def test_an_operator_can_have_it_forgotten(rig):
    rig(InputCondemned(version(), "a"), VersionIsolated(version()))
    rig(QuarantineCleared("other"))
    assert rig.entry.poison
    rig(QuarantineCleared("digits"))
    assert (rig.entry.poison, rig.entry.is_isolated) == ({}, False)


def test_a_new_version_begins_without_and_a_deleted_one_is_forgotten(rig):
    rig(InputCondemned(version(), "a"), VersionIsolated(version()), catalog(1, 2))
    assert rig.entry.poison
    assert rig.state.table.resolve("digits", "2").poison == {}
    rig(catalog(2), catalog(1, 2))
    assert (rig.entry.poison, rig.entry.is_isolated) == ({}, False)
