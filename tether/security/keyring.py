"""The cluster keys of a data folder: what all other secrets in it are wrapped by. One is current; a rotation has two for a while."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tether.errors import ClusterKeyMissingError, ConfigError, StoreError, TetherError
from tether.security.files import locked, sync_folder, written_aside

__all__ = ["Keyring", "wrapped_by"]

_KEY_NBYTES = 32
_ID_NBYTES = 16
_NONCE_NBYTES = 12
"""Random: 2^32 wrappings under one key would be too many, a lab makes thousands."""
_TAG_NBYTES = 16
_MOST_NBYTES = 128
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_ID_CONTEXT = "tether 2026 id of a cluster key"
"""The id follows from the secret: a file whose content was damaged is not the key that its name says."""
_WRAP = b"tether wrapped by cluster key v1\0"
_FILE = re.compile(r"cluster-([0-9a-f]{32})\.key")
_TEXT = re.compile(rb"([1-9][0-9]{0,8}) ([0-9a-f]{64})\n")
"""Number and secret. The key with the highest number is the current one: making it so is one step that can't be left half done."""
_RETIRED = ".retired"


class _ClusterKey(NamedTuple):
    number: int
    id: str
    secret: bytes

    def __repr__(self) -> str:
        return f"_ClusterKey({self.number}, {self.id}, ***)"


