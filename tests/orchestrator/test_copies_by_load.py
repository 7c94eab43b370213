"""Copies follow load within what was said, workers are chosen by region and label, and `explain` says why."""

from dataclasses import replace

import pytest

from tether.events import (
    CatalogChanged,
    CatalogModel,
    GatewayLoad,
    Holding,
    Loaded,
    LoadFailed,
    ModelWanted,
    Tick,
    VersionLoad,
    WorkerJoined,
    WorkerLeft,
)
from tether.orchestrator.need import KEEP
from tether.orchestrator.state import Configure, ControlState, Load, Unload
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId, WorkerMemory, WorkerSite

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
DIGITS = ModelVersion("digits", 1, Digest("1" * 64))


def catalog(serving=DEFAULTS, **others):
    models = {"digits": CatalogModel("digits", 1, {}, {1: (DIGITS, INFO)}, serving)}
    models |= {name: CatalogModel(name, 1, {}, {1: (ModelVersion(name, 1, Digest("2" * 64)), INFO)}, said) for name, said in others.items()}
    return CatalogChanged("tls://m", 1, models, 1)


def worker(number, host=None, *, labels=(), region="", free=None):
    memory = WorkerMemory(used=0, budget=free) if free is not None else None
    address = f"tls://{host or f'h{number}'}:{8000 + number}"
    return WorkerJoined(WorkerId(f"worker-{number}"), address, 100 + number, 0, memory, WorkerSite(region, labels))


class Lab:
    """Workers that load at once what they are told to."""

    def __init__(self, *events):
        self.state, self.holders, self.now = ControlState(), {}, 0.0
        for event in events:
            self.tell(event)

    def tell(self, event):
        for each in self.state.handle(event, self.now):
            if isinstance(each, Load):
                self.holders[each.address] = None
                self.tell(Loaded(each.address, each.pid, each.model, f"/s/{each.pid}"))
            elif isinstance(each, Unload):
                del self.holders[each.address]

    def serve(self, under_way, seconds=9, model=DIGITS):
        """So many requests are under way for a while."""
        for _ in range(seconds):
            self.now += 1.0
            self.tell(GatewayLoad("g", 1.0, {model: VersionLoad(answered=1, seconds=float(under_way), open=under_way)}))
        return len(self.holders)

    def rest(self, seconds):
        """Nobody asks; the plugin ticks as long as time may change something."""
        end = self.now + seconds
        while self.now < end and self.state.unsettled:
            self.now += 2.0
            self.tell(Tick())
        return len(self.holders)


def asked(serving, *workers):
    return Lab(catalog(serving), *workers, ModelWanted(DIGITS))


WORKERS = [worker(number) for number in range(1, 6)]


def test_copies_come_with_the_load_and_go_a_minute_after_it():
    lab = asked(ServingSettings(min_copies=1, max_copies=4), *WORKERS)
    assert len(lab.holders) == 1
    assert lab.serve(under_way=3) == 3
    assert lab.serve(under_way=20) == 4
    assert lab.rest(KEEP - 6) == 4
    assert lab.rest(20) == 1
    assert not lab.state.unsettled, "an idle lab has no timer"


def test_nothing_said_is_two_copies_whatever_the_load():
    lab = asked(DEFAULTS, *WORKERS)
    assert lab.serve(under_way=20) == 2
    assert not lab.state.unsettled


def test_what_may_go_goes_when_nobody_asks_and_comes_again_with_a_request():
    lab = asked(ServingSettings(min_copies=0, max_copies=2), *WORKERS)
    assert lab.serve(under_way=2) == 2
    assert lab.rest(KEEP + 6) == 0
    assert lab.state.table.resolve("digits").state == "unloaded"
    lab.tell(worker(6))
    assert len(lab.holders) == 0
    lab.tell(ModelWanted(DIGITS))
    assert len(lab.holders) == 1


def held(number, serving):
    """A worker that went on without an orchestrator."""
    return replace(worker(number), holdings=(Holding(DIGITS, f"/s/{number}", serving),))


@pytest.mark.parametrize("serving", [ServingSettings(min_copies=1, max_copies=4), ServingSettings(min_copies=0, max_copies=3, spare=True)])
@pytest.mark.parametrize("is_catalog_first", [True, False])
def test_a_new_orchestrator_frees_nothing_that_serves_before_it_knows_the_load(serving, is_catalog_first):
    state, there = ControlState(), [held(number, serving) for number in range(1, 5)]
    events = [catalog(serving), *there] if is_catalog_first else [*there, catalog(serving)]
    told = [each for event in (*events, worker(5)) for each in state.handle(event, 100.0)]
    assert [each for each in told if isinstance(each, Load | Unload | Configure)] == []
    freed = [each for second in range(0, 70, 2) for each in state.handle(Tick(), 100.0 + second) if isinstance(each, Unload)]
    assert len(freed) == 4 - serving.copies(0, 2)
    assert not state.unsettled


