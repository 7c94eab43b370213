r"""Pure: the blocks of a Hyperbee's log, and the tree over them that its publisher signed (Hypercore 10; flat tree of DEP-0002).

    leaf    =  BLAKE2b-256("\0" + nbytes u64 LE + block)
    parent  =  BLAKE2b-256("\1" + nbytes u64 LE of both + left + right)
    root    =  BLAKE2b-256("\2" + of each largest full subtree, left to right: hash + flat index u64 LE + nbytes u64 LE)
    block   =  protobuf: 1: index of the tree (bytes), 2: key (bytes), 3: value (bytes; missing: the key was deleted)

Hypercore verifies what comes, not what it reads again from the disk: what a follower believes is computed from the bytes that it reads.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

from tether.errors import MalformedFeedError

__all__ = ["Block", "FeedTree", "parse_block"]

Block = tuple[bytes, bytes | None]
"""A key and the value that it has from here on; None: it is gone."""
_LEAF, _PARENT, _ROOT = b"\0", b"\1", b"\2"
_KEY, _VALUE = 2, 3
_BYTES, _VARINT = 2, 0
_VARINT_NBYTES = 10


class _Peak(NamedTuple):
    """A full subtree."""

    digest: bytes
    nbytes: int
    first: int
    blocks: int


class FeedTree:
    """Of the blocks so far."""

    def __init__(self, before: FeedTree | None = None) -> None:
        """Of no blocks, or of those of another one, from which it then goes its own way."""
        self.length: int = before.length if before else 0
        """Blocks."""
        self._peaks: list[_Peak] = list(before._peaks) if before else []  # noqa: SLF001 (its own kind)

    def append(self, block: bytes) -> None:
        peak = _Peak(_digest(_LEAF, _u64(len(block)), block), len(block), self.length, 1)
        self.length += 1
        while self._peaks and self._peaks[-1].blocks == peak.blocks:
            left = self._peaks.pop()
            nbytes = left.nbytes + peak.nbytes
            peak = _Peak(_digest(_PARENT, _u64(nbytes), left.digest, peak.digest), nbytes, left.first, 2 * left.blocks)
        self._peaks.append(peak)

    def root(self) -> str:
        """What heads name, hex."""
        parts = (part for peak in self._peaks for part in (peak.digest, _u64(2 * peak.first + peak.blocks - 1), _u64(peak.nbytes)))
        return _digest(_ROOT, *parts).hex()


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"".join(parts), digest_size=32).digest()


def _u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def parse_block(data: bytes) -> Block:
    """Any block but the first, which is Hyperbee's own. Raises: MalformedFeedError: it is none of a Hyperbee."""
    key: bytes | None = None
    value: bytes | None = None
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        size, at = _varint(data, at)
        if tag & 7 == _VARINT:
            continue  # `size` was its value
        if tag & 7 != _BYTES or at + size > len(data):
            raise MalformedFeedError("a block of the feed is none of a Hyperbee")
        if tag >> 3 == _KEY:
            key = data[at : at + size]
        elif tag >> 3 == _VALUE:
            value = data[at : at + size]
        at += size
    if key is None:
        raise MalformedFeedError("a block of the feed has no key")
    return key, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number, and where it ends."""
    number = 0
    for index, byte in enumerate(data[at : at + _VARINT_NBYTES]):
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:  # noqa: PLR2004 (the last one)
            return number, at + index + 1
    raise MalformedFeedError("a block of the feed ends in the middle of a number")
