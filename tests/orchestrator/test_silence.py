"""Workers that fall silent and come back, and those that outlive their orchestrator: what the table says, and what is loaded where."""

from tether.events import (
    CatalogChanged,
    CatalogModel,
    Holding,
    Loaded,
    ManagerLeft,
    ModelWanted,
    WorkerBack,
    WorkerJoined,
    WorkerLeft,
    WorkerSilent,
)
from tether.orchestrator.state import Configure, ControlState, Load, Unload
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
DIGITS = ModelVersion("digits", 1, Digest("1" * 64))
OTHER = ModelVersion("other", 1, Digest("2" * 64))


def catalog(model=DIGITS, serving=DEFAULTS, stream=1):
    return CatalogChanged("tls://m", 1, {model.name: CatalogModel(model.name, 1, {"latest": 1}, {1: (model, INFO)}, serving)}, stream)


def joined(number, *models, serving=DEFAULTS):
    """`models`: that it has in memory."""
    holdings = tuple(Holding(model, f"/s/{model.name}-{number}", serving) for model in models)
    return WorkerJoined(WorkerId(f"w{number}"), f"tls://w{number}", number, 0, holdings=holdings)


def loaded(number):
    return Loaded(f"tls://w{number}", number, DIGITS, f"/s/digits-{number}")


class Lab:
    def __init__(self, *events, copies=2):
        self.state, self.now = ControlState(copies), 0.0
        for event in events:
            self.do(event)

    def do(self, event):
        """What is loaded, unloaded or set because of it, where."""
        self.now += 1.0
        instructions = self.state.handle(event, self.now)
        return [(type(each).__name__, each.address) for each in instructions if isinstance(each, Load | Unload | Configure)]

    @property
    def routes(self):
        return [route.worker for route in self.state.table.resolve("digits").routes]

    def seen(self, number):
        entry = self.state.table.workers[WorkerId(f"w{number}")]
        return entry.state, entry.since


def test_a_silent_worker_gets_no_requests_and_is_known_to_have_its_models_when_it_is_back():
    lab = Lab(catalog(), joined(1), joined(2), ModelWanted(DIGITS), loaded(1), loaded(2))
    assert lab.do(WorkerSilent("tls://w1")) == []
    assert (lab.routes, lab.seen(1)) == (["w2"], ("silent", lab.now))
    assert lab.do(WorkerBack("tls://w1")) == []
    assert (lab.routes, lab.seen(1)) == (["w1", "w2"], ("running", lab.now))


def test_the_only_one_that_has_a_model_keeps_its_route_until_another_one_has_it():
    """Perhaps it is the orchestrator that is cut off, and gateways reach it."""
    lab = Lab(catalog(), joined(1), joined(2), ModelWanted(DIGITS), loaded(1), copies=1)
    assert lab.do(WorkerSilent("tls://w1")) == [("Load", "tls://w2")]
    assert (lab.routes, lab.state.table.resolve("digits").state) == (["w1"], "ready")
    assert lab.do(loaded(2)) == []
    assert lab.routes == ["w2"]


def test_all_are_silent_and_requests_go_on():
    lab = Lab(catalog(), joined(1), joined(2), ModelWanted(DIGITS), loaded(1), loaded(2))
    for number in (1, 2):
        assert lab.do(WorkerSilent(f"tls://w{number}")) == []
    assert lab.routes == ["w1", "w2"]
    assert lab.do(WorkerBack("tls://w2")) == []
    assert lab.routes == ["w2"]


def test_what_comes_of_a_load_while_the_worker_is_silent_counts_once_it_is_back():
    lab = Lab(catalog(), joined(1), ModelWanted(DIGITS), WorkerSilent("tls://w1"), loaded(1))
    assert lab.do(WorkerBack("tls://w1")) == []
    assert lab.routes == ["w1"]


def test_a_silent_worker_that_is_lost_in_the_end_is_silent_no_more():
    lab = Lab(catalog(), joined(1), WorkerSilent("tls://w1"), WorkerLeft("tls://w1"))
    assert lab.seen(1)[0] == "lost"
    lab.do(WorkerBack("tls://w1"))
    assert lab.seen(1)[0] == "lost"


def test_a_new_orchestrator_finds_the_models_where_they_were():
    """In either order: the manager with its catalog, the workers with what they have."""
    for events in ([catalog(), joined(1, DIGITS), joined(2, DIGITS)], [joined(1, DIGITS), joined(2, DIGITS), catalog()]):
        lab = Lab()
        assert [told for event in events for told in lab.do(event)] == []
        assert lab.routes == ["w1", "w2"]
        assert lab.do(ModelWanted(DIGITS)) == []
        assert lab.do(WorkerLeft("tls://w1")) == []
        assert lab.do(joined(3)) == [("Load", "tls://w3")]


def test_what_was_unpublished_meanwhile_is_unloaded_and_not_before_a_manager_said_so():
    lab = Lab(joined(1, DIGITS, OTHER))
    assert lab.do(catalog()) == [("Unload", "tls://w1")]
    assert lab.routes == ["w1"]
    assert lab.do(ManagerLeft(1)) == []
    assert lab.do(joined(2, DIGITS, OTHER)) == []
    assert lab.do(catalog(stream=2)) == [("Unload", "tls://w2")]


def test_what_is_served_in_another_way_than_was_said_meanwhile_is_told():
    lab = Lab(catalog(serving=ServingSettings(max_batch_size=8)))
    assert lab.do(joined(1, DIGITS)) == [("Configure", "tls://w1")]
    assert lab.do(joined(2, DIGITS, serving=ServingSettings(max_batch_size=8))) == []
