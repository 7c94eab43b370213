"""Which members a zip archive has and where their bytes lie; whatever two readers of zip could see differently is refused.

Follows PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3 (zip64). Scanners and loaders have been played off against each other by archives
whose local headers, central directory, flags and checksums disagree (CVE-2025-1945, CVE-2025-10156); here they have to agree, all of
them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from struct import Struct, error
from typing import NamedTuple

from tether.errors import BadModelError, HostileModelError

__all__ = ["DEFLATED", "STORED", "Member", "chunks", "directory", "is_zip", "members", "part", "raw", "read"]

STORED, DEFLATED = 0, 8
_MAX_MEMBERS = 100_000
"""Half as many again as a model may have tensors: a second of reading."""
_MAX_DIRECTORY_NBYTES = 64 << 20
"""As for all metadata of a file: it is read as a whole."""
_MAX_RATIO = 200
"""Times the file's size that all its members may unpack to; deflate's own bound is 1032, which only zeros come near to."""
_FREE_NBYTES = 64 << 20
"""What any archive may unpack to."""
_MAX_DEFLATE = 1032
_STEP = 1 << 20
"""Bytes read at a time."""
_END = Struct("<4s4H2LH")
_END64 = Struct("<4sQ2H2L4Q")
_LOCATOR = Struct("<4sLQL")
_ENTRY = Struct("<4s6H3L5H2L")
_LOCAL = Struct("<4s5H3L2H")
_SIZES, _SIZES64 = Struct("<3L"), Struct("<L2Q")
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_DESCRIPTOR = 0x8
"""Flag: checksum and sizes follow the data; the local header has zeros."""
_UTF8 = 0x800
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075
_FULL = 0xFFFFFFFF
"""In place of a number that is in the zip64 field."""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    data_offset: int
    """Of its bytes, as stored, in the file on disk."""
    nbytes: int
    """Unpacked."""
    compressed_nbytes: int
    method: int
    """`STORED` or `DEFLATED`."""
    crc: int


class _Entry(NamedTuple):
    """What the central directory says of a member."""

    name: bytes
    flags: int
    method: int
    crc: int
    compressed_nbytes: int
    nbytes: int
    header_offset: int


class _Window(NamedTuple):
    """The bytes of an archive: a file, or a member that is stored in one."""

    file: int
    start: int
    nbytes: int
    label: str

    def read(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or offset + nbytes > self.nbytes:
            raise self.bad("is cut off or damaged")
        data = os.pread(self.file, nbytes, self.start + offset)
        if len(data) != nbytes:
            raise self.bad("became shorter while it was read")
        return data

    def bad(self, what: str) -> BadModelError:
        return BadModelError(f"{self.label} {what}: save the model again")

    def hostile(self, what: str) -> HostileModelError:
        return HostileModelError(f"{self.label} {what}; no library writes that, so it is refused: export the model again from its source")


def is_zip(path: Path) -> bool:
    """Whether a file begins as archives do."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def directory(path: Path) -> bytes:
    """The directory of an archive as it stands, for a first look at the names in it; `members` checks it.

    Raises: BadModelError: no archive, damaged, or too large.
    """
    with _opened(path, None) as window:
        start, _, end = _directory(window)
        return window.read(start, end - start)


def members(path: Path, within: Member | None = None) -> list[Member]:
    """The files of an archive in the order of its directory; `within` a member that is an archive itself, stored as it is.

    Raises: BadModelError: no archive, or damaged; HostileModelError: encrypted, overlapping, duplicate members, headers that disagree,
        names that lead out, more than 100,000 members, or more bytes than such a file can sensibly hold.
    """
    with _opened(path, within) as window:
        start, count, end = _directory(window)
        data = window.read(start, end - start)
        entries = _entries(window, data, count)
        spans = []
        found = []
        for entry in entries:
            member, stop = _located(window, entry)
            spans.append((entry.header_offset, stop))
            if not member.name.endswith("/"):
                found.append(member)
        _check_spans(window, spans, start)
        _check_total(window, found)
        return found


