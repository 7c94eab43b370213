"""The first API key of a lab: made at the first start, for the user who can read the file."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from tether.errors import ConfigError, StoreError
from tether.security.files import written_aside

__all__ = ["ensure_api_key"]

_KEY = re.compile(rb"tk_[A-Za-z0-9_-]{43}\s*")
"""32 random bytes in base64url."""
_MOST_NBYTES = 128


def ensure_api_key(path: Path) -> None:
    """Make the key if there is none; 32 random bytes, mode 0600. Two processes that both make it get the same.

    Raises: ConfigError: others can read the file, or there is no key in it; StoreError: it can't be read or written.
    """
    try:
        if not path.exists():
            _create(path)
        _check(path)
    except (ConfigError, StoreError):
        raise
    except OSError as error:
        raise StoreError(f"the API key {path} can't be read or written ({error.strerror}): mend the folder's permissions") from error


def _create(path: Path) -> None:
    """Whole or not at all: linked, which fails where another process was first."""
    with (
        contextlib.suppress(FileExistsError),
        written_aside(path, f"tk_{secrets.token_urlsafe(32)}\n".encode()) as partial,
    ):
        os.link(partial, path)


def _check(path: Path) -> None:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others; run chmod 600 on it, or delete it to get a new key")
        text = file.read(_MOST_NBYTES)
    if not _KEY.fullmatch(text):
        raise ConfigError(f"{path} holds no API key of Tether's; delete it to get a new one")
