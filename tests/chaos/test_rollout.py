"""Rows 6 and 32: workers are started again one by one and versions replaced under load; bad versions go back by themselves."""

import os
import random
import signal
import threading
import time

import numpy as np
import onnx
import pytest
from chaos_lab import PROMPT, Client, Load, together, until, write_echo
from onnx import TensorProto, helper

pytestmark = pytest.mark.chaos
MODEL = "rolled"
DETECTION, BY_HAND, FAREWELL = 5.0, 1.0, 1.0
"""Seconds: from a bad version's first request to its end; until somebody's word is done; of a drain beyond its longest request. Asserted at
full scale only, on a machine that has time for it."""
DEEDS = {
    "raises": "raise ValueError('it is bad')",
    "dies": "os._exit(3)",
    "slow": "time.sleep(0.3)",
}
CODE = """
import os, time

class Model:
    inputs = outputs = [("x", "FP64", (-1,))]
    pure = True

    def predict(self, x):
        {deed}
        return {{"x": x}}
"""


def write_times(path, factor):
    """y = x * factor."""
    values = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["batch"]) for name in "xy"]
    held = helper.make_tensor("factor", TensorProto.DOUBLE, [1], [factor])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "factor"], ["y"])], "times", values[:1], values[1:], [held])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_bad(folder, kind):
    if kind == "nan":
        return write_times(folder / "nan.onnx", np.nan)
    path = folder / f"{kind}.py"
    path.write_text(CODE.format(deed=DEEDS[kind]))
    return path


@pytest.fixture(scope="module")
def rolled(lab, tmp_path_factory):
    """A good version under the alias `prod`, and the bad ones beside it: kind → its number."""
    folder = tmp_path_factory.mktemp("rolled")
    good = lab.publish(MODEL, write_echo(folder / "good.onnx"), alias="prod").version
    lab.infer(MODEL, np.zeros(1))
    until(lambda: sum(f"{MODEL}:{good}" in worker.models for worker in lab.workers.values()) == 2)
    numbers = {kind: lab.publish(MODEL, write_bad(folder, kind)).version for kind in ("nan", *DEEDS)}
    other = lab.publish(MODEL, write_times(folder / "other.onnx", 1.0)).version
    yield numbers | {"good": good, "other": other}
    for number in numbers.values():
        lab.delete(MODEL, number)


@pytest.mark.timeout(3600)
def test_row_32_a_bad_version_goes_back_by_itself_and_nobody_sees_it(lab, rolled, chaos, measured):
    chance, begun, times, total = random.Random(f"row 32, {chaos.seed}"), time.monotonic(), [], chaos.count(100, 3)
    kinds = ["nan", "raises", "slow", "dies"]
    with Load(lab, MODEL, clients=8) as load:
        for turn in range(total):
            kind = kinds[turn] if turn < len(kinds) else chance.choice(kinds)
            lab.rollout(MODEL, rolled[kind], steps=(0.3, 1.0), every=60.0)
            until(lambda: lab.rollout(MODEL).state != "loading")
            first = time.monotonic()
            ended = until(lambda: None if (now := lab.rollout(MODEL)).goes_on else now)
            times.append((time.monotonic() - first, kind))
            assert (ended.state, lab.models[MODEL].aliases["prod"]) == ("reverted", rolled["good"]), (kind, ended)
        by_hand = [_stopped_by_hand(lab, rolled) for _ in range(chaos.count(50, 1))]
    longest = max(times)
    counts = f"{total} bad versions back after {longest[0]:.1f} s at most ({longest[1]}), "
    counts += f"{len(by_hand)} by hand after {max(by_hand):.2f} s at most, {load.answered} requests, {len(load.flaws)} failed"
    measured(f"row 32: {counts}")
    chaos.record(32, counts, time.monotonic() - begun)
    assert (load.flaws, load.late) == ([], 0)
    assert longest[0] < (DETECTION if chaos.scale >= 1 else PROMPT)
    assert max(by_hand) < (BY_HAND if chaos.scale >= 1 else PROMPT)


def _stopped_by_hand(lab, rolled):
    """Seconds."""
    lab.rollout(MODEL, rolled["nan"], steps=(0.01,), every=600.0, allow_nan=True)
    asked = time.monotonic()
    assert lab.abort_rollout(MODEL).state == "aborted"
    return time.monotonic() - asked


@pytest.mark.timeout(3600)
def test_row_06_workers_and_versions_are_replaced_and_no_request_fails(lab, rolled, chaos, measured):
    begun, wanted, rounds = time.monotonic(), chaos.count(10_000, 200), 0
    drains = [_drained(lab) for _ in range(chaos.count(20, 1))]
    with Load(lab, MODEL, clients=2) as load:
        while not rounds or load.answered < wanted:
            rounds += 1
            lab.rollout(MODEL, rolled["other" if lab.models[MODEL].default == rolled["good"] else "good"], steps=(0.5, 1.0), every=0.5)
            lab.restart(*(() if chaos.scale >= 1 else ("worker-1",)))
            _ended(lab, "worker-2")
            until(lambda: lab.rollout(MODEL).state == "promoted")
    counts = f"{rounds} times all workers started again, {load.answered} requests, {len(load.flaws)} failed, "
    counts += f"{len(drains)} drains, {max(drains):.2f} s longer than the longest request at most"
    measured(f"row 6: {counts}")
    chaos.record(6, counts, time.monotonic() - begun)
    assert (load.flaws, load.late) == ([], 0)
    assert max(drains) < (FAREWELL if chaos.scale >= 1 else PROMPT)


def _ended(lab, worker):
    """Its process is told to end, as the lab's own supervisor or Kubernetes would, and another one is back with its models."""
    before = lab.workers[worker]
    os.kill(before.pid, signal.SIGTERM)
    until(lambda: (now := lab.workers[worker]).state == "running" and now.pid != before.pid and len(now.models) >= len(before.models))


def _drained(lab):
    """Seconds that a drain took longer than the longest request that was under way: both workers have some."""
    asked = [(Client(lab), "patient", 1.0) for _ in range(2)]
    asking = threading.Thread(target=together, args=(asked,))
    begun = time.monotonic()
    asking.start()
    time.sleep(0.2)
    done = lab.drain("worker-1")
    drained = time.monotonic() - begun
    asking.join()
    lab.undrain("worker-1")
    until(lambda: lab.workers["worker-1"].state == "running" and len(lab.workers["worker-1"].models) >= 4)
    assert done.state == "drained"
    return drained - 1.0
