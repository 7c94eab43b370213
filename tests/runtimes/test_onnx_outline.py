"""An ONNX model's outline runs as the model does, with its weights mapped from the file that they lie in."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tether.errors import BadModelError
from tether.runtimes.onnx_outline import outline

WIDTH = 160
"""Of float32: 100 KiB a weight."""


def model_of(weights):
    names = list(weights)
    nodes = [helper.make_node("MatMul", [f"x{i}", name], [f"x{i + 1}"]) for i, name in enumerate(names)]
    ends = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["n", WIDTH]) for i in (0, len(names))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(array, name) for name, array in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def weights(count, width=WIDTH):
    chance = np.random.default_rng(count)
    return {f"w{index}": chance.standard_normal((WIDTH, width), np.float32) / 10 for index in range(count)}


def answer(model, folder):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x0": np.eye(3, WIDTH, dtype=np.float32)})[0]


def test_the_outline_holds_no_weight_and_answers_as_the_model(tmp_path):
    path = tmp_path / "a model.onnx"
    onnx.save(model_of(weights(4)), path)
    found = outline(path)
    assert len(found) < 4096
    np.testing.assert_array_equal(answer(found, tmp_path), answer(path.read_bytes(), tmp_path))


def test_its_weights_are_the_same_ones_by_onnx_own_reading(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(model_of(weights(2)), path)
    parsed = onnx.load_model_from_string(outline(path))
    onnx.load_external_data_for_model(parsed, str(tmp_path))
    for name, array in weights(2).items():
        found = next(numpy_helper.to_array(tensor) for tensor in parsed.graph.initializer if tensor.name == name)
        np.testing.assert_array_equal(found, array)


def test_small_weights_stay_and_a_model_of_small_ones_has_no_outline(tmp_path):
    small = {"w0": weights(1)["w0"][:, :WIDTH]}
    path = tmp_path / "model.onnx"
    model = model_of(weights(1) | {"w1": small["w0"]})
    tiny = numpy_helper.from_array(np.arange(9, dtype=np.float32), "tiny")
    model.graph.initializer.append(tiny)
    onnx.save(model, path)
    parsed = onnx.load_model_from_string(outline(path))
    assert [tensor.data_location for tensor in parsed.graph.initializer] == [
        TensorProto.EXTERNAL,
        TensorProto.EXTERNAL,
        TensorProto.DEFAULT,
    ]
    del model.graph.initializer[:2]
    onnx.save(model, path)
    assert outline(path) is None


def test_weights_that_are_typed_or_lie_elsewhere_already_are_left_as_they_are(tmp_path):
    array = weights(1)["w0"]
    typed = helper.make_tensor("w0", TensorProto.FLOAT, array.shape, array.ravel().tolist())
    model = model_of({"w0": array})
    model.graph.initializer[0].CopyFrom(typed)
    path = tmp_path / "typed.onnx"
    onnx.save(model, path)
    assert outline(path) is None
    path = tmp_path / "external.onnx"
    onnx.save(model_of(weights(2)), path, save_as_external_data=True, location="external.bin")
    assert outline(path) is None


def test_what_is_no_protobuf_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(BadModelError):
        outline(path)
