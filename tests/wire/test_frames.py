"""The hop's frames: what is written is what is read, however the socket cuts it."""

import random

from hypothesis import given
from hypothesis import strategies as st

from tether.ports import Undelivered
from tether.wire.frames import INLINE, UNDELIVERED, WITHDRAWN, FrameReader, FrameWriter
from tether.wire.ring import Ring, RingView

Request = st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=300), st.integers(0, 300), st.integers(0, 2**32 - 1))


def feed(reader: FrameReader, data: bytes, sizes: random.Random) -> list[tuple]:
    """Give the reader `data` in random pieces, as a socket does."""
    found = []
    while data:
        space = reader.space()
        count = min(len(space), sizes.choice([1, 3, 24, 1000, 100_000]), len(data))
        space[:count] = data[:count]
        found += [(head, bytes(payload)) for head, payload in reader.received(count)]
        reader.release()
        data = data[count:]
    return found


@given(st.lists(st.lists(Request, min_size=1, max_size=8), max_size=6), st.randoms())
def test_requests_survive_any_cutting(frames, sizes):
    writer, data = FrameWriter(), b""
    for frame in frames:
        for number, body, header, timeout in frame:
            writer.request(number, body, header, timeout)
        data += b"".join(writer.take())
    assert not writer
    read = feed(FrameReader(), data, sizes)
    assert [(head.id, body, head.header_nbytes, head.timeout_ms) for head, body in read] == [
        request for frame in frames for request in frame
    ]


def test_a_payload_larger_than_the_buffer_arrives_whole():
    writer = FrameWriter()
    body = random.Random(1).randbytes(3_000_001)
    writer.reply(7, 200, body, 12)
    writer.reply(8, 404, b"no", 0)
    read = feed(FrameReader(), b"".join(writer.take()), random.Random(2))
    assert [(head.id, head.status, head.header_nbytes, payload) for head, payload in read] == [(7, 200, 12, body), (8, 404, 0, b"no")]


def test_a_body_in_the_ring_does_not_travel_in_the_frame():
    ring = Ring(1 << 20)
    body = random.Random(3).randbytes(100_000)
    offset = ring.put(body)
    writer = FrameWriter()
    writer.request(1, body, 10, 1000, offset)
    data = b"".join(writer.take())
    assert len(data) < 100
    ((head, payload),) = feed(FrameReader(), data, random.Random(4))
    view = RingView(ring.fd)
    assert payload == b""
    assert head.offset != INLINE
    assert view.block(head.offset, head.nbytes) == body
    view.close()
    ring.close()


@given(st.lists(st.integers(1, 60_000), max_size=60), st.randoms())
def test_ring_blocks_never_overlap_and_all_come_back(sizes, order):
    ring, held = Ring(256 << 10), []
    for size in sizes:
        offset = ring.put(bytes(size))
        if offset is None:
            index = order.randrange(len(held))
            ring.give_back(*held.pop(index))
            continue
        pages = -(-size // 4096) * 4096
        assert all(offset + pages <= start or start + length <= offset for start, length in held)
        held.append((offset, pages))
    for block in held:
        ring.give_back(*block)
    assert ring.put(bytes(256 << 10)) == 0
    ring.close()


def test_what_is_taken_back_and_what_was_not_delivered_stand_among_the_rest():
    writer = FrameWriter()
    writer.request(1, b"body", 0, 10)
    writer.withdraw(1)
    writer.undelivered(2, Undelivered.LOST)
    writer.reply(3, 200, b"answer", 0)
    read = feed(FrameReader(), b"".join(writer.take()), random.Random("frames"))
    assert [(head.id, head.status, body) for head, body in read][:2] == [(1, 0, b"body"), (1, WITHDRAWN, b"")]
    assert (read[2][0].id, UNDELIVERED[read[2][0].status]) == (2, Undelivered.LOST)
    assert (read[3][0].id, read[3][1]) == (3, b"answer")
