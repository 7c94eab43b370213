r"""Packs: immutable files of blobs with an index at the end: the format, the index, what damage is called.

    16 bytes   magic "tether pack 1\\n\\0\\0"
    …          the blobs, in the order of the files that they were cut from, with room between them
    n × 44     index: digest (32 bytes), offset (u64), nbytes (u32), little-endian
    56 bytes   footer: offset of the index (u64), n (u64), BLAKE3 of the index (32 bytes), magic "tetherpk"

The pack is named by the BLAKE3 of its index, so that a publish that was cut off and is tried again writes the same file.

A blob lies at an offset that leaves the same remainder by 64 as its offset in the file it was cut from. So what is aligned in a model's
file is aligned in the pack, and neighbours in the file are neighbours in the pack, without a gap, where both were written together:
a tensor of many blobs is one range of the pack, which numpy can use in place.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from blake3 import blake3

from tether.errors import ChunkAlteredError, ChunkMissingError, StoreError
from tether.store.format.layout import BLOB_NBYTES
from tether.types import Digest

__all__ = ["MAGIC", "SUFFIX", "Located", "Location", "altered", "index_bytes", "missing", "place", "read_index"]

SUFFIX = ".pack"
MAGIC = b"tether pack 1\n\x00\x00"
"""How a pack begins."""
_ALIGNMENT = 64
"""safetensors, GGUF and numpy align tensors in their files to this or less; it is also a line of the processor's cache."""
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


def place(end: int, phase: int) -> int:
    """The first offset from `end` for bytes that lay at `phase` in their file.

    >>> place(16, 0), place(64, 64), place(114, 50)
    (64, 64, 114)
    """
    return end + (phase - end) % _ALIGNMENT


def index_bytes(index: Sequence[Located], start: int) -> tuple[str, bytes]:
    """The name of the pack and the bytes that end it; they begin at `start`."""
    table = b"".join(_ENTRY.pack(bytes.fromhex(line.digest), line.offset, line.nbytes) for line in index)
    digest = blake3(table)
    return digest.hexdigest() + SUFFIX, table + _FOOTER.pack(start, len(index), digest.digest(), _END)


def read_index(name: str, file: BinaryIO) -> list[Located]:
    """The index of a pack, checked; `name`: that of its file.

    Raises: StoreError: it is not a pack, was cut, or its index was altered.
    """
    size = file.seek(0, os.SEEK_END)
    if size < len(MAGIC) + _FOOTER.size:
        raise _broken(name)
    file.seek(size - _FOOTER.size)
    start, count, digest, end = _FOOTER.unpack(file.read(_FOOTER.size))
    if end != _END or count > _MAX_BLOBS or start + count * _ENTRY.size + _FOOTER.size != size:
        raise _broken(name)
    file.seek(start)
    table = file.read(count * _ENTRY.size)
    if blake3(table).digest() != digest or name != digest.hex() + SUFFIX:
        raise _broken(name)
    return [_line(name, start, *entry) for entry in _ENTRY.iter_unpack(table)]


def _line(name: str, start: int, digest: bytes, offset: int, nbytes: int) -> Located:
    # A pack may come from another host: whoever wrote it could give it any index and the name that fits.
    if nbytes > BLOB_NBYTES or not len(MAGIC) <= offset <= start - nbytes:
        raise _broken(name)
    return Located(Digest(digest.hex()), offset, nbytes)


def _broken(name: str) -> StoreError:
    return StoreError(f"{name} is not a whole pack: `tether verify` lists the versions that need it; publish or replicate those again")


def altered(digest: Digest, path: str) -> ChunkAlteredError:
    """The error for a blob whose bytes are not what its digest says."""
    where = f" (needed by {path})" if path else ""
    return ChunkAlteredError(f"blob {digest}{where} was altered on disk: publish or replicate the version again", digest, path)


def missing(digest: Digest, path: str) -> ChunkMissingError:
    """The error for a blob that no pack holds."""
    where = f" (needed by {path})" if path else ""
    return ChunkMissingError(f"blob {digest}{where} is not in the store: publish or replicate the version again", digest, path)
