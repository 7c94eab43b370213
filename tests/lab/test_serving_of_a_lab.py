"""What a lab says of serving a model, through all of its processes: from `lab.serve` to the worker's queue, without a reload."""

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from click.testing import CliRunner

from tether.cli import tether as command
from tether.errors import BadInputError, UnknownModelError
from tether.serving_settings import DEFAULTS, ServingSettings

PATIENCE = 60.0
SLOW = """\
import time
import numpy as np

class Model:
    inputs = [("x", "FP32", (-1, 1))]
    outputs = [("rows", "INT64", (-1,)), ("life", "INT64", (-1,))]
    pure = True

    def load(self, path):
        self.life = time.time_ns()

    def predict(self, x):
        time.sleep(0.05)
        return {"rows": np.full(len(x), len(x)), "life": np.full(len(x), self.life)}
"""


def eventually(observe, expected):
    """Workers are told of a change when it is durable, which is when the call returns; a moment later they have it."""
    end = time.monotonic() + PATIENCE
    while not expected(seen := observe()):
        assert time.monotonic() < end, seen


class Callers:
    """Who sends requests of one row, all at a time."""

    def __init__(self, lab):
        self.lab, self.pool, self.lives = lab, ThreadPoolExecutor(20), set()

    def ask(self, **parameters):
        """Status, size of the batch that it ran in (or the error's code), header Retry-After, and when."""
        body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}], "parameters": parameters}
        request = urllib.request.Request(f"{self.lab.gateway}/v2/models/slow/infer", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                rows, life = (output["data"][0] for output in json.load(answer)["outputs"])
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["code"], error.headers["Retry-After"], time.monotonic()
        self.lives.add(life)
        return 200, rows, None, time.monotonic()

    def burst(self, count=12, **parameters):
        return [future.result() for future in [self.pool.submit(self.ask, **parameters) for _ in range(count)]]

    def sizes(self):
        """Of the batches of a burst."""
        return {rows for _, rows, _, _ in self.burst()}

    def overtaken(self):
        """How many of a burst were answered after all of those that came later and are urgent."""
        first = self.pool.submit(self.ask)
        others = [self.pool.submit(self.ask) for _ in range(11)]
        first.result()
        urgent = [self.pool.submit(self.lab.infer, "slow", np.ones((1, 1), np.float32), priority=1), self.pool.submit(self.ask, priority=1)]
        done = [future.result() and time.monotonic() for future in urgent]
        return sum(future.result()[3] > max(done) for future in others)


@pytest.fixture(scope="module")
def slow(lab, tmp_path_factory):
    path = tmp_path_factory.mktemp("slow") / "model.py"
    path.write_text(SLOW)
    lab.publish("slow", path, serving={"max_batch_size": 2})
    callers = Callers(lab)
    lab.infer("slow", np.ones((1, 1), np.float32))
    eventually(lambda: [worker.models for worker in lab.workers.values()], lambda held: all("slow:1" in models for models in held))
    yield callers
    callers.pool.shutdown()


@pytest.fixture(autouse=True)
def nothing_said(lab, slow):
    yield
    lab.reset_serving("slow")
    assert len(slow.lives) <= 2, "a worker loaded it again"


def test_what_is_said_with_a_publish_holds_from_the_first_request_on(lab, slow):
    assert lab.models["slow"].serving == ServingSettings(max_batch_size=2)
    assert slow.sizes() <= {1, 2}


def test_limits_of_batches_change_while_it_serves(lab, slow):
    assert lab.serve("slow", max_batch_size=1) == ServingSettings(max_batch_size=1)
    eventually(slow.sizes, lambda sizes: sizes == {1})
    lab.serve("slow", max_batch_size=4, preferred_batch_sizes=[3], max_delay=0.5)
    eventually(slow.sizes, lambda sizes: 3 in sizes and max(sizes) == 3)
    lab.reset_serving("slow")
    assert lab.models["slow"].serving == DEFAULTS
    eventually(slow.sizes, lambda sizes: max(sizes) > 3)


def test_beyond_the_queue_requests_are_refused_and_told_to_come_again(lab, slow):
    lab.serve("slow", max_batch_size=1, max_queue_size=1)
    eventually(slow.burst, lambda seen: {each[:3] for each in seen} == {(200, 1, None), (503, "queue_full", "1")})


def test_who_waits_for_too_long_is_told(lab, slow):
    lab.serve("slow", max_batch_size=1, queue_timeout=0.1)
    eventually(slow.burst, lambda seen: {each[:3] for each in seen} == {(200, 1, None), (504, "deadline_exceeded", None)})


def test_urgent_requests_overtake_those_that_wait(lab, slow):
    lab.serve("slow", max_batch_size=1, priority_levels=2)
    eventually(slow.overtaken, lambda count: count >= 2)


def test_clients_of_the_protocol_see_what_was_said(lab):
    lab.serve("slow", max_batch_size=16, max_queue_size=7)
    with triton.InferenceServerClient(lab.gateway.removeprefix("http://")) as client:
        told = client.get_model_config("slow")
        assert client.get_model_config("slow", "1") == told
        assert "model_configuration" in client.get_server_metadata()["extensions"]
    assert (told["max_batch_size"], told["dynamic_batching"]["default_queue_policy"]["max_queue_size"]) == (16, 7)


def test_settings_that_do_not_exist_are_told_with_those_that_do(lab):
    with pytest.raises(BadInputError, match="there are max_batch_size"):
        lab.serve("slow", batch=3)
    with pytest.raises(BadInputError, match="max_delay"):
        lab.serve("slow", max_delay=float("nan"))
    with pytest.raises(UnknownModelError):
        lab.serve("nobody", max_batch_size=3)
    with pytest.raises(BadInputError, match="max_batch_size"):
        lab.publish("never", "nowhere", serving={"max_batch_size": 0})


def test_the_command_line_says_and_shows_them(lab):
    def run(*arguments):
        called = CliRunner().invoke(command, ["serving", "slow", *arguments, "--data", str(Path(lab.status().data))], prog_name="tether")
        assert called.exit_code == 0, called.output
        return called.stdout

    run("--max-batch-size", "8", "--preferred-batch-sizes", "4,8", "--pinned")
    assert lab.models["slow"].serving == ServingSettings(max_batch_size=8, preferred_batch_sizes=(4, 8), pinned=True)
    assert json.loads(run("--unset", "pinned", "--json"))["serving"] == {"max_batch_size": 8, "preferred_batch_sizes": [4, 8]}
    assert "preferred_batch_sizes  4, 8" in run()
    assert json.loads(run("--reset", "--max-queue-size", "9", "--json"))["serving"] == {"max_queue_size": 9}
