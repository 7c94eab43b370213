"""Pure: JSON with bytes behind it, as some calls between processes carry both: u32 LE nbytes | JSON | bytes."""

from __future__ import annotations

import struct
from typing import Any, Final

import orjson

from tether.errors import MalformedRequestError

__all__ = ["joined", "parted"]

_LENGTH: Final = struct.Struct("<I")


def joined(head: Any, body: bytes | memoryview = b"") -> bytes:
    """The value with this head."""
    text = orjson.dumps(head)
    return b"".join((_LENGTH.pack(len(text)), text, body))


def parted(value: bytes) -> tuple[bytes, bytes]:
    """JSON, not decoded, and what is behind it.

    >>> parted(joined({"a": 1}, b"rest"))
    (b'{"a":1}', b'rest')

    Raises: MalformedRequestError.
    """
    if len(value) < _LENGTH.size:
        raise MalformedRequestError("the value is a length of four bytes, JSON of that length, and bytes")
    end = _LENGTH.size + _LENGTH.unpack_from(value)[0]
    if end > len(value):
        raise MalformedRequestError(f"{end - _LENGTH.size} bytes of JSON were announced, {len(value) - _LENGTH.size} bytes came")
    return value[_LENGTH.size : end], value[end:]
