"""An encrypted stream's messages are the same however the bytes come: cut anywhere; too large ones are refused."""

import asyncio
import random

import pytest

from tether.swarm.engine.secretstream import SEAL_NBYTES
from tether.swarm.engine.secure import Keys, SecureStream, StreamLimits

SIZES = [1, 100, 127_744, 127_744, 50_000, 70_003, 127_744, 8]


class Wire:
    """What one side writes, kept to be delivered in other pieces."""

    rtt, pulse = 0.0, (0, False)

    def __init__(self):
        self.written = bytearray()

    def write(self, data, *, owned):
        assert owned
        self.written += data
        return True

    def poke(self): ...
    def write_end(self): ...
    def pause(self): ...
    def resume(self): ...
    def destroy(self): ...


def stream(*, is_initiator):
    keys, ids = (b"1" * 32, b"2" * 32), (b"a" * 32, b"b" * 32)
    here, there = (0, 1) if is_initiator else (1, 0)
    known = Keys(keys[here], keys[there], b"k" * 32, b"h" * 64, ids[here], ids[there], is_initiator)
    return SecureStream(Wire(), known, StreamLimits(), asyncio.get_running_loop())


def pieces_of(data, chance, most):
    at = 0
    while at < len(data):
        end = at + chance.randrange(1, most)
        yield bytes(data[at:end])
        at = end


@pytest.mark.parametrize("most", [40, 5_000, 64_000, 200_000])
async def test_messages_are_those_that_were_sent_wherever_their_bytes_are_cut(most):
    chance, got = random.Random(f"cut {most}"), []
    sender, receiver = stream(is_initiator=True), stream(is_initiator=False)
    messages = [chance.randbytes(size) for size in SIZES]
    for message in messages:
        sender.send(message)
    receiver.start(lambda message: got.append(bytes(message)), lambda: None, lambda _: None)
    for number, piece in enumerate(pieces_of(sender.carrier.written, chance, most)):
        receiver.data_arrived(piece)
        if number % 7 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [len(message) for message in got] == SIZES
    assert got == messages
    sender.destroy()
    receiver.destroy()


async def test_a_message_that_is_too_large_is_refused_though_it_came_in_pieces():
    lost = []
    sender, receiver = stream(is_initiator=True), stream(is_initiator=False)
    receiver.start(lambda _: None, lambda: None, lost.append)
    await asyncio.sleep(0)
    sender.send(bytes(100_000))
    wire = bytes(sender.carrier.written)
    receiver.data_arrived(wire[: -50_000 - SEAL_NBYTES])
    receiver.max_message_nbytes = 99_999
    receiver.data_arrived(wire[-50_000 - SEAL_NBYTES :])
    await asyncio.sleep(0)
    assert "over the 99999" in str(lost[0])
    sender.destroy()
