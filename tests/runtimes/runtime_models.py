"""Small models of every format, built for the tests: an echo, a row-wise layer, a large one."""

from pathlib import Path

import numpy as np

CUSTOM_ECHO = """
class Echo:
    inputs = {inputs!r}
    outputs = {outputs!r}
    pure = True

    def load(self, path):
        pass

    def predict(self, **inputs):
        return {{name.replace("x_", "y_"): value for name, value in inputs.items()}}
"""
CUSTOM_ROWS = """
import numpy as np
from pathlib import Path

class Rows:
    inputs = [("x", np.float32, (None, 4))]
    outputs = [{"name": "y", "datatype": "FP32", "shape": (-1, 2)}]
    pure = True

    def load(self, path):
        large = Path(path) / "large.npy"
        self.large = np.load(large) if large.exists() else None
        self.weights = np.arange(8, dtype=np.float32).reshape(4, 2)

    def predict(self, x):
        return x @ self.weights
"""


def onnx_echo(folder, datatypes):
    import onnx
    from onnx import helper

    def value(prefix, datatype):
        element = {"BYTES": onnx.TensorProto.STRING, "BF16": onnx.TensorProto.BFLOAT16}.get(datatype)
        from tether.types import dtype_of

        element = element or helper.np_dtype_to_tensor_dtype(dtype_of(datatype))
        return helper.make_tensor_value_info(f"{prefix}_{datatype.lower()}", element, ("n", 3))

    nodes = [helper.make_node("Identity", [f"x_{datatype.lower()}"], [f"y_{datatype.lower()}"]) for datatype in datatypes]
    graph = helper.make_graph(nodes, "echo", [value("x", each) for each in datatypes], [value("y", each) for each in datatypes])
    return _save_onnx(folder, graph)


def onnx_rows(folder, nbytes=0, *, external=False):
    from onnx import helper, numpy_helper

    width = max(nbytes // 24, 1)  # (4, width) and (width, 2) floats
    first, second = (np.linspace(-1, 1, size, dtype=np.float32) for size in (4 * width, width * 2))
    weights = [numpy_helper.from_array(first.reshape(4, width), "a"), numpy_helper.from_array(second.reshape(width, 2), "b")]
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    graph = helper.make_graph(nodes, "rows", [_floats("x", 4)], [_floats("y", 2)], weights)
    return _save_onnx(folder, graph, external=external)


def _floats(name, width):
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", width))


def _save_onnx(folder, graph, *, external=False):
    import onnx
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path = Path(folder) / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=external, location="weights.bin" if external else None, size_threshold=0)
    return path


def torch_echo(datatypes):
    """Module and example; written out, since TorchScript knows no **kwargs."""
    import torch

    names = [datatype.lower() for datatype in datatypes]
    arguments = ", ".join(f"x_{name}: torch.Tensor" for name in names)
    answers = ", ".join(f'"y_{name}": x_{name}.clone()' for name in names)
    from tether.testing.runtimes import sample

    scope = {"torch": torch}
    exec(f"def forward(self, {arguments}):\n    return {{{answers}}}", scope)  # noqa: S102
    module = type("Echo", (torch.nn.Module,), {"forward": scope["forward"]})()
    numbers = [sample("FP32" if datatype == "BF16" else datatype, 2) for datatype in datatypes]  # torch takes no bfloat16 from numpy
    example = [torch.from_numpy(array) for array in numbers]
    return module.eval(), tuple(tensor.bfloat16() if kind == "BF16" else tensor for kind, tensor in zip(datatypes, example, strict=True))


def torch_rows(nbytes=0):
    import torch

    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            width = max(nbytes // 24, 1)
            self.a = torch.nn.Parameter(torch.linspace(-1, 1, 4 * width).reshape(4, width))
            self.b = torch.nn.Parameter(torch.linspace(-1, 1, 2 * width).reshape(width, 2))

        def forward(self, x: torch.Tensor):
            return {"y": x @ self.a @ self.b}

    return Rows().eval(), (torch.ones(2, 4),)


def save_pt2(folder, module, example):
    import torch

    dynamic = tuple({0: torch.export.Dim("n")} for _ in example)
    path = Path(folder) / "model.pt2"
    torch.export.save(torch.export.export(module, example, dynamic_shapes=dynamic), path)
    return path


def save_torchscript(folder, module, example):
    import torch

    path = Path(folder) / "model.pt"
    traced = torch.jit.trace(module, example, strict=False)
    traced.save(str(path))
    return path


def saved_model(folder, function, specs, variables=()):
    import tensorflow as tf

    module = tf.Module()
    module.variables_of_the_test = list(variables)
    module.serve = tf.function(function, input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return Path(folder)


def tf_dtype(datatype):
    import tensorflow as tf

    from tether.types import dtype_of

    return tf.string if datatype == "BYTES" else tf.as_dtype(dtype_of(datatype))


def savedmodel_echo(folder, datatypes):
    import tensorflow as tf

    names = [datatype.lower() for datatype in datatypes]
    specs = [tf.TensorSpec((None, 3), tf_dtype(datatype), name=f"x_{datatype.lower()}") for datatype in datatypes]
    scope = {"tf": tf}
    answers = ", ".join(f'"y_{name}": tf.identity(x_{name})' for name in names)
    exec(f"def serve({', '.join(f'x_{name}' for name in names)}):\n    return {{{answers}}}", scope)  # noqa: S102
    return saved_model(folder, scope["serve"], specs)


def savedmodel_rows(folder, nbytes=0):
    import tensorflow as tf

    width = max(nbytes // 24, 1)
    a = tf.Variable(tf.reshape(tf.linspace(-1.0, 1.0, 4 * width), (4, width)))
    b = tf.Variable(tf.reshape(tf.linspace(-1.0, 1.0, 2 * width), (width, 2)))
    return saved_model(folder, lambda x: {"y": x @ a @ b}, [tf.TensorSpec((None, 4), tf.float32, name="x")], (a, b))


def keras_echo(folder, datatypes):
    import keras

    inputs, outputs = {}, {}
    for datatype in datatypes:
        kind = tf_dtype(datatype).name
        name = datatype.lower()
        inputs[f"x_{name}"] = keras.Input((3,), dtype=kind, name=f"x_{name}")
        outputs[f"y_{name}"] = keras.layers.Identity(dtype=kind)(inputs[f"x_{name}"])
    path = Path(folder) / "model.keras"
    keras.Model(inputs, outputs).save(path)
    return path


def keras_rows(folder, nbytes=0):
    import keras

    x = keras.Input((4,), name="x")
    hidden = keras.layers.Dense(max(nbytes // 28, 1))(x)
    path = Path(folder) / "model.keras"
    keras.Model(x, keras.layers.Dense(2, name="y")(hidden)).save(path)
    return path


def custom_echo(folder, datatypes):
    inputs, outputs = ([(f"{prefix}_{datatype.lower()}", datatype, (-1, 3)) for datatype in datatypes] for prefix in "xy")
    (Path(folder) / "model.py").write_text(CUSTOM_ECHO.format(inputs=inputs, outputs=outputs))
    return Path(folder)


def custom_rows(folder, nbytes=0):
    (Path(folder) / "model.py").write_text(CUSTOM_ROWS)
    if nbytes:
        np.save(Path(folder) / "large.npy", np.ones(nbytes // 8))
    return Path(folder)
