"""Pure: the frames of a stream of blobs. Each is one message of the stream; numbers are little endian. Both sides ask and answer.

    0 | "tetherblobs" | u8 version 1 | u32 window           hello, first; how many askings of the other side are worked on at a time
    1 | u32 id | u8 kind | digest                           ask for a blob (0), a signed manifest (1), the bitmap of a version (2)
    2 | u32 id                                              take it back; it is answered all the same, with 5 if nothing else
    3 | u32 id | u64 nbytes | bytes                         the answer begins
    4 | u32 id | bytes                                      and goes on, in order; pieces of other answers may come between
    5 | u32 id                                              not here
    6 | u32 id | {"error", "code"}                          not for you, or not now
    7 | digest | u32 index*                                 of a version whose bitmap was asked for more blobs are here now
    8 | text                                                goodbye: no further answers
    manifest = publisher (32 bytes) | u8 length of the signature | signature | the manifest's bytes
    bitmap   = one bit a blob, in the manifest's order, lowest bit first; the last byte is filled with zeros

A stream of messages knows where each ends, so no lengths are needed, and protomux, which would bring its channels, neither.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tether.errors import PeerFailedError, ProtocolError, RemoteError, TetherError
from tether.ports import SignedManifest
from tether.types import Digest
from tether.wire.faults import decode_error
from tether.wire.faults import encode_error as encode_body

__all__ = [
    "Absent",
    "Ask",
    "Begin",
    "BlobFrame",
    "Cancel",
    "Failed",
    "Goodbye",
    "Have",
    "Hello",
    "Kind",
    "Piece",
    "bits",
    "encode_absent",
    "encode_ask",
    "encode_begin",
    "encode_cancel",
    "encode_error",
    "encode_goodbye",
    "encode_have",
    "encode_hello",
    "encode_manifest",
    "encode_piece",
    "is_hello",
    "read_frame",
    "read_manifest",
]

_HELLO, _ASK, _CANCEL, _BEGIN, _PIECE, _ABSENT, _FAILED, _HAVE, _GOODBYE = range(9)
_MAGIC = b"\x00tetherblobs"
_VERSION = 1
_Hello, _Ask, _Id, _Begin = struct.Struct("<BI"), struct.Struct("<BIB32s"), struct.Struct("<BI"), struct.Struct("<BIQ")
_KEY_NBYTES = 32
_TEXT_NBYTES = 4096
_MAX_INDICES = 1 << 16


class Kind(enum.IntEnum):
    """What can be asked for."""

    BLOB = 0
    MANIFEST = 1
    BITMAP = 2


class Hello(NamedTuple):
    """The first frame of each side."""

    window: int


class Ask(NamedTuple):
    """Ask for something by its digest."""

    id: int
    kind: Kind
    digest: Digest


class Cancel(NamedTuple):
    """Take an asking back."""

    id: int


class Begin(NamedTuple):
    """The first bytes of an answer."""

    id: int
    nbytes: int
    data: memoryview


class Piece(NamedTuple):
    """The next bytes of an answer."""

    id: int
    data: memoryview


class Absent(NamedTuple):
    """It is not here, or was taken back."""

    id: int


class Failed(NamedTuple):
    """It can't be had."""

    id: int
    error: TetherError


class Have(NamedTuple):
    """More blobs of a version came."""

    digest: Digest
    indices: tuple[int, ...]


class Goodbye(NamedTuple):
    """No further answers."""

    text: str


BlobFrame = Hello | Ask | Cancel | Begin | Piece | Absent | Failed | Have | Goodbye


def is_hello(message: bytes | memoryview) -> bool:
    """Whether a stream that begins so is one of blobs; one of protomux is not."""
    return bytes(message[: len(_MAGIC)]) == _MAGIC


def encode_hello(window: int) -> bytes:
    """`window`: how many askings of the other side are worked on."""
    return _MAGIC + _Hello.pack(_VERSION, window)


def encode_ask(ask_id: int, kind: Kind, digest: Digest) -> bytes:
    """`ask_id`: not in use."""
    return _Ask.pack(_ASK, ask_id, kind, bytes.fromhex(digest))


def encode_cancel(ask_id: int) -> bytes:
    return _Id.pack(_CANCEL, ask_id)


def encode_begin(ask_id: int, nbytes: int, data: memoryview) -> bytes:
    """`nbytes`: of the whole answer, of which `data` is the first piece."""
    return b"".join((_Begin.pack(_BEGIN, ask_id, nbytes), data))


def encode_piece(ask_id: int, data: memoryview) -> bytes:
    return b"".join((_Id.pack(_PIECE, ask_id), data))


def encode_absent(ask_id: int) -> bytes:
    return _Id.pack(_ABSENT, ask_id)


