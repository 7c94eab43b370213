"""A real lab for the tests of this folder: scheduler, two workers, manager, gateway, each in its own process."""

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tether
from tether.testing.testnet import testnet

WEIGHTS = np.arange(64, dtype=np.float32).reshape(16, 4)


def write_model(path, scale=1.0):
    """y = x @ (scale * WEIGHTS), 16 → 4."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.float32(scale) * WEIGHTS, "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def until(condition, patience=90.0):
    """What it gives, once it gives something."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="session")
def net():
    """A DHT of this machine, on which the labs of all tests meet that need one."""
    with testnet() as net:
        yield net


@pytest.fixture(scope="module")
def on_the_net(net):
    """Labs that are started meanwhile are on it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TETHER_BOOTSTRAP", net.bootstrap)
        yield net


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The lab that tests share: they publish under names of their own and leave its processes alone."""
    with tether.up(workers=2, data=tmp_path_factory.mktemp("lab"), swarm=False) as started:
        yield started


@pytest.fixture
def own_lab(tmp_path):
    """A lab for a test that breaks it."""
    with tether.up(workers=2, data=tmp_path / "data", swarm=False) as started:
        yield started
