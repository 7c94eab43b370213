"""Weights to measure with: 1 GiB in 256 tensors, 5,000 small tensors, and fine-tunes of a model in three formats."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

MIB = 1 << 20
Weights = dict[str, np.ndarray]


def large(nbytes: int = 1 << 30, count: int = 256) -> Iterator[tuple[str, np.ndarray]]:
    """Layers of a transformer, as far as sizes go: float32, none like another."""
    chance = np.random.default_rng(1)
    rows = nbytes // count // 4 // 1024
    for index in range(count):
        yield f"blocks.{index // 4}.{('q', 'k', 'v', 'o')[index % 4]}.weight", chance.standard_normal((rows, 1024), np.float32)


def small(count: int = 5_000) -> Iterator[tuple[str, np.ndarray]]:
    """Biases, norms and little kernels: 256 B to 64 KiB each."""
    chance = np.random.default_rng(2)
    for index in range(count):
        yield f"layers.{index}.bias", chance.standard_normal(int(chance.integers(64, 16_384)), np.float32)


def layers(count: int = 32, seed: int = 3) -> Weights:
    """A model whose layers are changed, half of them, for its second version: 64 MiB and some biases."""
    chance = np.random.default_rng(seed)
    weights = {}
    for index in range(count):
        weights[f"layer{index:02}.weight"] = chance.standard_normal((1024, 512), np.float32)
        weights[f"layer{index:02}.bias"] = chance.standard_normal(512, np.float32)
    return weights


def tuned(weights: Mapping[str, np.ndarray], chosen: list[int]) -> Weights:
    """The same with the chosen layers moved a little."""
    names = {f"layer{index:02}" for index in chosen}
    return {name: array * np.float32(1.01) if name.partition(".")[0] in names else array for name, array in weights.items()}


def write_safetensors(path: Path, tensors: Iterator[tuple[str, np.ndarray]], more: int = 0) -> Path:
    """The format's own layout, written as tensors come: its library wants all of them in memory. `more`: bytes of header to spare."""
    header: dict[str, object] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    body, offset = path.with_suffix(".body"), 0
    with body.open("wb") as file:
        for name, array in tensors:
            header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
            offset += file.write(array.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + more)
    with path.open("wb") as file, body.open("rb") as data:
        file.write(struct.pack("<Q", len(text)) + text)
        while part := data.read(16 * MIB):
            file.write(part)
    body.unlink()
    return path


def as_safetensors(path: Path, weights: Weights, more: int) -> Path:
    """Beside the class that uses them: safetensors alone say nothing of what is to be computed."""
    write_safetensors(path / "weights.safetensors", iter(weights.items()), more)
    (path / "model.py").write_text("class Model:\n    def predict(self, x):\n        return {'y': x}\n")
    return path


def as_onnx(path: Path, weights: Weights, more: int) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 512])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [shape], [helper.make_tensor_value_info("y", 1, ["n", 512])], held
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="p" * (1 + more))
    onnx.save(model, path.with_suffix(".onnx"))
    return path.with_suffix(".onnx")


def as_savedmodel(path: Path, weights: Weights, more: int) -> Path:
    import tensorflow as tf

    module = tf.Module(name="m" * (1 + more))
    module.held = {name.replace(".", "_"): tf.Variable(array, name=name.replace(".", "_")) for name, array in weights.items()}
    module.serve = tf.function(lambda x: x, input_signature=[tf.TensorSpec([None, 4], tf.float32)])
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve.get_concrete_function()})
    return path


FORMATS: dict[str, Callable[[Path, Weights, int], Path]] = {"ONNX": as_onnx, "safetensors": as_safetensors, "SavedModel": as_savedmodel}