def test_workers_serve_as_they_were_told_while_no_manager_says_how():
    state = ControlState()
    assert [each for each in state.handle(held(1, ServingSettings(pinned=True)), 0.0) if isinstance(each, Configure)] == []
    (told,) = [each for each in state.handle(catalog(ServingSettings(max_delay=0.1)), 1.0) if isinstance(each, Configure)]
    assert told.serving == ServingSettings(max_delay=0.1)


def test_a_spare_is_one_more_than_load_needs_on_another_host():
    lab = asked(ServingSettings(min_copies=1, max_copies=1, spare=True), worker(1, "a"), worker(2, "a"), worker(3, "b"))
    assert list(lab.holders) == ["tls://a:8001", "tls://b:8003"]


def test_settings_that_change_take_effect_at_once_and_nothing_in_use_goes():
    lab = asked(DEFAULTS, *WORKERS)
    lab.tell(catalog(ServingSettings(min_copies=3)))
    assert len(lab.holders) == 3
    lab.tell(catalog(ServingSettings(min_copies=0, max_copies=1)))
    assert len(lab.holders) == 1


def test_further_copies_come_only_where_there_is_room_for_them():
    lab = Lab(catalog(ServingSettings(min_copies=1, max_copies=4)), worker(1, free=1000), worker(2, free=50), worker(3, free=1000))
    lab.state.handle(ModelWanted(DIGITS), 0.0)
    lab.tell(Loaded("tls://h1:8001", 101, DIGITS, "/s/1", WorkerMemory(100, 1000, {"digits:1": 100})))
    lab.holders["tls://h1:8001"] = None
    lab.serve(under_way=4)
    assert list(lab.holders) == ["tls://h1:8001", "tls://h3:8003"]


def test_it_runs_where_its_region_and_labels_are_and_moves_with_them():
    west, east = worker(1, region="eu-west", labels=("gpu=a100",)), worker(2, region="us-east", labels=("disk=fast", "gpu=a100"))
    lab = asked(ServingSettings(labels=("gpu=a100",), region="us-east"), worker(3), west, east)
    assert list(lab.holders) == ["tls://h2:8002"]
    lab.tell(catalog(ServingSettings(region="eu-west")))
    assert list(lab.holders) == ["tls://h1:8001"]


def test_what_no_worker_has_is_refused_at_once_and_runs_when_one_comes_that_has():
    lab = asked(ServingSettings(region="mars"), worker(1))
    entry = lab.state.table.resolve("digits")
    assert entry.state == "failed"
    assert entry.reason.startswith("no_device: digits:1 is to run in mars, and no worker does: start one (`tether worker --region mars`)")
    lab.tell(worker(2, region="mars"))
    assert lab.state.table.resolve("digits").state == "ready"


def test_what_is_too_large_for_one_worker_goes_to_the_next_and_what_is_for_all_is_refused_with_the_reason():
    state = Lab(catalog(), worker(1), worker(2)).state
    (first,) = [each for each in state.handle(ModelWanted(DIGITS), 0.0) if isinstance(each, Load)]
    (second,) = [
        each
        for each in state.handle(LoadFailed(first.address, first.pid, DIGITS, "model_too_large", "6 GB of 4"), 1.0)
        if isinstance(each, Load)
    ]
    assert second.address != first.address
    state.handle(LoadFailed(second.address, second.pid, DIGITS, "model_too_large", "6 GB of 5"), 2.0)
    assert (state.table.resolve("digits").state, state.table.resolve("digits").reason) == ("failed", "model_too_large: 6 GB of 5")
    (version,) = state.overview.explain(state.table, "digits", 2.0)
    assert [each["why"] for each in version["workers"]] == [
        "model_too_large: 6 GB of 4; it is asked again in 4 s",
        "model_too_large: 6 GB of 5; it is asked again in 5 s",
    ]


def explained(lab, name="digits"):
    (version,) = lab.state.overview.explain(lab.state.table, name, lab.now)
    return version, {each["worker"]: (each["holding"], each["why"]) for each in version["workers"]}


def test_explain_says_of_each_worker_why():
    lab = asked(
        ServingSettings(min_copies=1, max_copies=2, labels=("a=1",)), worker(1, labels=("a=1",)), worker(2), worker(3, labels=("a=1",))
    )
    lab.tell(WorkerLeft("tls://h3:8003"))
    version, workers = explained(lab)
    assert (version["version"], version["state"], version["copies"]) == (1, "ready", 1)
    assert version["why"] == "1 copy: load needs 1, from 1 on"
    assert workers == {
        "worker-1": ("loaded", "it has it in memory"),
        "worker-2": ("", "it has no label a=1"),
        "worker-3": ("", "it is lost"),
    }


def test_explain_says_why_it_is_nowhere():
    version, workers = explained(Lab(catalog(), worker(1)))
    assert (version["state"], version["copies"], version["why"]) == ("unloaded", 0, "nobody asks for it")
    assert workers["worker-1"] == ("", "nobody asks for it")
    version, workers = explained(asked(ServingSettings(device="gpu"), worker(1)))
    assert version["why"].startswith("no_device: digits:1 is to run on a GPU, and no worker does")
    assert workers["worker-1"] == ("", "it has no GPU")
