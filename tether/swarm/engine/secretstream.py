"""libsodium's secretstream (XChaCha20-Poly1305), the same bytes: small messages by libsodium, large ones by OpenSSL in half the time.

    sealed   tag, encrypted | message, encrypted | 16 bytes of authentication

What it does for a message is ChaCha20-Poly1305 (RFC 8439) of 64 bytes, which are the tag and zeros and of which one travels, and the
message behind them. One thing differs: behind what it authenticates come `nbytes % 16` zeros, in the RFC as many as 16 bytes lack. For
multiples of eight these are the same; other lengths are libsodium's. What moves the state on is on its page "Secretstream: Algorithm".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from tether.swarm.engine.sodium import ffi, lib

__all__ = ["HEADER_NBYTES", "SEAL_NBYTES", "Opener", "Sealer"]

HEADER_NBYTES: Final = 24
"""Goes before the first message, in the clear."""
SEAL_NBYTES: Final = 17
"""By which a message grows."""
_STATE_NBYTES, _KEY, _NONCE, _COUNTER = 52, slice(0, 32), slice(32, 44), slice(32, 36)
_MIX = slice(36, 44)
_BLOCK, _MAC = 64, 16
_REKEY = 2
_LARGE_NBYTES = 16 << 10
"""From here on OpenSSL's start, 5 µs, is worth it."""
_KEPT_NBYTES = 256 << 10
"""Of a stream's memory for what goes into the cipher: new memory for each message costs a tenth of encrypting it."""


class _State:
    """One direction of a stream: key, counter and nonce, where libsodium has them."""

    def __init__(self) -> None:
        self._room = bytearray()
        self.bytes = bytearray(_STATE_NBYTES)
        self.at: Any = ffi.from_buffer(self.bytes)
        self._cipher: ChaCha20Poly1305 | None = None

    def takes(self, nbytes: int) -> bool:
        """Whether a message of so many bytes is OpenSSL's."""
        return nbytes >= _LARGE_NBYTES and not nbytes % 8 and _is_there()

    def room(self, nbytes: int) -> memoryview:
        """Memory for what goes into the cipher; what is in it is what was there the last time, or zeros."""
        if nbytes > _KEPT_NBYTES:
            return memoryview(bytearray(nbytes))
        if len(self._room) < nbytes:
            self._room = bytearray(nbytes)
        return memoryview(self._room)[:nbytes]

    @property
    def nonce(self) -> bytes:
        return bytes(self.bytes[_NONCE])

    @property
    def cipher(self) -> ChaCha20Poly1305:
        if self._cipher is None:
            self._cipher = ChaCha20Poly1305(bytes(self.bytes[_KEY]))
        return self._cipher

    def advance(self, tag: int, mac: bytes | bytearray | memoryview) -> None:
        """After a message of OpenSSL's."""
        state = self.bytes
        mixed = int.from_bytes(state[_MIX], "little") ^ int.from_bytes(mac[: _MIX.stop - _MIX.start], "little")
        state[_MIX] = mixed.to_bytes(_MIX.stop - _MIX.start, "little")
        counter = int.from_bytes(state[_COUNTER], "little") + 1 & 0xFFFFFFFF
        state[_COUNTER] = counter.to_bytes(_COUNTER.stop - _COUNTER.start, "little")
        if tag & _REKEY or not counter:
            lib.crypto_secretstream_xchacha20poly1305_rekey(self.at)
            self._cipher = None

    def advanced(self, tag: int) -> None:
        """After one of libsodium's, which moved the state on itself."""
        if tag & _REKEY or self.bytes[_COUNTER] == b"\x01\0\0\0":
            self._cipher = None


