"""Who goes away takes the work along: a run that nobody waits for stops using the processor, whatever kind of model it is."""

import asyncio
import time

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from tether.gateway.transport import UnixTransport
from tether.ports import Hop
from tether.runtimes import inspect
from tether.types import Digest, ModelVersion
from tether.wire.oip import encode_request
from tether.worker.engine import Engine, Source
from tether.worker.runner import RunnerPool, load_model

PATIENCE = 60.0
BUSY = 0.06
"""Share of a core: what spins has more, also beside ten others; what waits has less."""
VERSION = ModelVersion("m", 1, Digest("0" * 64))
SPINNING = """
class Model:
    inputs = [("x", "FP32", (-1,))]
    outputs = [("y", "FP32", (-1,))]
    pure = {pure}

    def __init__(self):
        self.seen = 0

    def predict(self, x):
        self.seen += 1
        while x[0] < 0:
            {body}
        return x * 0 + self.seen
"""
STUBBORN = """
            try:
                while True: sum(range(100))
            except KeyboardInterrupt: pass
"""


def scalar(name, kind, value):
    return helper.make_tensor(name, kind, [], [value])


def write_loop(path):
    """Goes round for ever where x is negative, else not at all."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("v2", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("ReduceMin", ["x"], ["least"], keepdims=0),
        helper.make_node("Less", ["least", "zero"], ["go"]),
        helper.make_node("Loop", ["trips", "go", "x"], ["y"], body=body),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    weights = [scalar("trips", TensorProto.INT64, 1 << 62), scalar("zero", TensorProto.FLOAT, 0.0)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_custom(path, body="pass", *, pure=True):
    path.write_text(SPINNING.format(body=body, pure=pure))
    return path


@pytest.fixture(scope="module")
def pool():
    pool = RunnerPool()
    yield pool
    pool.close()


@pytest.fixture
async def loaded(tmp_path, pool):
    """A model's file → the way to it, and the engine."""
    engines = []

    def begin(path):
        source = Source(path, inspect(path))
        engine = Engine(tmp_path, lambda _model, _room: source, lambda source: load_model(source.path, source.info, pool=pool))
        transport = UnixTransport(engine.load(VERSION), None)
        engines.append((engine, transport))
        return transport, next(iter(engine._servers.values())).loaded

    begin.engines = engines
    yield begin
    for engine, transport in engines:
        transport.close()
        await asyncio.to_thread(engine.close)


def send(transport, value, on_reply=lambda _reply: None, timeout=PATIENCE):
    body, header_nbytes = encode_request({"x": np.full(1, value, np.float32)}, binary=False)
    return transport.send(Hop(body, header_nbytes, timeout), on_reply)


async def ask(transport, value):
    answered = asyncio.get_running_loop().create_future()
    send(transport, value, answered.set_result)
    async with asyncio.timeout(PATIENCE):
        return await answered


def processor(pid=None):
    """Seconds of it that were used."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def share(pid=None):
    """Of one core, over a moment."""
    before, begun = processor(pid), time.monotonic()
    await asyncio.sleep(0.3)
    return (processor(pid) - before) / (time.monotonic() - begun)


async def busy(pid=None):
    async with asyncio.timeout(PATIENCE):
        while await share(pid) < BUSY:
            pass


async def idle(pid=None):
    """Seconds of the processor that it took until then: on a busy machine they come later, and are no more."""
    before = processor(pid)
    async with asyncio.timeout(PATIENCE):
        while await share(pid) >= BUSY:
            pass
    return processor(pid) - before


async def test_an_endless_graph_ends_when_its_client_goes_away(loaded, tmp_path):
    transport, _ = loaded(write_loop(tmp_path / "m.onnx"))
    abandon = send(transport, -1)
    await busy()
    abandon()
    assert await idle() < 1
    assert (await ask(transport, 1)).status == 200


async def test_a_model_that_is_unloaded_waits_for_no_run_that_nobody_waits_for(loaded, tmp_path):
    path = write_loop(tmp_path / "m.onnx")
    transport, _ = loaded(path)
    abandon = send(transport, -1)
    await busy()
    unloading = asyncio.create_task(asyncio.to_thread(loaded.engines[-1][0].unload, VERSION))
    await asyncio.sleep(0.1)
    abandon()
    async with asyncio.timeout(PATIENCE):
        assert await unloading


async def test_a_gateway_that_is_gone_waits_for_nothing(loaded, tmp_path):
    transport, _ = loaded(write_loop(tmp_path / "m.onnx"))
    send(transport, -1)
    await busy()
    transport.close()
    assert await idle() < 1


async def test_a_run_goes_on_while_one_of_its_clients_waits(loaded, tmp_path):
    transport, model = loaded(write_custom(tmp_path / "m.py"))
    replies = []
    together = [send(transport, -1, replies.append) for _ in range(2)]
    await busy(model.pid)
    together[0]()
    await asyncio.sleep(1)
    await busy(model.pid)
    assert len(replies) == 0
    together[1]()
    assert await idle(model.pid) < 1


@pytest.mark.parametrize("pure", [True, False])
async def test_a_spinning_class_is_interrupted_and_keeps_what_it_knows(loaded, tmp_path, pure):
    transport, model = loaded(write_custom(tmp_path / "m.py", pure=pure))
    abandon, pid = send(transport, -1), model.pid
    await busy(pid)
    abandon()
    assert await idle(pid) < 1
    assert b"[2.0]" in (await ask(transport, 1)).body
    assert model.pid == pid


async def test_a_class_that_spins_on_loses_its_process(loaded, tmp_path):
    transport, model = loaded(write_custom(tmp_path / "m.py", STUBBORN))
    abandon, pid = send(transport, -1), model.pid
    await busy(pid)
    abandon()
    async with asyncio.timeout(PATIENCE):
        while model.pid == pid:  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0.05)
    assert b"[1.0]" in (await ask(transport, 1)).body


async def test_one_that_keeps_something_loses_it_at_the_deadline_only(loaded, tmp_path):
    transport, model = loaded(write_custom(tmp_path / "m.py", STUBBORN, pure=False))
    abandon, pid = send(transport, -1, timeout=3), model.pid
    begun = time.monotonic()
    server = next(iter(loaded.engines[-1][0]._servers.values()))
    async with asyncio.timeout(PATIENCE):
        while not server.is_in_use:  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0.01)
    abandon()
    async with asyncio.timeout(PATIENCE):
        while model.pid == pid:  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0.05)
    assert time.monotonic() - begun > 3