def read(path: Path, member: Member, limit: int) -> bytes:
    """The bytes of a member, unpacked; their checksum is right.

    Raises: BadModelError: more than `limit` bytes, or damaged.
    """
    if member.nbytes > limit:
        raise BadModelError(f"{path.name}: {member.name[:200]!r} has {member.nbytes} bytes; at most {limit} are taken of such a file")
    return b"".join(chunks(path, member))


def chunks(path: Path, member: Member) -> Iterator[bytes]:
    """The bytes of a member, unpacked, in pieces of about 1 MiB; the checksum is known to be right after the last one.

    Raises: BadModelError: they are not what the directory says.
    """
    crc = nbytes = 0
    for piece in _inflated(path, member) if member.method == DEFLATED else raw(path, member):
        crc = zlib.crc32(piece, crc)
        nbytes += len(piece)
        if nbytes > member.nbytes:
            raise HostileModelError(f"{path.name}: {member.name[:200]!r} unpacks to more than the {member.nbytes} bytes that it declares")
        yield piece
    if nbytes != member.nbytes or crc != member.crc:
        raise BadModelError(f"{path.name}: {member.name[:200]!r} is damaged (its checksum or length is wrong): save the model again")


@contextmanager
def _opened(path: Path, within: Member | None) -> Iterator[_Window]:
    with path.open("rb") as file:
        if within is None:
            yield _Window(file.fileno(), 0, os.fstat(file.fileno()).st_size, path.name)
            return
        label = f"{path.name}: {within.name[:200]!r}"
        if within.method != STORED:
            raise BadModelError(f"{label} is an archive that was compressed once more: save the model again")
        yield _Window(file.fileno(), within.data_offset, within.nbytes, label)


def _directory(window: _Window) -> tuple[int, int, int]:
    """Where the central directory begins, how many entries it has, where it ends."""
    if window.nbytes < _END.size:
        raise window.bad("is not a zip archive, or was cut off")
    end = window.nbytes - _END.size
    magic, disk, first_disk, here, count, nbytes, start, comment = _END.unpack(window.read(end, _END.size))
    if magic != b"PK\x05\x06" or comment:
        # a comment may hold the end of a second archive, and readers differ in which they find
        raise window.bad("is not a zip archive, was cut off, or has something behind its end")
    end, wide = _directory64(window, end)
    if wide:
        given = (count, nbytes, start)
        disk, first_disk, here, count, nbytes, start = wide
        full = (0xFFFF, _FULL, _FULL)
        if any(old not in {new, most} for old, new, most in zip(given, (count, nbytes, start), full, strict=True)):
            raise window.hostile("has two ends of its directory that disagree")
    if disk or first_disk or here != count:
        raise window.bad("is one part of several")
    if start + nbytes != end:
        raise window.bad("has a directory that is not where it says")
    if count > _MAX_MEMBERS or nbytes > _MAX_DIRECTORY_NBYTES or count * _ENTRY.size > nbytes:
        raise window.hostile(f"has a directory of {count} members in {nbytes} bytes (at most {_MAX_MEMBERS} members are taken)")
    return start, count, end


def _directory64(window: _Window, end: int) -> tuple[int, tuple[int, int, int, int, int, int] | None]:
    """Where the end records begin, and the wide one's disks, counts, size and offset, if there is one."""
    at = end - _LOCATOR.size - _END64.size
    if at < 0:
        return end, None
    locator, disk, offset, disks = _LOCATOR.unpack(window.read(end - _LOCATOR.size, _LOCATOR.size))
    if locator != b"PK\x06\x07":
        return end, None
    magic, nbytes, _, _, *numbers = _END64.unpack(window.read(at, _END64.size))
    if magic != b"PK\x06\x06" or nbytes != _END64.size - 12 or offset != at or disk or disks > 1:
        raise window.hostile("has a zip64 end record that is not where it says")
    this, first, here, count, size, start = numbers
    return at, (this, first, here, count, size, start)


