"""Pure: the messages of an RPC channel as @hyperswarm/rpc 3.5 (protomux-rpc 1.10) writes them, and those of our own channel beside it.

    request    0 | uint id | string method | value            id 0: an event, which is not answered
    response   1 | flags | uint id | value
               or of an error: string message [| string code] [| string its cause's message | string its code [| string context]]
               flags: 1 an error, 2 with a code, 4 with a cause, 8 the cause has a context
    value      optional buffer: uint nbytes | bytes

The other channel (`tether/1/calls`), which a plain peer rejects and does without; ids are those of the requests:

    0 | uint milliseconds                    how long answers to requests from here on are waited for; 2^53 - 1: for ever
    1 | uint id                              the request is taken back, with its body and answer
    2 | uint id | uint nbytes | string method    a request whose body comes in pieces      3 | uint id | bytes    one of them
    4 | uint id | uint nbytes                the answer comes in pieces                     5 | uint id | bytes    one of them
    6 | uint id | uint nbytes                there is room for so many bytes more of the request's body
    7 | uint id | uint nbytes                … of the answer

Of a request over 1 MiB nothing is sent before the first 6, of an answer 1 MiB before the first 7 (`bodies.AHEAD_NBYTES`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from tether.errors import InternalError, MalformedRequestError, PeerFailedError, ProtocolError, TetherError, UnknownMethodError, from_code
from tether.swarm.wire.compact import MAX_UINT, read_buffer, read_string, read_uint, string, uint

__all__ = [
    "CALLS",
    "MESSAGE_NBYTES",
    "PROTOCOL",
    "REQUEST",
    "RESPONSE",
    "SMALL_NBYTES",
    "CallMessage",
    "Response",
    "encode_call",
    "encode_deadline",
    "encode_error",
    "encode_failure",
    "encode_method",
    "encode_request",
    "encode_response",
    "read_deadline",
    "read_method",
    "read_request",
    "read_response",
    "read_value",
]

PROTOCOL = "protomux-rpc"
CALLS = "tether/1/calls"
REQUEST, RESPONSE = 0, 1
_REQUEST, _RESPONSE = b"\x00", b"\x01\x00"
_ERROR, _CODE, _CAUSE, _CONTEXT = 1, 2, 4, 8
_ONE_BYTE = 0xFC
_METHOD_NBYTES = 256
MESSAGE_NBYTES = (1 << 24) - 4096
"""A message of a secure stream has a length of three bytes; the rest is room for its tag and the heads."""
SMALL_NBYTES = 4096
"""Values up to here go out as they are ready, many in one frame; larger ones when there is room for them."""
_TEXT_CHARS = 4096
"""An error's text beyond this is cut off: it is for people, and may come from a stranger."""


class CallMessage(enum.IntEnum):
    """What is said on our own channel."""

    DEADLINE = 0
    CANCEL = 1
    REQUEST = 2
    REQUEST_PIECE = 3
    RESPONSE = 4
    RESPONSE_PIECE = 5
    REQUEST_ROOM = 6
    RESPONSE_ROOM = 7


def encode_call(kind: CallMessage, request_id: int, *rest: bytes | memoryview) -> bytes:
    """A message of our own channel; `rest` is what follows the id."""
    return b"".join((uint(kind), uint(request_id), *rest))


def encode_deadline(seconds: float | None) -> bytes:
    """How long from now on answers are waited for; None: for ever."""
    milliseconds = MAX_UINT if seconds is None else min(max(0.0, seconds) * 1000, MAX_UINT)
    return uint(CallMessage.DEADLINE) + uint(round(milliseconds))


def read_deadline(body: memoryview) -> float | None:
    """As `encode_deadline` was given it. Raises: ProtocolError."""
    milliseconds, _ = read_uint(body, 0)
    return None if milliseconds == MAX_UINT else milliseconds / 1000


def encode_method(method: str) -> bytes:
    """A method's name, as `encode_request` takes it. Raises: MalformedRequestError: it is too long."""
    encoded = string(method)
    if len(encoded) > _METHOD_NBYTES:
        raise MalformedRequestError(f"the name of a method has at most {_METHOD_NBYTES - 3} bytes: {method[:80]!r}")
    return encoded


def encode_request(request_id: int, method: bytes, value: bytes) -> bytes:
    """A request; `method` from `encode_method`."""
    return b"".join((_REQUEST, uint(request_id), method, uint(len(value)), value))


def encode_response(request_id: int, value: bytes) -> bytes:
    """An answer that is none of the errors."""
    return b"".join((_RESPONSE, uint(request_id), uint(len(value)), value))


