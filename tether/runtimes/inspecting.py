"""What a publish asks of a model, in one trip to the sandbox: its weights, its metadata, its answer to the example."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import msgspec
import numpy as np

from tether.errors import BadInputError, BadModelError, ModelFailedError
from tether.ports import Streaming
from tether.runtimes import recognise
from tether.runtimes.generating import first_parts
from tether.runtimes.signatures import (
    Signature,
    check_answer,
    example_specs,
    fit,
    folder_signature,
    hinted,
    refine,
)
from tether.runtimes.weights import read_index
from tether.sandbox import Limits, arun
from tether.types import ModelFormat, ModelInfo, StoredTensor, Tensors, TensorSpec
from tether.wire.npz import from_npz, to_npz

if TYPE_CHECKING:
    from tether.ports import LoadedModel, Runtime

__all__ = ["Inspection", "inspect_in_sandbox", "inspect_model", "limits_for"]

_GENERAL_NBYTES = 3 << 30
"""What the libraries themselves may take: TensorFlow resides in 0.6 GB, and its threads' stacks and arenas count as well."""
_COPIES = 4
"""A model in memory while it loads: file, parsed form, weights, and one rearrangement of them."""
_CPU_SECONDS = 5.0
"""Processor time of an ONNX model beside that for its size: five times what a small one takes with all imports. A loop may be endless."""
_LOADED_NBYTES = 50e6
"""… of which each second more allows as much: a twentieth of what ONNX Runtime parses and packs in one."""

_NO_ANSWER = (msgspec.ValidationError, LookupError, TypeError, OSError, BadZipFile)
"""What reading the sandbox's answer raises where it makes no sense: only a model that took over the process can give such a one."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a publish records of a model."""

    info: ModelInfo
    example_inputs: Tensors | None
    """As given, named and cast to the model's datatypes."""
    example_outputs: Tensors | None
    tensors: tuple[StoredTensor, ...]
    """The weights. `file` is relative to the model's folder, or the name of its one file."""


def limits_for(path: Path, seconds: float = 60.0) -> Limits:
    """Sandbox limits that suit the size of the model."""
    return Limits(seconds, _GENERAL_NBYTES + _COPIES * _nbytes(path))


def _nbytes(path: Path) -> int:
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(entry.stat().st_size for entry in files)


async def inspect_in_sandbox(
    path: Path,
    framework: str | None = None,
    *,
    example: Path | None = None,
    hints: Signature | None = None,
    converted: Path | None = None,
    limits: Limits | None = None,
) -> Inspection:
    """`inspect_model` in a disposable process. The example is an `.npz` in a folder that may be written to.

    `converted`: a file to be written, for weights that lie in none of the model's files as zarr wants them; without it they are left out.

    Raises: as `tether.runtimes.inspect`; BadInputError: the example does not fit; BadModelError: also when it fails or answers NaN on it.
    """
    # names and first bytes only: what is plainly no model costs no process
    _, format_ = await asyncio.to_thread(recognise, path, framework)
    here = Path.cwd()
    argument = {
        "path": str(here / path),
        "framework": framework,
        "example": str(here / example) if example else None,
        "hints": msgspec.to_builtins(hints),
        "converted": str(here / converted) if converted else None,
    }
    limits = _bounded(limits or limits_for(path), path, format_)
    answer = await arun("tether.runtimes.inspecting:inspect_model", argument, limits=limits)
    try:
        info = msgspec.convert(answer["info"], ModelInfo)
        found = msgspec.convert(answer["tensors"], tuple[StoredTensor, ...])
        kinds = [kind for kind in ("inputs", "outputs") if example and answer[f"example_{kind}"]]
        arrays = {kind: await asyncio.to_thread(_read, example, kind) for kind in kinds if example}
    except _NO_ANSWER as error:
        raise BadModelError(f"the model's description is not valid: {error}") from None
    return Inspection(info, arrays.get("inputs"), arrays.get("outputs"), found)


def _bounded(limits: Limits, path: Path, format_: ModelFormat) -> Limits:
    """With less processor time for a format that imports nothing heavy."""
    if format_ != "onnx" or limits.cpu_seconds is not None:
        return limits
    return replace(limits, cpu_seconds=min(2 * limits.seconds, _CPU_SECONDS + _nbytes(path) / _LOADED_NBYTES))


def inspect_model(argument: Mapping[str, Any]) -> dict[str, Any]:
    """Runs in the sandbox.

    `{"path", "framework"?, "example"?, "hints"?, "converted"?}` → `{"tensors", "info", "example_inputs", "example_outputs"}`; the last
    two are paths beside the example (`NAME.inputs.npz`, `NAME.outputs.npz`), None without one. The weights come first: their reader
    executes nothing and refuses what hides in archives before a library sees it.

    Raises: as `inspect_in_sandbox`.
    """
    path = Path(argument["path"])
    runtime, format_ = recognise(path, argument.get("framework"))
    answer: dict[str, Any] = {"tensors": msgspec.to_builtins(_weights(path, format_, argument.get("converted")))}
    given = argument.get("hints")
    hints = msgspec.convert(given, Signature) if given else folder_signature(path)
    if not argument.get("example"):
        return answer | {"info": msgspec.to_builtins(hinted(runtime, path, hints)), "example_inputs": None, "example_outputs": None}
    example = Path(argument["example"])
    info, inputs, outputs = _self_test(runtime, path, from_npz(example.read_bytes()), hints)
    answer["info"] = msgspec.to_builtins(info)
    for kind, values in (("inputs", inputs), ("outputs", outputs)):
        file = _beside(example, kind)
        file.write_bytes(to_npz(values))
        answer[f"example_{kind}"] = str(file)
    return answer


def _weights(path: Path, format_: ModelFormat, converted: str | None) -> list[StoredTensor]:
    if converted is None:
        return read_index(path, format_)
    file = Path(converted)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as sink:
        found = read_index(path, format_, sink)
        used = sink.tell()
    if not used:
        file.unlink()
    return found


def _self_test(runtime: Runtime, path: Path, given: Tensors, hints: Signature | None) -> tuple[ModelInfo, Tensors, Tensors]:
    """The metadata, with what the example shows of it; the example as the model takes it; the answer."""
    info = hinted(runtime, path, hints or Signature(example_specs(given)))
    inputs = fit(given, info.inputs)
    model = runtime.load(path, info)
    try:
        outputs = first_parts(model.stream(inputs)) if info.streams and isinstance(model, Streaming) else model.run(inputs)
        check_answer(outputs)
        if info.outputs:
            return refine(info, inputs, outputs), inputs, outputs
        info = msgspec.structs.replace(info, outputs=example_specs(outputs))
        if info.streams:
            return msgspec.structs.replace(info, outputs=_any_rows(info.outputs)), inputs, outputs
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


def _beside(example: Path, kind: str) -> Path:
    return example.with_name(f"{example.stem}.{kind}.npz")


def _read(example: Path, kind: str) -> Tensors:
    """What the sandbox wrote, where it should: what it says of the place is not believed, and no link or bomb is followed."""
    file = _beside(example, kind)
    with ZipFile(file) as archive:
        packed = any(member.compress_type != ZIP_STORED for member in archive.infolist())
    if packed or file.is_symlink():
        raise BadModelError(f"the model wrote over the sandbox's answer ({file.name})")
    return from_npz(file.read_bytes())
