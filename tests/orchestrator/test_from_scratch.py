"""The control plane looks only at what an event touched; looking at everything must come to the same, after any events."""

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec import structs

from tether.errors import MemoryFullError
from tether.events import (
    CatalogChanged,
    CatalogModel,
    DrainAsked,
    Evicting,
    GatewayLoad,
    InputCondemned,
    LentChanged,
    LentWorker,
    LoadCut,
    Loaded,
    LoadFailed,
    ManagerLeft,
    ModelWanted,
    QuarantineCleared,
    Tick,
    Unloaded,
    VersionIsolated,
    VersionLoad,
    WorkerBack,
    WorkerJoined,
    WorkerLeft,
    WorkerSilent,
)
from tether.orchestrator.entries import TableMaker
from tether.orchestrator.state import ControlState, Load, Push, Unload
from tether.orchestrator.workforce import Workforce
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId, WorkerMemory, WorkerSite

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
NAMES = "abc"
VERSIONS = [(name, number) for name in NAMES for number in (1, 2)]
SERVED = [DEFAULTS, DEFAULTS, ServingSettings(device="gpu"), ServingSettings(device="cpu"), ServingSettings(keep_alive=5.0)]
SERVED += [
    ServingSettings(min_copies=0, max_copies=3),
    ServingSettings(min_copies=1, max_copies=1, spare=True),
    ServingSettings(region="eu"),
]
PAUSES = [0.25, 0.5, 0.5, 1.0, 3.0, 3.0, 20.0, 61.0]


def version(name, number):
    return ModelVersion(name, number, Digest(f"{number:064x}"))


