"""The first API key of a lab: made at the first start, for the user who can read the file."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tether.errors import ConfigError

__all__ = ["ensure_api_key"]


def ensure_api_key(path: Path) -> None:
    """Make the key if there is none; 32 random bytes, mode 0600.

    Raises: ConfigError: others can read the file.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others; run chmod 600 on it, or delete it to get a new key") from None
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(f"tk_{secrets.token_urlsafe(32)}\n")
