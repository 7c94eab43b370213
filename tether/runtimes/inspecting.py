"""What a publish asks of a model, in one trip to the sandbox: its metadata, and its answer to the example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from tether.errors import BadInputError, BadModelError, ModelFailedError
from tether.runtimes import recognise
from tether.runtimes.signatures import (
    Signature,
    check_answer,
    example_specs,
    fit,
    folder_signature,
    hinted,
    refine,
)
from tether.sandbox import Limits, arun
from tether.types import ModelInfo, Tensors, TensorSpec
from tether.wire.npz import from_npz, to_npz

if TYPE_CHECKING:
    from tether.ports import LoadedModel, Runtime

__all__ = ["Inspection", "inspect_in_sandbox", "inspect_model", "limits_for"]

_GENERAL_NBYTES = 3 << 30
"""What the libraries themselves may take: TensorFlow resides in 0.6 GB, and its threads' stacks and arenas count as well."""
_COPIES = 4
"""A model in memory while it loads: file, parsed form, weights, and one rearrangement of them."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a publish records of a model."""

    info: ModelInfo
    example_inputs: Tensors | None
    """As given, named and cast to the model's datatypes."""
    example_outputs: Tensors | None


def limits_for(path: Path, seconds: float = 60.0) -> Limits:
    """Sandbox limits that suit the size of the model."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return Limits(seconds, _GENERAL_NBYTES + _COPIES * sum(entry.stat().st_size for entry in files))


async def inspect_in_sandbox(
    path: Path, framework: str | None = None, *, example: Path | None = None, hints: Signature | None = None, limits: Limits | None = None
) -> Inspection:
    """`inspect_model` in a disposable process. The example is an `.npz` in a folder that may be written to.

    Raises: as `tether.runtimes.inspect`; BadInputError: the example does not fit; BadModelError: also when it fails or answers NaN on it.
    """
    recognise(path, framework)  # names and first bytes only: what is plainly no model costs no process
    here = Path.cwd()
    argument = {
        "path": str(here / path),
        "framework": framework,
        "example": str(here / example) if example else None,
        "hints": msgspec.to_builtins(hints),
    }
    answer = await arun("tether.runtimes.inspecting:inspect_model", argument, limits=limits or limits_for(path))
    try:
        info = msgspec.convert(answer["info"], ModelInfo)
    except msgspec.ValidationError as error:  # only a model that took over the process can do this
        raise BadModelError(f"the model's description is not valid: {error}") from None
    return Inspection(info, _read(answer, "example_inputs"), _read(answer, "example_outputs"))


def inspect_model(argument: Mapping[str, Any]) -> dict[str, Any]:
    """Runs in the sandbox.

    `{"path", "framework"?, "example"?, "hints"?}` → `{"info", "example_inputs", "example_outputs"}`; the last two are paths beside the
    example (`NAME.inputs.npz`, `NAME.outputs.npz`), None without one.

    Raises: as `inspect_in_sandbox`.
    """
    path = Path(argument["path"])
    runtime, _ = recognise(path, argument.get("framework"))
    given = argument.get("hints")
    hints = msgspec.convert(given, Signature) if given else folder_signature(path)
    if not argument.get("example"):
        return {"info": msgspec.to_builtins(hinted(runtime, path, hints)), "example_inputs": None, "example_outputs": None}
    example = Path(argument["example"])
    info, inputs, outputs = _self_test(runtime, path, from_npz(example.read_bytes()), hints)
    answer = {"info": msgspec.to_builtins(info)}
    for kind, values in (("inputs", inputs), ("outputs", outputs)):
        file = example.with_name(f"{example.stem}.{kind}.npz")
        file.write_bytes(to_npz(values))
        answer[f"example_{kind}"] = str(file)
    return answer


def _self_test(runtime: Runtime, path: Path, given: Tensors, hints: Signature | None) -> tuple[ModelInfo, Tensors, Tensors]:
    """The metadata, with what the example shows of it; the example as the model takes it; the answer."""
    info = hinted(runtime, path, hints or Signature(example_specs(given)))
    inputs = fit(given, info.inputs)
    model = runtime.load(path, info)
    try:
        outputs = model.run(inputs)
        check_answer(outputs)
        if info.outputs:
            return refine(info, inputs, outputs), inputs, outputs
        info = msgspec.structs.replace(info, outputs=example_specs(outputs))
        return info if hints else _probe_rows(model, info, inputs), inputs, outputs
    finally:
        model.close()


def _probe_rows(model: LoadedModel, info: ModelInfo, inputs: Tensors) -> ModelInfo:
    """Whether the first axis is the batch, for a format that does not say: an example twice as long has to get an answer twice as long."""
    if not all(spec.shape for spec in (*info.inputs, *info.outputs)):
        return info
    try:
        doubled = model.run({name: np.concatenate([array, array]) for name, array in inputs.items()})
    except (ModelFailedError, BadInputError):
        return info
    if any(doubled[spec.name].shape != (2 * spec.shape[0], *spec.shape[1:]) for spec in info.outputs):
        return info
    return msgspec.structs.replace(info, inputs=_any_rows(info.inputs), outputs=_any_rows(info.outputs), batched=True)


def _any_rows(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(msgspec.structs.replace(spec, shape=(-1, *spec.shape[1:])) for spec in specs)


def _read(answer: Mapping[str, Any], kind: str) -> Tensors | None:
    return from_npz(Path(answer[kind]).read_bytes()) if answer[kind] else None
