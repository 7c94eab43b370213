"""Models run where their settings say, on GPUs first where they say nothing, and what can't run anywhere is refused with the reason."""

import pytest

from tether.events import CatalogChanged, CatalogModel, Loaded, ModelWanted, Unloaded, WorkerJoined, WorkerLeft
from tether.orchestrator.state import ControlState, Load, Unload
from tether.serving_settings import ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
DIGITS = ModelVersion("digits", 1, Digest("1" * 64))
GPU, PLAIN = WorkerJoined(WorkerId("with"), "tls://gpu", 1, 1), WorkerJoined(WorkerId("without"), "tls://cpu", 2, 0)


def said(device):
    return CatalogChanged("tls://m", 1, {"digits": CatalogModel("digits", 1, {}, {1: (DIGITS, INFO)}, ServingSettings(device=device))}, 1)


def lab(device, *workers, copies=1):
    state = ControlState(copies=copies)
    for event in (said(device), *workers):
        state.handle(event, 0.0)
    return state


def loads(instructions):
    return [each.address for each in instructions if isinstance(each, Load)]


def entry(state):
    return state.table.models["digits"].versions[1]


@pytest.mark.parametrize(("device", "first"), [("any", "tls://gpu"), ("gpu", "tls://gpu"), ("cpu", "tls://cpu")])
@pytest.mark.parametrize("workers", [(GPU, PLAIN), (PLAIN, GPU)])
def test_the_first_copy_comes_where_it_is_to_be(device, first, workers):
    assert loads(lab(device, *workers).handle(ModelWanted(DIGITS), 1.0)) == [first]


def test_a_second_copy_comes_where_one_may_be_only():
    for device, others in (("any", ["tls://cpu"]), ("gpu", [])):
        state = lab(device, GPU, PLAIN, copies=2)
        state.handle(ModelWanted(DIGITS), 1.0)
        assert loads(state.handle(Loaded("tls://gpu", 1, DIGITS, "/s"), 1.1)) == others


@pytest.mark.parametrize(("device", "there", "missing"), [("gpu", PLAIN, GPU), ("cpu", GPU, PLAIN)])
def test_what_can_run_nowhere_is_refused_until_a_worker_comes_that_can(device, there, missing):
    state = lab(device, there)
    assert loads(state.handle(ModelWanted(DIGITS), 1.0)) == []
    assert entry(state).state == "failed"
    assert entry(state).reason.startswith("no_device: digits:1 is to run")
    assert "tether serving digits --device any" in entry(state).reason
    assert loads(state.handle(missing, 2.0)) == [missing.address]
    assert entry(state).state == "loading"


def test_a_worker_that_may_come_back_is_waited_for():
    state = lab("gpu", GPU, PLAIN)
    state.handle(WorkerLeft("tls://gpu"), 1.0)
    state.handle(ModelWanted(DIGITS), 1.0)
    assert entry(state).state == "unloaded"


def test_a_change_moves_what_is_loaded():
    state = lab("any", PLAIN)
    state.handle(ModelWanted(DIGITS), 1.0)
    state.handle(Loaded("tls://cpu", 2, DIGITS, "/s"), 1.1)
    state.handle(GPU, 1.2)
    instructions = state.handle(said("gpu"), 2.0)
    assert [each.address for each in instructions if isinstance(each, Unload)] == ["tls://cpu"]
    assert loads(instructions) == ["tls://gpu"]
    state.handle(Unloaded("tls://cpu", 2, DIGITS), 2.1)
    state.handle(Loaded("tls://gpu", 1, DIGITS, "/t"), 2.2)
    assert [route.worker for route in entry(state).routes] == ["with"]
