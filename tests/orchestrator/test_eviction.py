"""What a worker puts out of memory leaves the table and comes back when it is asked for: the orchestrator does not work against it."""

from tether.errors import MemoryFullError
from tether.events import CatalogChanged, CatalogModel, Evicting, Loaded, LoadFailed, ModelWanted, Tick, Unloaded, WorkerJoined, WorkerLeft
from tether.orchestrator.registry import PRESSED
from tether.orchestrator.state import ControlState, Load, Push
from tether.serving_settings import ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId, WorkerMemory

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
A, B, C = (ModelVersion(name, 1, Digest(f"{number:064x}")) for number, name in enumerate("abc"))
CATALOG = CatalogChanged("tls://m", 1, {each.name: CatalogModel(each.name, 1, {}, {1: (each, INFO)}) for each in (A, B, C)}, 1)


def took(*models, free=0):
    """Each 10 bytes; others take the rest, but for what is free."""
    return WorkerMemory(100 - free, 100, {str(model): 10 for model in models})


class Lab:
    """Two workers; whatever is to be loaded is loaded at once, and takes all the room that there is but `free`."""

    def __init__(self, free=0):
        self.state, self.now, self.free, self.loads = ControlState(2), 0.0, free, []
        self.do(CATALOG)
        for number in (1, 2):
            self.do(WorkerJoined(WorkerId(f"w{number}"), f"tls://w{number}", number, 0, took(free=free)))

    def do(self, event):
        self.now += 0.1
        instructions = self.state.handle(event, self.now)
        self.loads += [each for each in instructions if isinstance(each, Load)]
        return instructions

    def want(self, model):
        self.do(ModelWanted(model))
        while self.loads:
            load = self.loads.pop(0)
            self.do(Loaded(load.address, load.pid, load.model, f"/s/{load.pid}", took(load.model, free=self.free)))

    def evict(self, model, number, **more):
        self.do(Evicting(f"tls://w{number}", number, model, f"/s/{number}", took(**more)))

    def entry(self, model):
        return self.state.table.resolve(model.name)

    def routes(self, model):
        return [route.endpoint for route in self.entry(model).routes]


def test_what_is_put_out_is_withdrawn_at_once_and_loaded_again_only_when_it_is_asked_for():
    lab = Lab()
    lab.want(A)
    assert (lab.routes(A), lab.state.unsettled) == (["/s/1"], False)
    instructions = lab.do(Evicting("tls://w1", 1, A, "/s/1", took()))
    assert [type(each) for each in instructions] == [Push]
    assert (lab.entry(A).state, lab.entry(A).reason) == ("unloaded", "")
    lab.now += 1000
    assert not lab.do(Tick())
    assert not lab.loads
    lab.want(A)
    assert lab.routes(A) == ["/s/1"]
    lab.evict(A, 1)
    lab.want(A)
    assert lab.routes(A) == ["/s/2"], "where others had to go just now there is less room"


def test_a_second_copy_comes_where_there_is_room_and_puts_nobody_out():
    assert (lab := Lab(free=10)).want(A) is None
    assert lab.routes(A) == ["/s/1", "/s/2"]
    lab = Lab(free=9)
    lab.want(A)
    assert lab.routes(A) == ["/s/1"]


def test_where_others_had_to_go_no_copies_come_for_a_while():
    lab = Lab(free=10)
    lab.want(A)
    lab.evict(A, 2, free=20)
    assert (lab.routes(A), lab.loads) == (["/s/1"], [])
    lab.now += PRESSED
    lab.do(Tick())
    assert [load.address for load in lab.loads] == ["tls://w2"]


def test_what_the_last_worker_put_out_is_not_placed_again_when_a_worker_comes_or_goes():
    lab = Lab()
    lab.want(A)
    lab.evict(A, 1)
    lab.do(WorkerLeft("tls://w2"))
    lab.do(WorkerJoined(WorkerId("w2"), "tls://w2", 7, 0))
    assert lab.loads == []


def test_a_load_that_was_put_out_before_its_answer_came_has_no_route():
    lab = Lab()
    lab.do(ModelWanted(A))
    lab.evict(A, 1)
    assert lab.entry(A).state == "loading"
    lab.do(Loaded("tls://w1", 1, A, "/s/1", took()))
    assert (lab.entry(A).state, lab.routes(A)) == ("unloaded", [])
    lab.loads.clear()
    lab.want(A)
    assert lab.routes(A) == ["/s/2"]


def test_news_of_an_earlier_load_or_process_takes_nothing_from_the_one_that_is_there():
    lab = Lab()
    lab.want(A)
    lab.do(Evicting("tls://w1", 1, A, "/s/0", took(A)))
    lab.do(Evicting("tls://w1", 99, A, "/s/1", took()))
    assert lab.routes(A) == ["/s/1"]


def test_who_found_no_room_is_no_failure_says_why_and_is_tried_again_at_once_when_it_is_asked_for():
    lab = Lab()
    lab.do(ModelWanted(A))
    (load,) = lab.loads
    lab.do(LoadFailed(load.address, load.pid, A, MemoryFullError.code, "no room within 30 s"))
    assert (lab.entry(A).state, lab.entry(A).reason) == ("unloaded", "memory_full: no room within 30 s")
    lab.now += 1000
    lab.do(Tick())
    assert (lab.loads, lab.state.unsettled) == ([load], False)
    lab.do(ModelWanted(A))
    assert lab.entry(A).state == "loading"
    lab.do(Loaded(lab.loads[1].address, lab.loads[1].pid, A, "/s/1"))
    assert (lab.entry(A).state, lab.entry(A).reason) == ("ready", "")


def test_the_table_says_what_models_take():
    lab = Lab(free=5)
    lab.want(A)
    assert lab.state.table.workers[WorkerId("w1")].memory == took(A, free=5)
    lab.do(Unloaded("tls://w1", 1, A, took(free=15)))
    assert lab.state.table.workers[WorkerId("w1")].memory == took(free=15)


def test_a_copy_that_nobody_asked_for_so_long_comes_back_when_it_is_asked_for():
    lab = Lab(free=50)
    kept = {"a": CatalogModel("a", 1, {}, {1: (A, INFO)}, ServingSettings(keep_alive=10.0))}
    lab.do(CatalogChanged("tls://m", 2, kept, 1))
    lab.want(A)
    lab.want(A)
    assert lab.routes(A) == ["/s/1", "/s/2"]
    lab.evict(A, 2, free=50)
    lab.now += 10 * PRESSED
    lab.do(Tick())
    assert (lab.routes(A), lab.loads) == (["/s/1"], [])
    lab.want(A)
    assert lab.routes(A) == ["/s/1", "/s/2"]
