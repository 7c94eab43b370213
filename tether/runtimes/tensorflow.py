"""TensorFlow models: SavedModel folders and `.keras` files. Their graphs can read and write files, so they belong in a runner process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import structlog

from tether.errors import BadModelError, HostileModelError
from tether.runtimes import tensors
from tether.runtimes.arrivals import Arrivals
from tether.runtimes.savedmodel_restoring import UnusualModelError, restoring
from tether.runtimes.weights import keras_files, savedmodel
from tether.types import Datatype, Framework, ModelFormat, ModelInfo, Tensors, TensorSpec

__all__ = ["TensorFlowModel", "TensorFlowRuntime"]

_DATATYPES: dict[str, Datatype] = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "half": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
    "string": "BYTES",
}
_IMPURE = (
    "Assign",
    "ResourceApply",
    "ResourceScatter",
    "Random",
    "Multinomial",
    "LookupTableInsert",
    "Write",
    "Stack",
    "Queue",
    "Iterator",
)
"""Beginnings of the names of operations that keep something or answer differently each time."""
log = structlog.get_logger("tether.runtimes")
_SIGNATURE = "serving_default"
_Call = Callable[[Tensors], Mapping[str, Any]]
_Loaded = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], bool, _Call]
"""Inputs, outputs, whether pure, and the function."""


class TensorFlowRuntime:
    """SavedModel folders and `.keras` files."""

    framework: ClassVar[Framework] = "tensorflow"

    def recognise(self, path: Path) -> ModelFormat | None:
        """By `saved_model.pb`, or the suffix `.keras`."""
        if (path / "saved_model.pb").is_file():
            return "savedmodel"
        return "keras" if tensors.only_file(path, [".keras"]) else None

    def inspect(self, path: Path) -> ModelInfo:
        """Raises: BadModelError: damaged, without a `serving_default` signature, or a Keras model that was never built."""
        kind = self.recognise(path)
        inputs, outputs, pure, _ = _load(path, kind)
        return ModelInfo("tensorflow", kind or "keras", inputs, outputs, batched=tensors.batched(inputs, outputs), pure=pure, code=True)

    def warm(self) -> None:
        """Import TensorFlow and Keras; no operation runs, since thread limits have to come before the first one."""
        tf = _library()
        tf.keras.models  # noqa: B018 (imports Keras, which TensorFlow does late; it has no `saving` since Keras 3.15)

    def load(self, path: Path, info: ModelInfo, threads: int = 1) -> TensorFlowModel:
        """Raises: BadModelError, MissingDependencyError. `threads` holds for the process, from its first TensorFlow model on."""
        return self.load_arriving(path, info, threads, Arrivals(whole=True))

    def load_arriving(self, path: Path, info: ModelInfo, threads: int, arrivals: Arrivals) -> TensorFlowModel:
        """As `load`, of files that are still coming and will lie in `path`: of a SavedModel each variable has its value when it came."""
        tf = _library()
        with contextlib.suppress(RuntimeError):  # TensorFlow takes it only before its first operation
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(1)
            for card in tf.config.list_physical_devices("GPU"):  # it would take all of a card's memory at once
                tf.config.experimental.set_memory_growth(card, enable=True)
        if info.format == "savedmodel":
            return TensorFlowModel(info, _restored(tf, path, arrivals))
        self.warm()
        arrivals.wait_whole()
        return TensorFlowModel(info, _load(path, info.format)[3])


class TensorFlowModel:
    """A signature or Keras model in memory."""

    def __init__(self, info: ModelInfo, call: _Call) -> None:
        self.info = info
        self._call: _Call | None = call

    def run(self, inputs: Tensors) -> Tensors:
        """Raises: ModelFailedError."""
        with tensors.failures("the model failed"):
            if self._call is None:
                raise RuntimeError("it is closed")
            outputs = self._call(inputs)
            plain = {name: value.numpy() for name, value in outputs.items()}
        return tensors.conform(plain, self.info.outputs)

    def interrupt(self) -> None:
        """Nothing: it runs in a runner, which is ended as a whole."""

    def close(self) -> None:
        """Drop the model and give its memory back."""
        if self._call is not None:
            self._call = None
            tensors.release_memory()


def _load(path: Path, kind: ModelFormat | None) -> _Loaded:
    if kind == "savedmodel":
        return _load_saved(path)
    file = tensors.only_file(path, [".keras"])
    if file is None:
        raise BadModelError(f"{path.name}: has to be a SavedModel folder (saved_model.pb) or one .keras file")
    return _load_keras(file)


def _library() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    try:
        import tensorflow as tf  # heavy (4–10 s)
    except ImportError as error:
        raise tensors.missing("tensorflow", "tensorflow", error) from error
    tf.get_logger().setLevel("ERROR")
    return tf


def _restored(tf: Any, path: Path, arrivals: Arrivals) -> _Call:
    """The signature of a SavedModel whose variables we read.

    One with anything unusual is TensorFlow's to load, when it is whole; so is one that we can't read: what was coming may have been thrown
    away for files of before, and of what is damaged TensorFlow says more.
    """
    with tensors.failures(_not_loaded(path), BadModelError):
        try:
            with arrivals.folder(path) as folder, restoring(tf, folder, arrivals) as loaded:
                call = _signature(tf, loaded)[2]
        except HostileModelError:
            raise
        except (UnusualModelError, BadModelError, OSError) as error:
            reason = str(error) if isinstance(error, UnusualModelError) else "its files could not be read by ourselves"
            log.info("restored by TensorFlow alone", reason=reason)  # reasons name nothing of the model, which may be encrypted
        else:
            return call
        arrivals.wait_whole()
        return _load_saved(path)[3]


def _load_saved(path: Path) -> _Loaded:
    savedmodel.check(path, _not_loaded(path))  # before TensorFlow sees it: its operations reach any file
    tf = _library()
    with tensors.failures(_not_loaded(path), BadModelError):
        loaded = tf.saved_model.load(str(path))
    inputs, outputs, call = _signature(tf, loaded)
    return inputs, outputs, _is_pure(loaded.signatures[_SIGNATURE].graph.as_graph_def()), call


def _not_loaded(path: Path) -> str:
    return f"{path.name} can't be loaded as a SavedModel"


def _signature(tf: Any, loaded: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], _Call]:
    """Inputs, outputs, and the function."""
    if _SIGNATURE not in loaded.signatures:
        names = ", ".join(loaded.signatures) or "none"
        raise BadModelError(f"the SavedModel has no signature {_SIGNATURE!r} (it has: {names}); save it with signatures=model.call")
    function = loaded.signatures[_SIGNATURE]
    taken = function.structured_input_signature[1]
    # By name: the file keeps them in a protobuf map, whose order is another one in each process.
    inputs = tuple(_spec(name, taken[name]) for name in sorted(taken))
    outputs = tuple(_spec(name, value) for name, value in sorted(function.structured_outputs.items()))

    def call(arrays: Tensors, keep: Any = loaded) -> Mapping[str, Any]:
        """`keep`: a signature does not hold on to the variables of its model."""
        del keep
        values = {name: tf.convert_to_tensor(arrays[name], spec.dtype) for name, spec in taken.items()}
        answer: Mapping[str, Any] = function(**values)
        return answer

    return inputs, outputs, call


def _is_pure(graph: Any) -> bool:
    """No operation of the graph or of the functions that it calls keeps anything."""
    operations = {node.op for node in graph.node}
    for function in graph.library.function:
        operations |= {node.op for node in function.node_def}
    return not any(name.startswith(_IMPURE) for name in operations)


def _load_keras(file: Path) -> _Loaded:
    keras_files.check(file, f"{file.name} can't be loaded by Keras")  # Keras' own safe mode had a bypass a release
    tf = _library()
    with tensors.failures(f"{file.name} can't be loaded by Keras", BadModelError):
        import keras  # heavy, and it chooses its backend at import

        model = keras.saving.load_model(str(file), compile=False)  # safe_mode stays on: no pickled lambdas
    if not getattr(model, "inputs", None):
        raise BadModelError(f"{file.name} was never built, so its inputs are not known; call it once before model.save()")
    taken = list(model.inputs)
    inputs = tuple(_spec(value.name, value) for value in taken)
    struct = getattr(getattr(model, "_functional", model), "_inputs_struct", taken)  # a dict of inputs has to be called with a dict
    pure = not any(getattr(layer, "stateful", False) for layer in model.layers)

    @tf.function(input_signature=[tf.TensorSpec(value.shape, value.dtype) for value in taken], autograph=False)  # type: ignore[untyped-decorator]
    def graph(*values: Any) -> Any:
        packed = keras.tree.pack_sequence_as(struct, list(values))
        return _keras_outputs(model, model(packed, training=False))

    with tensors.failures(f"{file.name} can't be run by TensorFlow", BadModelError):
        answered = graph.get_concrete_function().structured_outputs
    outputs = tuple(_spec(name, value) for name, value in answered.items())

    def call(arrays: Tensors) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = graph(*(tf.convert_to_tensor(arrays[value.name], value.dtype) for value in taken))
        return answer

    return inputs, outputs, pure, call


def _keras_outputs(model: Any, answer: Any) -> dict[str, Any]:
    """A dict by its keys, else by the names of the layers that answer."""
    if isinstance(answer, Mapping):
        return dict(answer)
    values: Sequence[Any] = answer if isinstance(answer, (list, tuple)) else [answer]
    names = list(getattr(getattr(model, "_functional", model), "output_names", []))
    if len(set(names)) != len(values):
        names = [f"output_{index}" for index in range(len(values))]
    return dict(zip(names, values, strict=True))


def _spec(name: str, value: Any) -> TensorSpec:
    kind = getattr(value.dtype, "name", value.dtype)
    if kind not in _DATATYPES:
        raise BadModelError(f"{name!r} has dtype {kind}, which the inference protocol lacks; cast it in the model")
    if getattr(value.shape, "rank", 0) is None:
        raise BadModelError(f"{name!r} has no known rank; give it a shape in the signature (None for what varies)")
    return TensorSpec(name, _DATATYPES[kind], tuple(-1 if size is None else int(size) for size in value.shape))
