"""Pure: Open Inference Protocol bodies ↔ types, JSON and binary (OIP §2, §3), both sides; and the body of an error.

Who owns the memory: an array decoded from JSON owns it. An array decoded from binary is a read-only view of the body that was passed in, as
long as its address is aligned for its type (else a copy): keep the body unchanged and alive while the array is in use. BYTES elements are
always copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import orjson

from tether.errors import (
    BadInputError,
    InternalError,
    MalformedRequestError,
    ModelFailedError,
    RemoteError,
    RequestError,
    UnsupportedError,
)
from tether.types import (
    DATATYPES,
    Array,
    Datatype,
    InferRequest,
    InferResponse,
    ModelInfo,
    ModelVersion,
    RequestedOutput,
    Tensors,
    TensorSpec,
)
from tether.wire.elements import BINARY_ONLY, datatype_name, from_binary, from_json, to_binary, to_json
from tether.wire.faults import decode_error, encode_error

__all__ = [
    "Parameters",
    "ResponseWriter",
    "decode_error",
    "decode_request",
    "decode_response",
    "encode_error",
    "encode_request",
    "encode_response",
]

Parameters = dict[str, str | int | float | bool]
_NO_PARAMETERS: Final[Parameters] = {}
_NO_DATA: Final = msgspec.Raw(b"")
_DUMP: Final = orjson.OPT_SERIALIZE_NUMPY


class _Tensor(msgspec.Struct, gc=False):
    name: str
    shape: tuple[int, ...]
    datatype: str
    data: msgspec.Raw = _NO_DATA
    parameters: Parameters | None = None


class _Output(msgspec.Struct, gc=False):
    name: str
    parameters: Parameters | None = None


class _Request(msgspec.Struct, gc=False):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[_Output] | None = None


class _Response(msgspec.Struct, gc=False):
    model_name: str
    model_version: str
    outputs: list[_Tensor]
    id: str | None = None


_read_request = msgspec.json.Decoder(_Request).decode
_read_response = msgspec.json.Decoder(_Response).decode


def decode_request(body: bytes | memoryview, header_nbytes: int, info: ModelInfo) -> InferRequest:
    """The request in an HTTP body: checked against the model in names, datatypes, ranks, fixed dimensions, lengths.

    `header_nbytes` is the length of the JSON before the binary tensors; 0: all of the body is JSON. A binary array is a view of `body`
    (see the module).

    Raises: MalformedRequestError: the bytes are not what the protocol allows; BadInputError: they don't fit the model; UnsupportedError:
        shared memory, classification.
    """
    request, tail = _parse(_read_request, body, header_nbytes)
    inputs = _inputs(request.inputs, tail, info)
    parameters = request.parameters or _NO_PARAMETERS
    binary = parameters.get("binary_data_output", False) is True
    outputs = _requested(request.outputs, binary, info) if request.outputs else None
    return InferRequest(inputs, outputs, request.id, binary, parameters)


def _parse(read: Callable[[Any], Any], body: bytes | memoryview, header_nbytes: int) -> tuple[Any, memoryview]:
    nbytes = len(body)
    if not 0 <= header_nbytes <= nbytes:
        raise MalformedRequestError(f"Inference-Header-Content-Length is {header_nbytes}, the body has {nbytes} bytes")
    try:
        if not header_nbytes:
            return read(body), memoryview(b"")
        view = memoryview(body)
        return read(view[:header_nbytes]), view[header_nbytes:]
    except msgspec.ValidationError as error:
        raise MalformedRequestError(f"the JSON is not an inference message: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequestError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise MalformedRequestError("the JSON is nested too deeply") from None


def _inputs(sent: list[_Tensor], tail: memoryview, info: ModelInfo) -> Tensors:
    specs = info.inputs
    if len(sent) > len(specs):  # before 10^5 of them are looked at
        _check_names(sent[: len(specs) + 1], specs)
    inputs: Tensors = {}
    position = 0
    for tensor in sent:
        spec = _spec(tensor, specs)
        if tensor.name in inputs:
            raise BadInputError(f"input {spec.name!r} is given twice; send it once")
        inputs[spec.name], position = _input(tensor, spec, tail, position)
    if position != len(tail):
        raise MalformedRequestError(
            f"{len(tail) - position} bytes follow the last binary tensor; check binary_data_size and Inference-Header-Content-Length"
        )
    if len(inputs) != len(specs):
        _check_names(sent, specs)
    if info.batched and len(specs) > 1:
        _check_batch(inputs)
    return inputs


def _spec(tensor: _Tensor, specs: tuple[TensorSpec, ...]) -> TensorSpec:
    for spec in specs:
        if spec.name == tensor.name:
            _check_spec(tensor, spec)
            return spec
    raise BadInputError(f"the model has no input {tensor.name[:80]!r}; it expects {_described(specs)}")


def _check_names(sent: list[_Tensor], specs: tuple[TensorSpec, ...]) -> None:
    names, known = {tensor.name for tensor in sent}, {spec.name for spec in specs}
    for name in names - known:
        raise BadInputError(f"the model has no input {name[:80]!r}; it expects {_described(specs)}")
    for name in known - names:
        raise BadInputError(f"input {name!r} is missing; the model expects {_described(specs)}")
    raise BadInputError(f"an input is given twice; the model expects {_described(specs)}")


def _check_spec(tensor: _Tensor, spec: TensorSpec) -> None:
    if tensor.datatype != spec.datatype:
        raise BadInputError(f"input {spec.name!r} is {tensor.datatype[:20]!r}; the model expects {_described((spec,))}")
    shape, expected = tensor.shape, spec.shape
    if len(shape) != len(expected):
        raise BadInputError(f"input {spec.name!r} has rank {len(shape)}; the model expects {_described((spec,))}")
    for size, wanted in zip(shape, expected, strict=True):
        if size != wanted and (wanted >= 0 or size < 0):
            raise BadInputError(f"input {spec.name!r} has shape {str(list(shape))[:200]}; the model expects {_described((spec,))}")


def _described(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name!r} {spec.datatype} {list(spec.shape)}" for spec in specs[:20]) or "no inputs"


def _check_batch(inputs: Tensors) -> None:
    sizes = {name: array.shape[0] for name, array in inputs.items()}
    if len(set(sizes.values())) > 1:
        raise BadInputError(f"the first axis is the batch and must be the same in all inputs, not {sizes}")


def _input(tensor: _Tensor, spec: TensorSpec, tail: memoryview, position: int) -> tuple[Array, int]:
    try:
        return _elements(tensor, spec.datatype, tail, position)
    except BadInputError as error:
        raise BadInputError(f"input {spec.name!r}: {error}") from None


def _elements(tensor: _Tensor, datatype: Datatype, tail: memoryview, position: int, *, null_is_nan: bool = False) -> tuple[Array, int]:
    """The tensor's array, and where the next binary tensor begins in `tail`."""
    parameters = tensor.parameters or _NO_PARAMETERS
    nbytes = parameters.get("binary_data_size")
    if nbytes is not None:
        end = _end(tensor, nbytes, len(tail), position)
        return from_binary(tail[position:end], datatype, tensor.shape), end
    if "shared_memory_region" in parameters:
        raise UnsupportedError("shared memory is not offered; send the tensor in the body")
    if tensor.data is _NO_DATA:
        raise MalformedRequestError(f"tensor {tensor.name[:80]!r} has neither 'data' nor 'binary_data_size'")
    if datatype in BINARY_ONLY and not null_is_nan:
        raise BadInputError(f"{datatype} is sent in binary only: use binary_data_size (binary tensor data extension)")
    try:
        return from_json(tensor.data, datatype, tensor.shape, null_is_nan=null_is_nan), position
    except msgspec.DecodeError as error:
        raise MalformedRequestError(f"the data of tensor {tensor.name[:80]!r} is not valid JSON: {error}") from None


