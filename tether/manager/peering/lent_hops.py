"""Pure: a request on its way to a worker of this lab ↔ the `infer` of another lab that lends it one."""

from __future__ import annotations

import struct
from typing import Final

from tether.errors import (
    ForbiddenError,
    LoadFailedError,
    MalformedRequestError,
    ManagerLeavingError,
    NotFoundError,
    NoWorkerError,
    PeerLeavingError,
    PeerNotFoundError,
    PeerUnreachableError,
    ProtocolError,
    QueueFullError,
    ServiceUnavailableError,
    TetherError,
    WorkerLostError,
)
from tether.ports import Hop, HopReply, Undelivered
from tether.types import ModelVersion
from tether.wire.faults import encode_error

__all__ = ["asked", "failed", "replied"]

_LENGTH: Final = struct.Struct("<I")
_SPACE: Final = b" \t\r\n"
_NAMED: Final = b'{"model_name":"'
"""How an answer of ours begins."""
_BINARY: Final = b'"binary_data_size"'
_OK: Final = 200
_NOT_THERE = (
    PeerNotFoundError,
    PeerUnreachableError,
    PeerLeavingError,
    ManagerLeavingError,
    NoWorkerError,
    LoadFailedError,
    QueueFullError,
    NotFoundError,
    ForbiddenError,
)
"""It ran nothing: it was not reached, is about to end, has no room, or has the version no more; another worker may."""
_UNKNOWN = (ServiceUnavailableError, WorkerLostError)
"""It may have run it."""


def asked(hop: Hop, publisher: str, model: ModelVersion) -> bytes:
    """The value of `infer`: `u32 | JSON | tensors`, with the name by which the other lab has this lab's version in its JSON.

    The name comes last: what a caller wrote in its place does not count. Raises: MalformedRequestError: the JSON is no object.
    """
    nbytes = hop.header_nbytes or len(hop.body)
    text = hop.body[:nbytes].rstrip(_SPACE)
    inner = text[:-1].rstrip(_SPACE)
    if nbytes > len(hop.body) or not text.endswith(b"}") or not inner:
        raise MalformedRequestError("the body is no JSON object, which an inference request is")
    comma = b"" if inner.endswith(b"{") else b","
    named = b'%b"model_name":"%b~%b:sha-%b"}' % (comma, publisher.encode(), model.name.encode(), model.digest.encode())
    return b"".join((_LENGTH.pack(len(inner) + len(named)), inner, named, memoryview(hop.body)[nbytes:]))


def replied(answer: bytes, model: ModelVersion) -> HopReply:
    """What the gateway sends on: the answer, by the name that the model has here. Raises: ProtocolError: it is none."""
    nbytes = _LENGTH.unpack_from(answer)[0] if len(answer) >= _LENGTH.size else 0
    end = _LENGTH.size + nbytes
    if not 0 < nbytes <= len(answer) - _LENGTH.size:
        raise ProtocolError(f"the lab that runs {model} sent no answer to an inference, but {len(answer)} bytes: tell its owner")
    text = _renamed(answer[_LENGTH.size : end], model)
    is_binary = end < len(answer) or _BINARY in text  # of tensors without elements nothing follows
    return HopReply(_OK, b"".join((text, memoryview(answer)[end:])), len(text) if is_binary else 0)


def _renamed(text: bytes, model: ModelVersion) -> bytes:
    if not text.startswith(_NAMED):
        return text
    return _NAMED + model.name.encode() + text[text.index(b'"', len(_NAMED)) :] if b'"' in text[len(_NAMED) :] else text


def failed(error: TetherError) -> HopReply | Undelivered:
    """What becomes of a request that the other lab, or the way to it, refused."""
    if isinstance(error, _NOT_THERE):
        return Undelivered.NOT_SENT
    if isinstance(error, _UNKNOWN):
        return Undelivered.LOST
    return HopReply(error.http_status, encode_error(error))
