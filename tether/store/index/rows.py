"""Pure: what rows of the catalog may say. A disk can alter them, too: what makes no sense is told before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tether.errors import StoreError
from tether.store.format.layout import BLOB_NBYTES
from tether.store.format.packs import Located, Location
from tether.types import Digest

__all__ = ["altered", "located", "location", "seconds"]

_DIGEST_NBYTES = 32
_MAX_OFFSET = 1 << 60
"""No file is longer; sums with it still fit into what SQLite and the system count with."""


def altered(what: str) -> StoreError:
    """The error for a row: `what` it says."""
    return StoreError(
        f"the catalog was altered on disk ({what} makes no sense): restore catalog.sqlite from a backup, or delete the file and publish or "
        "replicate the versions again; their blobs are kept"
    )


def located(digest: object, offset: object, nbytes: object) -> Located:
    """A row of `blobs`. Raises: StoreError."""
    match digest, offset, nbytes:
        case bytes(), int(), int() if len(digest) == _DIGEST_NBYTES and _is_range(offset, nbytes):
            return Located(Digest(digest.hex()), offset, nbytes)
    raise altered("where it says that a blob lies")


def location(digest: Digest, row: Sequence[Any]) -> Location:
    """A row of `blobs` and its pack. Raises: StoreError."""
    pack, offset, nbytes = row
    if isinstance(pack, str) and isinstance(offset, int) and isinstance(nbytes, int) and _is_range(offset, nbytes) and "/" not in pack:
        return Location(pack, offset, nbytes)  # a `match` would take longer than SQLite did
    raise altered(f"where it says that blob {digest} lies")


def seconds(value: object) -> float:
    """A time. Raises: StoreError."""
    if not isinstance(value, int | float):
        raise altered("a time in it")
    return value


def _is_range(offset: int, nbytes: int) -> bool:
    return 0 <= offset < _MAX_OFFSET and 0 <= nbytes <= BLOB_NBYTES