def _end(tensor: _Tensor, nbytes: str | float, available: int, position: int) -> int:
    if tensor.data is not _NO_DATA:
        raise MalformedRequestError(f"tensor {tensor.name[:80]!r} has both 'data' and 'binary_data_size'; send one")
    if type(nbytes) is not int or nbytes < 0:
        raise MalformedRequestError(f"binary_data_size of tensor {tensor.name[:80]!r} must be a number of bytes")
    if position + nbytes > available:
        raise MalformedRequestError(
            f"binary_data_size of tensor {tensor.name[:80]!r} is {nbytes}, but {available - position} bytes are left after the JSON; "
            "is Inference-Header-Content-Length right?"
        )
    return position + nbytes


def _requested(sent: list[_Output], binary: bool, info: ModelInfo) -> tuple[RequestedOutput, ...]:
    known = {spec.name for spec in info.outputs}
    found: dict[str, RequestedOutput] = {}
    for output in sent:
        name = output.name
        if name not in known:
            raise BadInputError(f"the model has no output {name[:80]!r}; it has {_described(info.outputs)}")
        if name in found:
            raise BadInputError(f"output {name!r} is requested twice; name it once")
        found[name] = RequestedOutput(name, _wants_binary(output, binary))
    return tuple(found.values())


def _wants_binary(output: _Output, default: bool) -> bool:
    parameters = output.parameters
    if not parameters:
        return default
    if parameters.get("classification"):
        raise UnsupportedError("the classification extension is not offered; take the output's scores and sort them")
    if "shared_memory_region" in parameters:
        raise UnsupportedError("shared memory is not offered; outputs come in the body")
    wanted = parameters.get("binary_data", default)
    if not isinstance(wanted, bool):
        raise MalformedRequestError(f"binary_data of output {output.name!r} must be true or false")
    return wanted


def encode_response(outputs: Tensors, model: ModelVersion, request: InferRequest, info: ModelInfo) -> tuple[bytes, int]:
    """As `ResponseWriter.write`."""
    return ResponseWriter(model, info).write(outputs, request)