class Cluster:
    """Whatever may happen to a lab: mostly that it is asked and its workers answer, now and then that all is another thing."""

    def __init__(self, random):
        self.random, self.state, self.now, self.lives, self.stream = random, ControlState(2), 0.0, 0, 1
        self.alive, self.asked, self.freeing, self.registered = {}, [], [], {}

    def live(self, steps):
        likely = {self.ask: 5, self.answer: 12, self.join: 3, self.leave: 2, self.evict: 2, self.free: 2, self.hold: 1, self.tick: 2}
        likely |= {self.stand_still: 2, self.drain: 1.5, self.publish: 1.5, self.report: 2, self.lend: 1, self.end_manager: 0.4}
        weights = [each * self.random.choice([0.1, 1, 1, 3]) for each in likely.values()]  # each lab is another one
        for step in self.random.choices(list(likely), weights, k=steps):
            step()
            self.compare()

    def do(self, event):
        self.now += self.random.choice(PAUSES) if self.random.random() < 0.95 else 4000.0
        before = self.state.table
        for instruction in self.state.handle(event, self.now):
            if isinstance(instruction, Load):
                self.asked.append(instruction)
            elif isinstance(instruction, Unload):
                self.freeing.append(instruction)
            elif isinstance(instruction, Push):
                assert instruction.table == self.state.table == before.amended(instruction.change)

    def memory(self):
        if self.random.random() < 0.3:
            return None
        models = {f"{name}:{number}": self.random.choice([10, 20, 60]) for name, number in VERSIONS if self.random.random() < 0.3}
        return WorkerMemory(self.random.randint(0, 100), self.random.choice([0, 100, 100]), models)

    def tick(self):
        self.do(Tick())

    def join(self):
        number = self.random.randint(1, 4)
        address = f"tls://w{number}"
        if address not in self.alive:
            self.lives += 1
            self.alive[address] = self.lives
            site = WorkerSite("eu" * (number == 2))
            self.do(WorkerJoined(WorkerId(f"w{number}"), address, self.lives, int(number == 1), self.memory(), site))

    def leave(self):
        address = f"tls://w{self.random.randint(1, 4)}"
        self.alive.pop(address, None)
        self.do(WorkerLeft(address))

    def report(self):
        seen = {version(*self.random.choice(VERSIONS)): VersionLoad(seconds=self.random.choice([0.1, 5.0, 12.0]))}
        self.do(GatewayLoad("g", 1.0, seen))

    def drain(self):
        self.do(DrainAsked(WorkerId(f"w{self.random.randint(1, 4)}"), self.random.choice([None, 0.0, 30.0])))

    def stand_still(self):
        self.do(self.random.choice([WorkerSilent, WorkerBack, WorkerBack])(f"tls://w{self.random.randint(1, 4)}"))

    def publish(self):
        self.stream += self.random.random() < 0.2
        self.do(CatalogChanged("tls://m", self.random.randint(1, 9), dict(self.entries()), self.stream))

    def entries(self):
        for name in NAMES:
            if self.random.random() < 0.9:
                found = [number for number in (1, 2) if self.random.random() < 0.8]
                versions = {number: (version(name, number), INFO) for number in found}
                yield name, CatalogModel(name, max(found, default=1), {}, versions, self.random.choice(SERVED))

    def end_manager(self):
        self.do(ManagerLeft(self.stream))

    def lend(self):
        self.lives += 1
        ids = [each for each in "xyz" if self.random.random() < 0.5]
        anew = self.random.random() < 0.2
        self.registered = {each: self.lives if anew else self.registered.get(each, self.lives) for each in ids}
        self.do(LentChanged(self.stream, tuple(self.lent(*each) for each in self.registered.items())))

    def lent(self, name, number):
        return LentWorker(WorkerId(name), name, number, self.random.randint(0, 1), 4, self.random.choice(["*", "a"]))

    def ask(self):
        self.do(ModelWanted(version(*self.random.choice(VERSIONS))))

    def answer(self):
        if not self.asked:
            return
        load = self.asked.pop(self.random.randrange(len(self.asked)))
        which = load.address, load.pid, load.model
        match self.random.choice(["loaded", "loaded", "loaded", "failed", "full", "cut"]):
            case "loaded":
                self.do(Loaded(*which, f"{load.address}/{load.pid}/{load.model}", self.memory()))
            case "failed":
                self.do(LoadFailed(*which, "bad_model", "no"))
            case "full":
                self.do(LoadFailed(*which, MemoryFullError.code, "no"))
            case _:
                self.do(LoadCut(*which))

    def free(self):
        if self.freeing:
            unload = self.freeing.pop()
            self.do(Unloaded(unload.address, unload.pid, unload.model, self.memory()))

    def evict(self):
        held = [(worker, model) for worker in self.state._workforce if worker.lent is None for model in (*worker.loaded, *worker.loading)]
        if held:
            worker, model = self.random.choice(held)
            endpoint = f"{worker.address}/{worker.pid}/{model}"
            self.do(Evicting(worker.address, worker.pid, model, endpoint, self.memory() or WorkerMemory()))

    def hold(self):
        model = version(*self.random.choice(VERSIONS))
        self.do(self.random.choice([VersionIsolated(model), InputCondemned(model, "mark"), QuarantineCleared(model.name)]))

    def compare(self):
        self.the_table_is_as_if_made_anew()
        self.the_index_is_as_if_made_anew()
        self.whoever_looks_at_all_finds_nothing_to_do()

    def the_table_is_as_if_made_anew(self):
        state = self.state
        maker = TableMaker(state._catalog, Everyone(state._workforce), state._demand, state._isolation, state._rollouts)
        maker.update(state._catalog.published, state._catalog.models, [*state._workforce._by_id, *state._workforce.lost])
        assert structs.replace(maker.table, seq=0) == structs.replace(state.table, seq=0)

    def whoever_looks_at_all_finds_nothing_to_do(self):
        state, lacking = self.state, set(self.state._demand.lacking)
        state._workforce.touched |= every_version(state)
        state._workforce.changed |= {worker.id for worker in state._workforce}
        assert state.handle(Tick(), self.now) == []
        assert lacking == state._demand.lacking == {model for model in state._demand.wanted if not state._placing.is_held(model)}

    def the_index_is_as_if_made_anew(self):
        known, made = self.state._workforce, Workforce()
        for worker in known:
            (made._lent if worker.lent is not None else made._own)[worker.address] = worker
            made._add(worker)
        assert {model: set(each) for model, each in made._concerned.items()} == {m: set(each) for m, each in known._concerned.items()}
        assert (made.failing, made._sizes) == (known.failing, known._sizes)
        assert made._by_id.keys() == known._by_id.keys()


class Everyone(Workforce):
    """Asks each worker, where the index would be asked."""

    def __init__(self, known):
        self.__dict__ |= vars(known)

    def concerned(self, model):
        return [worker for worker in self if worker.knows(model)]


def every_version(state):
    return state._catalog.published | state._demand.wanted | {model for worker in state._workforce for model in worker.known}


@given(st.randoms(use_true_random=True))
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_who_looks_only_at_what_was_touched_misses_nothing(random):
    Cluster(random).live(120)
