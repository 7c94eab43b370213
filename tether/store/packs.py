r"""Packs: immutable files of blobs with an index at the end. Writes, reads and scans them.

    16 bytes   magic "tether pack 1\\n\\0\\0"
    …          the blobs, one after the other
    n × 44     index: digest (32 bytes), offset (u64), nbytes (u32), little-endian
    56 bytes   footer: offset of the index (u64), n (u64), BLAKE3 of the index (32 bytes), magic "tetherpk"

The pack is named by the BLAKE3 of its index, so that a publish that was cut off and is tried again writes the same file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from tether.errors import ChunkAlteredError, ChunkMissingError, MissingBlobsError, StoreError
from tether.store.disk import disk_errors, partial_of, sync_folder, write_halves
from tether.store.faults import reach
from tether.store.layout import BLOB_NBYTES
from tether.types import Digest

__all__ = ["SUFFIX", "Located", "Location", "missing", "read_at", "scan", "verified", "write_pack"]

Read = Callable[[Digest], bytes | None]
"""Gives the verified bytes of a blob; None: it is not there."""
SUFFIX = ".pack"
_MAGIC = b"tether pack 1\n\x00\x00"
_END = b"tetherpk"
_ENTRY = struct.Struct("<32sQI")
_FOOTER = struct.Struct("<QQ32s8s")
_MAX_BLOBS = 1 << 24
"""64 TB of full blobs: bounds what a broken footer can make us read."""


class Location(NamedTuple):
    """Where a blob lies."""

    pack: str
    offset: int
    nbytes: int


class Located(NamedTuple):
    """A line of a pack's index."""

    digest: Digest
    offset: int
    nbytes: int


def write_pack(folder: Path, digests: Iterable[Digest], read: Read) -> tuple[str, list[Located]]:
    """Write the blobs to a new pack, durably: one fsync of the file, a rename, one of the folder. Gives its name and index.

    Raises: MissingBlobsError: `read` gave None; OSError: the disk refused. Nothing is left then.
    """
    partial = partial_of(folder / "new")
    try:
        with partial.open("xb", buffering=0) as file:
            index = _write_blobs(file.fileno(), digests, read)
            name = _write_index(file.fileno(), index)
            reach("pack.index")
            os.fsync(file.fileno())
        reach("pack.fsync")
        partial.rename(folder / name)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    reach("pack.rename")
    sync_folder(folder)
    reach("pack.folder")
    return name, index


def _write_blobs(descriptor: int, digests: Iterable[Digest], read: Read) -> list[Located]:
    os.write(descriptor, _MAGIC)
    index, offset = [], len(_MAGIC)
    for digest in digests:
        data = read(digest)
        if data is None:
            raise MissingBlobsError(f"blob {digest} is not staged any more: upload it again, then send the manifest again", [digest])
        write_halves(descriptor, data, "blob")
        index.append(Located(digest, offset, len(data)))
        offset += len(data)
    return index


def _write_index(descriptor: int, index: list[Located]) -> str:
    table = b"".join(_ENTRY.pack(bytes.fromhex(line.digest), line.offset, line.nbytes) for line in index)
    digest = blake3(table)
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    tail = memoryview(table + _FOOTER.pack(start, len(index), digest.digest(), _END))
    while tail:
        tail = tail[os.write(descriptor, tail) :]
    return digest.hexdigest() + SUFFIX


def scan(path: Path) -> list[Located]:
    """The index of a pack, checked.

    Raises: StoreError: it is not a pack, was cut, or its index was altered.
    """
    with disk_errors(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < len(_MAGIC) + _FOOTER.size:
            raise _broken(path)
        file.seek(size - _FOOTER.size)
        start, count, digest, end = _FOOTER.unpack(file.read(_FOOTER.size))
        if end != _END or count > _MAX_BLOBS or start + count * _ENTRY.size + _FOOTER.size != size:
            raise _broken(path)
        file.seek(start)
        table = file.read(count * _ENTRY.size)
    if blake3(table).digest() != digest or path.name != digest.hex() + SUFFIX:
        raise _broken(path)
    return [Located(Digest(key.hex()), offset, nbytes) for key, offset, nbytes in _ENTRY.iter_unpack(table)]


def _broken(path: Path) -> StoreError:
    return StoreError(f"{path.name} is not a whole pack: `tether verify` lists the versions that need it; publish or replicate those again")


def read_at(folder: Path, location: Location, digest: Digest, path: str) -> bytes:
    """The bytes of a blob, verified; `path` is the array that needs them.

    Raises: ChunkMissingError: its pack is gone; ChunkAlteredError: its bytes are not what the digest says.
    """
    try:
        with disk_errors(folder / location.pack), (folder / location.pack).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), min(location.nbytes, BLOB_NBYTES), location.offset)
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise missing(digest, path) from None
        raise
    return verified(data, digest, path)


def verified(data: bytes, digest: Digest, path: str) -> bytes:
    """`data`, if it has this digest. Raises: ChunkAlteredError."""
    if blake3(data).hexdigest() != digest:
        where = f" (needed by {path})" if path else ""
        raise ChunkAlteredError(f"blob {digest}{where} was altered on disk: publish or replicate the version again", digest, path)
    return data


def missing(digest: Digest, path: str) -> ChunkMissingError:
    """The error for a blob that no pack holds."""
    where = f" (needed by {path})" if path else ""
    return ChunkMissingError(f"blob {digest}{where} is not in the store: publish or replicate the version again", digest, path)
