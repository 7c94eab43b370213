"""Workers that are to go are drained first, and named when they have nothing any more."""

import asyncio

from tether.events import CatalogChanged, CatalogModel, DrainAsked, Loaded, ModelWanted, Unloaded, WorkerJoined, WorkerLeft
from tether.orchestrator.instructions import Load, Unload
from tether.orchestrator.resizing import Resizing
from tether.orchestrator.scaling import Batch
from tether.orchestrator.state import ControlState
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
DIGITS = ModelVersion("digits", 1, Digest("1" * 64))
CATALOG = CatalogChanged("tls://m", 1, {"digits": CatalogModel("digits", 1, {}, {1: (DIGITS, INFO)})}, 1)


class Lab:
    """Two copies of one model on three workers, which load at once; what they are to free is answered when it is said."""

    def __init__(self):
        self.state, self.unloads, self.asked, self.batch = ControlState(), [], [], Batch()
        for event in (CATALOG, *(WorkerJoined(WorkerId(f"w{number}"), f"tls://w{number}", number, 0) for number in (1, 2, 3))):
            self.tell(event)
        self.tell(ModelWanted(DIGITS))
        self.resizing = Resizing(self.state.overview.staff, dict, lambda: self.batch, self.tell)

    def tell(self, event, now=1.0):
        self.asked += [event] if isinstance(event, DrainAsked) else []
        for each in self.state.handle(event, now):
            if isinstance(each, Load):
                self.tell(Loaded(each.address, each.pid, each.model, f"/s/{each.pid}"))
            elif isinstance(each, Unload):
                self.unloads.append(each)

    def answer(self):
        """What was under way there has been answered."""
        while self.unloads:
            unload = self.unloads.pop()
            self.tell(Unloaded(unload.address, unload.pid, unload.model))

    def leaving(self, target, names=("w1", "w2", "w3")):
        return asyncio.run(self.resizing.leaving(names, target, 30.0))["workers"]

    @property
    def holders(self):
        return sorted(route.worker for route in self.state.table.resolve("digits").routes)


def test_a_worker_with_nothing_goes_first_and_one_in_use_when_its_models_are_elsewhere_and_its_requests_answered():
    lab = Lab()
    assert lab.leaving(2) == ["w3"]
    assert lab.holders == ["w1", "w2"]
    lab = Lab()
    assert lab.leaving(2, names=("w1", "w2")) == []
    assert asyncio.run(lab.resizing.leaving(("w1", "w2"), 1, 30.0))["workers"] == []
    assert len(lab.holders) == 2, "its copy is elsewhere before it goes"
    assert "w3" in lab.holders
    assert lab.unloads, "it answers what it has"
    assert not any(lab.resizing.sent_away(f"tls://{name}") for name in ("w1", "w2", "w3"))
    lab.answer()
    (gone,) = lab.leaving(1, names=("w1", "w2"))
    assert gone not in lab.holders
    lab.tell(WorkerLeft(f"tls://{gone}", for_good=lab.resizing.sent_away(f"tls://{gone}")))
    assert gone not in lab.state.table.workers, "nobody waits for it to come back"


def test_a_worker_that_runs_tasks_stays_and_tasks_that_wait_want_workers():
    lab = Lab()
    lab.batch = Batch({"w3"}, running=1, waiting=9, seconds=20.0)
    assert lab.leaving(2, names=("w2", "w3")) == []
    assert lab.leaving(0, names=("w3",)) == []
    wanted = asyncio.run(lab.resizing.wanted(("w2", "w3"), {"keep": 0.0, "idle": 0.0}, None))
    assert wanted == {"workers": 3}, "four, and one is another's"


def test_whom_nobody_is_to_miss_any_more_goes_on_and_whom_a_person_drained_does_not():
    lab = Lab()
    lab.tell(DrainAsked(WorkerId("w1"), 30.0))
    lab.answer()
    assert lab.leaving(3) == []
    assert {each.worker for each in lab.state.overview.staff() if each.is_leaving} == {"w1"}
    assert lab.leaving(1) == ["w1"]
    lab.answer()
    lab.leaving(3)
    assert {each.worker for each in lab.state.overview.staff() if each.is_leaving} == {"w1"}
    assert len(lab.holders) == 2


def test_dasks_own_rule_may_not_end_all_that_have_a_version_at_once():
    lab = Lab()
    assert lab.state.overview.dispensable(["w1", "w2", "w3"]) == {"w1", "w3"}
    assert lab.state.overview.dispensable(["w2"]) == {"w2"}, "one that runs something is not asked for"
    lab.tell(DrainAsked(WorkerId("w2"), 0.0))
    assert lab.state.overview.dispensable(["w2"]) == set(), "it answers what it has"
    lab.answer()
    assert "w2" in lab.state.overview.dispensable(["w2", "w1", "w3"])