def read_request(body: memoryview) -> tuple[int, str, memoryview]:
    """Id, method, and the value as it is on the wire: `read_value` is for whoever was let in. Raises: ProtocolError."""
    request_id, at = read_uint(body, 0)
    method, at = read_method(body, at)
    return request_id, method, body[at:]


def read_method(body: memoryview, at: int) -> tuple[str, int]:
    """A method's name, and where what follows begins. Raises: ProtocolError."""
    method, at = read_buffer(body, at)
    if len(method) > _METHOD_NBYTES:
        raise ProtocolError(f"a method whose name has {len(method)} bytes")
    return str(method, "utf-8", "replace"), at


def read_value(value: memoryview) -> memoryview:
    """The bytes of a value; what follows them is passed over, as npm's package does. Raises: ProtocolError: they are cut short."""
    if value and value[0] <= _ONE_BYTE:
        if len(value) <= value[0]:
            raise ProtocolError("a value is cut short")
        return value[1 : 1 + value[0]]
    return read_buffer(value, 0)[0]


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str
    code: str = ""
    cause: str | None = None
    cause_code: str = ""
    context: str = ""


def encode_error(request_id: int, error: TetherError) -> bytes:
    """An error of ours: to npm's package a REQUEST_ERROR, or UNKNOWN_METHOD, whose cause has our message and code.

    What else the error knows is in the cause's context, as JSON.
    """
    text = str(error)[:_TEXT_CHARS]
    if isinstance(error, UnknownMethodError):
        return encode_failure(request_id, _Failure(text, "UNKNOWN_METHOD"))
    if isinstance(error, ProtocolError):  # the value could not be read
        return encode_failure(request_id, _Failure("Could not decode request", "DECODE_ERROR", text, MalformedRequestError.code))
    return encode_failure(request_id, _Failure("Request failed", "REQUEST_ERROR", text, error.code, _context(error)))


def _context(error: TetherError) -> str:
    if len(error.args) <= 1:
        return ""
    try:
        return orjson.dumps(error.args[1:], default=str).decode()
    except TypeError:  # half a surrogate in a name, a key that is no text: the message and the code go all the same
        return ""


def encode_failure(request_id: int, failure: _Failure) -> bytes:
    """A response that is an error."""
    flags, texts = _ERROR, [failure.message]
    if failure.code:
        flags |= _CODE
        texts.append(failure.code)
    if failure.cause is not None:
        flags |= _CAUSE
        texts += (failure.cause, failure.cause_code)
        if failure.context:
            flags |= _CONTEXT
            texts.append(failure.context)
    return b"".join((b"\x01", bytes([flags]), uint(request_id), *map(string, texts)))


class Response(NamedTuple):
    """What a peer answered."""

    id: int
    value: memoryview | None
    """None: an error."""
    error: TetherError | None = None


def read_response(body: memoryview, peer: str) -> Response:
    """An answer of `peer`. Raises: ProtocolError."""
    if not body:
        raise ProtocolError("an empty response")
    flags = body[0]
    request_id, at = read_uint(body, 1)
    if not flags & _ERROR:
        return Response(request_id, read_value(body[at:]))
    return Response(request_id, None, _error(_read_failure(body, at, flags), peer))


def _read_failure(body: memoryview, at: int, flags: int) -> _Failure:
    cause, cause_code, code, context = None, "", "", ""
    message, at = read_string(body, at)
    if flags & _CODE:
        code, at = read_string(body, at)
    if flags & _CAUSE:
        cause, at = read_string(body, at)
        cause_code, at = read_string(body, at)
        if flags & _CONTEXT:
            context, at = read_string(body, at)
    return _Failure(message[:_TEXT_CHARS], code, None if cause is None else cause[:_TEXT_CHARS], cause_code, context)


def _error(failure: _Failure, peer: str) -> TetherError:
    """Ours by its code; whatever a program in Node threw as `PeerFailedError`."""
    if failure.code == "UNKNOWN_METHOD":
        return UnknownMethodError(failure.message)
    if failure.cause is not None and failure.cause_code:
        error = from_code(failure.cause_code, failure.cause, *_details(failure.context))
        if type(error) is not TetherError and not isinstance(error, InternalError | ProtocolError):
            return error
    code = failure.cause_code or failure.code
    return PeerFailedError(f"peer {peer[:8]}…: {failure.cause or failure.message}", code)


def _details(context: str) -> list[object]:
    try:
        found = orjson.loads(context) if context else []
    except orjson.JSONDecodeError:
        return []  # of a program in Node: its errors' own
    return found if isinstance(found, list) else []
