"""ONNX models, run by ONNX Runtime: data only, so they run in the worker's own process."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from tether.errors import BadInputError, BadModelError
from tether.runtimes import tensors
from tether.runtimes.onnx_files import external_file, external_files
from tether.runtimes.onnx_sessions import Opened, Prepacking, open_session, said
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


class OnnxRuntime:
    """`.onnx` files, alone or in a folder with their external data."""

    framework: ClassVar[Framework] = "onnx"

    def recognise(self, path: Path) -> ModelFormat | None:
        """One `.onnx` file, or a folder with exactly one."""
        return "onnx" if tensors.only_file(path, [".onnx"]) else None

    def inspect(self, path: Path) -> ModelInfo:
        """Raises: BadModelError: not parsed, outputs that are no tensors, weights outside the folder."""
        session = _open(path, threads=1).session
        inputs = tuple(map(_spec, session.get_inputs()))
        outputs = tuple(map(_spec, session.get_outputs()))
        if {"BF16", "BYTES"} <= {spec.datatype for spec in (*inputs, *outputs)}:
            raise BadModelError(
                "ONNX Runtime's Python interface can't mix strings and bfloat16 in one model; cast the latter to float in the graph"
            )
        together = tensors.batched(inputs, outputs)
        return ModelInfo("onnx", "onnx", inputs, outputs, batched=together, pure=True, code=False)

    def load(self, path: Path, info: ModelInfo, threads: int = 1) -> OnnxModel:
        """The files have to stay as they are until it is closed: those of a large model are mapped.

        Raises: BadModelError, MissingDependencyError.
        """
        return OnnxModel(info, *_open(path, threads))


class OnnxModel:
    """An inference session, and while that is not the prepacked one, what makes it. `interrupt` may be called from another thread."""

    def __init__(self, info: ModelInfo, session: Any, prepacking: Prepacking | None = None) -> None:
        import onnxruntime  # heavy (0.2 s)

        self.info = info
        self._session = session
        self._prepacking = prepacking
        self._outputs = [spec.name for spec in info.outputs]
        self._text = [spec.name for spec in info.inputs if spec.datatype == "BYTES"]
        self._by_value = any(spec.datatype == "BF16" for spec in (*info.inputs, *info.outputs))
        self._new_options = onnxruntime.RunOptions
        self._running: Any = None

    def run(self, inputs: Tensors) -> Tensors:
        """Raises: ModelFailedError; BadInputError: a shape that the graph can't take, a string that is not UTF-8."""
        for name in self._text:
            inputs = {**inputs, name: _as_text(name, inputs[name])}
        self._prepare()
        self._running = options = self._new_options()
        with tensors.failures("the model failed"):
            try:
                run = self._run_by_value if self._by_value else self._session.run
                values = run(self._outputs, inputs, options)
            except Exception as error:
                if type(error).__name__ == "InvalidArgument":  # pybind makes one class for each status of ONNX Runtime
                    raise BadInputError(f"the model can't take this input: {said(error)}") from error
                raise
        return tensors.conform(dict(zip(self._outputs, values, strict=True)), self.info.outputs)

    def _prepare(self) -> None:
        """Between two runs: take the prepacked session if it is there, and see to it that it will be."""
        if self._prepacking is None:
            return
        better = self._prepacking.ready()
        if better is None:
            self._prepacking.used()
        else:
            self._session, self._prepacking = better, None

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
        if self._prepacking is not None:
            self._prepacking.cancel()
            self._prepacking = None
        if self._session is not None:
            self._session = None
            tensors.release_memory()


def _open(path: Path, threads: int) -> Opened:
    file = tensors.only_file(path, [".onnx"])
    if file is None:
        raise BadModelError(f"{path.name}: has to be one .onnx file, or a folder with exactly one")
    names = external_files(file)
    if names and path.is_file():
        raise BadModelError(f"{file.name} keeps its weights in other files; publish the folder that holds both")
    return open_session(file, [external_file(file, name) for name in sorted(names)], threads)


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