class Sealer:
    """The sending side."""

    def __init__(self, key: bytes) -> None:
        self._state = _State()
        header = bytearray(HEADER_NBYTES)
        lib.crypto_secretstream_xchacha20poly1305_init_push(self._state.at, ffi.from_buffer(header), key)
        self.header = bytes(header)

    def seal(self, message: bytes | bytearray | memoryview, prefix: bytes) -> bytearray | memoryview:
        """The prefix, in the clear, and the sealed message behind it. The memory is the caller's."""
        return self._large(message, prefix) if self._state.takes(len(message)) else self._small(message, prefix)

    def _small(self, message: bytes | bytearray | memoryview, prefix: bytes) -> bytearray:
        nbytes, start = len(message), len(prefix)
        frame = bytearray(start + nbytes + SEAL_NBYTES)
        frame[:start] = prefix
        plain = message if type(message) is bytes else ffi.from_buffer(message)
        at = ffi.from_buffer(frame) + start
        lib.crypto_secretstream_xchacha20poly1305_push(self._state.at, at, ffi.NULL, plain, nbytes, ffi.NULL, 0, 0)
        self._state.advanced(0)
        return frame

    def _large(self, message: bytes | bytearray | memoryview, prefix: bytes) -> memoryview:
        state, nbytes = self._state, len(message)
        plain = state.room(_BLOCK + nbytes)  # nothing but zeros is ever written to its first block
        plain[_BLOCK:] = message
        out = np.empty(_BLOCK + nbytes + _MAC, np.uint8).data  # a bytearray would be filled with zeros before
        state.cipher.encrypt_into(state.nonce, plain, None, out)
        state.advance(0, out[-_MAC:])
        out[_BLOCK - 1] = out[0]
        out[_BLOCK - 1 - len(prefix) : _BLOCK - 1] = prefix
        return out[_BLOCK - 1 - len(prefix) :]


class Opener:
    """The receiving side."""

    def __init__(self, header: bytes, key: bytes) -> None:
        self._state = _State()
        self._opened = bytearray()
        self._tag = ffi.new("unsigned char *")
        lib.crypto_secretstream_xchacha20poly1305_init_pull(self._state.at, header, key)

    def open(self, *sealed: memoryview) -> memoryview | None:
        """The message, in memory that the next one overwrites; None: it was altered, or sealed with another key.

        `sealed`: `SEAL_NBYTES` or more, in one part or several.
        """
        nbytes = sum(map(len, sealed)) - SEAL_NBYTES
        if len(self._opened) < nbytes + _BLOCK:
            self._opened = bytearray(max(nbytes + _BLOCK, 2 * len(self._opened), 1 << 12))
        if self._state.takes(nbytes):
            return self._large(sealed, nbytes)
        return self._small(sealed[0] if len(sealed) == 1 else memoryview(b"".join(sealed)), nbytes)

    def _small(self, sealed: memoryview, nbytes: int) -> memoryview | None:
        out, taken = ffi.from_buffer(self._opened), ffi.from_buffer(sealed)
        pull = lib.crypto_secretstream_xchacha20poly1305_pull
        if pull(self._state.at, out, ffi.NULL, self._tag, taken, len(sealed), ffi.NULL, 0):
            return None
        self._state.advanced(self._tag[0])
        return memoryview(self._opened)[:nbytes]

    def _large(self, sealed: Sequence[memoryview], nbytes: int) -> memoryview | None:
        state = self._state
        nonce = state.nonce
        zeros = state.cipher.encrypt(nonce, bytes(_BLOCK), None)  # what the 63 bytes that did not travel are encrypted
        taken = state.room(_BLOCK + nbytes + _MAC)
        at = _BLOCK - 1
        for part in sealed:
            taken[at : at + len(part)] = part
            at += len(part)
        taken[0], taken[1:_BLOCK] = taken[_BLOCK - 1], zeros[1:_BLOCK]
        with memoryview(self._opened)[: _BLOCK + nbytes] as out:
            try:
                state.cipher.decrypt_into(nonce, taken, None, out)
            except InvalidTag:
                return None
        state.advance(self._opened[0], taken[-_MAC:])
        return memoryview(self._opened)[_BLOCK : _BLOCK + nbytes]


@functools.cache
def _is_there() -> bool:
    """Whether this `cryptography` (46 and later) and its OpenSSL (not where only FIPS' ciphers are allowed) can do it."""
    try:
        ChaCha20Poly1305(bytes(32)).encrypt_into(bytes(12), b"", None, bytearray(_MAC))
    except (AttributeError, UnsupportedAlgorithm):
        return False
    return True
