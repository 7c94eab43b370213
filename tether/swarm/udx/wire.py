"""Pure: UDX version 1 on the wire, one packet and whole batches of them.

    packet = u8 0xFF | u8 version 1 | u8 flags | u8 data offset | u32 receiver's stream id | u32 window | u32 seq | u32 ack | …

Little endian, 20 bytes. `seq` counts packets, `ack` is the next one expected, `window` the bytes the sender of this packet can still
take. With SACK pairs (start, end) of what came above `ack` follow, with DATA the payload, behind `data offset` bytes of padding or pairs.
Numbers on the wire are 32 bits of unbounded ones (`unwrap`). Batches are packets of one size but for the last, as UDP_SEGMENT and
UDP_GRO have them: a batch is built by NumPy and read by one struct, since per packet Python would be five times as slow.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

__all__ = [
    "DATA",
    "DESTROY",
    "END",
    "HEADER_NBYTES",
    "HEARTBEAT",
    "MAX_BLOCKS",
    "MESSAGE",
    "SACK",
    "Buffer",
    "Header",
    "Run",
    "blocks_of",
    "build_ack",
    "build_batch",
    "build_packet",
    "parse_header",
    "parse_last_ack",
    "parse_run",
    "payload_of",
    "readdress",
    "refresh",
    "stream_of",
    "unwrap",
]

DATA, END, SACK, MESSAGE, DESTROY, HEARTBEAT = 1, 2, 4, 8, 16, 32
"""Flags. DATA and END take a sequence number; the others don't."""
HEADER_NBYTES = 20
MAX_BLOCKS = 50
"""What libudx sends, and what a base packet has room for."""
_MAGIC, _VERSION = 0xFF, 1
_HEADER = struct.Struct("<BBBBIIII")
_PLAIN_DATA = _MAGIC | _VERSION << 8 | DATA << 16
"""First word of a data packet without padding."""
_PLAIN_ACK = _MAGIC | _VERSION << 8
_MANY = 12
"""Packets from which on NumPy, which takes 3 µs to begin, is quicker."""
_WORD = 4
_MASK = 0xFFFFFFFF
_HALF = 0x80000000

Buffer = bytes | bytearray | memoryview
Header = tuple[int, int, int, int, int, int, int, int]
"""Magic, version, flags, data offset, stream id, window, seq, ack; the last four are 32 bits of larger numbers."""
Run = tuple[int, int, int, int, int, bytes]
"""Packets of one stream and size: id, window, seq of the first, seq of the last, ack, payloads; window and ack are the last one's."""


@lru_cache(256)  # a struct of 60 packets has 11 KB: a stranger who varies sizes must not fill memory with them
def _heads_struct(nbytes: int, count: int) -> struct.Struct:
    return struct.Struct("<" + f"IIIII{nbytes - HEADER_NBYTES}x" * count)


@lru_cache(256)
def _numbers_struct(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}I")


def unwrap(near: int, low: int) -> int:
    """The number next to `near` whose low 32 bits are `low`; it may be negative."""
    return near + ((low - near + _HALF & _MASK) - _HALF)


def stream_of(datagram: Buffer) -> int:
    """The stream id, if it is a packet at all."""
    return int.from_bytes(datagram[4:8], "little")


def parse_header(datagram: Buffer) -> Header | None:
    """The header of what can be a UDX packet, else None; whether it is one shows when its stream is known."""
    if len(datagram) < HEADER_NBYTES:
        return None
    header = _HEADER.unpack_from(datagram)
    return header if header[0] == _MAGIC and header[1] == _VERSION else None


def blocks_of(datagram: Buffer, header: Header) -> list[tuple[int, int]]:
    """The pairs of a SACK packet: 32 bits each and unchecked."""
    nbytes = len(datagram) - HEADER_NBYTES
    offset = header[3]
    count = (offset if 0 < offset < nbytes else nbytes) // 8
    numbers = _numbers_struct(2 * count).unpack_from(datagram, HEADER_NBYTES)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def payload_of(datagram: Buffer, header: Header) -> bytes | None:
    """A copy of what stands behind header and offset; None where the offset leads out of the packet."""
    start = HEADER_NBYTES + header[3]
    return bytes(datagram[start:]) if start <= len(datagram) else None


def parse_run(buffer: Buffer, nbytes: int, count: int) -> Run | None:
    """What `count` packets of `nbytes` each carry if all are plain data of one stream with one number after the other, else None."""
    fields = _heads_struct(nbytes, count).unpack_from(buffer)
    if fields[0] != _PLAIN_DATA:
        return None
    stream_id, seq, last = fields[1], fields[3], 5 * (count - 1)
    if fields[3::5] != tuple(range(seq, seq + count)) or fields[0::5].count(_PLAIN_DATA) != count or fields[1::5].count(stream_id) != count:
        return None
    return stream_id, fields[last + 2], seq, seq + count - 1, fields[last + 4], _payloads(buffer, nbytes, count)


