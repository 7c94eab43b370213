"""Pure: compact-encoding as far as protomux and its RPC need it: numbers, texts, byte strings. No length is believed beyond the end.

uint     up to 0xFC one byte; else 0xFD u16, 0xFE u32, 0xFF u64, little endian; over 2^53 - 1 is refused, as JavaScript does
string   uint nbytes | UTF-8            buffer   uint nbytes | bytes; the optional one of no bytes stands for null
"""

from __future__ import annotations

import struct

from tether.errors import ProtocolError

__all__ = ["MAX_UINT", "buffer", "read_buffer", "read_string", "read_uint", "string", "uint"]

_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_ONE_BYTE = 0xFC
_WIDE = {0xFD: _U16, 0xFE: _U32, 0xFF: _U64}
MAX_UINT = (1 << 53) - 1
_SMALL = tuple(bytes([number]) for number in range(_ONE_BYTE + 1))


def uint(number: int) -> bytes:
    """`number`, which is from 0 to MAX_UINT."""
    if number <= _ONE_BYTE:
        return _SMALL[number]
    if number <= 0xFFFF:  # noqa: PLR2004 (what two bytes hold)
        return b"\xfd" + _U16.pack(number)
    return b"\xfe" + _U32.pack(number) if number <= 0xFFFFFFFF else b"\xff" + _U64.pack(number)  # noqa: PLR2004 (four bytes)


def read_uint(data: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and where what follows begins. Raises: ProtocolError: `data` ends before it does, or it is too large."""
    if at >= len(data):
        raise ProtocolError("a message ends where a number should stand")
    first = data[at]
    if first <= _ONE_BYTE:
        return first, at + 1
    form = _WIDE[first]
    if len(data) - at - 1 < form.size:
        raise ProtocolError("a message ends within a number")
    number: int = form.unpack_from(data, at + 1)[0]
    if number > MAX_UINT:
        raise ProtocolError("a number over 2^53 - 1")
    return number, at + 1 + form.size


def buffer(data: bytes) -> bytes:
    """Bytes with their length before them."""
    return uint(len(data)) + data


def read_buffer(data: memoryview, at: int) -> tuple[memoryview, int]:
    """A part of `data`, not copied, and where what follows begins. Raises: ProtocolError: it reaches beyond the end."""
    nbytes, at = read_uint(data, at)
    if len(data) - at < nbytes:
        raise ProtocolError(f"a message says that {nbytes} bytes follow, and {len(data) - at} do")
    return data[at : at + nbytes], at + nbytes


def string(text: str) -> bytes:
    """A text."""
    return buffer(text.encode(errors="replace"))


def read_string(data: memoryview, at: int) -> tuple[str, int]:
    """A text, and where what follows begins; what is no UTF-8 in it is replaced, as JavaScript does. Raises: ProtocolError."""
    found, at = read_buffer(data, at)
    return str(found, "utf-8", "replace"), at
