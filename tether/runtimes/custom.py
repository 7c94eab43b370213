"""Custom models: a Python class with `load(path)` and `predict(**inputs)`, published with its source.

Or `generate(**inputs)`, which yields what it answers part by part, as a `predict` with `yield` does.
"""

from __future__ import annotations

import importlib.util
import inspect as inspection
import itertools
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import msgspec
import numpy as np

from tether.errors import BadInputError, BadModelError, MissingDependencyError, ModelFailedError
from tether.runtimes import tensors
from tether.runtimes.generating import each_part, joined, streaming_method
from tether.runtimes.requirements import check_installed, found_requirements
from tether.runtimes.signatures import Signature, named
from tether.types import DATATYPES, Framework, ModelFormat, ModelInfo, Tensors, TensorSpec, datatype_of

__all__ = ["CustomModel", "CustomRuntime"]

_numbers = itertools.count()
"""Each load makes a module of its own: two models' `model.py` must not be one in `sys.modules`."""


class CustomRuntime:
    """A folder with `model.py`, or one `.py` file."""

    framework: ClassVar[Framework] = "custom"

    def recognise(self, path: Path) -> ModelFormat | None:
        """By the names only."""
        return "custom" if _source(path) else None

    def inspect(self, path: Path) -> ModelInfo:
        """Runs the module.

        Raises: BadModelError: no class, or several; BadInputError: the class declares no `inputs`; MissingDependencyError.
        """
        return self._inspect(path, None)

    def inspect_hinted(self, path: Path, hints: Signature) -> ModelInfo:
        """As `inspect`; the hints stand in for `inputs` and `outputs` that the class lacks."""
        return self._inspect(path, hints)

    def _inspect(self, path: Path, hints: Signature | None) -> ModelInfo:
        found = found_requirements(_required_source(path), path)
        module = _import(path)
        try:
            cls = _model_class(module)
            requirements = _strings(cls, "requirements") or found
            inputs, outputs = _declared(cls, hints)
            together = _flag(cls, "batched", default=bool(outputs) and tensors.batched(inputs, outputs))
            if hints is not None and hints.batched is not None:
                together = hints.batched
            pure, streams = _flag(cls, "pure", default=False), streaming_method(cls) is not None
            together &= not streams  # how many rows a part has is up to the model
            return ModelInfo(
                "custom", "custom", inputs, outputs, batched=together, pure=pure, code=True, requirements=requirements, streams=streams
            )
        finally:
            _forget(module, path)

    def load(self, path: Path, info: ModelInfo, threads: int = 1) -> CustomModel:
        """`threads` is up to the class; the runner sets the libraries' own environment variables.

        Raises: BadModelError: it raises; MissingDependencyError: with the `pip install` that mends it.
        """
        del threads
        check_installed(info.requirements)
        return CustomModel(path, info)


class CustomModel:
    """One object of the user's class."""

    def __init__(self, path: Path, info: ModelInfo) -> None:
        self.info = info
        self._path = path
        self._module: ModuleType | None = _import(path)
        cls = _model_class(self._module)
        self._streaming = streaming_method(cls)
        self._predicts = self._streaming != "predict" and callable(getattr(cls, "predict", None))
        with tensors.failures(f"{cls.__name__}.load failed", BadModelError):
            self._model: Any = cls()
            if hasattr(self._model, "load"):
                self._model.load(path)

    def run(self, inputs: Tensors) -> Tensors:
        """Of a class that answers in parts only, all of them, joined.

        Raises: ModelFailedError: `predict` raised, or answered something else than it declares.
        """
        if not self._predicts:
            return joined(self.stream(inputs), self.info.outputs)
        with tensors.failures(f"{type(self._model).__name__}.predict failed"):
            return self._conformed(self._model.predict(**inputs))

    def stream(self, inputs: Tensors) -> Generator[Tensors]:
        """As `ports.Streaming.stream`. Raises: ModelFailedError: as `run`."""
        failures = tensors.failures(f"{type(self._model).__name__}.{self._streaming} failed")
        with failures:
            parts = each_part(getattr(self._model, str(self._streaming))(**inputs))
        try:
            while True:
                with failures:
                    try:
                        part = self._conformed(next(parts))
                    except StopIteration:
                        return
                yield part
        finally:
            with failures:
                getattr(parts, "close", lambda: None)()

    def _conformed(self, answer: Any) -> Tensors:
        return tensors.conform(_by_name(answer, [spec.name for spec in self.info.outputs]), self.info.outputs)

    def interrupt(self) -> None:
        """Nothing: it runs in a runner, which is ended as a whole."""

    def close(self) -> None:
        """Drop the object and its module."""
        if self._module is not None:
            _forget(self._module, self._path)
            self._module = self._model = None
            tensors.release_memory()


def _source(path: Path) -> Path | None:
    file = path / "model.py" if path.is_dir() else path
    return file if file.suffix == ".py" and file.is_file() else None