def _entries(window: _Window, data: bytes, count: int) -> list[_Entry]:
    entries = []
    names: set[bytes] = set()
    at = 0
    for _ in range(count):
        entry, at = _entry(window, data, at)
        if entry.name in names:
            raise window.hostile(f"has two members of the name {entry.name[:200]!r}")
        names.add(entry.name)
        entries.append(entry)
    if at != len(data):
        raise window.hostile("has more in its directory than it says")
    return entries


def _entry(window: _Window, data: bytes, at: int) -> tuple[_Entry, int]:
    try:
        fields = _ENTRY.unpack_from(data, at)
    except error:
        raise window.bad("has a directory that is cut off") from None
    magic, _, _, flags, method, _, _, crc, packed, nbytes, name_nbytes, extra_nbytes, comment_nbytes, disk, _, _, offset = fields
    name_at = at + _ENTRY.size
    extra_at = name_at + name_nbytes
    end = extra_at + extra_nbytes + comment_nbytes
    if magic != b"PK\x01\x02" or end > len(data) or disk:
        raise window.bad("has a directory that is damaged")
    name = data[name_at:extra_at]
    if flags & _ENCRYPTED:
        raise window.hostile(f"has an encrypted member {name[:200]!r}")
    nbytes, packed, offset = _widened(window, data[extra_at : extra_at + extra_nbytes], (nbytes, packed, offset))
    if method not in {STORED, DEFLATED}:
        raise window.bad(f"has a member {name[:200]!r} compressed in a way (method {method}) that is not read")
    if (nbytes != packed) if method == STORED else (nbytes > _MAX_DEFLATE * packed):
        raise window.hostile(f"has a member {name[:200]!r} with sizes that are not possible ({packed} bytes packed, {nbytes} unpacked)")
    return _Entry(name, flags, method, crc, packed, nbytes, offset), end


def _widened(window: _Window, extra: bytes, numbers: tuple[int, ...]) -> list[int]:
    """The numbers (size, packed size, offset), those that are all ones taken from the zip64 field."""
    wide = _extra(window, extra)
    at = 0
    result = []
    for number in numbers:
        if number != _FULL or wide is None:
            result.append(number)
            continue
        if at + 8 > len(wide):
            raise window.hostile("has a zip64 field that lacks a number")
        result.append(int.from_bytes(wide[at : at + 8], "little"))
        at += 8
    return result


def _extra(window: _Window, extra: bytes) -> bytes | None:
    """The zip64 field of a header's extra fields. What lies behind the last whole field is padding, which torch writes."""
    found = None
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = int.from_bytes(extra[at : at + 2], "little"), int.from_bytes(extra[at + 2 : at + 4], "little")
        if kind == _UNICODE_PATH or (kind == _ZIP64 and found is not None):
            raise window.hostile("has a member with a second name or size in an extra field")
        if at + 4 + nbytes > len(extra):
            break
        if kind == _ZIP64:
            found = extra[at + 4 : at + 4 + nbytes]
        at += 4 + nbytes
    return found


def _located(window: _Window, entry: _Entry) -> tuple[Member, int]:
    """The member, its local header checked against the directory; and where it ends, with its data descriptor."""
    name = _name(window, entry)
    head = window.read(entry.header_offset, _LOCAL.size)
    magic, _, flags, method, _, _, crc, packed, nbytes, name_nbytes, extra_nbytes = _LOCAL.unpack(head)
    if magic != b"PK\x03\x04" or name_nbytes != len(entry.name):
        raise window.hostile(f"has a member {name[:200]!r} whose two headers disagree")
    rest = window.read(entry.header_offset + _LOCAL.size, name_nbytes + extra_nbytes)
    nbytes, packed = _widened(window, rest[name_nbytes:], (nbytes, packed))
    told = (entry.crc, entry.compressed_nbytes, entry.nbytes)
    agreed = (crc, packed, nbytes) == told or (entry.flags & _DESCRIPTOR and (crc, packed, nbytes) == (0, 0, 0))
    if (flags, method, rest[:name_nbytes]) != (entry.flags, entry.method, entry.name) or not agreed:
        raise window.hostile(f"has a member {name[:200]!r} whose two headers disagree")
    start = entry.header_offset + _LOCAL.size + name_nbytes + extra_nbytes
    end = start + entry.compressed_nbytes
    if end > window.nbytes:
        raise window.bad(f"has a member {name[:200]!r} that goes on behind its end")
    if entry.flags & _DESCRIPTOR:
        end += _descriptor_nbytes(window, end, told, name)
    return Member(name, window.start + start, entry.nbytes, entry.compressed_nbytes, entry.method, entry.crc), end


