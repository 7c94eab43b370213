"""PyTorch models: `.pt2` (torch.export) and TorchScript. Both can run code while they load, so they belong in a runner process."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import ml_dtypes
import numpy as np
import structlog

from tether.config import has_cards
from tether.errors import BadInputError, BadModelError
from tether.runtimes import tensors
from tether.runtimes.arrivals import Arrivals
from tether.runtimes.devices import torch_compiler
from tether.runtimes.signatures import Signature, named
from tether.runtimes.weights import zips
from tether.types import Array, Datatype, Framework, ModelFormat, ModelInfo, Tensors, TensorSpec

__all__ = ["TorchModel", "TorchRuntime"]

log = structlog.get_logger("tether.runtimes")
_SUFFIXES = (".pt2", ".pt", ".pts", ".pth", ".torchscript")
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
    "float32": "FP32",
    "float64": "FP64",
}
_HOW_TO_EXPORT = "export it: torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('n')},)), 'model.pt2')"
_NEEDS_EXAMPLE = (
    "TorchScript does not say its shapes and datatypes: publish it with example= (one array for each input), or with a signature "
    "(.tether/signature.json in its folder); a .pt2 file needs neither"
)


class TorchRuntime:
    """`.pt2`, `.pt` and `.pts` files, alone or the only one in a folder."""

    framework: ClassVar[Framework] = "torch"

    def recognise(self, path: Path) -> ModelFormat | None:
        """A pickled `.pt` counts as TorchScript here, so that `inspect` can say how to export it."""
        file = tensors.only_file(path, _SUFFIXES)
        if file is None:
            return None
        return "pt2" if file.suffix.lower() == ".pt2" or _is_export(file) else "torchscript"

    def inspect(self, path: Path) -> ModelInfo:
        """Raises: BadModelError: pickled, damaged, or it takes something else than tensors; BadInputError: TorchScript, without hints."""
        if self.recognise(path) == "torchscript":
            _check_script(_model_file(path))
            raise BadInputError(_NEEDS_EXAMPLE)
        return _Exported(_model_file(path)).info()

    def inspect_hinted(self, path: Path, hints: Signature) -> ModelInfo:
        """As `inspect`; TorchScript's shapes and datatypes come from the hints, its names from `forward`."""
        if self.recognise(path) == "pt2":
            return self.inspect(path)
        inputs = named(hints.inputs, _script_names(_load_script(_model_file(path)), len(hints.inputs)))
        together = tensors.batched(inputs, hints.outputs) if hints.outputs else False
        if hints.batched is not None:
            together = hints.batched
        return ModelInfo("torch", "torchscript", inputs, hints.outputs, batched=together, pure=False, code=True)

    def warm(self) -> None:
        """Take a tiny model through export and load: a thousand modules are imported by the first one only (2 s)."""
        torch = _library()
        file = io.BytesIO()
        torch.export.save(torch.export.export(torch.nn.Identity(), (torch.zeros(1),)), file)
        file.seek(0)
        torch.export.load(file).module()

    def load(self, path: Path, info: ModelInfo, threads: int = 1) -> TorchModel:
        """Raises: BadModelError, MissingDependencyError. `threads` holds for the whole process: torch has no other bound."""
        torch = _library()
        torch.set_num_threads(threads)
        file = _model_file(path)
        if info.format == "pt2":
            return TorchModel(info, _Exported(file).callable())
        module = _load_script(file)
        return TorchModel(info, lambda arrays: _script_outputs(module(*arrays)))

    def load_arriving(self, path: Path, info: ModelInfo, threads: int, arrivals: Arrivals) -> TorchModel:
        """As `load`, of files that are still coming and will lie in `path`: what it needs is imported meanwhile."""
        if info.format == "pt2":
            self.warm()
        else:
            _library()  # what `warm` does besides, TorchScript does not need (1.3 s)
        arrivals.wait_whole()
        return self.load(path, info, threads)


