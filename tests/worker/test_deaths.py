"""A model's process dies on some inputs: who is told what, and how many processes it costs."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest

from tether.errors import LoadFailedError, ModelDiedError, ModelFailedError
from tether.gateway.transport import UnixTransport
from tether.ports import Hop
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec
from tether.wire.oip import encode_request
from tether.worker.serving import ModelServer

PATIENCE = 60.0
SPINS = 1000


class Fragile:
    """y = 2x. Its process dies of a negative number; waits for `gate`."""

    def __init__(self, *, pure=True, by_itself=True, batched=True):
        spec = TensorSpec("x", "FP32", (-1, 2))
        self.info = ModelInfo("custom", "custom", (spec,), (TensorSpec("y", "FP32", (-1, 2)),), batched=batched, pure=pure, code=True)
        self.by_itself, self.batches, self.deaths, self.moves = by_itself, [], 0, []
        self.gate, self.freed = threading.Event(), threading.Event()

    def run(self, inputs):
        self.batches.append(inputs["x"][:, 0].tolist())
        self.gate.wait(PATIENCE)
        if (inputs["x"] == SPINS).any():
            self.freed.wait(PATIENCE)
            raise ModelFailedError("interrupted")
        if (inputs["x"] < 0).any():
            self.deaths += 1
            raise ModelDiedError("the model's process died", self.by_itself)
        return {"y": 2 * inputs["x"]}

    def isolate(self):
        self.moves.append(len(self.batches))

    def interrupt(self):
        self.gate.set()
        self.freed.set()

    def close(self):
        self.interrupt()


class Immovable(Fragile):
    """There is no room for a second copy."""

    def isolate(self):
        raise LoadFailedError("no memory for another process")


@pytest.fixture
async def serve(tmp_path):
    """A model → what sends it numbers."""
    made = []

    def begin(model):
        server = ModelServer(ModelVersion("m", 1, Digest("0" * 64)), model, tmp_path / "m.sock")
        server.start()
        transport = UnixTransport(str(server.endpoint), None)
        made.append((server, transport))

        def ask(value, *, alone=False, timeout=PATIENCE):
            future = asyncio.get_running_loop().create_future()
            body, header_nbytes = encode_request({"x": np.full((1, 2), value, np.float32)})
            transport.send(Hop(body, header_nbytes, timeout, alone), future.set_result)
            return future

        ask.server = server
        return ask

    yield begin
    for server, transport in made:
        transport.close()
        server.loaded.close()
        server.stop()


async def together(model, asked):
    """Their codes, "" for an answer; they are in the queue before the first one ends."""
    async with asyncio.timeout(PATIENCE):
        while not model.batches:  # noqa: ASYNC110 (the model's thread says nothing)
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        model.gate.set()
        replies = await asyncio.gather(*asked)
    return [json.loads(reply.body[: reply.header_nbytes or None]).get("code", "") for reply in replies]


async def test_of_a_batch_that_ends_the_process_one_is_found_out_at_the_second_death_and_the_others_are_answered(serve):
    model = Fragile()
    ask = serve(model)
    first = ask(0)
    codes = await together(model, [first, *(ask(value) for value in (1, 2, -3, 4))])
    assert codes == ["", "", "", "poison_input", ""]
    assert model.deaths == 2


async def test_an_input_that_ends_the_process_alone_has_one_more_try(serve):
    model = Fragile()
    model.gate.set()
    ask = serve(model)
    assert await together(model, [ask(-1)]) == ["poison_input"]
    assert model.deaths == 2


async def test_a_model_that_is_not_pure_runs_it_once(serve):
    model = Fragile(pure=False)
    ask = serve(model)
    assert await together(model, [ask(1), ask(-1), ask(2)]) == ["", "model_died", ""]
    assert model.deaths == 1


async def test_a_process_that_was_ended_from_outside_twice_is_held_against_nobody(serve):
    model = Fragile(by_itself=False)
    model.gate.set()
    ask = serve(model)
    assert await together(model, [ask(-1)]) == ["model_died"]


async def test_a_suspect_runs_alone_after_the_model_moved_and_one_death_tells(serve):
    model = Fragile()
    ask = serve(model)
    codes = await together(model, [ask(0), ask(1), ask(2), ask(-3, alone=True), ask(4), ask(5, alone=True)])
    assert codes == ["", "", "", "poison_input", "", ""]
    assert [-3.0] in model.batches
    assert [5.0] in model.batches
    assert model.deaths == 1
    assert model.moves[0] == model.batches.index([-3.0])


async def test_a_model_that_can_not_move_refuses_suspects_and_serves_on(serve):
    model = Immovable()
    model.gate.set()
    ask = serve(model)
    assert await together(model, [ask(1), ask(-2, alone=True), ask(3)]) == ["", "load_failed", ""]
    assert model.deaths == 0
    ask.server.isolate()
    assert await together(model, [ask(4)]) == [""]


async def test_a_model_that_is_told_to_moves_between_two_batches(serve):
    model = Fragile()
    model.gate.set()
    ask = serve(model)
    assert await together(model, [ask(1)]) == [""]
    ask.server.isolate()
    async with asyncio.timeout(PATIENCE):
        while not model.moves:  # noqa: ASYNC110 (the model's thread says nothing)
            await asyncio.sleep(0.005)
    assert await together(model, [ask(2)]) == [""]
    assert model.moves == [1]


async def test_who_spins_does_not_hold_up_those_who_are_in_its_batch_beyond_its_own_deadline(serve):
    model = Fragile()
    ask = serve(model)
    asked = [ask(1), ask(2), ask(SPINS, timeout=0.5), ask(3)]
    answers = asyncio.ensure_future(together(model, asked))
    async with asyncio.timeout(PATIENCE):
        while not any(SPINS in batch for batch in model.batches):  # noqa: ASYNC110 (the model's thread says nothing)
            await asyncio.sleep(0.01)
    begun = time.monotonic()
    await asyncio.sleep(0.5)  # it is late
    ask.server.end_unwanted_run(begun + 0.9)
    assert not model.freed.is_set()  # late, but not stuck: it may be slow
    ask.server.end_unwanted_run(begun + 1.5)
    assert await answers == ["", "", "deadline_exceeded", ""]
    assert any(SPINS in batch and len(batch) > 1 for batch in model.batches)
