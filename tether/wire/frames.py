"""Pure: the frames of the hop between a gateway and a model of a worker (FASTPATH.md §2). Many requests or replies travel in one frame.

    frame  = u32 nbytes after this field | u32 count | count heads | count payloads, each padded to 8
    head   = u32 id | u16 status | u16 flags | u32 payload nbytes | u32 JSON header nbytes | u32 ring offset | u32 timeout in ms

Little endian. `status` is 0 in a request; WITHDRAWN in what takes the request of that id back; in a reply an HTTP status, or why there is
none (`UNDELIVERED`); LEAVING answers none.  `flags` of a request: ALONE, PARTS, both or 0. A payload in the ring (offset other than INLINE)
is not in the frame. A reply with the request's id also gives its ring block back, so a request that was taken back is answered too
(WITHDRAWN, if it did not run).

The last field of a reply says how many microseconds of the model's thread a request takes, in batches as they are; 0: not known.

Before the last reply to a request with PARTS any number of replies of status PART may come.  The last one is an error, or OK: with one more
part in it, or empty.  For each PART the asking end sends TAKEN when it can have another one; a few are sent without.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from tether.errors import MalformedRequestError
from tether.ports import Undelivered

__all__ = [
    "ALONE",
    "INLINE",
    "LEAVING",
    "MAX_NBYTES",
    "OK",
    "PART",
    "PARTS",
    "TAKEN",
    "UNDELIVERED",
    "WITHDRAWN",
    "Frame",
    "FrameReader",
    "FrameWriter",
    "Head",
]

_TOP = struct.Struct("<II")
_HEAD = struct.Struct("<IHHIIII")
_PADDING = tuple(b"\0" * (-size % 8) for size in range(8))
INLINE = 0xFFFFFFFF
"""Ring offset of a payload that stands in the frame itself."""
OK = 200
PART = 206
"""Status of a reply that is a part of the answer; more replies follow."""
TAKEN = 100
"""Status of what says that a part of the answer to that id has found its reader."""
WITHDRAWN = 499
"""Nobody waits for the reply any more."""
UNDELIVERED = {1: Undelivered.NOT_SENT, 2: Undelivered.LOST}
"""Status of a reply → what became of a request that was to go further: to another lab."""
ALONE = 1
"""This request is suspected to end the process that runs it (`Hop.alone`)."""
PARTS = 2
"""The answer to this request may come in parts."""
LEAVING = 3
"""Status of what answers no request (its id is 0): what comes from now on is answered still, but whoever needs no more is to disconnect."""
_REASONS = {reason: status for status, reason in UNDELIVERED.items()}
MAX_NBYTES = 1 << 30
"""A frame is ended before it gets near this; a length beyond it is not ours, and would be memory before it is noticed."""
_FULL_NBYTES = 1 << 26
_READ_NBYTES = 1 << 18
_KEPT_NBYTES = 1 << 22
"""An empty buffer larger than this is given back: one large body must not cost every connection its size for ever."""
_JOIN_NBYTES = 256 * 1024
"""Below this one `join` and one write beat a list of buffers (measured: FASTPATH.md §2)."""


class Head(NamedTuple):
    """One request or reply of a frame."""

    id: int
    status: int
    flags: int
    nbytes: int
    header_nbytes: int
    offset: int
    timeout_ms: int
    """Of a reply: microseconds that a request takes."""


_new_head = tuple.__new__
"""`Head._make` without its two checks: half of the time, and `struct` gives as many fields."""

Frame = list[tuple[Head, memoryview]]
"""Heads with their payloads; the payload of a head in the ring is empty. Valid until `FrameReader.release`."""


class FrameReader:
    """Cuts what a socket receives into frames. One buffer, reused: copy what must outlive `release`."""

    __slots__ = ("_buffer", "_consumed", "_used", "_view", "_want")

    def __init__(self) -> None:
        self._buffer = bytearray(_READ_NBYTES)
        self._view = memoryview(self._buffer)
        self._used = 0
        self._want = 0
        self._consumed = 0

    def space(self) -> memoryview:
        """Where the next bytes of the socket go; never empty."""
        room = len(self._buffer) - self._used
        if (self._want > len(self._buffer)) if self._want else (room < _READ_NBYTES // 4):
            self._resize(max(self._want, self._used + _READ_NBYTES))
        return self._view[self._used :]

    def received(self, nbytes: int) -> Frame:
        """All heads of the frames that `nbytes` more bytes completed, with their payloads.

        Raises: MalformedRequestError: a frame is too large to be one of ours.
        """
        self._used += nbytes
        found: Frame = []
        start, view, used = 0, self._view, self._used
        while used - start >= _TOP.size:
            length, count = _TOP.unpack_from(view, start)
            end = start + 4 + length
            if length > MAX_NBYTES:
                raise MalformedRequestError(f"a frame of {length} bytes; at most {MAX_NBYTES} are taken")
            if used < end:
                self._want = 4 + length
                break
            _cut(view, start + _TOP.size, count, found)
            start = end
        self._consumed = start
        return found

    def release(self) -> None:
        """The frames of the last `received` are done with: their bytes may be overwritten."""
        start, self._consumed = self._consumed, 0
        if start:
            rest = self._used - start
            if rest:
                self._view[:rest] = bytes(self._view[start : self._used])
            self._used, self._want = rest, 0
        if not self._used and len(self._buffer) > _KEPT_NBYTES:
            self._resize(_READ_NBYTES)

    def _resize(self, nbytes: int) -> None:
        other = bytearray(nbytes)
        other[: self._used] = self._view[: self._used]
        self._buffer, self._view = other, memoryview(other)


def _cut(view: memoryview, start: int, count: int, found: Frame) -> None:
    payload = start + _HEAD.size * count
    for fields in _HEAD.iter_unpack(view[start:payload]):
        head = _new_head(Head, fields)
        if fields[5] == INLINE:
            found.append((head, view[payload : payload + fields[3]]))
            payload += (fields[3] + 7) & ~7
        else:
            found.append((head, view[:0]))


class FrameWriter:
    """Collects heads and payloads until `take` turns them into one frame."""

    __slots__ = ("_heads", "_nbytes", "_payloads")

    def __init__(self) -> None:
        self._heads: list[bytes] = []
        self._payloads: list[bytes] = []
        self._nbytes = 0

    def __bool__(self) -> bool:
        return bool(self._heads)

    @property
    def is_full(self) -> bool:
        """Whether the frame is large enough to be taken before more is added."""
        return self._nbytes > _FULL_NBYTES

    def request(self, request_id: int, body: bytes, header_nbytes: int, timeout_ms: int, offset: int = INLINE, flags: int = 0) -> None:
        """Add a request; with a ring offset the body is in the ring already and only its size travels."""
        self._heads.append(_HEAD.pack(request_id, 0, flags, len(body), header_nbytes, offset, timeout_ms))
        if offset == INLINE:
            self._add(body)

    def withdraw(self, request_id: int) -> None:
        """Take a request back."""
        self._heads.append(_HEAD.pack(request_id, WITHDRAWN, 0, 0, 0, INLINE, 0))

    def taken(self, request_id: int) -> None:
        """Say that a part of this answer has found its reader."""
        self._heads.append(_HEAD.pack(request_id, TAKEN, 0, 0, 0, INLINE, 0))

    def undelivered(self, request_id: int, reason: Undelivered) -> None:
        """Add a reply that says why there is none."""
        self.reply(request_id, _REASONS[reason], b"", 0)

    def reply(self, request_id: int, status: int, body: bytes, header_nbytes: int, pace_us: int = 0) -> None:
        """Add a reply."""
        self._heads.append(_HEAD.pack(request_id, status, 0, len(body), header_nbytes, INLINE, pace_us))
        self._add(body)

    def _add(self, body: bytes) -> None:
        self._payloads.append(body)
        padding = _PADDING[len(body) & 7]
        if padding:
            self._payloads.append(padding)
        self._nbytes += len(body) + len(padding)

    def take(self) -> list[bytes]:
        """The frame, as few buffers, in order; the writer is empty afterwards."""
        heads, payloads = self._heads, self._payloads
        top = _TOP.pack(4 + _HEAD.size * len(heads) + self._nbytes, len(heads))
        parts = [top, *heads, *payloads]
        small = self._nbytes < _JOIN_NBYTES
        self._heads, self._payloads, self._nbytes = [], [], 0
        return [b"".join(parts)] if small else parts
