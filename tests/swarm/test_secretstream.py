"""libsodium's secretstream by two libraries: whichever seals a message, the other one opens it, and what follows."""

import itertools
import random

import pytest
from nacl import _sodium
from nacl.bindings import (
    crypto_secretstream_xchacha20poly1305_init_pull,
    crypto_secretstream_xchacha20poly1305_init_push,
    crypto_secretstream_xchacha20poly1305_pull,
    crypto_secretstream_xchacha20poly1305_push,
    crypto_secretstream_xchacha20poly1305_state,
    crypto_secretstream_xchacha20poly1305_TAG_REKEY,
)

from tether.swarm.engine import secretstream
from tether.swarm.engine.secretstream import SEAL_NBYTES, Opener, Sealer

KEY = bytes(range(32))
LARGE = 16 << 10
SIZES = [0, 1, 17, LARGE - 8, LARGE, LARGE + 1, LARGE + 4, LARGE + 8, LARGE + 16, 65_536, 131_077, 131_080, 1 << 20]


class Sodium:
    """Both sides by PyNaCl alone."""

    def __init__(self):
        self.state = crypto_secretstream_xchacha20poly1305_state()

    def push(self, message, tag=0):
        return crypto_secretstream_xchacha20poly1305_push(self.state, message, None, tag)

    def pull(self, sealed):
        return crypto_secretstream_xchacha20poly1305_pull(self.state, bytes(sealed), None)[0]


@pytest.fixture
def messages():
    chance = random.Random("secretstream")
    return [chance.randbytes(size) for size in (*SIZES, *chance.choices(SIZES, k=30), *(chance.randrange(4 * LARGE) for _ in range(60)))]


def test_libsodium_opens_what_is_sealed(messages):
    sealer, sodium = Sealer(KEY), Sodium()
    crypto_secretstream_xchacha20poly1305_init_pull(sodium.state, sealer.header, KEY)
    for message in messages:
        frame = sealer.seal(message, b"abc")
        assert bytes(frame[:3]) == b"abc"
        assert len(frame) == 3 + len(message) + SEAL_NBYTES
        assert sodium.pull(frame[3:]) == message


def test_what_libsodium_sealed_is_opened(messages):
    sodium = Sodium()
    opener = Opener(crypto_secretstream_xchacha20poly1305_init_push(sodium.state, KEY), KEY)
    for message in messages:
        assert opener.open(memoryview(sodium.push(message))) == message


def test_what_came_in_parts_is_opened_as_if_it_had_come_whole(messages):
    sealer, chance = Sealer(KEY), random.Random("parts")
    opener = Opener(sealer.header, KEY)
    for message in messages:
        frame = memoryview(bytes(sealer.seal(message, b"")))
        cuts = sorted({0, len(frame), *(chance.randrange(len(frame) + 1) for _ in range(3))})
        assert opener.open(*(frame[at:end] for at, end in itertools.pairwise(cuts))) == message


def test_a_peer_may_take_a_new_key_with_any_message(messages):
    sodium, chance = Sodium(), random.Random("rekey")
    opener = Opener(crypto_secretstream_xchacha20poly1305_init_push(sodium.state, KEY), KEY)
    for message in messages:
        tag = chance.choice([0, crypto_secretstream_xchacha20poly1305_TAG_REKEY])
        assert opener.open(memoryview(sodium.push(message, tag))) == message


@pytest.mark.parametrize("last", [65_536, 100])
def test_the_key_is_another_one_when_the_counter_has_gone_round(last):
    sealer, sodium = Sealer(KEY), Sodium()
    crypto_secretstream_xchacha20poly1305_init_pull(sodium.state, sealer.header, KEY)
    opener = Opener(sealer.header, KEY)
    for size in (65_536, 65_536, last, 65_536, 100):
        frame = sealer.seal(bytes(size), b"")
        assert opener.open(memoryview(frame)) == bytes(size)
        assert sodium.pull(frame) == bytes(size)
        if sealer._state.bytes[32:36] == b"\x02\0\0\0":
            for counter in (sealer._state.bytes, opener._state.bytes, _sodium.ffi.buffer(sodium.state.statebuf)):
                counter[32:36] = b"\xfe\xff\xff\xff"


@pytest.mark.parametrize("size", SIZES)
def test_what_was_altered_anywhere_is_not_opened(size):
    sealer = Sealer(KEY)
    frame = bytes(sealer.seal(bytes(size), b""))
    for at in {0, 1, len(frame) // 2, len(frame) - 17, len(frame) - 1}:
        altered = bytearray(frame)
        altered[at] ^= 1
        assert Opener(sealer.header, KEY).open(memoryview(altered)) is None


def test_without_openssl_the_bytes_are_the_same(messages, monkeypatch):
    sealer = Sealer(KEY)
    opener = Opener(sealer.header, KEY)
    frames = [bytes(sealer.seal(message, b"")) for message in messages]
    monkeypatch.setattr(secretstream, "_is_there", lambda: False)
    assert [opener.open(memoryview(frame)) == message for frame, message in zip(frames, messages, strict=True)] == [True] * len(messages)
