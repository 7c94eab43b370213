"""Trains a base model on the digits and fine-tunes it, twice, for pages that lie on their side.

    python datasets/finetune.py [--folder datasets/models]

`digits-base.onnx` knows upright digits. `digits-head.onnx` is the same with its last layer trained again on digits turned by 90 degrees,
`digits-all.onnx` with all of its layers trained on. All have the signature of `train.py`'s models; their weights are named
`layer1.weight`, `layer1.bias` …
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import digits
import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).with_name("models")
FILES = {"base": "digits-base.onnx", "head": "digits-head.onnx", "all": "digits-all.onnx"}
SEED = 11
LAYERS = (256, 128)
Arrays = list[npt.NDArray[np.float32]]


def turned(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The images `(n, 8, 8)` as they lie on a page on its side."""
    return np.rot90(images, axes=(1, 2)).copy()


def build(folder: Path = FOLDER) -> dict[str, Path]:
    """Train what is missing or older than this script; name → file."""
    paths = {name: folder / file for name, file in FILES.items()}
    made = Path(__file__).stat().st_mtime
    if not all(path.exists() and path.stat().st_mtime > made for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, (weights, biases) in _trained(digits.load()).items():
            _save(weights, biases, paths[name])
    return paths


def _trained(data: digits.Digits) -> dict[str, tuple[Arrays, Arrays]]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    upright, sideways = (images[data.train].reshape(-1, 64) for images in (data.images, turned(data.images)))
    labels = data.labels[data.train]
    model = MLPClassifier(LAYERS, learning_rate_init=0.003, random_state=SEED)
    for _ in range(25):
        model.partial_fit(upright, labels, classes=np.arange(10))
    found = {"base": _weights(model)}
    head = LogisticRegression(max_iter=5000).fit(_hidden(sideways, *found["base"]), labels)
    weights, biases = found["base"]
    found["head"] = ([*weights[:-1], head.coef_.T.astype("f4")], [*biases[:-1], head.intercept_.astype("f4")])
    for _ in range(15):
        model.partial_fit(sideways, labels)
    found["all"] = _weights(model)
    return found


def _weights(model: object) -> tuple[Arrays, Arrays]:
    return [each.astype("f4") for each in model.coefs_], [each.astype("f4") for each in model.intercepts_]


def _hidden(rows: npt.NDArray[np.float32], weights: Arrays, biases: Arrays) -> npt.NDArray[np.float32]:
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        rows = np.maximum(rows @ weight + bias, 0)
    return rows


def _save(weights: Arrays, biases: Arrays, path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    held = [numpy_helper.from_array(np.array([-1, 64]), "row_shape")]
    nodes = [helper.make_node("Reshape", ["images", "row_shape"], ["rows0"])]
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
        names = f"layer{number}.weight", f"layer{number}.bias"
        held += [numpy_helper.from_array(array, name) for array, name in zip((weight, bias), names, strict=True)]
        last = number == len(weights)
        nodes.append(helper.make_node("Gemm", [f"rows{number - 1}", *names], ["logits" if last else f"sum{number}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"sum{number}"], [f"rows{number}"]))
    nodes += [
        helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10]),
    ]
    graph = helper.make_graph(nodes, "digits", [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 8, 8])], outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    onnx.save(model, draft)
    draft.replace(path)  # another run may be reading what is there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    print({name: str(path) for name, path in build(parser.parse_args().folder).items()})


if __name__ == "__main__":
    main()
