"""The control plane's decisions, without a loop or a clock."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from tether.events import (
    CatalogChanged,
    CatalogModel,
    Evicting,
    LentChanged,
    LentWorker,
    LoadCut,
    Loaded,
    LoadFailed,
    ManagerLeft,
    ModelWanted,
    Tick,
    Unloaded,
    WorkerJoined,
    WorkerLeft,
)
from tether.orchestrator.registry import RETRY_AFTER
from tether.orchestrator.state import FORGET_AFTER, ControlState, Load, Push, Unload
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId, WorkerMemory

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)


def version(name="digits", number=1):
    return ModelVersion(name, number, Digest(f"{number:064x}"))


def catalog(*numbers, name="digits", stream=1):
    versions = {number: (version(name, number), INFO) for number in numbers}
    models = {name: CatalogModel(name, max(numbers), {"latest": max(numbers)}, versions)} if numbers else {}
    return CatalogChanged("tls://m", 1, models, stream)


def joined(number, life=0):
    """`life`: how often this worker was started before; each start is another process at the same address."""
    return WorkerJoined(WorkerId(f"worker-{number}"), f"tls://w{number}", 100 + number + 10 * life, 0)


def lent(*ids, number=1, slots=4, stream=1):
    """Labs that lend workers, all of a first registration unless it is said."""
    return LentChanged(stream, tuple(LentWorker(WorkerId(each), f"key of {each}", number, 1, slots) for each in ids))


def of(instructions, kind):
    return [each for each in instructions if isinstance(each, kind)]


def running(*events, copies=2):
    state = ControlState(copies)
    for event in events:
        state.handle(event, 0.0)
    return state


def test_a_wanted_model_is_loaded_once_routed_and_then_copied():
    state = running(catalog(1), joined(1), joined(2), joined(3))
    assert of(state.handle(ModelWanted(version()), 1.0), Load) == [Load("tls://w1", 101, version())]
    assert state.table.resolve("digits").state == "loading"
    instructions = state.handle(Loaded("tls://w1", 101, version(), "/s/1"), 1.1)
    assert of(instructions, Load) == [Load("tls://w2", 102, version())]
    assert [route.endpoint for route in of(instructions, Push)[-1].table.resolve("digits").routes] == ["/s/1"]


def test_asking_again_while_it_loads_asks_no_worker_twice():
    state = running(catalog(1), joined(1), ModelWanted(version()))
    assert state.handle(ModelWanted(version()), 1.0) == []


def test_a_lost_worker_is_replaced_by_the_next_one():
    loaded = [Loaded(f"tls://w{number}", 100 + number, version(), f"/s/{number}") for number in (1, 2)]
    state = running(catalog(1), joined(1), joined(2), joined(3), ModelWanted(version()), *loaded)
    instructions = state.handle(WorkerLeft("tls://w1"), 2.0)
    assert of(instructions, Load) == [Load("tls://w3", 103, version())]
    assert state.table.workers[WorkerId("worker-1")].state == "lost"
    assert [route.endpoint for route in state.table.resolve("digits").routes] == ["/s/2"]


def test_a_worker_that_comes_back_gets_its_models_again():
    state = running(catalog(1), joined(1), ModelWanted(version()), Loaded("tls://w1", 101, version(), "/s/1"), WorkerLeft("tls://w1"))
    assert of(state.handle(joined(1), 3.0), Load) == [Load("tls://w1", 101, version())]


def test_a_failed_load_is_reported_and_tried_again_later_only():
    state = running(catalog(1), joined(1), ModelWanted(version()))
    state.handle(LoadFailed("tls://w1", 101, version(), "bad_model", "corrupt"), 1.0)
    entry = state.table.resolve("digits")
    assert (entry.state, entry.reason) == ("failed", "bad_model: corrupt")
    assert of(state.handle(ModelWanted(version()), 1.5), Load) == []
    assert of(state.handle(ModelWanted(version()), 1.0 + RETRY_AFTER), Load) == [Load("tls://w1", 101, version())]


def test_what_is_no_longer_published_is_unloaded():
    state = running(catalog(1, 2), joined(1), ModelWanted(version()), Loaded("tls://w1", 101, version(), "/s/1"))
    assert of(state.handle(catalog(2), 2.0), Unload) == [Unload("tls://w1", 101, version())]
    assert state.handle(Unloaded("tls://w1", 101, version()), 2.1) == []


def test_a_lost_manager_takes_nothing_away_from_the_table():
    state = running(catalog(1), joined(1), ModelWanted(version()), Loaded("tls://w1", 101, version(), "/s/1"))
    (push,) = state.handle(ManagerLeft(1), 2.0)
    assert push.table.manager is None
    assert push.table.resolve("digits").routes


def test_an_unknown_model_is_not_wanted():
    state = running(catalog(1), joined(1))
    assert state.handle(ModelWanted(version("other")), 1.0) == []


def test_a_load_that_its_workers_death_cut_off_is_no_failure_and_is_placed_again_when_it_is_back():
    state = running(catalog(1), joined(1), ModelWanted(version()))
    assert of(state.handle(LoadCut("tls://w1", 101, version()), 1.0), Load) == []
    assert (state.table.resolve("digits").state, state.table.resolve("digits").reason) == ("unloaded", "")
    state.handle(WorkerLeft("tls://w1"), 1.1)
    assert of(state.handle(joined(1, life=1), 1.5), Load) == [Load("tls://w1", 111, version())]


def test_a_load_that_was_cut_off_by_a_worker_that_lives_is_tried_again():
    state = running(catalog(1), joined(1), ModelWanted(version()))
    state.handle(LoadCut("tls://w1", 101, version()), 1.0)
    assert of(state.handle(Tick(), 1.0 + RETRY_AFTER), Load) == [Load("tls://w1", 101, version())]


def test_a_late_answer_of_a_dead_process_is_not_taken_for_one_of_the_next_at_its_address():
    state = running(catalog(1), joined(1), ModelWanted(version()), WorkerLeft("tls://w1"), joined(1, life=1))
    late = [
        Loaded("tls://w1", 101, version(), "/s/old"),
        LoadFailed("tls://w1", 101, version(), "x", "y"),
        LoadCut("tls://w1", 101, version()),
    ]
    for event in late:
        assert state.handle(event, 1.0) == []
    assert state.table.resolve("digits").state == "loading"
    state.handle(Loaded("tls://w1", 111, version(), "/s/new"), 1.1)
    assert state.handle(Unloaded("tls://w1", 101, version()), 1.2) == []
    assert [route.endpoint for route in state.table.resolve("digits").routes] == ["/s/new"]


def test_time_alone_brings_the_next_try_ever_later_until_a_request_asks():
    state = running(catalog(1), joined(1))
    assert not state.unsettled
    state.handle(ModelWanted(version()), 0.0)
    tries, now = [], 0.0
    state.handle(LoadFailed("tls://w1", 101, version(), "bad_model", "no"), now)
    while now < 200 and state.unsettled:
        now += 1.0
        if of(state.handle(Tick(), now), Load):
            tries.append(now)
            state.handle(LoadFailed("tls://w1", 101, version(), "bad_model", "no"), now)
    assert tries == [5, 15, 35, 75, 135, 195]
    assert of(state.handle(ModelWanted(version()), 195 + RETRY_AFTER), Load)
    state.handle(Loaded("tls://w1", 101, version(), "/s/1"), now)
    assert not state.unsettled


def test_the_end_of_an_old_managers_stream_does_not_unregister_the_new_one_at_the_same_address():
    state = running(catalog(1), catalog(1, 2, stream=2))
    assert state.handle(ManagerLeft(1), 1.0) == []
    assert state.handle(catalog(1), 1.0) == []
    assert state.table.manager == "tls://m"
    state.handle(ManagerLeft(2), 1.0)
    assert state.table.manager is None


def test_lost_workers_are_forgotten_after_an_hour_and_reasons_with_their_version():
    state = running(catalog(1), joined(1), joined(2), ModelWanted(version()), LoadFailed("tls://w1", 101, version(), "bad_model", "no"))
    state.handle(WorkerLeft("tls://w1"), 1.0)
    state.handle(catalog(2), 2.0)
    state.handle(catalog(1, 2), 3.0)
    assert state.table.resolve("digits", "1").state != "failed"
    assert WorkerId("worker-1") in state.table.workers
    state.handle(Tick(), 1.0 + FORGET_AFTER)
    assert list(state.table.workers) == [WorkerId("worker-2")]


def test_a_lent_worker_is_asked_through_the_manager_for_what_the_lab_has_no_worker_for():
    state = running(catalog(1), lent("b"))
    assert of(state.handle(ModelWanted(version()), 1.0), Load) == [Load("b", 1, version(), "tls://m")]
    state.handle(Loaded("b", 1, version(), "/s/b"), 1.1)
    assert of(state.handle(joined(1), 2.0), Load) == [Load("tls://w1", 101, version())]
    state.handle(Loaded("tls://w1", 101, version(), "/s/1"), 2.1)
    assert [(route.endpoint, route.slots) for route in state.table.resolve("digits").routes] == [("/s/1", None), ("/s/b", 4)]
    shown = state.table.workers[WorkerId("b")]
    assert (shown.address, shown.transport, shown.peer, shown.slots) == ("swarm://key of b", "swarm", "key of b", 4)
    assert (shown.gpus, shown.models) == (1, ("digits:1",))
    assert Unload("b", 1, version(), "tls://m") in state.handle(catalog(2), 3.0)


def test_a_lent_worker_takes_the_place_of_one_that_died_and_gives_it_back():
    state = running(catalog(1), joined(1), joined(2), lent("b"), ModelWanted(version()))
    for number in (1, 2):
        state.handle(Loaded(f"tls://w{number}", 100 + number, version(), f"/s/{number}"), 1.0)
    assert of(state.handle(WorkerLeft("tls://w1"), 2.0), Load) == [Load("b", 1, version(), "tls://m")]
    state.handle(Loaded("b", 1, version(), "/s/b"), 2.5)
    assert of(state.handle(joined(1, life=1), 3.0), Load) == [Load("tls://w1", 111, version())]


def test_a_lent_worker_that_is_gone_takes_its_routes_with_it_and_is_not_shown_as_lost():
    state = running(catalog(1), lent("b", "c"), ModelWanted(version()), Loaded("b", 1, version(), "/s/b"))
    instructions = state.handle(lent("c"), 2.0)
    assert list(state.table.workers) == [WorkerId("c")]
    assert state.table.resolve("digits").routes == ()
    assert of(instructions, Push)


def test_the_same_registration_keeps_what_it_has_and_another_has_nothing():
    state = running(catalog(1), lent("b"), ModelWanted(version()), Loaded("b", 1, version(), "/s/b"))
    state.handle(lent("b", "c", slots=9), 2.0)
    assert [(route.endpoint, route.slots) for route in state.table.resolve("digits").routes] == [("/s/b", 9)]
    assert of(state.handle(lent("b", number=2), 3.0), Load) == [Load("b", 2, version(), "tls://m")]
    assert state.handle(Loaded("b", 1, version(), "/s/old"), 3.1) == []
    assert state.table.resolve("digits").routes == ()


def test_the_lines_end_with_the_manager_that_has_them():
    state = running(catalog(1), lent("b"), ModelWanted(version()), Loaded("b", 1, version(), "/s/b"))
    state.handle(ManagerLeft(1), 2.0)
    assert (state.table.workers, state.table.resolve("digits").routes) == ({}, ())
    assert state.handle(lent("b"), 2.1) == []
    state.handle(catalog(1, stream=2), 3.0)
    assert state.handle(lent("b"), 3.1) == []
    assert of(state.handle(lent("b", stream=2, number=2), 3.2), Load) == [Load("b", 2, version(), "tls://m")]
    state.handle(catalog(1, stream=3), 4.0)
    assert state.table.workers == {}


def test_a_version_that_a_lent_worker_has_no_more_is_loaded_there_again():
    state = running(catalog(1), lent("b"), ModelWanted(version()), Loaded("b", 1, version(), "/s/1"))
    closed = LentChanged(1, (LentWorker(WorkerId("b"), "key of b", 1, 1, 4, closed=("/s/1",)),))
    assert of(state.handle(closed, 1.0), Load) == [Load("b", 1, version(), "tls://m")]
    assert state.table.resolve("digits").routes == ()
    state.handle(Loaded("b", 1, version(), "/s/2"), 2.0)
    state.handle(closed, 3.0)
    assert [route.endpoint for route in state.table.resolve("digits").routes] == ["/s/2"]


def test_what_a_lent_worker_refuses_is_no_reason_to_refuse_requests_while_a_worker_of_the_lab_may_come_back():
    state = running(catalog(1), joined(1), lent("b"), ModelWanted(version()), Loaded("tls://w1", 101, version(), "/s/1"))
    state.handle(LoadFailed("b", 1, version(), "untrusted_code", "no"), 1.0)
    state.handle(WorkerLeft("tls://w1"), 2.0)
    assert (state.table.resolve("digits").state, state.table.resolve("digits").reason) == ("unloaded", "")
    assert of(state.handle(joined(1, life=1), 2.5), Load) == [Load("tls://w1", 111, version())]


def test_a_lent_worker_is_asked_for_what_it_is_lent_for_and_for_no_other_labs_models():
    for_some = LentChanged(1, (LentWorker(WorkerId("b"), "key", 1, 0, 4, models="net*"),))
    state = running(catalog(1), for_some, ModelWanted(version()))
    assert (state.table.resolve("digits").state, state.unsettled) == ("failed", False)
    assert state.table.resolve("digits").reason == "unsupported: b runs net* of this lab's own models, not digits"
    state.handle(joined(1), 1.0)
    assert state.table.resolve("digits").state == "loading"
    state = running(catalog(1, name="net-2"), for_some)
    assert of(state.handle(ModelWanted(version("net-2")), 1.0), Load) == [Load("b", 1, version("net-2"), "tls://m")]
    state = running(catalog(1, name="alice~digits"), lent("b"))
    assert of(state.handle(ModelWanted(version("alice~digits")), 1.0), Load) == []


def test_what_a_lent_worker_refuses_is_tried_again_only_where_that_could_help():
    state = running(catalog(1), lent("b"), ModelWanted(version()), LoadFailed("b", 1, version(), "untrusted_code", "no"))
    assert (state.table.resolve("digits").state, state.table.resolve("digits").reason) == ("failed", "untrusted_code: no")
    assert state.unsettled
    for number in (1, 2):
        state.handle(joined(number), 1.0)
        state.handle(Loaded(f"tls://w{number}", 100 + number, version(), f"/s/{number}"), 1.0)
    assert not state.unsettled


def test_what_was_loaded_while_no_manager_was_there_is_freed_when_one_is_back():
    state = running(catalog(1, 2), joined(1), ModelWanted(version()), catalog(2), ManagerLeft(1))
    assert not of(state.handle(Loaded("tls://w1", 101, version(), "/s/1"), 1.0), Unload)
    assert of(state.handle(catalog(2, stream=2), 2.0), Unload) == [Unload("tls://w1", 101, version())]


def test_what_a_lent_worker_refuses_counts_once_the_labs_own_worker_is_forgotten():
    for_some = LentChanged(1, (LentWorker(WorkerId("b"), "key", 1, 0, 4, models="net*"),))
    state = running(catalog(1), joined(1), for_some, ModelWanted(version()), WorkerLeft("tls://w1"))
    assert state.table.resolve("digits").state == "unloaded"
    state.handle(Tick(), FORGET_AFTER)
    assert state.table.resolve("digits").state == "failed"


LENDERS = {"a", "b", "c"}


class Cluster(RuleBasedStateMachine):
    """Random events; what must hold after each."""

    workers = Bundle("workers")

    def __init__(self):
        super().__init__()
        self.state, self.now, self.alive = ControlState(2), 0.0, {}
        self.loading = []
        self.late = []
        """Loads of processes that have died since: their answers must change nothing."""
        self.lives = 0
        self.stream, self.has_manager = 0, False

    def do(self, event):
        self.now += 0.5
        for instruction in self.state.handle(event, self.now):
            if isinstance(instruction, Load | Unload):
                assert self.alive[instruction.address] == instruction.pid
                assert instruction.manager == ("tls://m" if instruction.address in LENDERS else None)
            if isinstance(instruction, Load):
                assert instruction not in self.loading
                self.loading.append(instruction)

    def gone(self, address):
        """What it was to load will be answered too late, if at all."""
        self.alive.pop(address, None)
        self.late += [each for each in self.loading if each.address == address]
        self.loading = [each for each in self.loading if each.address != address]

    @rule(number=st.integers(1, 4))
    def join(self, number):
        if f"tls://w{number}" not in self.alive:
            self.lives += 1
            event = joined(number, self.lives)
            self.alive[event.address] = event.pid
            self.do(event)

    @rule(number=st.integers(1, 4))
    def leave(self, number):
        self.gone(f"tls://w{number}")
        self.do(WorkerLeft(f"tls://w{number}"))

    @rule(numbers=st.sets(st.integers(1, 3)), another=st.booleans())
    def publish(self, numbers, another):
        if another or not self.has_manager:
            self.stream, self.has_manager = self.stream + 1, True
            self.forget_lenders()
        self.do(catalog(*numbers, stream=self.stream))

    @rule()
    def manager_leaves(self):
        self.has_manager = False
        self.forget_lenders()
        self.do(ManagerLeft(self.stream))

    def forget_lenders(self):
        for each in LENDERS & set(self.alive):
            self.gone(each)

    @rule(ids=st.sets(st.sampled_from(["a", "b", "c"])), registered=st.booleans(), late=st.booleans())
    def lend(self, ids, registered, late):
        """`registered`: all of them once more."""
        current = self.has_manager and not late
        kept = {each: self.alive[each] for each in ids if each in self.alive and not registered}
        self.lives += 1
        numbers = {each: kept.get(each, self.lives) for each in ids}
        if current:
            for each in (LENDERS & set(self.alive)) - set(kept):
                self.gone(each)
            self.alive |= numbers
        told = tuple(LentWorker(WorkerId(each), each, number, 0, 4) for each, number in numbers.items())
        before = self.state.table
        self.do(LentChanged(self.stream - late, told))
        assert current or self.state.table.workers == before.workers

    @rule(number=st.integers(1, 3))
    def want(self, number):
        self.do(ModelWanted(version(number=number)))

    @rule(data=st.data(), end=st.sampled_from(["loaded", "failed", "cut"]))
    def answer(self, data, end):
        if self.loading:
            self.do(self.end_of(self.loading.pop(data.draw(st.integers(0, len(self.loading) - 1))), end))

    @rule(end=st.sampled_from(["loaded", "failed", "cut"]))
    def answer_late(self, end):
        if self.late:
            before = self.state.table
            self.do(self.end_of(self.late.pop(), end))
            assert self.state.table.workers == before.workers

    @rule(data=st.data())
    def evict(self, data):
        """A worker of the lab puts out what it has; it is not told to load it again for that."""
        own = [(worker, name) for worker in self.state.table.workers.values() if worker.transport == "unix" for name in worker.models]
        if own:
            worker, name = data.draw(st.sampled_from(sorted(own, key=lambda each: (each[0].id, each[1]))))
            entry = self.state.table.models[name.partition(":")[0]].versions.get(int(name.partition(":")[2]))
            (endpoint,) = [each.endpoint for each in entry.routes if each.worker == worker.id]
            before = len(self.loading)
            self.do(Evicting(worker.address, worker.pid, entry.model, endpoint, WorkerMemory()))
            assert len(self.loading) <= before + (len(entry.routes) > 1)

    @rule()
    def tick(self):
        self.do(Tick())

    def end_of(self, load, end):
        match end:
            case "loaded":
                return Loaded(load.address, load.pid, load.model, f"{load.address}/{load.pid}/{load.model}")
            case "failed":
                return LoadFailed(load.address, load.pid, load.model, "bad_model", "no")
            case _:
                return LoadCut(load.address, load.pid, load.model)

    @invariant()
    def routes_lead_to_live_workers_only(self):
        table = self.state.table
        for entry in table.models.values():
            for each in entry.versions.values():
                own = [table.workers[route.worker].address for route in each.routes if route.slots is None]
                lent_ones = [route.worker for route in each.routes if route.slots is not None]
                assert {*own, *lent_ones} <= set(self.alive)
                assert max(len(own), len(lent_ones)) <= 2
                assert [route.slots for route in each.routes] == [None] * len(own) + [4] * len(lent_ones)
                assert (each.state == "ready") == bool(each.routes)

    @invariant()
    def lent_ones_are_known_only_while_their_manager_is(self):
        known = {name for name, worker in self.state.table.workers.items() if worker.transport == "swarm"}
        assert known == LENDERS & set(self.alive)


Cluster.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCluster = Cluster.TestCase
