"""A model's thread under settings that its lab gave it, over its own socket; and settings that change while it serves."""

import asyncio
import threading
import time

import numpy as np
import orjson
import pytest

from tether.gateway.transport import UnixTransport
from tether.ports import Hop
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec
from tether.wire.oip import decode_request, encode_request
from tether.worker.serving import ModelServer

PATIENCE = 60.0


class Gated:
    """y = x, a run for each word of `let`; remembers what ran together."""

    def __init__(self):
        spec, out = (TensorSpec(name, "FP32", (-1, 1)) for name in "xy")
        self.info = ModelInfo("custom", "custom", (spec,), (out,), batched=True, pure=True, code=True)
        self.batches, self._gate = [], threading.Semaphore(0)

    def run(self, inputs):
        self.batches.append([int(row) for row in inputs["x"][:, 0]])
        self._gate.acquire(timeout=PATIENCE)
        return {"y": inputs["x"]}

    def let(self, runs=1):
        self._gate.release(runs)

    def interrupt(self):
        self.let(1000)

    close = interrupt


class Caller:
    """A gateway's way to one server: sends numbers, keeps statuses by number."""

    def __init__(self, server, model):
        self.server, self.model, self.answers, self.texts = server, model, {}, {}
        self.transport = UnixTransport(str(server.endpoint), None)

    def send(self, *numbers, **parameters):
        for number in numbers:
            body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [number]}], "parameters": parameters}
            self.transport.send(Hop(orjson.dumps(body), 0, PATIENCE), lambda reply, number=number: self._answered(number, reply))

    def _answered(self, number, reply):
        self.answers[number], self.texts[number] = reply.status, bytes(reply.body)

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE):
            while not condition():  # the model's thread says nothing
                self.server.end_unwanted_run(time.monotonic())  # as the engine's watchdog does
                await asyncio.sleep(0.005)

    async def running(self, *batch):
        """Until this batch is inside the model."""
        await self.until(lambda: list(batch) in self.model.batches)

    async def waiting(self, count):
        await self.until(lambda: self.server.stats.waiting == count)


@pytest.fixture
async def serve(tmp_path):
    made = []

    def begin(settings=DEFAULTS):
        model = Gated()
        server = ModelServer(ModelVersion("m", 1, Digest("0" * 64)), model, tmp_path / "m.sock")
        server.configure(settings)
        server.start()
        made.append(Caller(server, model))
        return made[-1]

    yield begin
    for caller in made:
        caller.transport.close()
        caller.model.interrupt()
        caller.server.stop()


async def test_what_is_beyond_the_queue_is_refused_while_the_model_still_runs(serve):
    caller = serve(ServingSettings(max_queue_size=2))
    caller.send(0)
    await caller.running(0)
    caller.send(1, 2, 3, 4)
    await caller.until(lambda: len(caller.answers) == 2)
    assert caller.answers == {3: 503, 4: 503}
    assert b"queue_full" in caller.texts[3]
    caller.model.let(10)
    await caller.until(lambda: len(caller.answers) == 5)
    assert [caller.answers[number] for number in (0, 1, 2)] == [200, 200, 200]


async def test_who_waited_as_long_as_the_queue_allows_is_told_so_while_the_model_still_runs(serve):
    caller = serve(ServingSettings(queue_timeout=0.05))
    caller.send(0)
    await caller.running(0)
    caller.send(1)
    await caller.until(lambda: 1 in caller.answers)
    assert (caller.answers, caller.model.batches) == ({1: 504}, [[0]])
    caller.model.let(10)
    await caller.until(lambda: 0 in caller.answers)
    assert caller.answers[0] == 200


async def test_urgent_requests_overtake(serve):
    caller = serve(ServingSettings(max_batch_size=1, priority_levels=2))
    caller.send(0)
    await caller.running(0)
    caller.send(1, 2)
    caller.send(3, priority=1)
    caller.send(4, priority=2)
    await caller.waiting(4)
    caller.model.let(10)
    await caller.until(lambda: len(caller.answers) == 5)
    assert caller.model.batches == [[0], [3], [1], [2], [4]]


def test_the_client_writes_a_priority_where_the_queue_looks_for_it():
    inputs, info = {"x": np.ones((1, 1), np.float32)}, Gated().info
    said = [decode_request(*encode_request(inputs, binary=binary, priority=3), info).parameters for binary in (True, False)]
    assert [each["priority"] for each in said] == [3, 3]
    assert "priority" not in decode_request(*encode_request(inputs), info).parameters


async def test_settings_that_change_hold_from_the_next_batch_on(serve):
    caller = serve()
    caller.send(0)
    await caller.running(0)
    caller.send(1, 2, 3, 4)
    await caller.waiting(4)
    caller.server.configure(ServingSettings(max_batch_size=3))
    caller.model.let()
    await caller.running(1, 2, 3)
    caller.server.configure(ServingSettings(max_delay=60.0))
    caller.server.configure(ServingSettings(max_batch_size=2, max_delay=60.0))
    caller.model.let(10)
    await caller.until(lambda: len(caller.answers) == 4)
    caller.send(5)
    await caller.running(4, 5)


async def test_a_thread_that_holds_a_request_sleeps_and_then_runs_it(serve):
    caller = serve(ServingSettings(max_batch_size=8, max_delay=0.4))
    take, looks = caller.server._queue.take, []
    caller.server._queue.take = lambda *args, **options: looks.append(args) or take(*args, **options)
    caller.model.let(10)
    begun = time.monotonic()
    caller.send(1, 2)
    await caller.until(lambda: len(caller.answers) == 2)
    assert time.monotonic() - begun >= 0.4
    assert len(looks) < 10, "it polls"
    assert caller.model.batches == [[1, 2]]


async def test_a_server_that_ends_holds_nobody(serve):
    caller = serve(ServingSettings(max_delay=60.0))
    caller.model.let(10)
    caller.send(1)
    await caller.waiting(1)
    await asyncio.to_thread(caller.server.stop)
    await caller.until(lambda: caller.answers == {1: 200})
