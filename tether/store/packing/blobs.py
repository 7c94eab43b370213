"""Reads stored blobs and the arrays that are made of them, decrypted where those are encrypted; nothing leaves unverified."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tether.errors import ChunkAlteredError, ChunkMissingError
from tether.store.format import packs
from tether.store.format.encrypted import vault_of
from tether.store.format.layout import BLOB_NBYTES
from tether.store.format.manifest import ArrayEntry, digest_of
from tether.store.format.packs import Located, Location
from tether.store.format.weights import Ranges
from tether.store.index.catalog import Catalog
from tether.store.packing.disk import BAD_MEDIUM, disk_errors, read_at, read_bytes_at
from tether.store.packing.pack_files import PackFiles
from tether.store.packing.parallel import buffer
from tether.types import Digest

__all__ = ["Blobs", "check_into", "cut_out", "plain_into", "too_short"]

Part = TypeVar("Part", bytes, memoryview)
_FEW = 64
"""Segments that are walked over in less than the time of a read."""
_KEPT = 16
"""Arrays of more whose segments' starts are remembered: each is 10 MB for a terabyte."""


class Blobs:
    """The blobs in the packs of one folder. Methods may be called from any thread."""

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self.files = PackFiles(folder)
        self._catalog = catalog
        self._lock = threading.Lock()
        self._ranges: OrderedDict[int, tuple[ArrayEntry, Ranges]] = OrderedDict()

    def nbytes(self, digest: Digest) -> int | None:
        """Size of a stored blob; None where it is not stored."""
        location = self._catalog.locate(digest)
        return location.nbytes if location else None

    def locate(self, digests: Iterable[Digest]) -> dict[Digest, Location]:
        """Where blobs lie, in the order of their bytes on the disk; those that no pack holds are left out."""
        found = self._catalog.locate_many(digests)
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def lines_of(self, pack: str) -> list[Located] | None:
        """What the catalog says lies in a pack; None: it does not know the pack."""
        lines = self._catalog.blobs_in(pack)
        return lines if lines or pack in self._catalog.packs() else None

    def read(self, digest: Digest, path: str = "") -> bytes:
        """The verified bytes; `path` is the array that needs them and goes into the error.

        Raises: ChunkMissingError, ChunkAlteredError, StoreError.
        """
        return self._read(digest, path, None, lambda descriptor, at: _checked(descriptor, at, digest, path))

    def read_into(self, digest: Digest, view: memoryview, path: str = "", location: Location | None = None) -> memoryview:
        """The part of `view` that holds the verified bytes now; `location` where the caller knows it.

        Raises: ChunkMissingError, ChunkAlteredError, StoreError.
        """
        return self._read(digest, path, location, lambda descriptor, at: check_into(descriptor, at, digest, view, path))

    def open_into(self, array: ArrayEntry, digest: Digest, view: memoryview, location: Location | None = None) -> memoryview:
        """The same for a blob of `array`, decrypted where that is encrypted: its tag is checked then, in place of the digest."""
        return self._read(digest, array.path, location, lambda descriptor, at: plain_into(descriptor, at, digest, view, array))

    def _read(self, digest: Digest, path: str, location: Location | None, read: Callable[[int, Location], Part]) -> Part:
        known = location or self._catalog.locate(digest)
        if known is None:
            raise packs.missing(digest, path)
        try:
            return self._read_at(known, digest, path, read)
        except ChunkMissingError:
            now = self._catalog.locate(digest)
            if now is None or now == known:
                raise
        return self._read_at(now, digest, path, read)  # the pack was rewritten since the catalog was asked

    def _read_at(self, location: Location, digest: Digest, path: str, read: Callable[[int, Location], Part]) -> Part:
        with disk_errors(self.files.folder / location.pack):
            try:
                with self.files.opened(location.pack) as descriptor:
                    return read(descriptor, location)
            except FileNotFoundError:
                raise packs.missing(digest, path) from None

    def is_whole(self, digest: Digest, location: Location | None = None) -> bool:
        """Whether it is stored and unaltered. Raises: StoreError: the disk refuses to say."""
        try:
            with buffer() as view:
                self.read_into(digest, view, location=location)
        except (ChunkMissingError, ChunkAlteredError):
            return False
        return True

    def span(self, array: ArrayEntry, start: int, stop: int) -> bytes:
        """The array's bytes [start, stop), decrypted; each blob that they touch is verified whole."""
        parts = []
        with buffer() as view:
            for segment in self._ranges_of(array).segments(start, stop - start):
                blob = self.open_into(array, segment.digest, view)
                parts.append(bytes(cut_out(blob, segment.digest, segment.offset, segment.nbytes, array.path)))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _ranges_of(self, array: ArrayEntry) -> Ranges:
        """Remembered by identity: to compare or hash an array of a hundred thousand segments takes as long as to walk over them."""
        if len(array.segments) < _FEW:
            return Ranges(array)
        with self._lock:
            known = self._ranges.get(id(array))
            if known is None:
                known = self._ranges[id(array)] = (array, Ranges(array))  # the array itself, too, so that no other gets its id
            self._ranges.move_to_end(id(array))
            while len(self._ranges) > _KEPT:
                self._ranges.popitem(last=False)
            return known[1]


def check_into(descriptor: int, location: Location, digest: Digest, view: memoryview, path: str) -> memoryview:
    """Read a blob from an open pack; gives the part of `view` that holds it. Raises: ChunkAlteredError; OSError."""
    part = _stored(descriptor, location, view)
    if digest_of(part) != digest:
        raise packs.altered(digest, path)
    return part


def _checked(descriptor: int, location: Location, digest: Digest, path: str) -> bytes:
    """The same as bytes of their own, read where they stay: a copy of them costs half of what hashing does."""
    data = b""
    with _bad_medium_is_damage():
        data = read_bytes_at(descriptor, location.offset, min(location.nbytes, BLOB_NBYTES))
    if digest_of(data) != digest:
        raise packs.altered(digest, path)
    return data


def plain_into(descriptor: int, location: Location, digest: Digest, view: memoryview, array: ArrayEntry) -> memoryview:
    """The same for a blob of `array`, which is decrypted on its way where that is encrypted. `view`: as long as the blob, or longer."""
    vault = vault_of(array)
    if vault is None:
        return check_into(descriptor, location, digest, view, array.path)
    with buffer() as sealed:
        return vault.open_into(digest, _stored(descriptor, location, sealed), view, array.path)


def _stored(descriptor: int, location: Location, view: memoryview) -> memoryview:
    part, count = view[: min(location.nbytes, BLOB_NBYTES)], 0
    with _bad_medium_is_damage():
        count = read_at(descriptor, location.offset, part)
    return part[:count]


@contextmanager
def _bad_medium_is_damage() -> Iterator[None]:
    """A bad place on the disk is damage like any other: what was read of it, nothing, has not the blob's digest, nor its tag."""
    try:
        yield
    except OSError as error:
        if error.errno not in BAD_MEDIUM:
            raise


def cut_out(blob: memoryview, digest: Digest, offset: int, nbytes: int, path: str) -> memoryview:
    """A range of a verified blob. Raises: ChunkAlteredError: it is shorter than the manifest says."""
    part = blob[offset : offset + nbytes]
    if len(part) != nbytes:
        raise too_short(digest, path)
    return part


def too_short(digest: Digest, path: str) -> ChunkAlteredError:
    """The error for a blob that is whole and yet not what the manifest counts on."""
    return ChunkAlteredError(f"blob {digest} is shorter than {path} needs: replicate the version again", digest, path)
