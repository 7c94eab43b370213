"""Reads stored blobs and the arrays that are made of them; nothing leaves unverified."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tether.errors import ChunkAlteredError
from tether.store import packs
from tether.store.catalog import Catalog
from tether.store.layout import slices
from tether.store.manifest import ArrayEntry, Segment, digest_of
from tether.types import Digest

__all__ = ["Blobs"]


class Blobs:
    """The blobs in the packs of one folder."""

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self._folder = folder
        self._catalog = catalog

    def nbytes(self, digest: Digest) -> int | None:
        """Size of a stored blob; None where it is not stored."""
        location = self._catalog.locate(digest)
        return location.nbytes if location else None

    def read(self, digest: Digest, path: str = "") -> bytes:
        """The verified bytes; `path` is the array that needs them and goes into the error.

        Raises: ChunkMissingError, ChunkAlteredError, StoreError.
        """
        location = self._catalog.locate(digest)
        if location is None:
            raise packs.missing(digest, path)
        return packs.read_at(self._folder, location, digest, path)

    def segments(self, array: ArrayEntry) -> Iterator[bytes]:
        """The array's bytes, a segment at a time."""
        return (self._segment(segment, array.path) for segment in array.segments)

    def span(self, array: ArrayEntry, start: int, stop: int) -> bytes:
        """The array's bytes [start, stop); each blob that they touch is verified whole."""
        parts = []
        for index, piece in slices([segment.nbytes for segment in array.segments], start, stop):
            whole = self._segment(array.segments[index], array.path)
            parts.append(whole if piece.nbytes == len(whole) else whole[piece.offset : piece.offset + piece.nbytes])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _segment(self, segment: Segment, path: str) -> bytes:
        blob = self.read(segment.digest, path)
        if len(blob) == segment.nbytes:
            return blob
        data = blob[segment.offset : segment.offset + segment.nbytes]
        if len(data) != segment.nbytes:
            raise ChunkAlteredError(
                f"blob {segment.digest} is shorter than {path} needs: replicate the version again", segment.digest, path
            )
        return data

    def is_copy(self, file: Path, array: ArrayEntry) -> bool:
        """Whether a file on disk is, byte for byte, the array."""
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        with os.fdopen(descriptor, "rb", buffering=0) as opened:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size != array.nbytes:
                return False
            return all(self._matches(opened.read(segment.nbytes), segment, array.path) for segment in array.segments)

    def _matches(self, data: bytes, segment: Segment, path: str) -> bool:
        if segment.offset == 0 and digest_of(data) == segment.digest:
            return True
        # A part of a blob has no digest of its own; compare with the blob. A damaged copy of a whole blob comes here too, which is rare.
        return self._segment(segment, path) == data
