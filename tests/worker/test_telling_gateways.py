"""What a model tells its gateways besides answers: how long a request takes it, and its last word before it goes."""

import asyncio
import socket
import threading
import time

import numpy as np
import pytest

from tether.gateway.transport import UnixTransport
from tether.ports import Hop
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec
from tether.wire.frames import FrameReader, FrameWriter
from tether.wire.oip import encode_request
from tether.worker.serving import ModelServer

PATIENCE = 60.0
BODY, HEADER_NBYTES = encode_request({"x": np.ones((1, 2), np.float32)})


class Sleeper:
    """Answers with `columns` numbers; each run takes so many seconds."""

    def __init__(self, seconds=0.0, columns=2):
        outputs = (TensorSpec("y", "FP32", (-1, columns)),)
        self.info = ModelInfo("custom", "custom", (TensorSpec("x", "FP32", (-1, 2)),), outputs, batched=True, pure=True, code=True)
        self.seconds, self.columns, self.gate = seconds, columns, threading.Event()
        self.gate.set()

    def run(self, inputs):
        threading.Event().wait(self.seconds)
        self.gate.wait(PATIENCE)
        return {"y": np.zeros((len(inputs["x"]), self.columns), np.float32)}

    def interrupt(self):
        self.gate.set()

    def close(self):
        self.gate.set()


@pytest.fixture
def serve(tmp_path):
    made = []

    def begin(model):
        made.append(ModelServer(ModelVersion("m", 1, Digest("0" * 64)), model, tmp_path / f"{len(made)}.sock"))
        made[-1].start()
        return made[-1]

    yield begin
    for server in made:
        server.loaded.close()
        server.stop()


async def asked(transport, count):
    """So many at a time, until all are answered."""
    answers = [asyncio.get_running_loop().create_future() for _ in range(count)]
    for answer in answers:
        transport.send(Hop(BODY, HEADER_NBYTES, PATIENCE), answer.set_result)
    return await asyncio.gather(*answers)


async def test_a_few_requests_are_felt_where_they_take_long_or_their_worker_stands_still_and_not_where_they_take_microseconds(serve):
    for seconds, is_felt in ((0.0, False), (0.02, True)):
        model = Sleeper(seconds)
        transport = UnixTransport(str(serve(model).endpoint), None)
        waiting = [transport.send(Hop(BODY, HEADER_NBYTES, PATIENCE), lambda _reply: None) for _ in range(2)]
        assert transport.load == len(waiting)  # nothing is known yet
        for _ in range(40):  # the first ones pay for what is made once
            await asked(transport, 1)
        assert transport._pace_us >= 1e6 * seconds
        if not is_felt:  # the machine may be slow
            transport._pace_us = 300
        model.gate.clear()
        transport._heard = asyncio.get_running_loop().time() + PATIENCE
        waiting = [transport.send(Hop(BODY, HEADER_NBYTES, PATIENCE), lambda _reply: None) for _ in range(3)]
        assert transport.load == (3 if is_felt else 0)
        transport._heard -= 2 * PATIENCE  # it stands still
        assert transport.load == transport.in_flight == 3
        model.gate.set()
        transport.close()


def test_a_model_that_goes_waits_until_its_answers_are_read(serve):
    server, reader, writer = serve(Sleeper(columns=4096)), FrameReader(), FrameWriter()
    for number in range(8):
        writer.request(number + 1, BODY, HEADER_NBYTES, 60_000)
    with socket.socket(socket.AF_UNIX) as gateway:
        gateway.connect(str(server.endpoint))
        gateway.sendall(b"-" + b"".join(writer.take()))
        deadline = time.monotonic() + PATIENCE
        while server.stats.requests < 8 and time.monotonic() < deadline:
            threading.Event().wait(0.005)
        ending = threading.Thread(target=server.stop)
        ending.start()
        ending.join(0.1)  # it is about to end, and asked for more
        writer.request(9, BODY, HEADER_NBYTES, 60_000)
        gateway.sendall(b"".join(writer.take()))
        answered = set()
        while got := gateway.recv_into(reader.space()):
            answered |= {head.id for head, _ in reader.received(got)}
            reader.release()
        ending.join(PATIENCE)
    assert answered >= set(range(1, 9))
