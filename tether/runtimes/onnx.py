"""ONNX models, run by ONNX Runtime: data only, so they run in the worker's own process."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from tether.errors import BadInputError, BadModelError
from tether.runtimes import tensors
from tether.runtimes.onnx_files import check_external_files, external_files
from tether.types import Array, Datatype, Framework, ModelFormat, ModelInfo, Tensors, TensorSpec

__all__ = ["OnnxModel", "OnnxRuntime"]

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
    "bfloat16": "BF16",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}
_ONNX_BFLOAT16 = 16
"""`TensorProto.BFLOAT16`."""
_FATAL = 4
"""ONNX Runtime's log severity: what it has to say of a model comes as an exception, its warnings would land in notebooks."""


class OnnxRuntime:
    """`.onnx` files, alone or in a folder with their external data."""

    framework: ClassVar[Framework] = "onnx"

    def recognise(self, path: Path) -> ModelFormat | None:
        """One `.onnx` file, or a folder with exactly one."""
        return "onnx" if tensors.only_file(path, [".onnx"]) else None

    def inspect(self, path: Path) -> ModelInfo:
        """Raises: BadModelError: not parsed, outputs that are no tensors, weights outside the folder."""
        session = _session(_model_file(path), threads=1)
        inputs = tuple(map(_spec, session.get_inputs()))
        outputs = tuple(map(_spec, session.get_outputs()))
        if {"BF16", "BYTES"} <= {spec.datatype for spec in (*inputs, *outputs)}:
            raise BadModelError(
                "ONNX Runtime's Python interface can't mix strings and bfloat16 in one model; cast the latter to float in the graph"
            )
        together = tensors.batched(inputs, outputs)
        return ModelInfo("onnx", "onnx", inputs, outputs, batched=together, pure=True, code=False)

    def load(self, path: Path, info: ModelInfo, threads: int = 1) -> OnnxModel:
        """Raises: BadModelError, MissingDependencyError."""
        return OnnxModel(info, _session(_model_file(path), threads))


class OnnxModel:
    """An inference session. `interrupt` may be called from another thread."""

    def __init__(self, info: ModelInfo, session: Any) -> None:
        import onnxruntime  # heavy (0.2 s)

        self.info = info
        self._session = session
        self._outputs = [spec.name for spec in info.outputs]
        self._text = [spec.name for spec in info.inputs if spec.datatype == "BYTES"]
        self._by_value = any(spec.datatype == "BF16" for spec in (*info.inputs, *info.outputs))
        self._new_options = onnxruntime.RunOptions
        self._running: Any = None

    def run(self, inputs: Tensors) -> Tensors:
        """Raises: ModelFailedError; BadInputError: a shape that the graph can't take, a string that is not UTF-8."""
        for name in self._text:
            inputs = {**inputs, name: _as_text(name, inputs[name])}
        self._running = options = self._new_options()
        with tensors.failures("the model failed"):
            try:
                run = self._run_by_value if self._by_value else self._session.run
                values = run(self._outputs, inputs, options)
            except Exception as error:
                if type(error).__name__ == "InvalidArgument":  # pybind makes one class for each status of ONNX Runtime
                    raise BadInputError(f"the model can't take this input: {_said(error)}") from error
                raise
        return tensors.conform(dict(zip(self._outputs, values, strict=True)), self.info.outputs)

    def interrupt(self) -> None:
        """End the current `run` soon, with ModelFailedError: between two nodes, which is what stops an endless Loop."""
        if self._running is not None:
            self._running.terminate = True

    def _run_by_value(self, names: list[str], inputs: Tensors, options: Any) -> list[Array]:
        """As numpy has no bfloat16, ONNX Runtime wants it wrapped and hands it back by address."""
        wrapped = {name: _wrap(array) for name, array in inputs.items()}
        return [_unwrap(value) for value in self._session.run_with_ort_values(names, wrapped, options)]

    def close(self) -> None:
        """Free the session and give its memory back."""
        if self._session is not None:
            self._session = None
            tensors.release_memory()


def _model_file(path: Path) -> Path:
    file = tensors.only_file(path, [".onnx"])
    if file is None:
        raise BadModelError(f"{path.name}: has to be one .onnx file, or a folder with exactly one")
    if path.is_file() and external_files(file):
        raise BadModelError(f"{file.name} keeps its weights in other files; publish the folder that holds both")
    check_external_files(file)
    return file


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime  # heavy (0.2 s)
    except ImportError as error:
        raise tensors.missing("onnxruntime", "onnx", error) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _FATAL
    # Threads that spin while they wait take the cores of the other models (measured: a second model halves the first one's rate).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    onnxruntime.set_default_logger_severity(_FATAL)
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        hint = "; it needs more memory than it may use" if "bad_alloc" in str(error) else ""
        raise BadModelError(f"{path.name} can't be loaded by ONNX Runtime: {_said(error)}{hint}") from error


def _said(error: Exception) -> str:
    """Without `[ONNXRuntimeError] : 7 : `."""
    return tensors.first_line(error).removeprefix("[ONNXRuntimeError] : ").partition(" : ")[2] or tensors.first_line(error)


def _spec(node: Any) -> TensorSpec:
    if not node.type.startswith("tensor("):
        raise BadModelError(
            f"{node.name!r} is a {node.type}, not a tensor; for scikit-learn classifiers convert with "
            "to_onnx(model, X, options={'zipmap': False}), else make the graph answer tensors (zipmap=False does it in skl2onnx)"
        )
    element = node.type[len("tensor(") : -1]
    if element not in _DATATYPES:
        raise BadModelError(f"{node.name!r} has element type {element}, which the inference protocol lacks; cast it in the graph")
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(node.name, _DATATYPES[element], shape)


def _as_text(name: str, array: Array) -> Array:
    """ONNX strings are text: given `bytes`, ONNX Runtime would take their repr."""
    out = np.empty(array.shape, dtype=object)
    try:
        out.reshape(-1)[:] = [item.decode() if isinstance(item, bytes) else str(item) for item in array.reshape(-1).tolist()]
    except UnicodeDecodeError:
        raise BadInputError(f"input {name!r} holds a string that is not UTF-8; ONNX strings have to be") from None
    return out


def _wrap(array: Array) -> Any:
    import onnxruntime  # heavy (0.2 s)

    if array.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _unwrap(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    shape = value.shape()
    count = int(np.prod(shape))
    words = np.empty(count, np.uint16)
    ctypes.memmove(words.ctypes.data, value.data_ptr(), words.nbytes)
    out: Array = words.view(ml_dtypes.bfloat16).reshape(shape)
    return out
