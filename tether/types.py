"""Pure: the values that every part of Tether speaks of. No I/O, no third party but numpy and msgspec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NewType

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from tether.errors import BadInputError, BadNameError

__all__ = [
    "DATATYPES",
    "Array",
    "Datatype",
    "Digest",
    "Framework",
    "InferRequest",
    "InferResponse",
    "ModelFormat",
    "ModelInfo",
    "ModelRef",
    "ModelVersion",
    "RequestedOutput",
    "StoredTensor",
    "TensorSpec",
    "Tensors",
    "WorkerId",
    "WorkerMemory",
    "WorkerSite",
    "datatype_of",
    "dtype_of",
    "model_name",
]

Digest = NewType("Digest", str)
"""64 lower-case hex digits: BLAKE3 of the bytes that are stored."""
WorkerId = NewType("WorkerId", str)
"""Name of a worker, unique in its lab (`worker-1`); it survives a restart of the process."""
Array = npt.NDArray[np.generic]
Tensors = dict[str, Array]
"""Tensor name → array. Batch axis first where the model has one. Strings (datatype BYTES) are object arrays of `bytes`."""

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64", "BYTES"
]
"""Tensor element types as the Open Inference Protocol names them."""
Framework = Literal["onnx", "torch", "tensorflow", "custom"]
ModelFormat = Literal["onnx", "pt2", "torchscript", "savedmodel", "keras", "custom"]

DATATYPES: dict[Datatype, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_NAMES: dict[np.dtype[np.generic], Datatype] = {dtype: name for name, dtype in DATATYPES.items()}


def dtype_of(datatype: Datatype) -> np.dtype[np.generic]:
    """The numpy dtype for a protocol datatype; BYTES is `object` (elements are `bytes`)."""
    return DATATYPES[datatype]


def datatype_of(dtype: npt.DTypeLike) -> Datatype:
    """The protocol's name of a numpy dtype; str and bytes arrays are BYTES.

    Raises: BadInputError: the protocol has no such type (complex, datetime, …).
    """
    kind = np.dtype(dtype)
    if kind.kind in "SUO":
        return "BYTES"
    try:
        return _NAMES[kind.newbyteorder("<") if kind.byteorder == ">" else kind]
    except KeyError:
        raise BadInputError(f"no protocol datatype for numpy dtype {kind}; cast to one of {', '.join(DATATYPES)}") from None


_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_SHA = re.compile(r"sha-([0-9a-f]{8,64})")
RESERVED_NAMES = frozenset({"stats"})
"""`/v2/models/stats` is a path of the protocol's statistics extension (OIP §1)."""


def model_name(text: str) -> str:
    """`text`, if it is a valid model name: `[a-z0-9][a-z0-9._-]{0,63}`, not `stats`.

    Raises: BadNameError: it is not; the message says why.
    """
    if not _NAME.fullmatch(text):
        raise BadNameError(f"model name {text[:80]!r}: use 1–64 of a–z, 0–9, '.', '_', '-', starting with a letter or digit")
    if text in RESERVED_NAMES:
        raise BadNameError(f"model name {text!r} is reserved by the inference protocol; choose another")
    return text


