"""Pure: the protocol's paths, its metadata, raw requests, compressed bodies and the short form of an inference (OIP §1–§3)."""

from __future__ import annotations

import re
import zlib
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import msgspec
import numpy as np
import orjson

from tether._version import __version__
from tether.errors import BadInputError, MalformedRequestError, PayloadTooLargeError
from tether.routing.table import ModelEntry, Table, VersionEntry
from tether.types import Array, ModelFormat, ModelInfo, TensorSpec, dtype_of
from tether.wire.elements import from_json
from tether.wire.oip import decode_response, encode_request

__all__ = [
    "PLATFORMS",
    "Target",
    "decompressed",
    "is_ready",
    "lab_is_ready",
    "model_metadata",
    "nested_array",
    "plain",
    "raw_request",
    "repository_index",
    "server_metadata",
    "short_answer",
    "short_request",
    "target_of",
]

Target = tuple[str, str | None]
"""Model and version as the URL says them."""

_INFER: Final = re.compile(rb"/v2/models/([^/?#]+)(?:/versions/([^/?#]+))?/infer(?:\?[^#]*)?")
PLATFORMS: Final[dict[ModelFormat, str]] = {
    "onnx": "onnxruntime_onnx",
    "pt2": "pytorch_pt2",
    "torchscript": "pytorch_torchscript",
    "savedmodel": "tensorflow_savedmodel",
    "keras": "tensorflow_keras",
    "custom": "python_custom",
}
_EXTENSIONS: Final = ["binary_tensor_data", "generate", "model_configuration", "parameters", "schedule_policy"]
_INDEX_STATE: Final = {"ready": "READY", "loading": "LOADING", "unloaded": "UNAVAILABLE", "failed": "UNAVAILABLE"}


def target_of(url: bytes) -> Target | None:
    """Model and version of an inference URL; None for every other URL."""
    found = _INFER.fullmatch(url)
    if found is None:
        return None
    model, version = found.groups()
    return _text(model), None if version is None else _text(version)


def _text(part: bytes) -> str:
    return unquote_to_bytes(part).decode("utf-8", "replace")


def server_metadata() -> dict[str, Any]:
    """`GET /v2`; only extensions that work are named."""
    return {"name": "tether", "version": __version__, "extensions": _EXTENSIONS}


def model_metadata(name: str, table: Table, entry: VersionEntry, *, all_versions: bool) -> dict[str, Any]:
    """`GET /v2/models/{m}[/versions/{v}]`."""
    versions = sorted(table.models[name.partition("@")[0]].versions) if all_versions else [entry.model.version]
    return {
        "name": entry.model.name,
        "versions": [str(version) for version in versions],
        "platform": PLATFORMS[entry.info.format],
        "inputs": [_tensor_metadata(spec) for spec in entry.info.inputs],
        "outputs": [_tensor_metadata(spec) for spec in entry.info.outputs],
    }


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def lab_is_ready(table: Table) -> bool:
    """Whether a request could be answered: the orchestrator spoke, and a worker runs."""
    return any(worker.state == "running" for worker in table.workers.values())


def is_ready(table: Table, entry: VersionEntry) -> bool:
    """Whether an inference would be answered: it is loaded, or will be when asked for (which waits for it)."""
    return bool(entry.routes) or (entry.state != "failed" and lab_is_ready(table))


def repository_index(table: Table, *, only_ready: bool) -> list[dict[str, str]]:
    """`POST /v2/repository/index`."""
    rows = [_index_row(model, version) for model in table.models.values() for version in model.versions.values()]
    return [row for row in rows if not only_ready or row["state"] == "READY"]


def _index_row(model: ModelEntry, version: VersionEntry) -> dict[str, str]:
    reason = version.reason or ("unloaded" if version.state == "unloaded" else "")
    return {"name": model.name, "version": str(version.model.version), "state": _INDEX_STATE[version.state], "reason": reason}


def raw_request(body: bytes, info: ModelInfo) -> tuple[bytes, int]:
    """The binary request that a raw one (header length 0, body a bare tensor) means; all outputs come back binary.

    Raises: BadInputError: the model has more than one input or dynamic dimension, or the body does not fill whole rows.
    """
    if len(info.inputs) != 1:
        raise BadInputError(
            f"a raw request needs a model with one input; this one has {len(info.inputs)}: send the binary form with its JSON"
        )
    spec = info.inputs[0]
    described: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": _raw_shape(len(body), spec)}
    packed = body
    if spec.datatype == "BYTES":
        packed = len(body).to_bytes(4, "little") + body
    described["parameters"] = {"binary_data_size": len(packed)}
    head = orjson.dumps({"inputs": [described], "parameters": {"binary_data_output": True}})
    return head + packed, len(head)


