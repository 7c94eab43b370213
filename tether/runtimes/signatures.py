"""What a model takes and answers, where its file does not say: hints, and the examples that stand for a self-test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec
import numpy as np

from tether.errors import BadInputError, BadModelError
from tether.runtimes import tensors
from tether.types import Array, ModelInfo, Tensors, TensorSpec, datatype_of, dtype_of

if TYPE_CHECKING:
    from tether.ports import Runtime

__all__ = [
    "SIGNATURE_FILE",
    "Signature",
    "check_answer",
    "example_specs",
    "fit",
    "folder_signature",
    "hinted",
    "named",
    "refine",
]

SIGNATURE_FILE = Path(".tether") / "signature.json"
"""In a model's folder: a `Signature` as JSON."""


class Signature(msgspec.Struct, frozen=True):
    """What a publisher says of a model whose format does not say it."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    """Empty: as the example shows them."""
    batched: bool | None = None
    """None: whether every first axis is -1."""


@runtime_checkable
class TakesHints(Protocol):
    """A runtime whose format leaves something open."""

    def inspect_hinted(self, path: Path, hints: Signature) -> ModelInfo:
        """As `inspect`, with the publisher's signature in place of what the files do not say."""
        ...


def hinted(runtime: Runtime, path: Path, hints: Signature | None) -> ModelInfo:
    """`runtime.inspect`, with hints where there are some and the runtime takes them.

    Raises: as `Runtime.inspect`.
    """
    if hints is not None and isinstance(runtime, TakesHints):
        return runtime.inspect_hinted(path, hints)
    return runtime.inspect(path)


def named(specs: Sequence[TensorSpec], names: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The specs in the order of the model's own `names`; those of a positional example (`arr_0` …) get the names.

    Raises: BadInputError: a name that the model does not have, or a missing one.
    """
    given = {spec.name: spec for spec in specs}
    if sorted(given) == sorted(f"arr_{index}" for index in range(len(names))):
        given = {name: msgspec.structs.replace(given[f"arr_{index}"], name=name) for index, name in enumerate(names)}
    if set(given) != set(names):
        raise BadInputError(
            f"the example or signature has {', '.join(given) or 'nothing'}; the model takes {', '.join(names) or 'nothing'}"
        )
    return tuple(given[name] for name in names)


def folder_signature(path: Path) -> Signature | None:
    """What `.tether/signature.json` in the model's folder says.

    Raises: BadModelError: it is no `Signature`.
    """
    file = path / SIGNATURE_FILE
    if not file.is_file():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=Signature)
    except msgspec.DecodeError as error:
        raise BadModelError(f"{SIGNATURE_FILE}: {error}; it holds inputs and outputs, each a list of name, datatype, shape") from None


def example_specs(example: Mapping[str, Array]) -> tuple[TensorSpec, ...]:
    """Specs of an example's tensors, their sizes taken as they are."""
    return tuple(TensorSpec(name, datatype_of(array.dtype), array.shape) for name, array in example.items())


def fit(example: Mapping[str, Array], specs: Sequence[TensorSpec]) -> Tensors:
    """The example as the model takes it: positional arrays (`arr_0` …, `numpy.savez(file, x)`) named, numbers of the same kind cast.

    Raises: BadInputError: names, kinds of number, ranks or sizes that do not fit.
    """
    names = [spec.name for spec in specs]
    if set(example) != set(names):
        if sorted(example) != sorted(f"arr_{index}" for index in range(len(names))):
            raise BadInputError(f"the example has {', '.join(example) or 'nothing'}; the model takes {', '.join(names)}")
        example = {name: example[f"arr_{index}"] for index, name in enumerate(names)}
    return {spec.name: _fit_one(example[spec.name], spec) for spec in specs}


def _fit_one(array: Array, spec: TensorSpec) -> Array:
    dtype = dtype_of(spec.datatype)
    fits = (array.dtype.kind == "O") == (spec.datatype == "BYTES") and np.can_cast(array.dtype, dtype, "same_kind")
    if not fits:
        raise BadInputError(f"the example's {spec.name!r} is {array.dtype}, the model takes {spec.datatype}; convert it first")
    if not _shape_fits(array.shape, spec.shape):
        raise BadInputError(f"the example's {spec.name!r} has shape {list(array.shape)}, the model takes {list(spec.shape)} (-1: any)")
    return np.asarray(array.astype(dtype, copy=False), order="C")


def _shape_fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """A declared scalar may be an unknown rank: ONNX Runtime reports both as `[]`."""
    return not declared or (len(shape) == len(declared) and all(want in (-1, have) for have, want in zip(shape, declared, strict=True)))


def refine(info: ModelInfo, inputs: Tensors, outputs: Tensors) -> ModelInfo:
    """`info` with shapes that the example disproves opened: files often declare no shape for outputs, or a wrong one."""
    opened = msgspec.structs.replace(
        info,
        inputs=tuple(_open(spec, inputs[spec.name].shape) for spec in info.inputs),
        outputs=tuple(_open(spec, outputs[spec.name].shape) for spec in info.outputs),
    )
    if opened == info or info.batched or info.streams:
        return opened
    return msgspec.structs.replace(opened, batched=tensors.batched(opened.inputs, opened.outputs))


def _open(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    if len(shape) != len(spec.shape):
        return msgspec.structs.replace(spec, shape=(-1,) * len(shape))
    return msgspec.structs.replace(spec, shape=tuple(want if want == have else -1 for have, want in zip(shape, spec.shape, strict=True)))


def check_answer(outputs: Tensors) -> None:
    """Refuse a model whose answer to its own example is no number.

    Raises: BadModelError: NaN or infinity.
    """
    for name, array in outputs.items():
        if array.dtype.kind not in "fV" or np.isfinite(array).all():
            continue
        what = "NaN" if np.isnan(array).any() else "infinity"
        raise BadModelError(f"the model answers {what} on its example (output {name!r}); check its weights and the example's scale")
