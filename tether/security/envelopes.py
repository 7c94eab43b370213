"""Secrets for one reader: a libsodium sealed box (X25519, XSalsa20-Poly1305) to the key that a lab signs with."""

from __future__ import annotations

from tether.errors import BadEnvelopeError, BadKeyError

__all__ = ["MAX_NBYTES", "open_sealed", "seal_to"]

MAX_NBYTES = 256 * 1024
"""Of an envelope: some thousand model keys. What is longer was not made by `seal_to`."""
_KEY_NBYTES = 32

# libsodium is imported when the first envelope is made or opened: 20 ms that a lab without peers need not pay.


def seal_to(public: str, secret: bytes) -> bytes:
    """An envelope that only the holder of the Ed25519 key `public` (hex) opens. It doesn't say who made it.

    Raises: BadKeyError: `public` is no key; BadEnvelopeError: `secret` is too long for one.
    """
    from nacl.bindings import crypto_sign_ed25519_pk_to_curve25519
    from nacl.public import PublicKey, SealedBox

    try:
        key = bytes.fromhex(public)
        if len(key) != _KEY_NBYTES or len(public) != 2 * _KEY_NBYTES:
            raise ValueError
        box = SealedBox(PublicKey(crypto_sign_ed25519_pk_to_curve25519(key)))
    except (ValueError, TypeError, RuntimeError):  # the last is libsodium's for a point of small order or off the curve
        raise BadKeyError(f"{public[:64]!r} is not the key of a lab: take the 64 hex digits that `tether status` shows there") from None
    sealed = bytes(box.encrypt(secret))
    if len(sealed) > MAX_NBYTES:
        raise BadEnvelopeError(f"an envelope of {len(sealed)} bytes is too long to be opened; at most {MAX_NBYTES} are: send fewer keys")
    return sealed


def open_sealed(seed: bytes, envelope: bytes) -> bytes:
    """What `seal_to` sealed for the Ed25519 key pair of this seed.

    Raises: BadEnvelopeError: it is for another key, altered, cut off, or too long.
    """
    from nacl.exceptions import CryptoError
    from nacl.public import SealedBox
    from nacl.signing import SigningKey

    try:
        if len(envelope) > MAX_NBYTES:
            raise ValueError
        return bytes(SealedBox(SigningKey(seed).to_curve25519_private_key()).decrypt(envelope))
    except (CryptoError, ValueError, TypeError):
        raise BadEnvelopeError("the envelope is not for this lab's key, or was altered: ask its sender for a new one") from None
