"""How long after a model's last byte it answers, and how much of it has to come before its first layer does.

A source gives 100 MB/s. `Replicated.checkout` writes the files while they come, and the model is brought into memory as a worker does it;
beside it the full download first: replicate, then check out, then the library's own loader. A SavedModel's process fills variables
while bytes come, a new one also imports TensorFlow then; on the other side TensorFlow was imported and used long before.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass
from pathlib import Path

import models
import numpy as np

from tether import store
from tether.ports import LoadedModel
from tether.runtimes import inspect, load
from tether.runtimes.arrivals import Coming
from tether.runtimes.weights import boundaries, read_index
from tether.security.identity import Identity
from tether.store.format.layout import Piece
from tether.store.format.weights import tensor_arrays
from tether.store.replicas.replicated import Replicated
from tether.testing.blob_sources import MemoryBlobSource
from tether.types import Digest, ModelFormat, ModelInfo
from tether.worker.runner import RunnerPool, load_model

RATE = 100e6
"""Bytes a second."""
WIDTH = 2048
"""Of each layer: 16 MiB."""
LAB = Identity(bytes(range(32)))
CUSTOM = ModelInfo("custom", "custom", (), (), batched=True, pure=True, code=True)


@dataclass(eq=False)
class TimedSource(MemoryBlobSource):
    """Knows when its last blob was given."""

    last: float = 0.0

    async def fetch(self, digest: Digest, nbytes: int) -> bytes | None:
        data = await super().fetch(digest, nbytes)
        self.last = time.perf_counter()
        return data


@dataclass(frozen=True, slots=True)
class Published:
    """A version, and a source that has it."""

    digest: Digest
    entry: str
    info: ModelInfo
    nbytes: int
    source: TimedSource


Loader = Callable[[Replicated, Published], LoadedModel]
"""Fetches a model and brings it into memory."""


class WarmPool(RunnerPool):
    """Its spare has imported TensorFlow when it is wanted."""

    def __init__(self, patience: float) -> None:
        super().__init__(patience)
        self._start_spare("tensorflow")
        self._spares["tensorflow"] = self.take("tensorflow")


def layers(nbytes: int) -> Iterator[np.ndarray]:
    chance = np.random.default_rng(5)
    for _ in range(max(1, nbytes // (4 * WIDTH * WIDTH))):
        yield chance.standard_normal((WIDTH, WIDTH), np.float32) / np.float32(WIDTH**0.5)


def write_onnx(folder: Path, nbytes: int) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, value = [], [], "x"
    for index, array in enumerate(layers(nbytes)):
        weights.append(numpy_helper.from_array(array, f"w{index}"))
        nodes += [helper.make_node("MatMul", [value, f"w{index}"], [f"h{index}"]), helper.make_node("Relu", [f"h{index}"], [f"r{index}"])]
        value = f"r{index}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    folder.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx")
    return folder / "model.onnx"


def write_savedmodel(folder: Path, nbytes: int) -> Path:
    import tensorflow as tf

    module = tf.Module()
    module.held = [tf.Variable(array) for array in layers(nbytes)]

    def serve(x: object) -> dict[str, object]:
        for weight in module.held:
            x = tf.nn.relu(tf.matmul(x, weight))
        return {"y": x}

    module.serve = tf.function(serve, input_signature=[tf.TensorSpec([None, WIDTH], tf.float32, name="x")], autograph=False)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return folder


def publish(folder: Path, path: Path, format_: ModelFormat, info: ModelInfo) -> Published:
    """A source over what `path` is published as. `folder`: for its store, which is gone afterwards."""
    root = path if path.is_dir() else path.parent
    pieces = {name: [Piece(*each) for each in found] for name, found in boundaries(root, format_).items()}
    with store.Repository.open(folder / "origin", own=LAB.public) as repository:
        files = repository.add_files(root, pieces)
        arrays = (*files, *tensor_arrays(files, read_index(root, format_)))
        entry = "" if path.is_dir() else path.name
        manifest = store.encode(store.Manifest(framework=info.framework, entry=entry, info=info, arrays=arrays))
        digest = repository.publish("model", manifest, LAB.public, LAB.sign(store.signed_message(manifest))).digest
        source = TimedSource.of(repository)
    shutil.rmtree(folder / "origin")
    return Published(digest, entry, info, sum(file.nbytes for file in files), source)


def answering(published: Published, replica: Path, loader: Loader) -> list[float]:
    """Seconds from the last byte until the model is in memory, and until its first answer."""
    published.source.nbytes_per_second = RATE
    rows = {"x": np.ones((1, WIDTH), np.float32)}
    with (
        store.Repository.open(replica) as local,
        Replicated(local, [published.source]) as replicated,
        closing(loader(replicated, published)) as model,
    ):
        ready = time.perf_counter()
        model.run(rows)
        answered = time.perf_counter()
    shutil.rmtree(replica)
    return [ready - published.source.last, answered - published.source.last]


def streamed(replicated: Replicated, published: Published) -> Path:
    return replicated.checkout(published.digest, "model") / published.entry


def downloaded(replicated: Replicated, published: Published) -> Path:
    replicated.replicate(published.digest, "model")
    return replicated.local.checkout(published.digest) / published.entry


def coming(replicated: Replicated, published: Published) -> Coming:
    """As `tether.worker.model_files` has it."""
    path = replicated.local.root / "cache" / published.digest / published.entry
    return Coming(path, lambda arrivals: replicated.checkout(published.digest, "model", watcher=arrivals))


def beside(what: str, published: Published, folder: Path, ours: Loader, theirs: Loader) -> Iterator[dict[str, object]]:
    streaming = answering(published, folder / "streamed", ours)
    downloading = answering(published, folder / "downloaded", theirs)
    for moment, mine, other in zip(("ready", "first answer"), streaming, downloading, strict=True):
        yield row(f"{what} of {published.nbytes >> 20} MiB at 100 MB/s, last byte to {moment}", other, mine, "")


def row(what: str, theirs: float, ours: float, more: str) -> dict[str, object]:
    text = f"{ours:.3f} s against {theirs:.3f} s{more}"
    return {"what": what, "reference": "full download first", "ratio": theirs / ours, "text": text, "theirs": [theirs], "ours": [ours]}


class _PlainOnnx:
    """ONNX Runtime as its own documentation has it."""

    def __init__(self, path: Path, info: ModelInfo) -> None:
        import onnxruntime

        self.info = info
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": self._session.run(None, inputs)[0]}

    def interrupt(self) -> None: ...

    def close(self) -> None:
        del self._session


class _PlainSavedModel:
    """TensorFlow as its own documentation has it, in a process that has used it before."""

    def __init__(self, path: Path, info: ModelInfo) -> None:
        import tensorflow as tf

        self.info = info
        self._constant = tf.constant
        self._loaded = tf.saved_model.load(str(path))

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        call = self._loaded.signatures["serving_default"]
        return {"y": call(x=self._constant(inputs["x"]))["y"].numpy()}

    def interrupt(self) -> None: ...

    def close(self) -> None:
        del self._loaded


def onnx_rows(folder: Path, nbytes: int) -> Iterator[dict[str, object]]:
    path = write_onnx(folder / "onnx", nbytes)
    info = inspect(path)
    published = publish(folder, path, "onnx", info)
    yield from beside(
        "ONNX",
        published,
        folder,
        lambda replicated, published: load(streamed(replicated, published), info),
        lambda replicated, published: _PlainOnnx(downloaded(replicated, published), info),
    )
    shutil.rmtree(path.parent)


def savedmodel_rows(folder: Path, nbytes: int) -> Iterator[dict[str, object]]:
    path = write_savedmodel(folder / "savedmodel", nbytes)
    info = inspect(path)
    published = publish(folder, path, "savedmodel", info)
    for state, pool in (("in a new process", RunnerPool(patience=60.0)), ("in a warm process", WarmPool(patience=60.0))):
        with closing(pool):
            yield from beside(
                f"SavedModel, {state},",
                published,
                folder,
                lambda replicated, published, pool=pool: load_model(coming(replicated, published), info, pool=pool),
                lambda replicated, published: _PlainSavedModel(downloaded(replicated, published), info),
            )
    shutil.rmtree(path)


def first_product(folder: Path, nbytes: int) -> dict[str, object]:
    """Of a safetensors model: when its first layer can be used, and how much has come by then."""
    path = models.write_safetensors(folder / "safetensors" / "model.safetensors", models.large(nbytes))
    published = publish(folder, path, "custom", CUSTOM)
    source = published.source
    source.nbytes_per_second = RATE
    with store.Repository.open(folder / "replica") as local, Replicated(local, [source]) as replicated:
        begun = time.perf_counter()
        nbytes_then = asyncio.run(_first(replicated, published.digest, source))
        first = time.perf_counter() - begun
    shutil.rmtree(folder / "replica")
    with store.Repository.open(folder / "replica") as local, Replicated(local, [source]) as replicated:
        begun = time.perf_counter()
        replicated.replicate(published.digest, "model")
        weights = replicated.load_tensors(published.digest)
        _product(next(iter(weights.values())))
        whole = time.perf_counter() - begun
    shutil.rmtree(folder / "replica")
    shutil.rmtree(path.parent)
    what = f"safetensors of {published.nbytes >> 20} MiB at 100 MB/s, first layer's product"
    return row(what, whole, first, f"; {nbytes_then / published.nbytes:.1%} of the bytes had come") | {
        "share": nbytes_then / published.nbytes
    }


async def _first(replicated: Replicated, digest: Digest, source: TimedSource) -> int:
    async with aclosing(replicated.stream_tensors(digest)) as tensors:
        async for _, array in tensors:
            _product(array)
            return source.given_nbytes
    return 0


def _product(weight: np.ndarray) -> np.ndarray:
    return np.ones((1, weight.shape[0]), np.float32) @ weight


def rows(folder: Path, nbytes: int) -> Iterator[dict[str, object]]:
    yield first_product(folder, nbytes)
    yield from onnx_rows(folder, nbytes)
    yield from savedmodel_rows(folder, nbytes)