class StoredTensor(msgspec.Struct, frozen=True):
    """A weight tensor and where it lies in the model's files: C-contiguous, little-endian."""

    name: str
    """As the framework names it: `conv1.weight`."""
    dtype: str
    """zarr's name of the element type: `float32`, `bfloat16`, `float8_e4m3fn` …"""
    shape: tuple[int, ...]
    file: str
    """Relative path in the model, with slashes."""
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ModelRef:
    """`[publisher/]name[:version | :sha-<hex> | @alias]`; in a URL the publisher is written `publisher~name`.

    >>> str(ModelRef.parse("digits@prod")), ModelRef.parse("alice~digits:3").publisher
    ('digits@prod', 'alice')
    """

    name: str
    publisher: str | None = None
    version: int | None = None
    alias: str | None = None
    sha: str | None = None
    """First ≥ 8 hex digits of the manifest's digest."""

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Raises: BadNameError: `text` is not a reference."""
        head, at, alias = text.partition("@")
        head, colon, version = head.partition(":")
        publisher, name = _split_publisher(head)
        if at and colon:
            raise BadNameError(f"model reference {text[:80]!r} has both a version and an alias; give one")
        if at and not _NAME.fullmatch(alias):
            raise BadNameError(f"alias {alias[:80]!r}: use 1–64 of a–z, 0–9, '.', '_', '-'")
        number, sha = _parse_version(version) if colon else (None, None)
        return cls(model_name(name), publisher, number, alias if at else None, sha)

    def __str__(self) -> str:
        head = f"{self.publisher}/{self.name}" if self.publisher else self.name
        if self.version is not None:
            return f"{head}:{self.version}"
        if self.sha is not None:
            return f"{head}:sha-{self.sha}"
        return f"{head}@{self.alias}" if self.alias else head


def _split_publisher(head: str) -> tuple[str | None, str]:
    for mark in "/~":
        publisher, found, name = head.partition(mark)
        if found:
            return model_name(publisher), name
    return None, head


def _parse_version(text: str) -> tuple[int | None, str | None]:
    if _VERSION.fullmatch(text):
        return int(text), None
    sha = _SHA.fullmatch(text)
    if sha:
        return None, sha[1]
    raise BadNameError(f"version {text[:80]!r}: use a number from 1, or sha- and at least 8 hex digits")


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a model."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    """-1 for a dimension that may vary; the batch axis, where there is one, is first and -1."""


class ModelInfo(msgspec.Struct, frozen=True):
    """What a model's files say of it: enough to check a request without loading it."""

    framework: Framework
    format: ModelFormat
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    """Whether the first axis of every input and output is the batch: requests may then run together."""
    pure: bool
    """Whether the same input always gives the same output and nothing is kept: a request may be tried twice."""
    code: bool
    """Whether loading or running the format can execute code of the publisher's: needs trust, runs in a runner process."""
    requirements: tuple[str, ...] = ()
    """Requirement specifiers (PEP 508) of a custom model."""
    streams: bool = False
    """Whether its answer comes in parts, any number of them: *decoupled*, as Triton has it. Asked for as one, the parts are joined."""


class ModelVersion(msgspec.Struct, frozen=True):
    """One published version: what a worker loads and a request runs on."""

    name: str
    """As in a URL: `digits`, or `publisher~digits`."""
    version: int
    digest: Digest
    """Of the manifest."""

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


class WorkerMemory(msgspec.Struct, frozen=True):
    """What models take of a worker's memory, in bytes."""

    used: int = 0
    """By those that are there, and reserved for those that are being loaded."""
    budget: int = 0
    """As much as they may take. 0: it is not bounded."""
    models: dict[str, int] = {}
    """`name:version` → bytes, as measured."""
    gpu_used: int = 0
    """Of the worker's card."""
    gpu_budget: int = 0

    @property
    def free(self) -> int | None:
        """Bytes that are left; None: as many as one likes."""
        return max(self.budget - self.used, 0) if self.budget else None


class WorkerSite(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was said of a worker when it was started, for those who choose where a model runs."""

    region: str = ""
    """"": nobody said."""
    labels: tuple[str, ...] = ()
    """Each as `gpu=a100`."""


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the caller asked for by name."""

    name: str
    binary: bool = False


@dataclass(slots=True)  # nobody changes one; frozen ones take four times as long to make, and each request makes one
class InferRequest:
    """A decoded inference request (OIP §2, §3)."""

    inputs: Tensors
    outputs: tuple[RequestedOutput, ...] | None = None
    """None: all of them."""
    id: str | None = None
    binary: bool = False
    """Whether outputs that do not say otherwise are answered in binary (`binary_data_output`)."""
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferResponse:
    """An inference answer."""

    model: str
    version: int
    outputs: Tensors
    id: str | None = None
