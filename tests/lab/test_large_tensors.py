"""Large tensors between labs: what is in the way passes them on, and does not grow with them."""

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tether
from tether.errors import DeadlineExceededError, PayloadTooLargeError
from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("pythonmonkey")]
MIB = 1 << 20
ROW = 64
"""Bytes of one row of input."""
SECONDS = 120.0


def write_wide(path, width):
    """y = the sum of a row, `width` times."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(np.ones((16, width), np.float32), "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Labs:
    """Hers, which runs the models, and his, from which she is called."""

    def __init__(self, hers, his, lab):
        self.hers, self.his, self.lab = hers, his, lab

    @property
    def managers(self):
        return [service.pid for lab in (self.hers, self.his) for service in lab.status().services if service.role == "manager"]


@pytest.fixture(scope="module")
def labs(on_the_net, tmp_path_factory):  # noqa: ARG001 (a fixture takes no mark)
    folder = tmp_path_factory.mktemp("large")
    with tether.up(workers=1, data=folder / "hers") as hers, tether.up(workers=1, data=folder / "his") as his:
        hers.publish("narrow", write_wide(folder / "narrow.onnx", 1))
        hers.publish("wide", write_wide(folder / "wide.onnx", 1024))
        with tether.connect(str(hers.invite(scope="infer")), data=folder / "his") as lab:
            assert [lab.infer(name, np.ones((1, 16), np.float32)).shape for name in ("narrow", "wide")] == [(1, 1), (1, 1024)]
            yield Labs(hers, his, lab)


def memory(pid, what):
    """VmRSS, or VmHWM: the most since it was forgotten."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) << 10
    raise AssertionError(what)


class Growth:
    """Of the managers of both labs."""

    def __init__(self, pids):
        self.before = {}
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
            self.before[pid] = memory(pid, "VmRSS")

    @property
    def nbytes(self):
        return max(memory(pid, "VmHWM") - before for pid, before in self.before.items())


def test_as_much_as_a_gateway_takes_goes_to_another_lab(labs, measured):
    rows, growth = np.ones((60 * MIB // ROW, 16), np.float32), Growth(labs.managers)
    answer = labs.lab.infer("narrow", rows, timeout=SECONDS)
    assert (answer.shape, np.unique(answer).tolist()) == ((len(rows), 1), [16.0])
    measured(f"60 MiB to a model of another lab: its manager and one's own grow by {growth.nbytes / MIB:.0f} MiB at most")
    assert growth.nbytes < 40 * MIB


def test_an_answer_of_hundreds_of_megabytes_comes_back(labs, measured):
    rows, growth = np.ones((70_000, 16), np.float32), Growth(labs.managers)
    answer = labs.lab.infer("wide", rows, timeout=SECONDS)
    assert (answer.shape, answer.min(), answer.max()) == ((70_000, 1024), 16.0, 16.0)
    measured(f"{answer.nbytes / MIB:.0f} MiB from a model of another lab: the managers grow by {growth.nbytes / MIB:.0f} MiB at most")
    assert growth.nbytes < 60 * MIB


def test_what_the_gateway_there_would_not_take_is_refused_before_it_is_sent(labs):
    with pytest.raises(PayloadTooLargeError, match="send fewer"):
        labs.lab.infer("narrow", np.ones((65 * MIB // ROW, 16), np.float32), timeout=SECONDS)


def test_small_calls_are_answered_while_large_ones_are_under_way(labs):
    large, small = np.ones((60 * MIB // ROW, 16), np.float32), np.ones((1, 16), np.float32)
    order = []
    thread = threading.Thread(target=lambda: order.append(len(labs.lab.infer("narrow", large, timeout=SECONDS))))
    thread.start()
    for _ in range(3):
        assert labs.lab.infer("wide", small, timeout=SECONDS).shape == (1, 1024)
        order.append(1)
    thread.join(SECONDS)
    assert order == [1, 1, 1, len(large)]


def test_a_deadline_in_the_middle_ends_it_and_the_next_call_is_answered(labs):
    with pytest.raises(DeadlineExceededError):
        labs.lab.infer("wide", np.ones((70_000, 16), np.float32), timeout=0.5)
    assert labs.lab.infer("narrow", np.ones((1, 16), np.float32), timeout=SECONDS)[0, 0] == 16.0
