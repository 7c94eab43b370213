"""The wire format: what is built is read, batches are the same as their packets, and no bytes of a stranger raise."""

import random
import struct

from hypothesis import given
from hypothesis import strategies as st

from tether.swarm.udx import wire

U32 = st.integers(0, (1 << 32) - 1)
NEVER_SEEN = 1 << 40


def test_a_packet_is_what_libudx_sends():
    packet = wire.build_packet(wire.DATA | wire.END, 0x01020304, 4 << 20, 7, 9)
    assert packet.hex() == "ff010300" + "04030201" + "00004000" + "07000000" + "09000000"
    ack = wire.build_ack(5, 100, 1, 2, [(4, 6), (8, 9)])
    assert ack.hex() == "ff010400" + "05000000" + "64000000" + "01000000" + "02000000" + "04000000060000000800000009000000"
    assert wire.blocks_of(ack, wire.parse_header(ack)) == [(4, 6), (8, 9)]


def test_padding_stands_between_header_and_payload():
    packet = wire.build_packet(wire.DATA, 1, 2, 3, 4, padding=255) + b"payload"
    assert wire.payload_of(packet, wire.parse_header(packet)) == b"payload"
    assert wire.payload_of(packet[:100], wire.parse_header(packet)) is None


@given(st.integers(0, NEVER_SEEN), st.integers(-(1 << 31), (1 << 31) - 1))
def test_numbers_are_found_again_from_their_low_32_bits(near, distance):
    assert wire.unwrap(near, (near + distance) & 0xFFFFFFFF) == near + distance


@given(U32, U32, st.integers(0, NEVER_SEEN), st.integers(0, NEVER_SEEN), st.binary(min_size=1, max_size=3000), st.integers(1, 200))
def test_a_batch_is_its_packets(stream_id, window, seq, ack, data, each):
    count = -(-len(data) // each)
    batch = bytes(wire.build_batch((stream_id, window, seq, ack), data, each))
    packets = [
        wire.build_packet(wire.DATA, stream_id, window, seq + index, ack) + data[index * each : (index + 1) * each]
        for index in range(count)
    ]
    assert batch == b"".join(packets)


@given(U32, U32, st.integers(0, NEVER_SEEN), st.integers(12, 50), st.integers(1, 40), st.integers(0, 3))
def test_a_large_batch_is_its_packets_wherever_the_data_lies(stream_id, window, seq, count, words, offset):
    each, rest = 4 * words, seq % (4 * words)
    data = random.Random(f"{seq} {count}").randbytes(offset + count * each - rest)[offset:]
    batch = wire.build_batch((stream_id, window, seq, seq), memoryview(bytes(offset) + data)[offset:], each)
    packets = [
        wire.build_packet(wire.DATA, stream_id, window, seq + index, seq) + data[index * each : (index + 1) * each]
        for index in range(-(-len(data) // each))
    ]
    assert bytes(batch) == b"".join(packets)


@given(U32, U32, U32, U32, st.integers(2, 60), st.integers(1, 100))
def test_a_run_is_read_as_its_packets_are(stream_id, window, seq, ack, count, each):
    data = random.Random(f"{seq} {count}").randbytes(count * each)
    batch = wire.build_batch((stream_id, window, seq, ack), data, each)
    run = wire.parse_run(batch, each + wire.HEADER_NBYTES, count)
    if seq + count > 1 << 32:
        assert run is None  # numbers go round within: packet by packet then
    else:
        assert run == (stream_id, window, seq, seq + count - 1, ack, data)


@given(st.integers(2, 40), st.data())
def test_whatever_is_not_a_run_is_not_taken_for_one(count, data):
    batch = wire.build_batch((1, 2, 3, 4), bytes(50 * count), 50)
    at = data.draw(st.integers(0, count - 1)) * 70 + data.draw(st.sampled_from([0, 1, 2, 3, 4, 7, 12, 15]))
    batch[at] ^= data.draw(st.integers(1, 255))
    run = wire.parse_run(batch, 70, count)
    assert run is None or [each[3] for each in map(wire.parse_header, (batch[:70],))] == [0]


@given(U32, st.lists(st.tuples(U32, U32, U32), min_size=2, max_size=60))
def test_of_many_acks_the_last_one_counts(stream_id, acks):
    packets = [wire.build_packet(0, stream_id, *each) for each in acks]
    assert wire.parse_last_ack(b"".join(packets), len(packets)) == wire.parse_header(packets[-1])
    other = wire.build_packet(0, stream_id ^ 1, 1, 1, 1)
    assert wire.parse_last_ack(b"".join([*packets, other]), len(packets) + 1) is None
    assert wire.parse_last_ack(b"".join([*packets, wire.build_packet(wire.HEARTBEAT, stream_id, 1, 1, 1)]), len(packets) + 1) is None


@given(U32, st.integers(1, 40), st.integers(1, 100), st.integers(0, 99))
def test_readdressing_a_batch_changes_ids_and_nothing_else(stream_id, count, each, short):
    data = random.Random(f"{count} {each}").randbytes(max(1, count * each - min(short, each - 1)))
    before = wire.build_batch((7, 8, 9, 10), data, each)
    after = wire.build_batch((stream_id, 8, 9, 10), data, each)
    wire.readdress(before, each + wire.HEADER_NBYTES, stream_id)
    assert before == after


def test_refreshing_a_packet_changes_window_and_ack_only():
    batch = wire.build_batch((7, 8, 9, 10), b"abcdef", 3)
    wire.refresh(batch, 23, 80, 100)
    assert batch == wire.build_batch((7, 8, 9, 10), b"abc", 3) + wire.build_batch((7, 80, 10, 100), b"def", 3)


@given(st.binary(max_size=200))
def test_no_datagram_raises(datagram):
    header = wire.parse_header(datagram)
    if header is not None:
        assert len(wire.blocks_of(datagram, header)) <= len(datagram) // 8
        assert len(wire.payload_of(datagram, header) or b"") <= len(datagram)
    count = len(datagram) // 20
    if count > 1:
        wire.parse_run(datagram, 20, count)
        wire.parse_last_ack(datagram, count)


def test_short_and_foreign_datagrams_are_no_packets():
    for datagram in (b"", b"\xff", b"\xff\x01" + bytes(17), b"\xff\x02" + bytes(18), b"\xfe\x01" + bytes(18)):
        assert wire.parse_header(datagram) is None
    assert wire.parse_header(b"\xff\x01" + bytes(18)) == (255, 1, 0, 0, 0, 0, 0, 0)
    assert struct.calcsize("<BBBBIIII") == wire.HEADER_NBYTES
