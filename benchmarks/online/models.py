"""The four models of the online benchmark, made from a fixed seed: what they cost is the point, not what they say.

| name  | input                    | cost of one row                                                  |
|-------|--------------------------|------------------------------------------------------------------|
| tiny  | x FP32 (-1, 16)          | one small product: the price of everything around the model      |
| image | x FP32 (-1, 3, 224, 224) | six convolutions, about 8 ms of one core: the price of big bodies |
| batch | x FP32 (-1, 512)         | 21 MB of weights read for one row or for 32: the gain of batching |
| large | x FP32 (-1, 4194304)     | the first quarter: 16 MiB in, 4 MiB out, the price of moving them |
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPES = {"tiny": (16,), "image": (3, 224, 224), "batch": (512,), "large": (4 << 20,)}
OUTPUTS = {"tiny": 4, "image": 10, "batch": 10, "large": 1 << 20}
WORDS, TOKENS = 30_522, 128
"""Of BERT's vocabulary; in a sequence of the benchmark on a graphics card."""
_CHANNELS = ((3, 16, 2), (16, 32, 2), (32, 96, 1), (96, 96, 2), (96, 128, 1), (128, 128, 1))
"""Of each convolution: channels in, channels out, stride."""


class _Graph:
    """Collects nodes and weights; each layer reads the output of the one before."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last = "x"
        self._random = np.random.default_rng(seed)

    def weight(self, *shape: int, fan_in: int) -> str:
        name = f"w{len(self.weights)}"
        values = self._random.standard_normal(shape) * np.sqrt(2 / fan_in) if fan_in else np.zeros(shape)
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def add(self, operator: str, *weights: str, output: str | None = None, **attributes: object) -> None:
        name = output or f"h{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, [self.last, *weights], [name], **attributes))
        self.last = name

    def save(self, name: str, path: Path) -> None:
        tensors = [("x", ["batch", *SHAPES[name]]), ("y", ["batch", OUTPUTS[name]])]
        inputs, outputs = ([helper.make_tensor_value_info(each, TensorProto.FLOAT, shape)] for each, shape in tensors)
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def _tiny(graph: _Graph) -> None:
    graph.add("MatMul", graph.weight(16, 4, fan_in=16), output="y")


def _image(graph: _Graph) -> None:
    for inputs, outputs, stride in _CHANNELS:
        weights = graph.weight(outputs, inputs, 3, 3, fan_in=inputs * 9), graph.weight(outputs, fan_in=0)
        graph.add("Conv", *weights, kernel_shape=[3, 3], strides=[stride, stride], pads=[1, 1, 1, 1])
        graph.add("Relu")
    graph.add("GlobalAveragePool")
    graph.add("Flatten")
    graph.add("Gemm", graph.weight(128, 10, fan_in=128), graph.weight(10, fan_in=0), output="y")


def _batch(graph: _Graph) -> None:
    sizes = (512, 2048, 2048, 10)
    for inputs, outputs in pairwise(sizes):
        last = outputs == sizes[-1]
        weights = graph.weight(inputs, outputs, fan_in=inputs), graph.weight(outputs, fan_in=0)
        graph.add("Gemm", *weights, output="y" if last else None)
        if not last:
            graph.add("Relu")


def _large(graph: _Graph) -> None:
    """The columns before the 1,048,576th."""
    places = [numpy_helper.from_array(np.array([value], np.int64), f"at{value}") for value in (0, OUTPUTS["large"], 1)]
    graph.weights += places
    start, end, one = (place.name for place in places)
    graph.add("Slice", start, end, one, one, output="y")


def make(folder: Path) -> dict[str, Path]:
    """Name → ONNX file; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.onnx" for name in SHAPES}
    for seed, (name, build) in enumerate({"tiny": _tiny, "image": _image, "batch": _batch, "large": _large}.items()):
        if not paths[name].exists():
            graph = _Graph(seed)
            build(graph)
            graph.save(name, paths[name])
    return paths


def row(name: str) -> np.ndarray:
    """One input row; short decimals, so that JSON carries the same float32 values. Of `bert`: ids of words."""
    if name == "bert":
        return np.random.default_rng(99).integers(0, WORDS, (1, TOKENS))
    return np.random.default_rng(99).standard_normal((1, *SHAPES[name])).round(4).astype(np.float32)
