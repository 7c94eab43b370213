"""Pure: an answer in parts as one HTTP body, for clients that take tensors in binary (`application/x-tether-parts`).

    part = u32 status | u32 nbytes of JSON before binary tensors, or 0 | u32 nbytes | body

Little endian. Status 200: the body is an answer of the Open Inference Protocol; 204: all parts came, nothing follows; else the body is an
error, and nothing follows. A body that ends without either was cut off.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from tether.errors import RemoteError

__all__ = ["END", "PARTS_KIND", "Part", "PartReader", "encode_part"]

PARTS_KIND: Final = "application/x-tether-parts"
_HEAD: Final = struct.Struct("<III")
_NO_CONTENT: Final = 204
_MOST_NBYTES: Final = 1 << 30
"""Of one part: a worker's frame has no more."""


class Part(NamedTuple):
    """One part, or what ends them."""

    status: int
    header_nbytes: int
    body: bytes

    @property
    def is_end(self) -> bool:
        """Whether all parts came."""
        return self.status == _NO_CONTENT


def encode_part(status: int, body: bytes, header_nbytes: int = 0) -> bytes:
    """One part.

    >>> PartReader().fed(encode_part(200, b"{}") + END)
    [Part(status=200, header_nbytes=0, body=b'{}'), Part(status=204, header_nbytes=0, body=b'')]
    """
    return _HEAD.pack(status, header_nbytes, len(body)) + body


END: Final = encode_part(_NO_CONTENT, b"")


class PartReader:
    """Cuts what comes into parts."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def fed(self, data: bytes) -> list[Part]:
        """Those that `data` completes. Raises: RemoteError: it is something else."""
        self._buffer += data
        found: list[Part] = []
        start = 0
        while len(self._buffer) - start >= _HEAD.size:
            status, header_nbytes, nbytes = _HEAD.unpack_from(self._buffer, start)
            if nbytes > _MOST_NBYTES or header_nbytes > nbytes:
                raise RemoteError("the answer is no answer in parts; do the gateway's version and this one differ?")
            end = start + _HEAD.size + nbytes
            if end > len(self._buffer):
                break
            found.append(Part(status, header_nbytes, bytes(memoryview(self._buffer)[start + _HEAD.size : end])))
            start = end
        del self._buffer[:start]
        return found
