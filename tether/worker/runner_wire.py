"""What a worker and the process of one of its models say to each other.

Four bytes of length, then msgpack of one message below: private to one version of Tether, both ends being of the same installation. The
tensors themselves lie in two memfds, one for each direction, which their writer lets grow.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, TypeVar

import msgspec

from tether.runtimes.arena import Place
from tether.types import Framework, ModelInfo

__all__ = [
    "REPLIES",
    "REQUESTS",
    "Begin",
    "DeadError",
    "Done",
    "Ended",
    "Failed",
    "Grown",
    "Leave",
    "Load",
    "Reply",
    "Request",
    "Run",
    "Step",
    "Warm",
    "Whole",
    "receive",
    "send",
]

_LENGTH = struct.Struct("<I")


class Warm(msgspec.Struct, tag="warm", frozen=True):
    framework: Framework


class Load(msgspec.Struct, tag="load", frozen=True):
    path: str
    info: ModelInfo
    threads: int
    scratch: str = ""
    arriving: bool = False
    """Whether the files are still coming: `Grown`, any number of them, and `Whole` follow, and the answer after that."""


class Grown(msgspec.Struct, tag="grown", frozen=True):
    folder: str
    """Where the files are written."""
    files: dict[str, int]
    """How far each is that got further."""


class Whole(msgspec.Struct, tag="whole", frozen=True):
    """The files are all there, where `Load` says."""


class Run(msgspec.Struct, tag="run", frozen=True):
    tensors: list[Place]


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """A stream, answered when its inputs were taken: the model's code runs when a part is asked for."""

    stream: int
    """Its number, given by who asks."""
    tensors: list[Place]


class Step(msgspec.Struct, tag="step", frozen=True):
    """The next part, else `Ended`; after that, or `Failed`, the stream is no more."""

    stream: int


class Leave(msgspec.Struct, tag="leave", frozen=True):
    """No more of this stream."""

    stream: int


class Done(msgspec.Struct, tag="done", frozen=True):
    tensors: list[Place] = []


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """A stream has no more parts."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    code: str
    args: list[Any]


Request = Warm | Load | Grown | Whole | Run | Begin | Step | Leave
Reply = Done | Ended | Failed
_Message = TypeVar("_Message")
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_ENCODER = msgspec.msgpack.Encoder()


class DeadError(Exception):
    """The other end is gone."""


def send(connection: socket.socket, message: Request | Reply) -> None:
    """Raises: DeadError."""
    data = _ENCODER.encode(message)
    try:
        connection.sendall(_LENGTH.pack(len(data)) + data)
    except OSError:
        raise DeadError from None


def receive(connection: socket.socket, decoder: msgspec.msgpack.Decoder[_Message]) -> _Message:
    """Raises: DeadError."""
    data = _exactly(connection, _LENGTH.size)
    return decoder.decode(_exactly(connection, _LENGTH.unpack(data)[0]))


def _exactly(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        try:
            part = connection.recv(nbytes - len(data))
        except OSError:
            part = b""
        if not part:
            raise DeadError
        data += part
    return data
