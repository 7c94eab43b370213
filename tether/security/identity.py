"""The key that a lab signs its models with, kept in one file; checks the signatures of others."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tether.errors import BadSignatureError, ConfigError, StoreError
from tether.security.envelopes import open_sealed
from tether.security.files import sync_folder

__all__ = ["Identity", "verify"]

_KEY_NBYTES = 32
_SIGNATURE_NBYTES = 64
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Identity:
    """An Ed25519 key pair (RFC 8032). Prints as its public key."""

    def __init__(self, seed: bytes) -> None:
        """`seed`: 32 secret bytes. Raises: ConfigError."""
        if len(seed) != _KEY_NBYTES:
            raise ConfigError(f"an identity has {_KEY_NBYTES} bytes, this has {len(seed)}: restore the file from a backup")
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._private.public_key().public_bytes_raw().hex()
        """64 hex digits: how others know this lab."""

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """The identity in the file, made there (mode 0600) if there is none; two processes that both make it get the same.

        Raises: ConfigError: the file is not an identity, or others may read it; StoreError: it can't be read or written.
        """
        try:
            if not path.exists():
                _create(path)
            return cls(_read(path))
        except (ConfigError, StoreError):
            raise
        except OSError as error:
            raise StoreError(f"the identity {path} can't be read or written ({error.strerror}): mend the folder's permissions") from error

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes: hyperdht makes the same key pair of them, so that a lab's address is the key that signs its models."""
        return self._private.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """The signature, 64 bytes. The caller sets kinds of messages apart by a prefix."""
        return self._private.sign(message)

    def open_sealed(self, envelope: bytes) -> bytes:
        """What was sealed for this key by `envelopes.seal_to`. Raises: BadEnvelopeError."""
        return open_sealed(self.seed, envelope)

    def __repr__(self) -> str:
        return f"Identity({self.public})"


def verify(public: str, message: bytes, signature: bytes) -> None:
    """Return if the holder of the key `public` (hex) signed `message`.

    Raises: BadSignatureError: it did not, or key or signature are malformed.
    """
    try:
        key = bytes.fromhex(public)
        if len(key) != _KEY_NBYTES or len(public) != 2 * _KEY_NBYTES or len(signature) != _SIGNATURE_NBYTES:
            raise ValueError
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise BadSignatureError(
            f"the signature is not that of key {public[:64]!r}: sign these very bytes with the publisher's key"
        ) from None


def _create(path: Path) -> None:
    """Whole or not at all: written aside, synced, then linked, which fails where another process was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(_KEY_NBYTES).hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & _OTHERS:
            raise ConfigError(
                f"the identity {path} can be read by other users: run `chmod 600 {path}`, and make a new one if they may have"
            )
        text = file.read(2 * _KEY_NBYTES + 2)
    try:
        return bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        raise ConfigError(f"{path} is not an identity (64 hex digits): restore it from a backup, or remove it to get a new one") from None
