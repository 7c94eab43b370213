"""What may be said of an encrypted model that can't be loaded: reasons go to logs, lists and whoever asked, and must hold nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tether.errors import (
    ChunkAlteredError,
    ChunkMissingError,
    ClusterKeyMissingError,
    ConfigError,
    LoadFailedError,
    LockedModelError,
    NoSpaceError,
    ServiceUnavailableError,
    TetherError,
    UntrustedCodeError,
)

__all__ = ["discretion", "withheld"]

_OURS = (LockedModelError, ClusterKeyMissingError, UntrustedCodeError, ServiceUnavailableError, NoSpaceError, ConfigError)
"""Raised before a file of the model is opened, of keys, trust and room: they say nothing of what is in it."""
_MORE = "to see more, open its files with their library where they may lie in plain (`tether export`)"


def withheld(error: Exception) -> TetherError:
    """An error of the same kind and code, without its text: a library names tensors and values, and we name files."""
    if isinstance(error, ChunkMissingError | ChunkAlteredError) and len(error.args) > 1:
        digest = error.args[1]
        return type(error)(f"a blob of the encrypted model is missing or altered ({digest}): `tether repair` mends it", digest, "")
    if isinstance(error, TetherError):
        return type(error)(f"the model is encrypted, so that only the kind of failure is said here, {error.code}: {_MORE}")
    kind = type(error).__name__
    return LoadFailedError(f"the model is encrypted, so that only the kind of failure is said here, {kind}: {_MORE}")


@contextmanager
def discretion(*, is_needed: bool) -> Iterator[None]:
    """Around what reads an encrypted model's names, before its files are opened. Raises: what the body does, without its text."""
    try:
        yield
    except _OURS:
        raise
    except Exception as error:
        if not is_needed:
            raise
        raise withheld(error) from None
