"""FAULTS.md row 21, once more: an encrypted model that can't be loaded is refused without a word of what is in it, in any place."""

import json
import urllib.request

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tether
from tether.config import DataFolder
from tether.errors import BadModelError
from tether.security.identity import Identity
from tether.store import Manifest, Repository, signed_message
from tether.store.sealing import Sealing
from tether.types import ModelInfo, TensorSpec

CANARY = "canary_9c41"
SPECS = (TensorSpec("x", "FP32", (-1, 64)),), (TensorSpec("y", "FP32", (-1, 10)),)
INFO = ModelInfo("onnx", "onnx", *SPECS, batched=True, pure=True, code=False)


def broken():
    """Two shapes that do not fit; ONNX Runtime names node and tensors in what it says of it."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", f"{CANARY}_weights"], ["y"], name=f"{CANARY}_node")],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(np.ones((5, 10), np.float32), f"{CANARY}_weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.fixture
def folder(tmp_path):
    """A data folder with such a model: the manager would have refused to publish it, as another version of the library might not have."""
    folder = DataFolder(tmp_path / "data").create()
    identity = Identity.load_or_create(folder.identity)
    with Repository.open(folder.store, own=identity.public, keys=folder.keys) as repository:
        intake = Sealing(repository, identity.public).intake("secret")
        arrays = (intake.add_bytes(f"{CANARY}.onnx", broken()),)
        data = intake.finished(Manifest(framework="onnx", entry=f"{CANARY}.onnx", info=INFO, arrays=arrays))
        repository.publish("secret", data, identity.public, identity.sign(signed_message(data)))
    return folder


def listed(lab):
    """What the lists say of the lab's models, as JSON."""
    request = urllib.request.Request(f"{lab.gateway}/v2/repository/index", data=b"{}", method="POST")
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode() + json.dumps(lab.operations.client and tether.lab.loop.run(lab.operations.client.status()))


def test_why_an_encrypted_model_can_not_be_loaded_is_said_by_its_code_in_answers_lists_and_logs(folder, tmp_path):
    with pytest.raises(onnx.shape_inference.InferenceError, match=CANARY):
        onnx.shape_inference.infer_shapes(onnx.load_from_string(broken()), strict_mode=True)

    with tether.up(workers=1, data=folder.root) as lab:
        with pytest.raises(BadModelError, match="only the kind of failure is said") as told:
            lab.infer("secret", np.ones((1, 64), np.float32))
        lists = listed(lab)

    assert "bad_model" in lists
    assert CANARY not in str(told.value) + lists
    logs = [path for path in folder.logs.rglob("*") if path.is_file()]
    assert any(b"load failed" in path.read_bytes() for path in logs)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()] == []
