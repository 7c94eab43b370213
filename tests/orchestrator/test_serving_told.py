"""Which workers are told how to serve what they have, and when."""

from hypothesis import given
from hypothesis import strategies as st

from tether.events import CatalogChanged, CatalogModel, LentChanged, LentWorker, Loaded, LoadFailed, ModelWanted, WorkerJoined, WorkerLeft
from tether.orchestrator.state import Configure, ControlState, Load
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
DIGITS = ModelVersion("digits", 1, Digest("1" * 64))
SMALL, LARGE = ServingSettings(max_batch_size=4), ServingSettings(max_batch_size=64, max_queue_size=9)


def said(settings):
    return CatalogChanged("tls://m", 1, {"digits": CatalogModel("digits", 1, {"latest": 1}, {1: (DIGITS, INFO)}, settings)}, 1)


def joined(number=1, life=0):
    return WorkerJoined(WorkerId(f"worker-{number}"), f"tls://w{number}", 100 + number + 10 * life, 0)


def loaded(number=1, life=0):
    return Loaded(f"tls://w{number}", 100 + number + 10 * life, DIGITS, f"/s/{number}")


def of(instructions, kind):
    return [each for each in instructions if isinstance(each, kind)]


def running(*events):
    state = ControlState(copies=1)
    for event in events:
        state.handle(event, 0.0)
    return state


def test_a_worker_is_told_with_the_load():
    state = running(said(SMALL), joined())
    (load,) = of(state.handle(ModelWanted(DIGITS), 1.0), Load)
    assert load.serving == SMALL
    assert of(state.handle(loaded(), 1.1), Configure) == []


def test_a_change_is_told_to_those_that_have_it_and_once():
    state = running(said(DEFAULTS), joined(1), joined(2), ModelWanted(DIGITS), loaded(1))
    assert of(state.handle(said(SMALL), 2.0), Configure) == [Configure("tls://w1", 101, DIGITS, SMALL)]
    assert of(state.handle(said(SMALL), 2.1), Configure) == []
    assert of(state.handle(said(DEFAULTS), 2.2), Configure) == [Configure("tls://w1", 101, DIGITS, DEFAULTS)]


def test_what_changes_while_it_loads_is_told_when_it_has():
    state = running(said(DEFAULTS), joined(), ModelWanted(DIGITS))
    assert of(state.handle(said(SMALL), 1.0), Configure) == []
    assert of(state.handle(said(LARGE), 1.1), Configure) == []
    assert of(state.handle(loaded(), 1.2), Configure) == [Configure("tls://w1", 101, DIGITS, LARGE)]


def test_the_next_process_of_a_worker_is_told_anew():
    state = running(said(SMALL), joined(), ModelWanted(DIGITS), loaded(), WorkerLeft("tls://w1"))
    (load,) = of(state.handle(joined(life=1), 1.0), Load)
    assert (load.pid, load.serving) == (111, SMALL)


def test_lent_workers_are_not_told_what_is_their_labs_matter():
    lent = LentChanged(1, (LentWorker(WorkerId("bob"), "key of bob", 1, 0, 4),))
    state = running(said(SMALL), lent)
    (load,) = of(state.handle(ModelWanted(DIGITS), 1.0), Load)
    state.handle(Loaded("bob", 1, DIGITS, "/s/bob"), 1.1)
    assert load.address == "bob"
    assert of(state.handle(said(LARGE), 1.2), Configure) == []


class Cluster:
    """Workers that do what they are told, some of them late."""

    def __init__(self):
        self.state, self.now, self.pids, self.loads, self.told = ControlState(copies=2), 0.0, {}, [], {}

    def handle(self, event):
        self.now += 1.0
        for instruction in self.state.handle(event, self.now):
            if isinstance(instruction, Load):
                self.loads.append(instruction)
            if isinstance(instruction, Load | Configure) and self.pids.get(instruction.address) == instruction.pid:
                self.told[instruction.address] = instruction.serving

    def joins(self, address):
        self.pids[address] = 1000 + int(self.now)
        self.handle(WorkerJoined(WorkerId(address), address, self.pids[address], 0))

    def leaves(self, address):
        self.handle(WorkerLeft(address))

    def loads_one(self, _):
        if self.loads:
            load = self.loads.pop(0)
            self.handle(Loaded(load.address, load.pid, DIGITS, f"/s/{self.now}"))

    def fails_one(self, _):
        if self.loads:
            load = self.loads.pop(0)
            self.handle(LoadFailed(load.address, load.pid, DIGITS, "bad_model", "corrupt"))


SAYINGS = st.sampled_from([DEFAULTS, SMALL, LARGE]).map(said)
DEEDS = st.tuples(
    st.sampled_from([Cluster.joins, Cluster.joins, Cluster.leaves, Cluster.loads_one, Cluster.loads_one, Cluster.fails_one]),
    st.sampled_from(["tls://w1", "tls://w2"]),
)


@given(st.lists(SAYINGS | DEEDS | st.just(ModelWanted(DIGITS)), max_size=40), SAYINGS)
def test_in_the_end_every_worker_serves_as_was_said_last(steps, last):
    cluster = Cluster()
    for step in [said(SMALL), *steps, last]:
        if isinstance(step, tuple):
            deed, address = step
            deed(cluster, address)
        else:
            cluster.handle(step)
    while cluster.loads:
        cluster.loads_one(None)
    holders = [worker.address for worker in cluster.state.table.workers.values() if worker.state == "running" and worker.models]
    assert {cluster.told[address] for address in holders} <= {last.models["digits"].serving}
