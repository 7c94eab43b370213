"""A model's thread and its queue: batches that are too much for the model, and many requests that are taken back at once."""

import asyncio
import threading

import numpy as np
import pytest

from tether.errors import ModelFailedError
from tether.gateway.transport import UnixTransport
from tether.ports import Hop
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec
from tether.wire.oip import encode_request
from tether.worker.serving import ModelServer

PATIENCE = 60.0
BODY, HEADER_NBYTES = encode_request({"x": np.ones((1, 2), np.float32)})


class Small:
    """y = 2x, of at most so many rows; waits for `gate`. A run costs the same however many rows it has."""

    def __init__(self, most_rows=1 << 20):
        spec = TensorSpec("x", "FP32", (-1, 2))
        self.info = ModelInfo("custom", "custom", (spec,), (TensorSpec("y", "FP32", (-1, 2)),), batched=True, pure=True, code=True)
        self.most_rows, self.batches, self.gate, self.closed = most_rows, [], threading.Event(), threading.Event()

    def run(self, inputs):
        self.batches.append(len(inputs["x"]))
        self.gate.wait(PATIENCE)
        self.closed.wait(0.002)
        if len(inputs["x"]) > self.most_rows:
            raise ModelFailedError("out of memory")
        return {"y": 2 * inputs["x"]}

    def interrupt(self):
        self.close()

    def close(self):
        self.gate.set()
        self.closed.set()


@pytest.fixture
async def serve(tmp_path):
    """A model → its server, and a gateway's way to it."""
    made = []

    def begin(model):
        server = ModelServer(ModelVersion("m", 1, Digest("0" * 64)), model, tmp_path / "m.sock")
        server.start()
        made.append((server, UnixTransport(str(server.endpoint), None)))
        return made[-1]

    yield begin
    for server, transport in made:
        transport.close()
        server.loaded.close()
        server.stop()


async def test_a_batch_that_is_too_much_for_the_model_is_not_tried_again_and_again(serve):
    model = Small(most_rows=40)
    model.gate.set()
    _, transport = serve(model)
    left, statuses, over = 2000, [], asyncio.Event()

    def send():
        nonlocal left
        left -= 1
        transport.send(Hop(BODY, HEADER_NBYTES, PATIENCE), answered)

    def answered(reply):
        statuses.append(reply.status)
        if left:
            send()
        elif len(statuses) == 2000:
            over.set()

    for _ in range(200):
        send()
    async with asyncio.timeout(PATIENCE):
        await over.wait()
    assert set(statuses) == {200}
    assert 1 <= sum(rows > 40 for rows in model.batches) < 5
    assert sum(rows == 1 for rows in model.batches) < 500


async def test_requests_that_are_taken_back_together_cost_one_look_at_the_queue(serve):
    model = Small()
    server, transport = serve(model)
    drop, looks = server._queue.drop, []
    server._queue.drop = lambda unwanted: looks.append(unwanted) or drop(unwanted)
    hop = Hop(BODY, HEADER_NBYTES, PATIENCE)
    first = asyncio.get_running_loop().create_future()
    transport.send(hop, first.set_result)
    async with asyncio.timeout(PATIENCE):
        while not model.batches:  # noqa: ASYNC110 (the model's thread says nothing)
            await asyncio.sleep(0.005)
        others = [transport.send(hop, first.set_exception) for _ in range(100)]
        for abandon in others:
            abandon()
        model.gate.set()
        assert (await first).status == 200
        while transport.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert model.batches == [1]
    assert len(looks) == 1
