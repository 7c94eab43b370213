"""An engine that may keep little in memory: who waits, who goes, what is told before, and what is lost on the way: nothing."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tether.errors import BadModelError, MemoryFullError, ModelTooLargeError
from tether.gateway.transport import UnixTransport
from tether.ports import Hop, HopReply, Undelivered
from tether.runtimes import inspect, load
from tether.serving_settings import ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec
from tether.wire.npz import to_npz
from tether.wire.oip import encode_request
from tether.worker.engine import Engine, Source
from tether.worker.footprint import Files, Footprints, _resident
from tether.worker.residency import RAM

PATIENCE = 60.0
SIZE = 100
X = np.ones((1, 2), np.float32)
BODY, HEADER_NBYTES = encode_request({"x": X})


def version(name):
    return ModelVersion(name, 1, Digest(name.encode().hex().ljust(64, "0")))


class Doubling:
    """y = 2x; of a code format, without a process of its own, so that it counts as its files. Waits for `gate`."""

    def __init__(self, *, pure=True, pid=None):
        spec = TensorSpec("x", "FP32", (-1, 2))
        self.info = ModelInfo("custom", "custom", (spec,), (TensorSpec("y", "FP32", (-1, 2)),), batched=True, pure=pure, code=True)
        self.pid = pid
        self.runs, self.gate, self.closed = 0, threading.Event(), threading.Event()
        self.gate.set()

    def run(self, inputs):
        self.runs += 1
        self.gate.wait(PATIENCE)
        return {"y": 2 * inputs["x"]}

    def interrupt(self):
        self.gate.set()

    def close(self):
        self.closed.set()


class Rig:
    """An engine with room for so many models, and those that it loaded, by name."""

    def __init__(self, folder, most):
        self.loaded, self.fetched, self.withdrawn, self.make = {}, [], [], Doubling
        self.example, self.before = None, lambda _name: None
        self.engine = Engine(folder, self.fetch, self.load, budget={RAM: most * SIZE})
        self.engine.withdraw = lambda model, endpoint: self.withdrawn.append((model.name, endpoint))

    def fetch(self, model, _room):
        self.fetched.append(model.name)
        self.before(model.name)
        self.loaded.setdefault(model.name, []).append(self.make())
        return Source(model.name, self.loaded[model.name][-1].info, SIZE, self.example)

    def load(self, source):
        return self.loaded[source.path][-1]

    def use(self, name, times=1):
        """As if requests came."""
        self.engine._servers[version(name)].stats.requests += times

    @property
    def names(self):
        return sorted(model.name for model in self.engine.models())


@pytest.fixture
def rig(tmp_path):
    made = []

    def begin(most):
        made.append(Rig(tmp_path, most))
        return made[-1]

    yield begin
    for each in made:
        for models in each.loaded.values():
            for model in models:
                model.gate.set()
        each.engine.close()


def slow(name):
    """Fetching that one takes long."""
    return lambda fetched: threading.Event().wait(0.5 if fetched == name else 0)


async def eventually(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (other threads make it true)
            await asyncio.sleep(0.005)


def test_all_who_ask_for_one_model_wait_for_one_load_and_others_load_beside_it(rig):
    rig = rig(4)
    both = threading.Barrier(2, timeout=PATIENCE)
    rig.before = lambda _name: both.wait()  # passes only if two are fetched at the same time
    with ThreadPoolExecutor(8) as pool:
        endpoints = list(pool.map(rig.engine.load, [version("a"), version("b")] * 4))
    assert len(set(endpoints)) == 2
    assert sorted(rig.fetched) == ["a", "b"]


def test_nothing_is_kept_of_versions_that_are_gone(rig):
    engine = rig(2).engine
    for name in "abc":
        engine.load(version(name))
        assert engine.unload(version(name))
    assert [engine._turns, engine._servers, engine._settings, engine._measured, engine._volatile] == [{}] * 5


def test_what_there_is_can_be_told_while_something_goes(rig, monkeypatch):
    engine = rig(2).engine
    endpoints = [engine.load(version(name)) for name in "ab"]

    def server(number):
        def endpoint(_self):
            monkeypatch.delitem(engine._servers, version("b"), raising=False)  # as the thread that frees it does
            return endpoints[number]

        return type("Server", (), {"endpoint": property(endpoint)})()

    freed = dict(engine._servers)
    monkeypatch.setattr(engine, "_servers", {version(name): server(number) for number, name in enumerate("ab")})
    assert [each.endpoint for each in engine.holdings()] == endpoints
    monkeypatch.undo()
    assert engine._servers == freed


def test_what_has_to_go_is_told_of_first_and_its_socket_is_gone_when_the_next_one_is_there(rig):
    rig = rig(2)
    rig.before = slow("b")
    first = rig.engine.load(version("a"))
    rig.engine.load(version("b"))
    rig.use("b", 60)
    rig.use("a")
    rig.engine.load(version("c"))
    assert rig.withdrawn == [("a", first)]
    assert rig.loaded["a"][0].closed.is_set()
    assert rig.names == ["b", "c"]
    assert rig.engine.memory.models == {"b:1": SIZE, "c:1": SIZE}
    assert (rig.engine.memory.used, rig.engine.memory.budget) == (2 * SIZE, 2 * SIZE)


def test_ten_times_more_than_fit_all_get_in_however_many_ask_at_once(rig, monkeypatch):
    monkeypatch.setattr("tether.worker.residency.SETTLE", 0.01)
    rig = rig(2)
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(rig.engine.load, [version(f"m{number}") for number in range(20)]))
    assert len(rig.fetched) == 20
    assert len(rig.names) <= 2
    assert len(rig.withdrawn) >= 18


def test_a_load_that_fails_or_never_had_files_gives_its_room_back(rig):
    rig = rig(1)

    def fail(_name):
        raise BadModelError("no")

    rig.before = fail
    for name in "ab":
        with pytest.raises(BadModelError):
            rig.engine.load(version(name))
    rig.before, rig.engine._load = lambda _name: None, fail
    with pytest.raises(BadModelError):
        rig.engine.load(version("c"))
    assert rig.engine.memory.used == 0


def test_what_can_never_fit_is_refused_with_what_to_set(rig):
    rig = rig(1)
    rig.engine.load(version("a"), ServingSettings(pinned=True))
    with pytest.raises(ModelTooLargeError, match=r"b:1 needs 100 bytes of ram, and of the 100 .* pinned .* 100; .*--memory-budget"):
        rig.engine.load(version("b"))
    rig.engine.configure(version("a"), ServingSettings())
    rig.use("a")
    rig.engine.load(version("b"))


def test_when_all_that_is_there_is_in_use_and_does_not_end_who_waits_is_told(rig, monkeypatch):
    monkeypatch.setattr("tether.worker.residency.SETTLE", PATIENCE)
    rig = rig(1)
    rig.engine._rooms._wait = 0.3
    rig.engine.load(version("a"))
    with pytest.raises(MemoryFullError, match=r"b:1: no room .* within 0.3 s, it has a:1"):
        rig.engine.load(version("b"))


async def test_what_nobody_asked_for_in_its_time_goes_by_itself(rig):
    rig = rig(2)
    rig.engine.load(version("a"), ServingSettings(keep_alive=0.05))
    rig.engine.load(version("b"))
    await eventually(lambda: rig.names == ["b"])
    assert [name for name, _ in rig.withdrawn] == ["a"]


@pytest.mark.parametrize("pure", [True, False])
def test_the_example_is_run_before_anybody_is_told_of_a_model_unless_that_leaves_something_behind(rig, tmp_path, pure):
    rig = rig(2)
    rig.example, rig.make = tmp_path / "example.npz", lambda: Doubling(pure=pure)
    rig.example.write_bytes(to_npz({"x": X}))
    rig.engine.load(version("a"))
    assert rig.loaded["a"][0].runs == pure


def test_an_example_that_unpacks_to_more_than_it_may_is_not_run(rig, tmp_path):
    rig = rig(2)
    rig.example = tmp_path / "example.npz"
    np.savez_compressed(rig.example, x=np.zeros((9 << 20, 2), np.float32))
    assert rig.example.stat().st_size < 1 << 20
    rig.engine.load(version("a"))
    assert rig.loaded["a"][0].runs == 0


def test_an_example_that_fails_in_whichever_way_keeps_no_model_from_being_loaded(rig, tmp_path):
    rig = rig(2)
    rig.example = tmp_path / "example.npz"
    rig.example.write_bytes(to_npz({"another": X}))
    rig.engine.load(version("a"))
    assert rig.names == ["a"], "KeyError in its run"
    rig.example.write_bytes(b"PK\3\4 but no archive")
    rig.engine.load(version("b"))
    assert rig.names == ["a", "b"]


class Stubborn(Doubling):
    """Goes on when it is interrupted once, as code does that catches KeyboardInterrupt."""

    def __init__(self):
        super().__init__()
        self.interrupts = 0
        self.gate.clear()

    def interrupt(self):
        self.interrupts += 1
        if self.interrupts > 1:
            self.gate.set()


def test_an_example_that_does_not_end_is_interrupted_until_it_does(rig, tmp_path, monkeypatch):
    for name in ("_WARM_UP", "_INSIST"):
        monkeypatch.setattr(f"tether.worker.engine.{name}", 0.05)
    rig = rig(2)
    rig.example, rig.make = tmp_path / "example.npz", Stubborn
    rig.example.write_bytes(to_npz({"x": X}))
    rig.engine.load(version("a"))
    assert rig.loaded["a"][0].interrupts > 1


async def test_requests_that_come_while_a_model_is_put_out_are_answered_or_were_never_sent(rig):
    rig = rig(1)
    rig.make = lambda: Doubling(pure=False)
    hop, outcomes, asked = Hop(BODY, HEADER_NBYTES, PATIENCE), [], 0
    for turn in range(3):
        endpoint = await asyncio.to_thread(rig.engine.load, version(f"m{turn}"))
        gateways = [UnixTransport(endpoint, None) for _ in range(3)]
        for number in range(30):
            asked += 1
            gateways[number % 3].send(hop, outcomes.append)
        going = asyncio.ensure_future(asyncio.to_thread(rig.engine.load, version(f"m{turn}-next")))
        while not going.done():
            for gateway in (*gateways, late := UnixTransport(endpoint, None)):
                asked += 1
                gateway.send(hop, outcomes.append)
            await asyncio.sleep(0.005)
            gateways.append(late)
        await going
        rig.use(f"m{turn}-next")
        await eventually(lambda: len(outcomes) == asked)  # noqa: B023 (before it changes)
        for gateway in gateways:
            gateway.close()
    assert Undelivered.LOST not in outcomes
    assert {each.status for each in outcomes if isinstance(each, HopReply)} == {200}
    assert sum(models.runs for each in rig.loaded.values() for models in each) == sum(isinstance(each, HopReply) for each in outcomes)


async def test_a_busy_model_answers_what_it_has_before_another_takes_its_place(rig):
    rig = rig(1)
    endpoint = await asyncio.to_thread(rig.engine.load, version("a"))
    model, gateway, replies = rig.loaded["a"][0], UnixTransport(endpoint, None), []
    model.gate.clear()
    gateway.send(Hop(BODY, HEADER_NBYTES, PATIENCE), replies.append)
    await eventually(lambda: model.runs)
    going = asyncio.ensure_future(asyncio.to_thread(rig.engine.load, version("b")))
    await eventually(lambda: rig.withdrawn)
    assert not model.closed.is_set()
    model.gate.set()
    await going
    assert [reply.status for reply in replies] == [200]
    gateway.close()


def test_on_a_card_a_model_counts_as_its_files_and_then_as_what_its_process_takes_there(rig, monkeypatch):
    rig = rig(9)
    rig.engine.limit_card(2 * SIZE)
    monkeypatch.setattr("tether.worker.engine.card_users", lambda: {os.getpid() + 1: 70})
    monkeypatch.setattr("tether.worker.engine.card_nbytes", lambda pid, users: users[pid])
    monkeypatch.setattr("tether.worker.engine.runner_nbytes", lambda _pid: 30)
    rig.make, rig.before = lambda: Doubling(pid=os.getpid() + 1), slow("b")
    rig.engine.load(version("a"))
    assert (rig.engine.memory.gpu_used, rig.engine.memory.gpu_budget) == (SIZE, 2 * SIZE)
    rig.engine._measure()
    assert (rig.engine.memory.gpu_used, rig.engine.memory.used) == (70, 30)
    rig.engine.load(version("b"))
    rig.use("a")
    rig.use("b", 60)
    rig.engine.load(version("c"))
    assert [name for name, _ in rig.withdrawn] == ["a"]


async def test_a_driver_that_takes_its_time_delays_nobody_who_goes_away(rig, monkeypatch):
    monkeypatch.setattr("tether.worker.engine._MEASURE", 0.01)
    asked, told = threading.Event(), threading.Event()
    monkeypatch.setattr("tether.worker.engine.card_users", lambda: asked.set() or told.wait(PATIENCE) or {})
    rig = rig(9)
    rig.engine.limit_card(9 * SIZE)
    endpoint = await asyncio.to_thread(rig.engine.load, version("a"))
    (model,), server = rig.loaded["a"], rig.engine._servers[version("a")]
    server.stats.busy += 1  # it was used, so it is measured
    assert await asyncio.to_thread(asked.wait, PATIENCE)
    model.gate.clear()
    gateway = UnixTransport(endpoint, None)
    abandon = gateway.send(Hop(BODY, HEADER_NBYTES, PATIENCE), lambda _reply: None)
    await eventually(lambda: model.runs == 1)
    abandon()
    try:
        async with asyncio.timeout(PATIENCE / 2):
            await asyncio.to_thread(model.gate.wait, PATIENCE / 2)  # interrupted
        assert model.gate.is_set()
    finally:
        told.set()
        gateway.close()


def write_large(path, nbytes):
    side = int((nbytes / 4) ** 0.5)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", side])],
        [numpy_helper.from_array(np.ones((side, side), np.float32), "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Source(path, inspect(path), path.stat().st_size), np.ones((1, side), np.float32)


def test_a_process_that_loads_and_frees_a_hundred_megabytes_ten_times_is_as_small_as_before(tmp_path):
    source, x = write_large(tmp_path / "m.onnx", 100 << 20)
    engine = Engine(tmp_path, lambda _model, _room: source, lambda source: load(source.path, source.info), budget={RAM: 150 << 20})
    sizes = []
    for turn in range(10):
        engine.load(version(f"m{turn}"))  # puts the one before out
        engine._servers[version(f"m{turn}")].loaded.run({"x": x})
        engine._servers[version(f"m{turn}")].stats.requests += 1
        assert len(engine.models()) == 1
        if turn in {1, 9}:
            sizes.append(sum(_resident()))
            assert engine.memory.used == pytest.approx(source.nbytes, rel=0.25)
    engine.close()
    sizes.append(sum(_resident()))
    assert sizes[1] <= sizes[0] + (20 << 20), sizes
    assert sizes[2] <= sizes[0] - (80 << 20), sizes


def test_small_models_are_measured_to_a_tenth(tmp_path):
    source, x = write_large(tmp_path / "m.onnx", 16 << 20)
    footprints, models = Footprints(), []

    def bring():
        model = load(source.path, source.info)
        model.run({"x": x})
        return model

    for _ in range(4):
        model, nbytes = footprints.brought(Files(source.nbytes, in_memory=False), bring)
        models.append(model)
        assert nbytes == pytest.approx(source.nbytes, rel=0.3)
    for model in models:
        model.close()