class TorchModel:
    """A module in memory, on the graphics card where there is one."""

    def __init__(self, info: ModelInfo, call: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.info = info
        self._call: Callable[[list[Any]], Mapping[str, Any]] | None = call
        self._torch = _library()
        self._device = _device(self._torch)

    def run(self, inputs: Tensors) -> Tensors:
        """Raises: ModelFailedError."""
        with tensors.failures("the model failed"), self._torch.inference_mode():
            if self._call is None:
                raise RuntimeError("it is closed")
            values = [_to_torch(self._torch, inputs[spec.name], self._device) for spec in self.info.inputs]
            outputs = {name: _to_numpy(self._torch, value) for name, value in self._call(values).items()}
        return tensors.conform(outputs, self.info.outputs)

    def interrupt(self) -> None:
        """Nothing: it runs in a runner, which is ended as a whole."""

    def close(self) -> None:
        """Drop the module and give its memory back, the card's too."""
        if self._call is not None:
            self._call = None
            tensors.release_memory()
            if self._device != "cpu":
                self._torch.cuda.empty_cache()


class _Exported:
    """A loaded `.pt2` file. Its flat inputs and outputs are put in the order and nesting that it was exported with."""

    def __init__(self, file: Path) -> None:
        torch = _library()
        with tensors.failures(f"{file.name} can't be loaded by torch.export", BadModelError):
            self._program = torch.export.load(file)
        self._tree = torch.utils._pytree  # noqa: SLF001 (torch.export's own in_spec and out_spec are its types)
        signature = self._program.graph_signature
        self._names: list[Any] = list(signature.user_inputs)
        values = {node.name: node.meta.get("val") for node in self._program.graph.nodes}
        self._inputs = [(name, values[name]) for name in self._names if isinstance(values.get(name), torch.Tensor)]
        answers = [values.get(name) for name in signature.user_outputs]
        self._outputs = list(zip(self._output_names(len(answers)), answers, strict=True))
        self._plain = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        if not all(isinstance(value, torch.Tensor) for value in answers):
            raise BadModelError(f"{file.name} answers something else than tensors; return a tensor, a tuple or a dict of tensors")

    def info(self) -> ModelInfo:
        inputs = tuple(_spec(name, value) for name, value in self._inputs)
        outputs = tuple(_spec(name, value) for name, value in self._outputs)
        firsts = {str(value.shape[0]) for _, value in (*self._inputs, *self._outputs) if value.dim()}
        together = tensors.batched(inputs, outputs) and len(firsts) == 1
        signature = self._program.graph_signature
        pure = not (signature.buffers_to_mutate or signature.user_inputs_to_mutate or _is_impure(self._program.graph_module))
        return ModelInfo("torch", "pt2", inputs, outputs, batched=together, pure=pure, code=True)

    def callable(self) -> Callable[[list[Any]], Mapping[str, Any]]:
        torch = _library()
        device = _device(torch)
        if device != "cpu":
            from torch.export.passes import move_to_device_pass  # heavy

            self._program = move_to_device_pass(self._program, device)
        module, in_spec, tree = _compiled(torch, self._program.module()), self._program.call_spec.in_spec, self._tree
        given, names = [name for name, _ in self._inputs], [name for name, _ in self._outputs]
        flat = [(name if name in self._plain or name in given else None, name) for name in self._names]
        plain = self._plain

        def call(arrays: list[Any]) -> Mapping[str, Any]:
            by_name = dict(zip(given, arrays, strict=True))
            leaves = [by_name.get(name, plain.get(name)) if known else name for known, name in flat]
            args, kwargs = tree.tree_unflatten(leaves, in_spec)
            return dict(zip(names, tree.tree_leaves(module(*args, **kwargs)), strict=True))

        self._program = None  # the module has the weights; the program's own copy of the graph can go
        return call

    def _output_names(self, count: int) -> list[str]:
        """A flat dict's keys, else `output_0` …"""
        spec = self._program.call_spec.out_spec
        keys = [str(key) for key in spec.context] if spec.type is dict else []
        return keys if len(keys) == count else [f"output_{index}" for index in range(count)]


def _compiled(torch: Any, module: Any) -> Callable[..., Any]:
    """By the backend that the settings name. What it can't compile runs as it was exported, and the log says so once."""
    backend = torch_compiler()
    if backend is None:
        return cast("Callable[..., Any]", module)
    call: Callable[..., Any] | None = None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal call
        try:
            call = call or torch.compile(module, backend=backend)
            return call(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:  # noqa: SLF001 (torch has no public name for it)
            log.warning("torch.compile failed, the model runs as it was exported", backend=backend, error=type(error).__name__)
            call = module
            return module(*args, **kwargs)

    return run


def _is_impure(module: Any) -> bool:
    """Whether an operation of the graph writes to a buffer, a parameter or an input, or draws random numbers.

    `graph_signature` tells it only of graphs that were functionalized, which `torch.export.export` leaves undone since torch 2.5.
    """
    graphs = [part.graph for part in module.modules() if hasattr(part, "graph")]
    return any(_node_is_impure(node) for graph in graphs for node in graph.nodes if hasattr(node.target, "_schema"))


def _node_is_impure(node: Any) -> bool:
    operation = node.target
    if any(tag.name == "nondeterministic_seeded" for tag in operation.tags):
        return "dropout" not in str(operation) or node.args[-1] is not False  # dropout(x, p, train)
    arguments = operation._schema.arguments  # noqa: SLF001 (torch has no public name for it)
    return any(
        argument.alias_info is not None and argument.alias_info.is_write and index < len(node.args) and _is_outside(node.args[index])
        for index, argument in enumerate(arguments)
    )


def _is_outside(node: Any) -> bool:
    """Whether a tensor is, or is a view of, one that came into the graph, rather than one that the graph made (an in-place ReLU's)."""
    while getattr(node, "op", None) == "call_function" and hasattr(node.target, "_schema"):
        if not any(answer.alias_info is not None for answer in node.target._schema.returns):  # noqa: SLF001 (as above)
            return False
        node = node.args[0]
    return getattr(node, "op", None) == "placeholder"


def _library() -> Any:
    try:
        import torch  # heavy (2 s)
        import torch.export
        import torch.utils._pytree
    except ImportError as error:
        raise tensors.missing("torch", "torch", error) from error
    return torch


def _device(torch: Any) -> str:
    return "cuda" if has_cards() and torch.cuda.is_available() else "cpu"


def _model_file(path: Path) -> Path:
    file = tensors.only_file(path, _SUFFIXES)
    if file is None:
        raise BadModelError(f"{path.name}: has to be one .pt2 or TorchScript file, or a folder with exactly one")
    return file


def _entries(file: Path) -> list[str]:
    """Names in the zip file, without its first folder; none where it is no zip file."""
    try:
        return [member.name.partition("/")[2] for member in zips.members(file)]
    except (BadModelError, OSError):
        return []


def _is_export(file: Path) -> bool:
    """A glance that costs little whatever the file is: the manager and the client take it outside of the sandbox."""
    try:
        return b"/archive_format" in zips.directory(file)
    except (BadModelError, OSError):
        return False


def _check_script(file: Path) -> None:
    entries = _entries(file)
    if any(name.startswith("code/") for name in entries):
        return
    if "data.pkl" in entries or file.read_bytes()[:1] == b"\x80":  # pickle protocol ≥ 2
        raise BadModelError(f"{file.name} is a pickle (torch.save of a module or its weights), which is never loaded; {_HOW_TO_EXPORT}")
    raise BadModelError(f"{file.name} is neither TorchScript nor a .pt2 file, or it is damaged; {_HOW_TO_EXPORT}")


def _load_script(file: Path) -> Any:
    _check_script(file)
    torch = _library()
    with tensors.failures(f"{file.name} can't be loaded by torch.jit", BadModelError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)  # users still have such files
        return torch.jit.load(str(file), map_location=_device(torch))


def _script_names(module: Any, given: int) -> list[str]:
    """The names of `forward`'s arguments; the last ones may be left out where they have defaults."""
    arguments = module.forward.schema.arguments[1:]
    required = [argument for argument in arguments if not argument.has_default_value()]
    count = min(max(given, len(required)), len(arguments))
    chosen = arguments[:count]
    wrong = [argument.name for argument in chosen if "Tensor" not in str(argument.type)]
    if wrong:
        raise BadModelError(f"forward takes {', '.join(wrong)}, which are no tensors; wrap the module so that it takes tensors only")
    return [argument.name for argument in chosen]


def _script_outputs(answer: Any) -> Mapping[str, Any]:
    if isinstance(answer, Mapping):
        return {str(name): value for name, value in answer.items()}
    values: Sequence[Any] = answer if isinstance(answer, (tuple, list)) else [answer]
    return {f"output_{index}": value for index, value in enumerate(values)}


def _spec(name: str, value: Any) -> TensorSpec:
    kind = str(value.dtype).removeprefix("torch.")
    if kind not in _DATATYPES:
        raise BadModelError(f"{name!r} has dtype {kind}, which the inference protocol lacks; cast it in forward()")
    return TensorSpec(name, _DATATYPES[kind], tuple(size if isinstance(size, int) else -1 for size in value.shape))


def _to_torch(torch: Any, array: Array, device: str) -> Any:
    # torch.from_numpy warns of arrays it may not write to, and knows no bfloat16
    source = array if array.flags.writeable else array.copy()
    tensor = (
        torch.from_numpy(source.view(np.int16)).view(torch.bfloat16) if source.dtype == ml_dtypes.bfloat16 else torch.from_numpy(source)
    )
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _to_numpy(torch: Any, value: Any) -> Array:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"it answered a {type(value).__name__}, not a tensor")
    tensor = value.detach().cpu().contiguous()
    array: Array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return array