class ResponseWriter:
    """The answers of one version."""

    def __init__(self, model: ModelVersion, info: ModelInfo) -> None:
        self._head: dict[str, Any] = {"model_name": model.name, "model_version": str(model.version)}
        self._all = {binary: tuple(RequestedOutput(spec.name, binary) for spec in info.outputs) for binary in (False, True)}

    def write(self, outputs: Tensors, request: InferRequest) -> tuple[bytes, int]:
        """The body of the answer and the length of its JSON part (0: all of it is JSON).

        Outputs come in the order requested, or the model's own. NaN and infinities are null in JSON, which has no text for them: ask for
        binary to get them exactly.

        Raises: RequestError: BYTES that are not UTF-8 asked for as JSON; ModelFailedError: an output of a type the protocol lacks;
            InternalError: an output is missing.
        """
        wanted = request.outputs or self._all[request.binary]
        described: list[dict[str, Any]] = []
        chunks: list[Any] = []
        for output in wanted:
            array = outputs.get(output.name)
            if array is None:
                raise InternalError(f"the runtime gave no output {output.name!r} of {self._head['model_name']}; please report it")
            described.append(_output(output, np.asarray(array), chunks))
        head = self._head.copy()
        if request.id is not None:
            head["id"] = request.id
        head["outputs"] = described
        return _joined(head, chunks, len(chunks) > 0)


def _joined(head: dict[str, Any], chunks: list[Any], binary: bool) -> tuple[bytes, int]:
    text = orjson.dumps(head, option=_DUMP)
    return (b"".join((text, *chunks)), len(text)) if binary else (text, 0)


def _output(output: RequestedOutput, array: Array, chunks: list[Any]) -> dict[str, Any]:
    try:
        return _described_tensor(output.name, array, output.binary, chunks)
    except BadInputError as error:
        raise ModelFailedError(f"output {output.name!r}: {error}") from None
    except UnicodeDecodeError:
        raise RequestError(f"output {output.name!r} has bytes that JSON can't carry; ask for it with the parameter binary_data") from None


def _described_tensor(name: str, array: Array, binary: bool, chunks: list[Any]) -> dict[str, Any]:
    datatype = datatype_name(array)
    described: dict[str, Any] = {"name": name, "datatype": datatype, "shape": array.shape}
    if binary:
        chunk = to_binary(array, datatype)
        chunks.append(chunk)
        described["parameters"] = {"binary_data_size": len(chunk)}
    else:
        described["data"] = to_json(array, datatype)
    return described


def encode_request(
    inputs: Tensors,
    *,
    outputs: Sequence[str] | None = None,
    id: str | None = None,  # noqa: A002 (the protocol's own name)
    binary: bool = True,
    priority: int = 0,
) -> tuple[bytes, int]:
    """A client's body and the length of its JSON part (0: all JSON). `binary` decides how inputs go and how outputs are asked for.

    `priority`: 1 is the most urgent, 0 the model's default.

    A tensor that JSON can't carry (FP16, BF16, NaN, infinities, bytes that are not UTF-8) goes binary all the same: mixed bodies are legal.

    Raises: BadInputError: a dtype that the protocol lacks.
    """
    chunks: list[Any] = []
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    head: dict[str, Any] = {} if id is None else {"id": id}
    head["inputs"] = [_described_tensor(name, array, binary or not _fits_json(array), chunks) for name, array in arrays.items()]
    if outputs is not None:
        head["outputs"] = [{"name": name} for name in outputs]
    parameters: Parameters = {"binary_data_output": True} if binary else {}
    if priority:
        parameters["priority"] = priority
    if parameters:
        head["parameters"] = parameters
    return _joined(head, chunks, bool(chunks))


def _fits_json(array: Array) -> bool:
    datatype = datatype_name(array)
    if datatype in BINARY_ONLY:
        return False
    if datatype == "BYTES":
        try:
            to_json(array, datatype)
        except UnicodeDecodeError:
            return False
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def decode_response(body: bytes | memoryview, header_nbytes: int) -> InferResponse:
    """The answer of a server; null in a float tensor is NaN. Binary arrays are views of `body` (see the module).

    Raises: RemoteError: the bytes are not an answer of the protocol.
    """
    try:
        answer, tail = _parse(_read_response, body, header_nbytes)
        outputs = _outputs(answer.outputs, tail)
        return InferResponse(answer.model_name, int(answer.model_version), outputs, answer.id)
    except (RequestError, ValueError) as error:
        raise RemoteError(f"the server's answer is not valid: {error}; is it an Open Inference Protocol server?") from None


def _outputs(sent: list[_Tensor], tail: memoryview) -> Tensors:
    outputs: Tensors = {}
    position = 0
    for tensor in sent:
        datatype = tensor.datatype
        if datatype not in DATATYPES or any(size < 0 for size in tensor.shape):
            raise BadInputError(f"output {tensor.name[:80]!r}: {datatype[:20]!r} {str(tensor.shape)[:200]} is no tensor")
        outputs[tensor.name], position = _elements(tensor, datatype, tail, position, null_is_nan=True)
    return outputs