class Keyring:
    """The cluster keys in a folder. Any thread. Prints no secret."""

    def __init__(self, folder: Path) -> None:
        """Use `open`."""
        self._folder = folder
        self._keys: dict[str, _ClusterKey] = {}
        self._lock = threading.RLock()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The keys in `folder`; makes it (mode 0700) and the first key (mode 0600) if there are none, and ends what a crash left half done.

        Raises: ConfigError: others can read a key, or it was damaged; StoreError: the disk refuses.
        """
        keyring = cls(folder)
        with keyring._changing():
            keyring._sweep()
            keyring._load()
            if not keyring._keys:
                keyring._add()
        return keyring

    @property
    def current(self) -> str:
        """Id of the key that wraps what is new."""
        with self._lock:
            return self._current().id

    @property
    def outdated(self) -> tuple[str, ...]:
        """Ids of the other keys in the folder: what a rotation has still to rewrap and `retire`, or what was restored from a backup."""
        with self._lock:
            return tuple(sorted(self._keys.keys() - {self._current().id}))

    def wrap(self, secret: bytes, context: bytes) -> bytes:
        """`secret` encrypted under the current key; opens only for the same `context`. Never the same bytes twice."""
        with self._lock:
            key = self._current()
        nonce = secrets.token_bytes(_NONCE_NBYTES)
        head = bytes.fromhex(key.id) + nonce
        return head + AESGCM(key.secret).encrypt(nonce, secret, _WRAP + head + context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The secret that `wrap` wrapped.

        Raises: ClusterKeyMissingError: its key is not in the folder; ConfigError; StoreError: it was altered or belongs elsewhere.
        """
        head, body = wrapped[: _ID_NBYTES + _NONCE_NBYTES], wrapped[_ID_NBYTES + _NONCE_NBYTES :]
        if len(body) < _TAG_NBYTES:
            raise _altered()
        key = self._key(wrapped_by(wrapped))
        try:
            return AESGCM(key.secret).decrypt(head[_ID_NBYTES:], body, _WRAP + head + context)
        except InvalidTag:
            raise _altered() from None

    def rotate_begin(self) -> str:
        """Make a new current key, durably, and give its id; those before it still unwrap until they are retired. Back the new one up.

        Raises: ConfigError, StoreError.
        """
        with self._changing():
            self._load()
            return self._add().id

    def retire(self, key: str) -> None:
        """Delete a key for good: overwritten as far as the disk lets one. Nothing may be wrapped by it any more. Again: does nothing.

        Raises: ConfigError: it is the current one; StoreError: the disk refuses.
        """
        with self._changing():
            self._load()
            if key == self._current().id:
                raise ConfigError(f"cluster key {key} is the current one and can't be retired: make a new one first")
            path = self._path(key)
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_name(path.name + _RETIRED))  # a crash from here on leaves no half-wiped key under a key's name
                sync_folder(self._folder)
            self._sweep()
            self._keys.pop(key, None)

    def __repr__(self) -> str:
        return f"Keyring({str(self._folder)!r}, current={self.current}, ***)"

    # --- the folder

    def _path(self, key: str) -> Path:
        return self._folder / f"cluster-{key}.key"

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """No other thread or process changes the folder meanwhile."""
        with self._lock, self._errors():
            _make_folder(self._folder)
            with locked(self._folder / "cluster.lock"):
                yield

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except TetherError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(f"the cluster keys in {self._folder} can't be read or written ({reason}): mend the folder") from error

    def _load(self) -> None:
        keys: dict[str, _ClusterKey] = {}
        for path in sorted(self._folder.iterdir()):
            match = _FILE.fullmatch(path.name)
            with contextlib.suppress(FileNotFoundError):  # another process retires it just now
                keys |= {match[1]: _read(path, match[1])} if match else {}
        self._keys = keys

    def _current(self) -> _ClusterKey:
        """Of two with one number (one was restored after another had been made) either will do.

        Raises: ClusterKeyMissingError: somebody removed them all.
        """
        if not self._keys:
            raise ClusterKeyMissingError(f"all cluster keys are gone from {self._folder}: restore them from a backup (mode 0600)", "")
        return max(self._keys.values())

    def _key(self, key: str) -> _ClusterKey:
        with self._lock:
            if key not in self._keys:  # another process may have rotated since
                with self._errors():
                    self._load()
            try:
                return self._keys[key]
            except KeyError:
                message = f"cluster key {key} is needed and not there: restore {self._path(key)} from a backup (mode 0600)"
                raise ClusterKeyMissingError(message, key) from None

    def _add(self) -> _ClusterKey:
        number = 1 + max((key.number for key in self._keys.values()), default=0)
        secret = secrets.token_bytes(_KEY_NBYTES)
        key = _ClusterKey(number, _id_of(secret), secret)
        with written_aside(self._path(key.id), f"{number} {secret.hex()}\n".encode()) as partial:
            partial.rename(self._path(key.id))
            sync_folder(self._folder)
        self._keys[key.id] = key
        return key

    def _sweep(self) -> None:
        """Wipe what is retired or was never finished. The lock is held: nobody is writing one now."""
        for pattern in (f"cluster-*{_RETIRED}", "cluster-*.partial"):
            for path in self._folder.glob(pattern):
                _wipe(path)
        sync_folder(self._folder)


def wrapped_by(wrapped: bytes) -> str:
    """Id of the cluster key that `Keyring.wrap` made this with."""
    return wrapped[:_ID_NBYTES].hex()


def _id_of(secret: bytes) -> str:
    return blake3(secret, derive_key_context=_ID_CONTEXT).hexdigest(_ID_NBYTES)


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & _OTHERS:
        folder.chmod(0o700)


def _read(path: Path, key: str) -> _ClusterKey:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_mode & _OTHERS:
            raise ConfigError(
                f"the cluster key {path} can be read by other users: run `chmod 600 {path}`, and rotate the cluster key if they may have"
            )
        match = _TEXT.fullmatch(file.read(_MOST_NBYTES))
    secret = bytes.fromhex(match[2].decode()) if match else b""
    if match is None or _id_of(secret) != key:
        raise ConfigError(f"{path} is cut off or altered and no key any more: restore it from a backup")
    return _ClusterKey(int(match[1]), key, secret)


def _wipe(path: Path) -> None:
    """Best effort: a disk that copies on write keeps the old blocks until it needs them."""
    with path.open("r+b") as file:
        file.write(secrets.token_bytes(_MOST_NBYTES))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _altered() -> StoreError:
    return StoreError("a wrapped key was altered, or belongs to something else: restore the catalog from a backup")
