"""Workers that are to take no more requests, and rollouts, as the control plane carries them out."""

import asyncio

import msgspec
import pytest
from msgspec import structs

from tether.events import (
    CatalogChanged,
    CatalogModel,
    DrainAsked,
    GatewayLoad,
    Loaded,
    LoadFailed,
    ModelWanted,
    Tick,
    Unloaded,
    VersionLoad,
    WorkerBack,
    WorkerJoined,
    WorkerLeft,
    WorkerSilent,
)
from tether.orchestrator import rolling
from tether.orchestrator.instructions import Configure, EndRollout, Load, Push, Unload
from tether.orchestrator.rolling import Rolling
from tether.orchestrator.state import ControlState
from tether.routing.table import Canary, WorkerEntry
from tether.serving_settings import DEFAULTS, Rollout, ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
ROLLOUT = Rollout(2, 1, begun=0.0, steps=(0.5,), every=10.0)


def version(number=1):
    return ModelVersion("digits", number, Digest(f"{number:064x}"))


def catalog(*numbers, default=1, rollout=None):
    versions = {number: (version(number), INFO) for number in numbers}
    serving = DEFAULTS if rollout is None else ServingSettings(rollout=rollout)
    return CatalogChanged("tls://m", 1, {"digits": CatalogModel("digits", default, {"prod": default}, versions, serving)}, 1)


class Lab:
    """A control plane whose workers do at once what they are told, unless they are told to tarry."""

    def __init__(self, workers, copies=1):
        self.state, self.now, self.tarries, self.done = ControlState(copies), 0.0, False, []
        for number in range(1, workers + 1):
            self.joins(number)
        self.say(catalog(1, 2))
        self.say(ModelWanted(version()))

    def joins(self, number, life=0):
        self.say(WorkerJoined(WorkerId(f"w{number}"), f"tls://w{number}", 10 * number + life, 0))

    def say(self, event):
        told = self.state.handle(event, self.now)
        self.done += told
        for each in told if not self.tarries else ():
            if isinstance(each, Load):
                self.say(Loaded(each.address, each.pid, each.model, f"/{each.address[-2:]}-{each.model.version}"))
            elif isinstance(each, Unload):
                self.say(Unloaded(each.address, each.pid, each.model))
        return told

    def drain(self, worker, patience=30.0):
        return self.say(DrainAsked(WorkerId(worker), patience))

    def passes(self, seconds):
        self.now += seconds
        return self.say(Tick())

    def routes(self, number=1):
        return [route.worker for route in self.state.table.models["digits"].versions[number].routes]

    def stands(self, worker):
        return self.state.table.workers[worker].state


def of(told, kind):
    return [each for each in told if isinstance(each, kind)]


def test_what_a_drained_worker_has_is_elsewhere_before_it_goes():
    lab = Lab(2)
    assert lab.routes() == ["w1"]
    lab.tarries = True
    (load,) = of(lab.drain("w1"), Load)
    assert (load.address, lab.routes(), lab.stands("w1")) == ("tls://w2", ["w1"], "draining")
    told = lab.say(Loaded("tls://w2", 20, version(), "/w2"))
    (unload,) = of(told, Unload)
    assert (unload.address, lab.routes(), lab.stands("w1")) == ("tls://w1", ["w2"], "draining")
    lab.say(Unloaded("tls://w1", 10, version()))
    assert lab.stands("w1") == "drained"
    assert not lab.state.is_changing


def test_a_drained_worker_gets_nothing_until_it_goes_on():
    lab = Lab(2)
    lab.drain("w2")
    assert lab.stands("w2") == "drained"
    lab.say(ModelWanted(version(2)))
    assert lab.routes(2) == ["w1"]
    lab.say(WorkerLeft("tls://w1"))
    assert lab.routes(1) == []
    lab.say(DrainAsked(WorkerId("w2"), None))
    assert (lab.stands("w2"), lab.routes(1), lab.routes(2)) == ("running", ["w2"], ["w2"])


def test_what_no_other_worker_can_have_goes_at_once():
    lab = Lab(1)
    lab.drain("w1")
    assert (lab.routes(), lab.stands("w1")) == ([], "drained")


def test_what_no_other_worker_gets_in_time_goes_all_the_same():
    lab = Lab(2)
    lab.tarries = True
    lab.drain("w1", 30.0)
    lab.say(LoadFailed("tls://w2", 20, version(), "bad_model", "no"))
    lab.passes(29)
    lab.drain("w1", 30.0)  # asked again
    assert (lab.routes(), lab.state.is_changing) == (["w1"], True)
    assert of(lab.passes(1), Unload)
    assert lab.routes() == []


def test_a_worker_that_was_silent_is_drained_still_and_its_next_process_is_not():
    lab = Lab(2)
    lab.tarries = True
    lab.drain("w1")
    lab.say(WorkerSilent("tls://w1"))
    lab.say(WorkerBack("tls://w1"))
    assert lab.stands("w1") == "draining"
    lab.tarries = False
    lab.say(WorkerLeft("tls://w1"))
    lab.joins(1, life=1)
    assert lab.stands("w1") == "running"


