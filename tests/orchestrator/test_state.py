"""The control plane's decisions, without a loop or a clock."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from tether.events import CatalogChanged, CatalogModel, Loaded, LoadFailed, ManagerLeft, ModelWanted, Unloaded, WorkerJoined, WorkerLeft
from tether.orchestrator.state import RETRY_AFTER, ControlState, Load, Push, Unload
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)


def version(name="digits", number=1):
    return ModelVersion(name, number, Digest(f"{number:064x}"))


def catalog(*numbers, name="digits"):
    versions = {number: (version(name, number), INFO) for number in numbers}
    return CatalogChanged("tls://m", 1, {name: CatalogModel(name, max(numbers), {"latest": max(numbers)}, versions)} if numbers else {})


def joined(number):
    return WorkerJoined(WorkerId(f"worker-{number}"), f"tls://w{number}", 100 + number, 0)


def of(instructions, kind):
    return [each for each in instructions if isinstance(each, kind)]


def running(*events, copies=2):
    state = ControlState(copies)
    for event in events:
        state.handle(event, 0.0)
    return state


def test_a_wanted_model_is_loaded_once_routed_and_then_copied():
    state = running(catalog(1), joined(1), joined(2), joined(3))
    assert of(state.handle(ModelWanted(version()), 1.0), Load) == [Load("tls://w1", version())]
    assert state.table.resolve("digits").state == "loading"
    instructions = state.handle(Loaded("tls://w1", version(), "/s/1"), 1.1)
    assert of(instructions, Load) == [Load("tls://w2", version())]
    assert [route.endpoint for route in of(instructions, Push)[-1].table.resolve("digits").routes] == ["/s/1"]


def test_asking_again_while_it_loads_asks_no_worker_twice():
    state = running(catalog(1), joined(1), ModelWanted(version()))
    assert state.handle(ModelWanted(version()), 1.0) == []


def test_a_lost_worker_is_replaced_by_the_next_one():
    loaded = [Loaded(f"tls://w{number}", version(), f"/s/{number}") for number in (1, 2)]
    state = running(catalog(1), joined(1), joined(2), joined(3), ModelWanted(version()), *loaded)
    instructions = state.handle(WorkerLeft("tls://w1"), 2.0)
    assert of(instructions, Load) == [Load("tls://w3", version())]
    assert state.table.workers[WorkerId("worker-1")].state == "lost"
    assert [route.endpoint for route in state.table.resolve("digits").routes] == ["/s/2"]


def test_a_worker_that_comes_back_gets_its_models_again():
    state = running(catalog(1), joined(1), ModelWanted(version()), Loaded("tls://w1", version(), "/s/1"), WorkerLeft("tls://w1"))
    assert of(state.handle(joined(1), 3.0), Load) == [Load("tls://w1", version())]


def test_a_failed_load_is_reported_and_tried_again_later_only():
    state = running(catalog(1), joined(1), ModelWanted(version()))
    state.handle(LoadFailed("tls://w1", version(), "bad_model", "corrupt"), 1.0)
    entry = state.table.resolve("digits")
    assert (entry.state, entry.reason) == ("failed", "bad_model: corrupt")
    assert of(state.handle(ModelWanted(version()), 1.5), Load) == []
    assert of(state.handle(ModelWanted(version()), 1.0 + RETRY_AFTER), Load) == [Load("tls://w1", version())]


def test_what_is_no_longer_published_is_unloaded():
    state = running(catalog(1, 2), joined(1), ModelWanted(version()), Loaded("tls://w1", version(), "/s/1"))
    assert of(state.handle(catalog(2), 2.0), Unload) == [Unload("tls://w1", version())]
    assert state.handle(Unloaded("tls://w1", version()), 2.1) == []


def test_a_lost_manager_takes_nothing_away_from_the_table():
    state = running(catalog(1), joined(1), ModelWanted(version()), Loaded("tls://w1", version(), "/s/1"))
    (push,) = state.handle(ManagerLeft("tls://m"), 2.0)
    assert push.table.manager is None
    assert push.table.resolve("digits").routes


def test_an_unknown_model_is_not_wanted():
    state = running(catalog(1), joined(1))
    assert state.handle(ModelWanted(version("other")), 1.0) == []


class Cluster(RuleBasedStateMachine):
    """Random events; what must hold after each."""

    workers = Bundle("workers")

    def __init__(self):
        super().__init__()
        self.state, self.now, self.alive, self.told = ControlState(2), 0.0, set(), set()
        self.loading = []

    def do(self, event):
        self.now += 0.5
        for instruction in self.state.handle(event, self.now):
            if isinstance(instruction, Load):
                assert instruction.address in self.alive
                assert (instruction.address, instruction.model) not in self.loading
                self.loading.append((instruction.address, instruction.model))

    @rule(number=st.integers(1, 4))
    def join(self, number):
        if f"tls://w{number}" not in self.alive:
            self.alive.add(f"tls://w{number}")
            self.do(joined(number))

    @rule(number=st.integers(1, 4))
    def leave(self, number):
        address = f"tls://w{number}"
        self.alive.discard(address)
        self.loading = [each for each in self.loading if each[0] != address]
        self.do(WorkerLeft(address))

    @rule(numbers=st.sets(st.integers(1, 3)))
    def publish(self, numbers):
        self.do(catalog(*numbers))

    @rule(number=st.integers(1, 3))
    def want(self, number):
        self.do(ModelWanted(version(number=number)))

    @rule(data=st.data(), fails=st.booleans())
    def answer(self, data, fails):
        if self.loading:
            address, model = self.loading.pop(data.draw(st.integers(0, len(self.loading) - 1)))
            self.do(LoadFailed(address, model, "bad_model", "no") if fails else Loaded(address, model, f"{address}/{model}"))

    @invariant()
    def routes_lead_to_live_workers_only(self):
        table = self.state.table
        for entry in table.models.values():
            for each in entry.versions.values():
                assert {table.workers[route.worker].address for route in each.routes} <= self.alive
                assert len(each.routes) <= 2
                assert (each.state == "ready") == bool(each.routes)


Cluster.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCluster = Cluster.TestCase
