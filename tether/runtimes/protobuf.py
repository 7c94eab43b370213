"""protobuf's wire format (protobuf.dev/programming-guides/encoding), read without a schema, a library or the whole file in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tether.errors import BadModelError

__all__ = ["BYTES", "FIXED32", "FIXED64", "VARINT", "Field", "Source", "at_most", "fields", "varint"]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; groups (3, 4) are in no format that we read."""
_WINDOW_NBYTES = 64 * 1024
"""Read at once where fields follow each other: thousands of small tensors cost few system calls."""
_GLANCE_NBYTES = 4096
"""Read at once after a jump over weights: enough for what lies between two of them."""
_TAG_NBYTES = 20
"""A tag and a length, or a value, are never longer: two varints of 10 bytes."""
_VARINT_NBYTES = 10
_CONTINUES = 0x80
_MAX_FIELDS = 4_000_000
"""Of one source: two seconds of reading, and several times what the largest models have in their graphs."""
_allowed: ContextVar[int] = ContextVar("fields of one source", default=_MAX_FIELDS)


Field = tuple[int, int, int, int]
"""One field of a message: number; wire type; value of a VARINT (unsigned, 64 bits), else where its bytes start; where they end.

A plain tuple: a named one takes four times as long to make, which is half of the time of an index.
"""


class Source:
    """Bytes that are read where they are needed: those of an open file (by its descriptor), or some in memory.

    A window of the file is kept, never a map: a file that somebody cuts off while it is mapped ends the process with SIGBUS.
    """

    def __init__(self, label: str, data: int | bytes) -> None:
        self.label = label
        """Names it in errors."""
        self._descriptor = data if isinstance(data, int) else None
        self._window = b"" if isinstance(data, int) else data
        self._start = 0
        self.nbytes = os.fstat(data).st_size if isinstance(data, int) else len(data)
        self._max_fields = self._fields_left = _allowed.get()

    def window(self, at: int) -> tuple[bytes, int]:
        """Bytes around `at`, and where they start: at least a tag and a length from `at` on, but at the end of the file."""
        end = self._start + len(self._window)
        if self._descriptor is None or self._start <= at <= end - _TAG_NBYTES or (self._start <= at and end == self.nbytes):
            return self._window, self._start
        follows = 0 <= at - end < _WINDOW_NBYTES or self._start <= at < end
        self._window = os.pread(self._descriptor, _WINDOW_NBYTES if follows else _GLANCE_NBYTES, at)
        self._start = at
        return self._window, at

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end); the caller has checked that they are few. Raises: BadModelError: the file ends before."""
        low, high = start - self._start, end - self._start
        if low >= 0 and high <= len(self._window):
            return self._window[low:high]
        data = b"" if self._descriptor is None else os.pread(self._descriptor, end - start, start)
        if len(data) != end - start:
            raise self.garbled()
        return data

    def charge(self, count: int) -> None:
        """Count fields that were read. Raises: BadModelError: there are too many."""
        self._fields_left -= count
        if self._fields_left < 0:
            raise BadModelError(f"{self.label} has more than {self._max_fields} entries; merge small nodes and tensors")

    def garbled(self) -> BadModelError:
        """The error for bytes that are no protobuf."""
        return BadModelError(f"{self.label}: its protobuf is cut off or garbled, so it is damaged or no such file; export it again")


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Sources that are opened meanwhile give up after so many fields: where somebody waits, and the answer can be done without."""
    token = _allowed.set(count)
    try:
        yield
    finally:
        _allowed.reset(token)


def fields(source: Source, start: int, end: int) -> Iterator[Field]:  # noqa: C901 (one branch for each wire type; calls would double its time)
    """The fields of the message in [start, end), in the order of the file; what lies inside of one is not looked at.

    Raises: BadModelError: the bytes are no protobuf, or there are too many fields.
    """
    window, base = source.window(start)
    at, stop, seen = start - base, end - base, 0
    try:
        while at < stop:
            if at + _TAG_NBYTES > len(window):
                source.charge(seen)
                position, seen = at + base, 0
                window, base = source.window(position)
                at, stop = position - base, end - base
            tag = window[at]
            at += 1
            if tag >= _CONTINUES:
                tag, at = varint(window, at - 1)
            wire_type = tag & 7
            if wire_type == BYTES:
                nbytes = window[at]
                at += 1
                if nbytes >= _CONTINUES:
                    nbytes, at = varint(window, at - 1)
                value = at + base
                at += nbytes
            elif wire_type == VARINT:
                value = window[at]
                at += 1
                if value >= _CONTINUES:
                    value, at = varint(window, at - 1)
            elif wire_type in (FIXED32, FIXED64):
                value = at + base
                at += 4 if wire_type == FIXED32 else 8
            else:
                raise source.garbled()
            if at > stop:
                raise source.garbled()
            seen += 1
            yield tag >> 3, wire_type, value, at + base
    except IndexError:
        raise source.garbled() from None
    source.charge(seen)


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, cut to 64 bits as protobuf does, and where it ends. Raises: IndexError: it does not end."""
    byte = data[at]
    if byte < _CONTINUES:
        return byte, at + 1
    value = byte & 0x7F
    for count in range(1, _VARINT_NBYTES):
        byte = data[at + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < _CONTINUES:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + count + 1
    raise IndexError
