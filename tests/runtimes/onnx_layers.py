"""ONNX models of as many MiB as a test wants: layers of 1 MiB, alone or beside a loop that takes as many turns as it is told."""

from __future__ import annotations

import numpy as np


def layers(path, count, *, external=None, seed=0):
    """`x` (n, 512) → `y` (n, 512) through `count` layers, all different."""
    from onnx import helper, numpy_helper

    base = np.random.default_rng(seed).standard_normal((512, 512), dtype=np.float32) / 22
    weights = [numpy_helper.from_array(np.roll(base, index), f"w{index}") for index in range(count)]
    nodes, value = [], "x"
    for index in range(count):
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [f"h{index}"]))
        value = "y" if index == count - 1 else f"r{index}"
        nodes.append(helper.make_node("Tanh", [f"h{index}"], [value]))
    graph = helper.make_graph(nodes, "layers", [_floats("x", 512)], [_floats("y", 512)], weights)
    return _save(path, graph, external)


def with_endless_loop(path):
    """`x` (n, 4) and `trips` → `y` (n, 4), after that many turns of a loop; 4 MiB of weights, for `z`."""
    from onnx import TensorProto, helper, numpy_helper

    scalar = lambda name, kind: helper.make_tensor_value_info(name, kind, [])  # noqa: E731
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])],
        "body",
        [scalar("i", TensorProto.INT64), scalar("c", TensorProto.BOOL), helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [scalar("c2", TensorProto.BOOL), helper.make_tensor_value_info("v2", TensorProto.FLOAT, None)],
    )
    held = [
        numpy_helper.from_array(np.ones((4, 1 << 18), np.float32), "w"),
        helper.make_tensor("go", TensorProto.BOOL, [], [True]),
    ]
    nodes = [helper.make_node("Loop", ["trips", "go", "x"], ["y"], body=body), helper.make_node("MatMul", ["x", "w"], ["z"])]
    ends = [_floats("y", 4), _floats("z", 1 << 18)]
    return _save(path, helper.make_graph(nodes, "loop", [_floats("x", 4), scalar("trips", TensorProto.INT64)], ends, held), None)


def _floats(name, width):
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", width))


def _save(path, graph, external):
    import onnx
    from onnx import helper

    path.parent.mkdir(exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, str(path), save_as_external_data=external is not None, location=external, size_threshold=0)
    return path
