"""Pure: the generate extension (OIP §1): plain JSON keys in, plain JSON keys out, for models of text and tokens."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
import orjson

from tether.errors import BadInputError, MalformedRequestError
from tether.gateway.oip import nested_array, plain
from tether.types import Array, ModelInfo, Tensors, TensorSpec
from tether.wire.oip import decode_response, encode_request

__all__ = ["generate_answer", "generate_request"]

_read: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_read_parameters: Final = msgspec.json.Decoder(dict[str, str | int | float | bool]).decode
_read_id: Final = msgspec.json.Decoder(str).decode


def generate_request(body: bytes, info: ModelInfo) -> tuple[bytes, int]:
    """The request in the protocol's binary form: keys that are the model's inputs are tensors, all others parameters.

    A value with fewer dimensions than the input has gets leading ones of size 1: a text is a tensor of one.

    Raises: MalformedRequestError, BadInputError.
    """
    try:
        sent = _read(body)
        identity = _read_id(sent.pop("id")) if "id" in sent else None
        parameters: dict[str, Any] = dict(_read_parameters(sent.pop("parameters"))) if "parameters" in sent else {}
        specs = {spec.name: spec for spec in info.inputs}
        parameters |= _read_parameters(msgspec.json.encode({name: raw for name, raw in sent.items() if name not in specs}))
        inputs: Tensors = {name: _tensor(raw, specs[name]) for name, raw in sent.items() if name in specs}
    except msgspec.ValidationError as error:
        raise MalformedRequestError(f"the JSON is no object of inputs, parameters and an id that is text: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequestError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise MalformedRequestError("the JSON is nested too deeply") from None
    encoded, header_nbytes = encode_request(inputs, id=identity, binary=True)
    header_nbytes = header_nbytes or len(encoded)
    head = orjson.loads(memoryview(encoded)[:header_nbytes])
    head["parameters"] = parameters | head["parameters"]
    text = orjson.dumps(head)
    return text + encoded[header_nbytes:], len(text)


def _tensor(raw: msgspec.Raw, spec: TensorSpec) -> Array:
    array = nested_array(raw, spec)
    missing = len(spec.shape) - array.ndim
    if missing < 0:
        raise BadInputError(f"input {spec.name!r} has {array.ndim} dimensions; the model expects {spec.datatype} {list(spec.shape)}")
    return array.reshape((1,) * missing + array.shape)


def generate_answer(body: bytes, header_nbytes: int) -> bytes:
    """JSON of one answer: a value for each output, a list of them where it has more than one element."""
    answer = decode_response(body, header_nbytes)
    told: dict[str, Any] = {} if answer.id is None else {"id": answer.id}
    told |= {"model_name": answer.model, "model_version": str(answer.version)}
    told |= {name: _values(array) for name, array in answer.outputs.items()}
    return orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY)


def _values(array: Array) -> Any:
    return plain(array.reshape(() if array.size == 1 else -1) if array.dtype != object else _texts(array))


def _texts(array: Array) -> Array:
    """Of one dimension, or one text: numpy has no scalar of type object."""
    flat: Array = array.reshape(-1)
    return np.asarray(flat[0], object) if flat.size == 1 else flat
