"""Blobs that were uploaded or cut and that no version names yet: one file each, until a publish packs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from tether.errors import DigestMismatchError, PayloadTooLargeError
from tether.store.disk import PARTIAL, disk_errors, partial_of, write_halves
from tether.store.faults import reach
from tether.store.layout import BLOB_NBYTES
from tether.store.manifest import digest_of, is_digest
from tether.types import Digest

__all__ = ["Staging"]

_STALE = 24 * 3600.0
"""Seconds after which an upload that was never published is given up."""


class Staging:
    """The folder of staged blobs. Not synced: a publish hashes them again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, digest: Digest, data: bytes) -> None:
        """Raises: PayloadTooLargeError, DigestMismatchError, NoSpaceError, StoreError."""
        if len(data) > BLOB_NBYTES:
            raise PayloadTooLargeError(f"a blob of {len(data)} bytes: cut files every {BLOB_NBYTES} bytes")
        if not is_digest(digest) or digest_of(data) != digest:
            raise DigestMismatchError(f"the bytes sent as blob {digest[:64]!r} have another BLAKE3 digest: send them again", digest[:64])
        path = self._folder / digest
        if self.nbytes(digest) == len(data):
            return
        with disk_errors(path):
            self._write(path, data)

    def _write(self, path: Path, data: bytes) -> None:
        partial = partial_of(path)
        try:
            with partial.open("xb", buffering=0) as file:
                write_halves(file.fileno(), data, "stage")
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        reach("stage.rename")

    def nbytes(self, digest: Digest) -> int | None:
        """Size of a staged blob; None where it is not staged."""
        try:
            return (self._folder / digest).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, digest: Digest) -> bytes | None:
        """The bytes, hashed again (a power loss may have cut them, and a wrong blob in a pack can't be taken back); None: not staged."""
        path = self._folder / digest
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if digest_of(data) == digest:
            return data
        path.unlink(missing_ok=True)
        return None

    def remove(self, digests: Iterable[Digest]) -> None:
        """Those of them that are staged. What can't be removed stays for the next sweep: it is only space."""
        for digest in digests:
            try:
                (self._folder / digest).unlink(missing_ok=True)
            except OSError:
                continue
            reach("clean")

    def sweep(self, is_stored: Callable[[Digest], bool], now: float) -> None:
        """Remove what was half-written, what a pack holds by now, what nobody published in a day. Only the writer calls it."""
        with disk_errors(self._folder):
            entries = [(entry, entry.stat().st_mtime) for entry in os.scandir(self._folder)]
        for entry, changed in entries:
            known = is_digest(entry.name)
            if (known and (now - changed > _STALE or is_stored(Digest(entry.name)))) or entry.name.endswith(PARTIAL):
                with disk_errors(Path(entry.path)):
                    Path(entry.path).unlink(missing_ok=True)

    def clear(self) -> None:
        """Give up all that is staged: the way to space on a full disk."""
        self.remove(Digest(entry.name) for entry in os.scandir(self._folder) if is_digest(entry.name))
