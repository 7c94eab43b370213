"""Trains one small model on the digits in each of three frameworks and saves it as that framework's users do.

    python datasets/train.py [onnx|torch|tensorflow …] [--folder datasets/models]

All three have the same signature: `images` FP32 `(-1, 8, 8)` → `label` INT64 `(-1,)`, `probabilities` FP32 `(-1, 10)`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import digits
import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).with_name("models")
FILES = {"onnx": "digits.onnx", "torch": "digits.pt2", "tensorflow": "digits-savedmodel"}
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
"""TensorFlow's notes on the processor are not ours to print; errors still show. Without oneDNN the weights are the same on every run."""
SEED = 7
HIDDEN = 64
GOOD_ENOUGH = 0.9

Labels = npt.NDArray[np.int64]


def train_onnx(data: digits.Digits, path: Path) -> Labels:
    """scikit-learn's multi-layer perceptron, converted by skl2onnx. Returns what it says of the held-out rows."""
    import onnx
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.neural_network import MLPClassifier

    rows = data.images.reshape(-1, 64)
    model = MLPClassifier((HIDDEN,), learning_rate_init=0.005, tol=1e-3, max_iter=500, random_state=SEED)
    model.fit(rows[data.train], data.labels[data.train])
    converted = to_onnx(model, initial_types=[("pixels", FloatTensorType([None, 64]))], options={"zipmap": False}, target_opset=17)
    onnx.save(_with_images(converted), path)
    return model.predict(rows[data.test])


def _with_images(model: object) -> object:
    """The same ONNX model with a Reshape in front: scikit-learn knows rows of pixels only, the other two take images."""
    from onnx import TensorProto, compose, helper

    reshape = helper.make_graph(
        [helper.make_node("Reshape", ["images", "row_shape"], ["rows"])],
        "flatten",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 8, 8])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor("row_shape", TensorProto.INT64, [2], [-1, 64])],
    )
    front = helper.make_model(reshape, opset_imports=model.opset_import, ir_version=model.ir_version)
    return compose.merge_models(front, model, io_map=[("rows", "pixels")])


def train_torch(data: digits.Digits, path: Path) -> Labels:
    """A convolutional network, exported with a batch axis that may vary. Returns what it says of the held-out rows."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(128, 10)),
            )

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.layers(images.unsqueeze(1))
            return {"label": logits.argmax(1), "probabilities": logits.softmax(1)}

    torch.manual_seed(SEED)
    model = Classifier()
    images, labels = torch.from_numpy(data.images[data.train]), torch.from_numpy(data.labels[data.train])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.005)
    for rows in (rows for _ in range(12) for rows in torch.randperm(len(images)).split(64)):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model.layers(images[rows].unsqueeze(1)), labels[rows]).backward()
        optimiser.step()
    model.eval()
    test = torch.from_numpy(data.images[data.test])
    torch.export.save(torch.export.export(model, (test,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}), path)
    return model(test)["label"].numpy()


def train_tensorflow(data: digits.Digits, path: Path) -> Labels:
    """A multi-layer perceptron as a plain tf.Module (Keras takes seconds to import). Returns what it says of the held-out rows."""
    import tensorflow as tf

    class Classifier(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = ((64, HIDDEN), (HIDDEN,), (HIDDEN, 10), (10,))
            self.weights = [tf.Variable(tf.random.normal(shape, stddev=0.15)) for shape in shapes]

        def logits(self, images: tf.Tensor) -> tf.Tensor:
            first, first_bias, second, second_bias = self.weights
            return tf.nn.relu(tf.reshape(images, (-1, 64)) @ first + first_bias) @ second + second_bias

        @tf.function(input_signature=[tf.TensorSpec((None, 8, 8), tf.float32, "images")])
        def serve(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
            logits = self.logits(images)
            return {"label": tf.argmax(logits, 1), "probabilities": tf.nn.softmax(logits)}

    tf.random.set_seed(SEED)
    model = Classifier()
    _descend(tf, model, tf.constant(data.images[data.train]), tf.constant(data.labels[data.train]))
    tf.saved_model.save(model, str(path), signatures={"serving_default": model.serve})
    return model.serve(tf.constant(data.images[data.test]))["label"].numpy()


def _descend(tf: object, model: object, images: object, labels: object, steps: int = 200) -> None:
    """Gradient descent with momentum over all rows at once; one traced function, so seconds and not minutes."""
    speeds = [tf.Variable(tf.zeros_like(weight)) for weight in model.weights]

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model.logits(images)))
        for weight, speed, slope in zip(model.weights, speeds, tape.gradient(loss, model.weights), strict=True):
            speed.assign(0.9 * speed - 0.2 * slope)
            weight.assign_add(speed)

    for _ in range(steps):
        step()


TRAINERS: dict[str, Callable[[digits.Digits, Path], Labels]] = {"onnx": train_onnx, "torch": train_torch, "tensorflow": train_tensorflow}


def build(frameworks: Iterable[str] = tuple(FILES), folder: Path | str = FOLDER) -> dict[str, Path]:
    """Framework → path of its saved model; what is there already and not older than this script is kept.

    Each framework is trained in a process of its own, so that the caller, a notebook say, imports none of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {framework: folder / FILES[framework] for framework in frameworks}
    stale = [name for name, path in paths.items() if not path.exists() or path.stat().st_mtime < Path(__file__).stat().st_mtime]
    commands = [[sys.executable, __file__, framework, "--folder", folder] for framework in stale]
    with ThreadPoolExecutor() as pool:  # side by side: each spends half of its time importing its library
        list(pool.map(lambda command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), commands))
    return paths


def _train(framework: str, folder: Path) -> None:
    data = digits.load()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[framework]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        draft = Path(scratch, path.name)
        labels = TRAINERS[framework](data, draft)
        accuracy = float(np.mean(labels == data.labels[data.test]))
        if accuracy < GOOD_ENOUGH:
            sys.exit(
                f"{framework}: accuracy {accuracy:.3f} on the held-out rows, expected {GOOD_ENOUGH}; try the versions of constraints.txt"
            )
        _install(draft, path)
    print(f"{framework:10}  accuracy {accuracy:.3f} on {len(labels)} held-out rows  {path}")


def _install(draft: Path, path: Path) -> None:
    """In place of what is there: who reads a file meanwhile reads the old one or the new one, and of two folders made at once one stays."""
    if path.is_dir():
        with contextlib.suppress(FileNotFoundError):  # another run has just taken it away
            path.rename(draft.with_name("old"))
    try:
        draft.replace(path)
    except OSError:
        if not path.is_dir():
            raise


def write_examples(folder: Path | str = FOLDER) -> None:
    """Two held-out images in the forms that the command line (`images.npy`, `example.npz`) and curl (`request.json`) send."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = digits.load()
    images = data.images[data.test[:2]]
    tensor = {"name": "images", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        drafts = Path(scratch)
        np.save(drafts / "images.npy", images)
        np.savez(drafts / "example.npz", images=images)
        (drafts / "request.json").write_text(json.dumps({"inputs": [tensor]}))
        for draft in list(drafts.iterdir()):
            draft.replace(folder / draft.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", nargs="*", help="which to train; all of them if none is named")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    if unknown := set(options.framework) - set(TRAINERS):
        parser.error(f"unknown framework {', '.join(sorted(unknown))}; use {', '.join(TRAINERS)}")
    os.environ |= QUIET
    for framework in options.framework or TRAINERS:
        _train(framework, options.folder)
    write_examples(options.folder)


if __name__ == "__main__":
    main()
