"""libsodium for the bundle, by PyNaCl's bindings: `js/sodium.js` is the other half.

Inputs lie end to end in the outbox, their lengths in the control block, the result goes behind them. `hashlib` stands in for what
PyNaCl does not export; the wire is the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

from nacl import _sodium

from tether.swarm.engine.bridge import FAILED, OK, Memory

__all__ = ["Sodium", "ffi", "lib"]

ffi: Any = _sodium.ffi
lib: Any = _sodium.lib
lib.sodium_init()  # picks what this processor does fastest; without it secretstream makes 400 MB/s a core instead of 1,200
_STATE = 52
_SIGNATURE = 64


class Sodium:
    """The functions that JavaScript calls; they work on the shared memory and keep nothing."""

    def __init__(self) -> None:
        self._control = memoryview(bytearray(4)).cast("I")
        self._outbox = memoryview(b"")
        self._at: Any = ffi.NULL

    def attach(self, memory: Memory) -> None:
        """The memory is there now; it never moves."""
        self._control = memory.control
        self._outbox = memory.outbox
        self._at = ffi.cast("unsigned char *", ffi.from_buffer(memory.outbox, require_writable=True))

    def functions(self) -> dict[str, Callable[[], None]]:
        """By the names that `js/sodium.js` uses."""
        return {
            "hash": self._hash,
            "sha512": self._sha512,
            "random": self._random,
            "signKeypair": self._sign_keypair,
            "sign": self._sign,
            "verify": self._verify,
            "scalarmult": self._scalarmult,
            "aeadEncrypt": self._aead_encrypt,
            "aeadDecrypt": self._aead_decrypt,
            "boxSeal": self._box_seal,
            "boxOpen": self._box_open,
            "streamInitPush": self._stream_init_push,
            "streamInitPull": self._stream_init_pull,
            "streamPush": self._stream_push,
            "streamPull": self._stream_pull,
        }

    def _hash(self) -> None:
        key, nbytes, out = self._control[:3]
        end = key + nbytes
        box = self._outbox
        box[end : end + out] = hashlib.blake2b(box[key:end], digest_size=out, key=box[:key]).digest()

    def _sha512(self) -> None:
        nbytes = self._control[0]
        self._outbox[nbytes : nbytes + 64] = hashlib.sha512(self._outbox[:nbytes]).digest()

    def _random(self) -> None:
        nbytes = self._control[0]
        self._outbox[:nbytes] = os.urandom(nbytes)

    def _sign_keypair(self) -> None:
        at = self._at
        lib.crypto_sign_seed_keypair(at + 32, at + 64, at)

    def _sign(self) -> None:
        """The detached form is not exported: the joined one begins with the signature."""
        key, nbytes = self._control[:2]
        joined = bytearray(nbytes + _SIGNATURE)
        lib.crypto_sign(ffi.from_buffer(joined), ffi.NULL, self._at + key, nbytes, self._at)
        end = key + nbytes
        self._outbox[end : end + _SIGNATURE] = joined[:_SIGNATURE]

    def _verify(self) -> None:
        signature, nbytes = self._control[:2]
        joined = signature + nbytes  # they lie end to end already
        opened = bytearray(joined)
        bad = lib.crypto_sign_open(ffi.from_buffer(opened), ffi.NULL, self._at, joined, self._at + joined)
        self._control[0] = FAILED if bad else OK

    def _scalarmult(self) -> None:
        scalar, point = self._control[:2]
        at = self._at
        bad = lib.crypto_scalarmult_ed25519_noclamp(at + scalar + point, at, at + scalar)
        self._control[0] = FAILED if bad else OK

    def _aead_encrypt(self) -> None:
        nbytes, additional, nonce, key = self._control[:4]
        at = self._at
        keyed = nbytes + additional + nonce
        lib.crypto_aead_chacha20poly1305_ietf_encrypt(
            at + keyed + key, ffi.NULL, at, nbytes, at + nbytes, additional, ffi.NULL, at + nbytes + additional, at + keyed
        )

    def _aead_decrypt(self) -> None:
        nbytes, additional, nonce, key = self._control[:4]
        at = self._at
        keyed = nbytes + additional + nonce
        bad = lib.crypto_aead_chacha20poly1305_ietf_decrypt(
            at + keyed + key, ffi.NULL, ffi.NULL, at, nbytes, at + nbytes, additional, at + nbytes + additional, at + keyed
        )
        self._control[0] = FAILED if bad else OK

    def _box_seal(self) -> None:
        """The padded form is what PyNaCl exports: 32 zero bytes before the message, 16 before the result."""
        nbytes, nonce, key = self._control[:3]
        padded = bytes(32) + bytes(self._outbox[:nbytes])
        sealed = bytearray(len(padded))
        at = self._at
        lib.crypto_secretbox(ffi.from_buffer(sealed), padded, len(padded), at + nbytes, at + nbytes + nonce)
        end = nbytes + nonce + key
        self._outbox[end : end + nbytes + 16] = sealed[16:]

    def _box_open(self) -> None:
        nbytes, nonce, key = self._control[:3]
        padded = bytes(16) + bytes(self._outbox[:nbytes])
        opened = bytearray(len(padded))
        at = self._at
        bad = lib.crypto_secretbox_open(ffi.from_buffer(opened), padded, len(padded), at + nbytes, at + nbytes + nonce)
        self._control[0] = FAILED if bad else OK
        end = nbytes + nonce + key
        self._outbox[end : end + nbytes - 16] = opened[32:]

    def _stream_init_push(self) -> None:
        key = self._control[0]
        at = self._at
        lib.crypto_secretstream_xchacha20poly1305_init_push(at + key, at + key + _STATE, at)

    def _stream_init_pull(self) -> None:
        header, key = self._control[:2]
        at = self._at
        lib.crypto_secretstream_xchacha20poly1305_init_pull(at + header + key, at, at + header)

    def _stream_push(self) -> None:
        state, nbytes, additional, _, tag = self._control[:5]
        at = self._at
        message = at + state
        lib.crypto_secretstream_xchacha20poly1305_push(
            at, message + nbytes + additional, ffi.NULL, message, nbytes, message + nbytes, additional, tag
        )

    def _stream_pull(self) -> None:
        state, nbytes, additional = self._control[:3]
        at = self._at
        sealed = at + state
        tag = ffi.new("unsigned char *")
        bad = lib.crypto_secretstream_xchacha20poly1305_pull(
            at, sealed + nbytes + additional, ffi.NULL, tag, sealed, nbytes, sealed + nbytes, additional
        )
        self._control[4] = tag[0]
        self._control[0] = FAILED if bad else OK