def test_a_worker_that_is_drained_while_it_loads_gives_that_up_when_it_has_it():
    lab = Lab(1)
    lab.tarries = True
    lab.say(ModelWanted(version(2)))
    lab.drain("w1")
    assert lab.stands("w1") == "draining"
    told = lab.say(Loaded("tls://w1", 10, version(2), "/x"))
    assert version(2) in [each.model for each in of(told, Unload)]


def test_the_new_version_is_loaded_split_and_promoted_and_workers_are_told_that_it_is_on_trial():
    lab = Lab(2)
    told = lab.say(catalog(1, 2, rollout=ROLLOUT))
    assert [each.model for each in of(told, Load)] == [version(2)]
    assert version(1) in [each.model for each in of(told, Configure)]
    lab.passes(1)
    assert lab.state.table.models["digits"].versions[1].canary == Canary(2, 0.5)
    (ended,) = of(lab.passes(10), EndRollout)
    assert (ended.rollout.state, lab.state.is_due(ended)) == ("promoted", True)
    lab.say(catalog(1, 2, default=2, rollout=ended.rollout))
    assert (lab.state.table.models["digits"].versions[1].canary, lab.state.is_due(ended)) == (None, False)
    assert not lab.state.is_changing
    lab.say(WorkerLeft("tls://w2"))
    assert lab.routes(2) == ["w1"]  # it is what the name means: wanted as before


def test_a_version_that_goes_back_gets_nothing_any_more_and_is_freed():
    lab = Lab(2)
    lab.say(catalog(1, 2, rollout=ROLLOUT))
    lab.passes(1)
    bad = GatewayLoad("g", 1.0, {version(2): VersionLoad(worse=3), version(1): VersionLoad(answered=10, seconds=0.1, slowest=0.01)})
    told = lab.say(bad)
    (ended,) = of(told, EndRollout)
    assert of(told, Push)
    assert (ended.rollout.state, lab.state.table.models["digits"].versions[1].canary) == ("reverted", None)
    assert [each.model for each in of(told, Unload)] == [version(2)]
    assert (lab.routes(1), lab.routes(2)) == (["w1"], [])


def test_a_rollout_that_somebody_stops_is_over_with_the_catalog_that_says_so():
    lab = Lab(2)
    lab.say(catalog(1, 2, rollout=ROLLOUT))
    lab.passes(1)
    lab.say(catalog(1, 2, rollout=structs.replace(ROLLOUT, state="aborted")))
    assert lab.state.table.models["digits"].versions[1].canary is None
    assert not lab.state.is_changing


def test_a_version_that_is_taken_back_while_a_worker_loads_it_is_freed_when_that_has_it():
    lab = Lab(2)
    lab.tarries = True
    (load,) = of(lab.say(catalog(1, 2, rollout=ROLLOUT)), Load)
    lab.say(catalog(1, 2, rollout=structs.replace(ROLLOUT, state="aborted")))
    (unload,) = of(lab.say(Loaded(load.address, load.pid, load.model, "/x")), Unload)
    assert (unload.address, unload.model, lab.routes(2)) == (load.address, version(2), [])


def test_a_version_that_failed_before_is_tried_anew_when_it_is_rolled_out():
    lab = Lab(1)
    lab.tarries = True
    (load,) = of(lab.say(ModelWanted(version(2))), Load)
    lab.say(LoadFailed(load.address, load.pid, load.model, "bad_model", "no such package"))
    assert lab.state.table.models["digits"].versions[2].state == "failed"
    lab.tarries = False
    told = lab.say(catalog(1, 2, rollout=ROLLOUT))
    assert [load.model for load in of(told, Load)] == [version(2)]
    assert of(lab.passes(1) + lab.passes(1), EndRollout) == []
    assert lab.state.table.models["digits"].versions[1].canary == Canary(2, 0.5)


class Stopped:
    """A worker that hears nothing."""

    async def tether_end(self):
        await asyncio.Event().wait()


@pytest.fixture
def asked():
    """A control plane of two workers, what people can have it do, and how it says that something changed."""
    lab, changed = Lab(2), asyncio.Condition()
    return lab, Rolling(lab.state, lab.say, lambda _address: Stopped(), changed, lambda: True).handlers(), changed


async def test_a_worker_that_falls_silent_while_it_is_drained_may_have_requests_still(asked):
    lab, ask, changed = asked
    lab.say(WorkerSilent("tls://w1"))
    answer = asyncio.ensure_future(ask["tether_drain"]("w1", 30.0, 30.0))
    await asyncio.sleep(0.0)  # it begins
    lab.say(WorkerBack("tls://w1"))
    async with changed:
        changed.notify_all()
    assert msgspec.msgpack.decode((await answer)["worker"], type=WorkerEntry).state == "drained"


async def test_a_worker_that_does_not_hear_that_it_is_to_end_is_named(asked, monkeypatch):
    monkeypatch.setattr(rolling, "_PROMPT", 0.01)
    _, ask, _ = asked
    code, message = (await ask["tether_restart"]("w1"))["error"]
    assert (code, "w1 does not answer" in message, "10, by hand" in message) == ("service_unavailable", True, True)