def _raw_shape(nbytes: int, spec: TensorSpec) -> list[int]:
    if spec.datatype == "BYTES":
        return [1] * len(spec.shape)
    dynamic = sum(size < 0 for size in spec.shape)
    if dynamic > 1:
        raise BadInputError(f"a raw request needs at most one dynamic dimension; input {spec.name!r} has shape {list(spec.shape)}")
    row = dtype_of(spec.datatype).itemsize
    for size in spec.shape:
        row *= size if size >= 0 else 1
    if dynamic == 0 or row == 0:
        return list(spec.shape)  # the worker compares the length
    if nbytes % row:
        raise BadInputError(f"the raw body has {nbytes} bytes; {spec.datatype} {list(spec.shape)} takes a multiple of {row}")
    return [size if size >= 0 else nbytes // row for size in spec.shape]


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """The body behind `Content-Encoding: gzip | deflate`; never more than `limit` bytes are made.

    Raises: PayloadTooLargeError; MalformedRequestError: another encoding, or not what it says.
    """
    windows = {"gzip": 31, "x-gzip": 31, "deflate": 15}
    wanted = windows.get(encoding.strip().lower())
    if wanted is None:
        raise MalformedRequestError(f"Content-Encoding {encoding[:40]!r} is not understood; send gzip, deflate or no encoding")
    stream = zlib.decompressobj(wanted)
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedRequestError(f"the body is not what Content-Encoding says ({encoding}): {error}") from None
    if len(plain) > limit:
        raise PayloadTooLargeError(f"the decompressed body is over the limit of {limit} bytes; send smaller batches")
    if not stream.eof or stream.unused_data:
        raise MalformedRequestError(f"the {encoding} body is cut short or followed by other bytes")
    return plain


class _Short(msgspec.Struct):
    model: str
    inputs: dict[str, msgspec.Raw] | list[msgspec.Raw]
    version: str | int | None = None
    id: str | None = None


_read_short = msgspec.json.Decoder(_Short).decode
_read_any = msgspec.json.Decoder().decode


def short_request(body: bytes, table: Table) -> tuple[Target, bytes, int]:
    """`POST /inference`: where it goes, and the same request in the protocol's form.

    `{"model", "version"?, "inputs": {name: nested list}}`; shapes are those of the lists, datatypes the model's. `inputs` may be the
    protocol's list instead.

    Raises: MalformedRequestError, BadInputError, UnknownModelError, UnknownVersionError.
    """
    try:
        sent = _read_short(body)
        version = None if sent.version is None else str(sent.version)
        entry = table.resolve(sent.model, version)
        if isinstance(sent.inputs, list):
            head = b'{"inputs":[' + b",".join(bytes(memoryview(tensor)) for tensor in sent.inputs) + b"]}"
            return (sent.model, version), head, 0
        arrays = {name: _nested(name, raw, entry.info) for name, raw in sent.inputs.items()}
    except msgspec.ValidationError as error:
        raise MalformedRequestError(f'the JSON is not {{"model": …, "inputs": {{name: list}}}}: {error}') from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequestError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise MalformedRequestError("the JSON is nested too deeply") from None
    return (sent.model, version), *encode_request(arrays, binary=True)


def _nested(name: str, raw: msgspec.Raw, info: ModelInfo) -> Array:
    for spec in info.inputs:
        if spec.name == name:
            return nested_array(raw, spec)
    raise BadInputError(f"the model has no input {name[:80]!r}; it expects {', '.join(repr(spec.name) for spec in info.inputs)}")


def nested_array(raw: msgspec.Raw, spec: TensorSpec) -> Array:
    """A nested list, or one value, as an array of the input's datatype and of its own shape.

    Raises: BadInputError; `msgspec.DecodeError` and RecursionError pass through.
    """
    shape: list[int] = []
    values = _read_any(raw)
    scalar = not isinstance(values, list)
    while isinstance(values, list):
        shape.append(len(values))
        values = values[0] if values else None
    try:
        if scalar:
            return from_json(msgspec.Raw(b"[" + bytes(memoryview(raw)) + b"]"), spec.datatype, ())
        return from_json(raw, spec.datatype, tuple(shape))
    except BadInputError as error:
        raise BadInputError(f"input {spec.name!r}: {error}; the model expects {spec.datatype} {list(spec.shape)}") from None


def short_answer(body: bytes, header_nbytes: int) -> bytes:
    """The short form of an answer: `{"model", "version", "outputs": {name: nested list}}`; NaN and infinities are null."""
    answer = decode_response(body, header_nbytes)
    outputs = {name: plain(array) for name, array in answer.outputs.items()}
    return orjson.dumps({"model": answer.model, "version": answer.version, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)


def plain(array: Array) -> Any:
    """What orjson writes as nested lists, or as one value: text as it is, NaN and infinities as null."""
    if array.dtype == object:
        return _texts(array.tolist())
    if array.dtype.kind == "V":  # bfloat16: orjson does not know it
        array = array.astype(np.float32)
    return array if array.ndim else array.item()


def _texts(value: Any) -> Any:
    return [_texts(item) for item in value] if isinstance(value, list) else value.decode("utf-8", "replace")
