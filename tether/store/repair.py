"""Mends what a survey found damaged, with blobs from elsewhere that are verified before they are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tether.store.format.layout import BLOB_NBYTES
from tether.store.format.manifest import digest_of
from tether.types import Digest

__all__ = ["RepairReport", "Source", "fetched"]

Source = Callable[[Digest], bytes | None]
"""Gives the bytes of a blob or a manifest; None: it does not have it. What it gives is not believed."""


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What became of the damage."""

    found: tuple[Digest, ...]
    """Blobs and manifests that were missing or altered, and good ones that had to leave an unreadable pack."""
    repaired: tuple[Digest, ...]
    failed: tuple[Digest, ...]
    """The source had none, or other bytes: ask another."""


def fetched(digests: Sequence[Digest], source: Source, failed: list[Digest], limit: int = BLOB_NBYTES) -> Iterator[tuple[Digest, bytes]]:
    """What the source has, verified; the others are added to `failed`."""
    for digest in digests:
        data = source(digest)
        if data is None or len(data) > limit or digest_of(data) != digest:
            failed.append(digest)
        else:
            yield digest, data
