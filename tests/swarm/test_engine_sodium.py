"""Libsodium as the bundle's JavaScript reaches it: each function against PyNaCl's own bindings or `hashlib`."""

import hashlib
import os

import pytest
from nacl import bindings

from tether.swarm.engine.bridge import FAILED, OK, Memory
from tether.swarm.engine.sodium import Sodium

CONTROL_AND_RINGS = 4096 + 2 * ((16 << 20) + (64 << 10))


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory(memoryview(bytearray(CONTROL_AND_RINGS)))


@pytest.fixture
def call(memory):
    """Lay the inputs out, call, take the result from behind them."""
    sodium = Sodium()
    sodium.attach(memory)
    functions = sodium.functions()

    def call(name: str, *inputs: bytes, nbytes: int = 0) -> bytes:
        at = 0
        for index, data in enumerate(inputs):
            memory.outbox[at : at + len(data)] = data
            memory.control[index] = len(data)
            at += len(data)
        memory.control[len(inputs)] = nbytes
        functions[name]()
        return bytes(memory.outbox[at : at + nbytes])

    return call


def test_hashes(call):
    assert call("hash", b"", b"abc", nbytes=32) == hashlib.blake2b(b"abc", digest_size=32).digest()
    assert call("hash", b"k" * 64, b"", nbytes=64) == hashlib.blake2b(b"", digest_size=64, key=b"k" * 64).digest()
    assert call("sha512", b"abc", nbytes=64) == hashlib.sha512(b"abc").digest()


def test_random_bytes_are_not_the_same_twice(call):
    assert call("random", nbytes=32) != call("random", nbytes=32)


def test_signatures(call, memory):
    seed, message = os.urandom(32), os.urandom(1000)
    public, secret = bindings.crypto_sign_seed_keypair(seed)
    assert call("signKeypair", seed, nbytes=96) == public + secret
    signature = call("sign", secret, message, nbytes=64)
    assert signature == bindings.crypto_sign(message, secret)[:64]
    call("verify", signature, message, public)
    assert memory.control[0] == OK
    for bad in ((bytes(64), message, public), (signature, message + b"x", public), (signature, message, bytes(32))):
        call("verify", *bad)
        assert memory.control[0] == FAILED


def test_scalar_multiplication_and_points_that_are_none(call, memory):
    point, _ = bindings.crypto_sign_seed_keypair(bytes(32))
    scalar = bytes([9]) * 32
    assert call("scalarmult", scalar, point, nbytes=32) == bindings.crypto_scalarmult_ed25519_noclamp(scalar, point)
    assert memory.control[0] == OK
    for bad in (bytes(32), b"\x01" + bytes(31), b"\xff" * 32):  # of small order, the identity, not canonical
        call("scalarmult", scalar, bad, nbytes=32)
        assert memory.control[0] == FAILED


@pytest.mark.parametrize("additional", [b"", b"said beside it"])
def test_authenticated_encryption(call, memory, additional):
    message, nonce, key = os.urandom(100), os.urandom(12), os.urandom(32)
    sealed = call("aeadEncrypt", message, additional, nonce, key, nbytes=116)
    assert sealed == bindings.crypto_aead_chacha20poly1305_ietf_encrypt(message, additional or None, nonce, key)
    assert call("aeadDecrypt", sealed, additional, nonce, key, nbytes=100) == message
    assert memory.control[0] == OK
    call("aeadDecrypt", sealed[:-1] + bytes([sealed[-1] ^ 1]), additional, nonce, key, nbytes=100)
    assert memory.control[0] == FAILED


def test_boxes(call, memory):
    message, nonce, key = os.urandom(100), os.urandom(24), os.urandom(32)
    sealed = call("boxSeal", message, nonce, key, nbytes=116)
    assert sealed == bindings.crypto_secretbox(message, nonce, key)
    assert call("boxOpen", sealed, nonce, key, nbytes=100) == message
    assert memory.control[0] == OK
    call("boxOpen", bytes(116), nonce, key, nbytes=100)
    assert memory.control[0] == FAILED


def test_secret_streams(call, memory):
    key = os.urandom(32)
    begun = call("streamInitPush", key, nbytes=76)
    state, header = begun[:52], begun[52:]
    receiver = bindings.crypto_secretstream_xchacha20poly1305_state()
    bindings.crypto_secretstream_xchacha20poly1305_init_pull(receiver, header, key)
    pulling = call("streamInitPull", header, key, nbytes=52)
    for index, message in enumerate((b"first", b"", os.urandom(70_000))):
        memory.control[4] = 3 if index == 2 else 0
        sealed = call("streamPush", state, message, b"", nbytes=len(message) + 17)
        state = bytes(memory.outbox[:52])
        assert bindings.crypto_secretstream_xchacha20poly1305_pull(receiver, sealed)[0] == message
        assert call("streamPull", pulling, sealed, b"", nbytes=len(message)) == message
        pulling = bytes(memory.outbox[:52])
        assert memory.control[0] == OK
        assert memory.control[4] == (3 if index == 2 else 0)
    call("streamPull", pulling, bytes(40), b"", nbytes=23)
    assert memory.control[0] == FAILED
