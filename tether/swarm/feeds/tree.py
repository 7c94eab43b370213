r"""Pure: the blocks of a Hyperbee's log, and the tree over them that its publisher signed (Hypercore 10; flat tree of DEP-0002).

    leaf    =  BLAKE2b-256("\0" + nbytes u64 LE + block)
    parent  =  BLAKE2b-256("\1" + nbytes u64 LE of both + left + right)
    root    =  BLAKE2b-256("\2" + of each largest full subtree, left to right: hash + flat index u64 LE + nbytes u64 LE)
    block   =  protobuf: 1: index of the tree (bytes), 2: key (bytes), 3: value (bytes; missing: the key was deleted)

Hypercore verifies what comes, not what it reads again from the disk: what a follower believes is computed from the bytes that it reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, Self

import msgspec

from tether.errors import MalformedFeedError

__all__ = ["Block", "FeedTree", "Growth", "Subtree", "parse_block", "spans"]

Block = tuple[bytes, bytes | None]
"""A key and the value that it has from here on; None: it is gone."""
Subtree = tuple[str, int]
"""Hash, hex, and bytes of the blocks in it."""
_HASH = re.compile("[0-9a-f]{64}")
_MOST_NBYTES = 1 << 53
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

    @classmethod
    def behind(cls, length: int) -> Self:
        """Of the blocks behind so many others: full subtrees of them stand in the whole tree as they are."""
        tree = cls()
        tree.length = length
        return tree

    def append(self, block: bytes) -> None:
        self._attach(_Peak(_digest(_LEAF, _u64(len(block)), block), len(block), self.length, 1))

    def _attach(self, peak: _Peak) -> None:
        self.length += peak.blocks
        while self._peaks and self._peaks[-1].blocks == peak.blocks:
            left = self._peaks.pop()
            nbytes = left.nbytes + peak.nbytes
            peak = _Peak(_digest(_PARENT, _u64(nbytes), left.digest, peak.digest), nbytes, left.first, 2 * left.blocks)
        self._peaks.append(peak)

    def root(self) -> str:
        """What heads name, hex."""
        parts = (part for peak in self._peaks for part in (peak.digest, _u64(2 * peak.first + peak.blocks - 1), _u64(peak.nbytes)))
        return _digest(_ROOT, *parts).hex()

    def subtrees(self) -> tuple[Subtree, ...]:
        """The largest full ones, left to right."""
        return tuple((peak.digest.hex(), peak.nbytes) for peak in self._peaks)

    def attach(self, subtrees: Sequence[Subtree], spans: Sequence[int]) -> None:
        """Go on with full subtrees of so many blocks each. Raises: MalformedFeedError: they are not such ones."""
        if len(subtrees) != len(spans):
            raise MalformedFeedError("what is to show how a feed grew does not fit its lengths")
        for (digest, nbytes), blocks in zip(subtrees, spans, strict=True):
            if not _HASH.fullmatch(digest) or not 0 <= nbytes < _MOST_NBYTES:
                raise MalformedFeedError("what is to show how a feed grew has a hash or a size that is none")
            self._attach(_Peak(bytes.fromhex(digest), nbytes, self.length, blocks))


class Growth(msgspec.Struct, frozen=True, array_like=True):
    """Shows that a log of one length contains one of a shorter length, or that it does not: a few hashes, whoever gives them."""

    before: tuple[Subtree, ...]
    """Full subtrees of the shorter one."""
    behind: tuple[Subtree, ...]
    """Those by which it became the longer one."""

    def roots(self, shorter: int, longer: int) -> tuple[str, str]:
        """At both lengths. If the second is the one that was signed, the first is that of the blocks with which this log begins.

        Raises: MalformedFeedError: it is of other lengths.
        """
        tree = FeedTree()
        tree.attach(self.before, spans(0, shorter))
        root = tree.root()
        tree.attach(self.behind, spans(shorter, longer))
        return root, tree.root()


def spans(length: int, longer: int) -> list[int]:
    """Blocks of each full subtree by which a tree of one length becomes one of another: O(log) of them.

    >>> spans(0, 11), spans(5, 11), spans(8, 8)
    ([8, 2, 1], [1, 2, 2, 1], [])
    """
    found = []
    while length < longer:
        largest = 1 << ((longer - length).bit_length() - 1)
        found.append(min(largest, length & -length) if length else largest)
        length += found[-1]
    return found


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