def encode_error(ask_id: int, error: TetherError) -> bytes:
    """An error that the other side may know of."""
    text = str(error)[: _TEXT_NBYTES // 8].encode(errors="replace").decode()  # it may name a file whose name is no text
    return _Id.pack(_FAILED, ask_id) + encode_body(type(error)(text))


def encode_have(digest: Digest, indices: Sequence[int]) -> list[bytes]:
    """The frames that name these blobs of a version by their place in the manifest."""
    parts = (indices[at : at + _MAX_INDICES] for at in range(0, len(indices), _MAX_INDICES))
    return [bytes([_HAVE]) + bytes.fromhex(digest) + struct.pack(f"<{len(part)}I", *part) for part in parts]


def encode_goodbye(text: str) -> bytes:
    """`text`: for people."""
    return bytes([_GOODBYE]) + text.encode(errors="replace")[: _TEXT_NBYTES // 8]


def encode_manifest(manifest: SignedManifest) -> bytes:
    """What answers an asking for a manifest."""
    signature = manifest.signature
    return b"".join((bytes.fromhex(manifest.publisher), bytes([len(signature)]), signature, manifest.data))


def read_manifest(data: bytes) -> SignedManifest:
    """Raises: ProtocolError: it is none."""
    start = _KEY_NBYTES + 1 + (data[_KEY_NBYTES] if len(data) > _KEY_NBYTES else 0)
    if len(data) <= start:
        raise ProtocolError("a manifest that is cut short")
    return SignedManifest(data[start:], data[:_KEY_NBYTES].hex(), data[_KEY_NBYTES + 1 : start])


def bits(bitmap: bytes, count: int) -> list[bool]:
    """Which of the `count` blobs of a version are there. Raises: ProtocolError: the bitmap is not one of so many."""
    if len(bitmap) != (count + 7) // 8 or (count % 8 and bitmap[-1] >> count % 8):
        raise ProtocolError(f"a bitmap of {len(bitmap)} bytes that is none of {count} blobs")
    return [bool(bitmap[number // 8] >> number % 8 & 1) for number in range(count)]


def read_frame(message: memoryview, peer: str) -> BlobFrame:
    """A frame of `peer`; what it holds is valid as long as the message is. Raises: ProtocolError: it is none."""
    try:
        return _read(message, peer)
    except (struct.error, IndexError, ValueError) as error:
        raise ProtocolError(f"a frame that is none ({error})") from error


def _read(message: memoryview, peer: str) -> BlobFrame:
    reader = _READERS.get(message[0])
    if reader is None:
        raise ProtocolError(f"a frame of kind {message[0]}")
    return reader(message, peer)


def _ask(message: memoryview, _peer: str) -> Ask:
    _, ask_id, kind, digest = _Ask.unpack(message)
    return Ask(ask_id, Kind(kind), Digest(digest.hex()))


def _begin(message: memoryview, _peer: str) -> Begin:
    _, ask_id, nbytes = _Begin.unpack_from(message)
    return Begin(ask_id, nbytes, message[_Begin.size :])


def _piece(message: memoryview, _peer: str) -> Piece:
    return Piece(_Id.unpack_from(message)[1], message[_Id.size :])


def _failed(message: memoryview, peer: str) -> Failed:
    ask_id = _Id.unpack_from(message)[1]
    error = decode_error(502, bytes(message[_Id.size : _Id.size + _TEXT_NBYTES]))
    if type(error) in (TetherError, RemoteError, ProtocolError):
        error = PeerFailedError(f"peer {peer[:8]}…: {error}", "")
    return Failed(ask_id, error)


def _hello(message: memoryview, _peer: str) -> Hello:
    if not is_hello(message) or len(message) <= len(_MAGIC):
        raise ProtocolError("a stream that is none of blobs")
    version = message[len(_MAGIC)]
    if version != _VERSION:
        raise ProtocolError(f"it speaks version {version} of the blobs' protocol, this lab version {_VERSION}: upgrade the older one")
    return Hello(_Hello.unpack_from(message, len(_MAGIC))[1])


def _have(message: memoryview, _peer: str) -> Have:
    indices = message[1 + _KEY_NBYTES :]
    if len(message) < 1 + _KEY_NBYTES or len(indices) % 4 or len(indices) > 4 * _MAX_INDICES:
        raise ProtocolError(f"a list of blobs of {len(indices)} bytes")
    return Have(Digest(bytes(message[1 : 1 + _KEY_NBYTES]).hex()), tuple(found for (found,) in struct.iter_unpack("<I", indices)))


_READERS: Mapping[int, Callable[[memoryview, str], BlobFrame]] = {
    _HELLO: _hello,
    _ASK: _ask,
    _CANCEL: lambda message, _: Cancel(_Id.unpack(message)[1]),
    _BEGIN: _begin,
    _PIECE: _piece,
    _ABSENT: lambda message, _: Absent(_Id.unpack(message)[1]),
    _FAILED: _failed,
    _HAVE: _have,
    _GOODBYE: lambda message, _: Goodbye(str(message[1 : 1 + _TEXT_NBYTES], "utf-8", "replace")),
}