def _required_source(path: Path) -> Path:
    source = _source(path)
    if source is None:
        raise BadModelError(f"{path.name}: a custom model is a folder with model.py, or one .py file")
    return source


def _import(path: Path) -> ModuleType:
    """The module of the model; its folder leads `sys.path` until `close`, so that it can import its neighbours, late ones too."""
    source = _required_source(path)
    spec = importlib.util.spec_from_file_location(f"tether_model_{next(_numbers)}", source)
    if spec is None or spec.loader is None:
        raise BadModelError(f"{source.name} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(source.parent))
    try:
        with tensors.failures(f"{source.name} can't be imported", BadModelError):
            try:
                spec.loader.exec_module(module)
            except ModuleNotFoundError as error:
                name = error.name or "a module"
                raise MissingDependencyError(f"{source.name} needs {name}, which is not installed; pip install {name}") from error
    except BaseException:
        _forget(module, path)
        raise
    return module


def _forget(module: ModuleType, path: Path) -> None:
    sys.modules.pop(module.__name__, None)
    folder = str(_required_source(path).parent) if path.exists() else None
    if folder in sys.path:
        sys.path.remove(folder)


def _model_class(module: ModuleType) -> type:
    """The one that predicts; else the one that generates: a class that predicts may have helpers that generate."""
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    found = _having("predict", own) or _having("generate", own)
    if len(found) != 1:
        names = ", ".join(cls.__name__ for cls in found) or "none"
        wanted = "a method predict(**inputs) or generate(**inputs)"
        raise BadModelError(f"model.py has to define exactly one class with {wanted}; it has {names}")
    return found[0]


def _having(method: str, classes: Sequence[type]) -> list[type]:
    return [cls for cls in classes if callable(getattr(cls, method, None))]


def _declared(cls: type, hints: Signature | None) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs, outputs = _specs(cls, "inputs"), _specs(cls, "outputs")
    if not inputs and hints is not None:
        inputs = named(hints.inputs, _parameters(cls) or [spec.name for spec in hints.inputs])
    if not outputs and hints is not None:
        outputs = hints.outputs
    if not inputs or (not outputs and hints is None):
        raise BadInputError(
            f"{cls.__name__} has to say what it takes and answers: publish it with example=, or give the class "
            'inputs = [("x", "FP32", (-1, 4))] and outputs = [("y", "FP32", (-1,))]'
        )
    return inputs, outputs


def _parameters(cls: type) -> list[str]:
    """The names that `predict` or `generate` takes; none where it is `**inputs`."""
    method = getattr(cls, "predict", None) or getattr(cls, "generate")  # noqa: B009 (one of them is there: `_model_class`)
    parameters = list(inspection.signature(method).parameters.values())[1:]
    named_ones = {inspection.Parameter.POSITIONAL_OR_KEYWORD, inspection.Parameter.KEYWORD_ONLY}
    return [parameter.name for parameter in parameters if parameter.kind in named_ones]


def _specs(cls: type, attribute: str) -> tuple[TensorSpec, ...]:
    return tuple(_spec(item, f"{cls.__name__}.{attribute}") for item in getattr(cls, attribute, ()))


def _spec(item: Any, where: str) -> TensorSpec:
    """A spec from `(name, datatype or dtype, shape)`, from a mapping with these keys, or as it is."""
    if isinstance(item, TensorSpec):
        return item
    try:
        values = (item["name"], item.get("datatype", item.get("dtype")), item["shape"]) if isinstance(item, Mapping) else item
        name, kind, shape = values
        datatype = kind if isinstance(kind, str) and kind in DATATYPES else datatype_of(kind)
        sizes = tuple(-1 if size is None else int(size) for size in shape)
        return msgspec.convert(TensorSpec(str(name), datatype, sizes), TensorSpec, from_attributes=True)
    except (TypeError, ValueError, KeyError, BadInputError) as error:
        wanted = '("x", "FP32" or numpy.float32, (-1, 4))'
        raise BadModelError(f"{where}: {item!r} is no tensor: write {wanted} ({tensors.first_line(error)})") from None


def _flag(cls: type, attribute: str, *, default: bool) -> bool:
    return bool(getattr(cls, attribute, default))


def _strings(cls: type, attribute: str) -> tuple[str, ...]:
    return tuple(str(item) for item in getattr(cls, attribute, ()))


def _by_name(answer: Any, names: Sequence[str]) -> dict[str, Any]:
    """A mapping as it is; one array, or a tuple of them, by position."""
    if isinstance(answer, Mapping):
        return {str(name): value for name, value in answer.items()}
    values = list(answer) if isinstance(answer, tuple) else [answer]
    names = names or [f"output_{index}" for index in range(len(values))]
    if len(values) != len(names):
        raise ModelFailedError(f"predict answered {len(values)} values for {len(names)} outputs ({', '.join(names)}); answer a dict")
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
