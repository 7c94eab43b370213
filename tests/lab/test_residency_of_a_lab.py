"""Many more models than fit: a whole lab, each of whose workers may keep a few in memory, answers for all of them."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import psutil
import pytest
from conftest import until
from onnx import TensorProto, helper, numpy_helper

import tether

SIDE = 1536
NBYTES = 4 * SIDE * SIDE
"""Of a model's weights."""
BUDGET = 64 << 20
"""A worker's: a model that runs code, in a process of its own, and one or two of these."""
SLACK = 128 << 20
"""What is not of models: connections, batches, a model that comes while another goes, and the process that each worker keeps warm."""
COUNTING = """\
class Model:
    inputs = [("x", "FP32", (-1, 2))]
    outputs = [("y", "FP32", (-1, 2))]
    pure = False

    def load(self, path):
        self.calls = 0

    def predict(self, x):
        self.calls += 1
        return {"y": 2 * x}
"""


def write_large(path):
    """y: twice the mean of x, in each place; with much weight."""
    weights = np.full((SIDE, SIDE), 2 / SIDE, np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", SIDE])],
        [numpy_helper.from_array(weights, "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def narrow_lab(tmp_path, monkeypatch):
    """Its workers have little room for models."""
    monkeypatch.setenv("DASK_TETHER__WORKER__MEMORY", str(BUDGET))
    with tether.up(workers=2, data=tmp_path / "data", swarm=False) as lab:
        yield lab


class Watch:
    """The most that workers and their processes took meanwhile, above what they took before without their models."""

    def __init__(self, lab):
        self._over = threading.Event()
        workers = list(lab.workers.values())
        self._pids = [worker.pid for worker in workers]
        self._before, self.most = self._look() - sum(worker.memory.used for worker in workers), 0
        self._thread = threading.Thread(target=self._run)

    def _look(self):
        total = 0
        for pid in self._pids:
            for process in (worker := psutil.Process(pid), *worker.children()):
                try:
                    total += process.memory_full_info().pss
                except psutil.NoSuchProcess:
                    continue
        return total

    def _run(self):
        while not self._over.wait(0.25):
            self.most = max(self.most, self._look() - self._before)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def test_a_lab_answers_for_many_more_models_than_its_workers_can_hold(narrow_lab, tmp_path, measured):
    lab, file = narrow_lab, write_large(tmp_path / "large.onnx")
    (tmp_path / "model.py").write_text(COUNTING)
    names = [*(f"large-{number}" for number in range(16)), "counting-1", "counting-2"]
    with ThreadPoolExecutor(4) as publishers:
        list(publishers.map(lambda name: lab.publish(name, tmp_path / "model.py" if name.startswith("counting") else file), names))

    def ask(number):
        chosen = random.Random(f"ask {number}")
        name = names[number] if number < len(names) else chosen.choice(names[-4:] if chosen.random() < 0.5 else names)
        x = np.full((1, 2 if name.startswith("counting") else SIDE), number, np.float32)
        np.testing.assert_allclose(lab.infer(name, x), 2 * x, rtol=1e-4)

    for number in (0, len(names) - 1):  # so that libraries are there
        ask(number)
    with Watch(lab) as watch, ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, range(100)))
    # what was under way comes to its end, and what turned out larger than its files goes
    until(lambda: all(worker.memory.used <= worker.memory.budget == BUDGET for worker in lab.workers.values()))
    workers = list(lab.workers.values())
    states = {model.name: version.state for model in lab.status().models for version in model.versions}
    assert set(states.values()) <= {"ready", "unloaded", "loading"}, "what was put out is no failure"
    assert any(worker.memory.used for worker in workers)
    assert 0 < list(states.values()).count("ready") <= sum(len(worker.models) for worker in workers) <= 2 * (BUDGET // NBYTES)
    measured(f"residency of a lab: at most {watch.most / 1e6:.0f} MB for models, of {2 * BUDGET / 1e6:.0f}")
    assert watch.most < 2 * BUDGET + SLACK