def _descriptor_nbytes(window: _Window, at: int, told: tuple[int, int, int], name: str) -> int:
    """How long the data descriptor is: with or without a signature, narrow or wide (APPNOTE 4.3.9)."""
    data = window.read(at, min(24, window.nbytes - at))
    narrow = _SIZES.pack(*told) if max(told) <= _FULL else b"-"
    for numbers in (narrow, _SIZES64.pack(*told)):
        for descriptor in (b"PK\x07\x08" + numbers, numbers):
            if data.startswith(descriptor):
                return len(descriptor)
    raise window.hostile(f"has a member {name[:200]!r} whose sizes or checksum are told in two ways")


def _name(window: _Window, entry: _Entry) -> str:
    try:
        name = entry.name.decode("utf-8" if entry.flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        raise window.bad(f"has a member with a name that is not UTF-8 ({entry.name[:200]!r})") from None
    parts = name.removesuffix("/").split("/")
    if "\0" in name or "\\" in name or parts[0].endswith(":") or not {"", ".", ".."}.isdisjoint(parts):
        raise window.hostile(f"has a member whose name leads elsewhere ({name[:200]!r})")
    if name.endswith("/") and entry.nbytes:
        raise window.hostile(f"has a folder with contents of its own ({name[:200]!r})")
    return name


def _check_spans(window: _Window, spans: list[tuple[int, int]], directory: int) -> None:
    spans.sort()
    if any(stop > start for (_, stop), (start, _) in pairwise(spans)) or (spans and spans[-1][1] > directory):
        raise window.hostile("has members that overlap")


def _check_total(window: _Window, found: list[Member]) -> None:
    total = sum(member.nbytes for member in found)
    if total > _FREE_NBYTES + _MAX_RATIO * window.nbytes:
        raise window.hostile(f"unpacks from {window.nbytes} bytes to {total}")


def part(path: Path, member: Member, start: int, nbytes: int) -> bytes:
    """A range of a stored member. Raises: BadModelError: it does not have it."""
    with path.open("rb") as file:
        file.seek(member.data_offset + start)
        data = file.read(nbytes) if start + nbytes <= member.compressed_nbytes else b""
    if len(data) != nbytes:
        raise BadModelError(f"{path.name}: {member.name[:200]!r} is cut off: save the model again")
    return data


def raw(path: Path, member: Member) -> Iterator[bytes]:
    """The bytes of a member as they are stored, in pieces; it ends early where the file does."""
    with path.open("rb", buffering=0) as file:
        file.seek(member.data_offset)
        left = member.compressed_nbytes
        while left:
            piece = file.read(min(_STEP, left))
            if not piece:
                return
            left -= len(piece)
            yield piece


def _inflated(path: Path, member: Member) -> Iterator[bytes]:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        for packed in raw(path, member):
            rest = packed
            while rest and not inflate.eof:
                yield inflate.decompress(rest, _STEP)
                rest = inflate.unconsumed_tail
            if inflate.unused_data:
                raise HostileModelError(f"{path.name}: {member.name[:200]!r} has more behind the end of its compressed data")
        while not inflate.eof:
            piece = inflate.decompress(b"", _STEP)
            if not piece:
                break
            yield piece
    except zlib.error as failed:
        raise BadModelError(f"{path.name}: {member.name[:200]!r} is damaged ({failed}): save the model again") from None