def _payloads(buffer: Buffer, nbytes: int, count: int) -> bytes:
    """One piece of all, copied at once: as many pieces as packets cost more to make, to join and to give back than to copy."""
    if count >= _MANY:
        return np.frombuffer(buffer, np.uint8, count * nbytes).reshape(count, nbytes)[:, HEADER_NBYTES:].tobytes()
    view = memoryview(buffer)
    return b"".join([view[at + HEADER_NBYTES : at + nbytes] for at in range(0, count * nbytes, nbytes)])


def parse_last_ack(buffer: Buffer, count: int) -> Header | None:
    """The last of `count` bare acks if all are that and of one stream: what it says holds for those before it."""
    words = _numbers_struct(5 * count).unpack_from(buffer)
    if words[0] != _PLAIN_ACK or words[0::5].count(_PLAIN_ACK) != count or words[1::5].count(words[1]) != count:
        return None
    return _HEADER.unpack_from(buffer, HEADER_NBYTES * (count - 1))


def build_packet(flags: int, stream_id: int, window: int, seq: int, ack: int, *, padding: int = 0) -> bytes:
    """A header, and `padding` zeros behind it."""
    return _HEADER.pack(_MAGIC, _VERSION, flags, padding, stream_id, window, seq & _MASK, ack & _MASK) + bytes(padding)


def build_ack(stream_id: int, window: int, seq: int, ack: int, blocks: Sequence[tuple[int, int]]) -> bytes:
    """An ack with at most MAX_BLOCKS blocks."""
    if not blocks:
        return build_packet(0, stream_id, window, seq, ack)
    numbers = [number & _MASK for block in blocks for number in block]
    return build_packet(SACK, stream_id, window, seq, ack) + _numbers_struct(len(numbers)).pack(*numbers)


def build_batch(head: tuple[int, int, int, int], data: Buffer, each: int) -> bytearray | memoryview:
    """Plain data packets in a row, with `each` bytes of the data, the last one with what is left. The memory is the caller's.

    `head`: stream id, window, seq of the first, ack.
    """
    count = -(-len(data) // each)
    return _built_of_parts(head, data, each, count) if count < _MANY or each % _WORD else _built_of_words(head, data, each, count)


def _built_of_parts(head: tuple[int, int, int, int], data: Buffer, each: int, count: int) -> bytearray:
    stream_id, window, seq, ack = head
    view = memoryview(data)
    parts: list[Buffer] = []
    for index in range(count):
        parts += build_packet(DATA, stream_id, window, seq + index, ack), view[index * each : (index + 1) * each]
    return bytearray().join(parts)


def _built_of_words(head: tuple[int, int, int, int], data: Buffer, each: int, count: int) -> memoryview:
    """By NumPy in as few calls as can be: each costs as much as copying 10 KB. The memory is not filled with zeros before."""
    stream_id, window, seq, ack = head
    size, header = HEADER_NBYTES + each, HEADER_NBYTES // _WORD
    packets = np.empty((count, size // _WORD), "<u4")
    packets[:, :header] = _PLAIN_DATA, stream_id, window, seq & _MASK, ack & _MASK
    packets[:, 3] += np.arange(count, dtype="<u4")  # what is over 32 bits falls off
    full = len(data) // each
    packets[:full, header:] = np.frombuffer(data, "<u4", full * each // _WORD).reshape(full, each // _WORD)
    batch = packets.data.cast("B")
    if full == count:
        return batch
    rest = memoryview(data)[full * each :]
    end = full * size + HEADER_NBYTES
    batch[end : end + len(rest)] = rest
    return batch[: end + len(rest)]


def refresh(wire: bytearray | memoryview, at: int, window: int, ack: int) -> None:
    """Write today's window and ack into the header that begins at `at`; its seq and payload stay."""
    struct.pack_into("<I", wire, at + 8, window)
    struct.pack_into("<I", wire, at + 16, ack & _MASK)


def readdress(wire: bytearray, nbytes: int, stream_id: int) -> None:
    """Write another receiver's id into every packet of a batch whose packets begin each `nbytes`."""
    count = -(-len(wire) // nbytes)
    for index, byte in enumerate(stream_id.to_bytes(4, "little")):
        wire[4 + index :: nbytes] = bytes([byte]) * count
