"""Zip archives: members as Python's zipfile sees them, and nothing that two readers could see differently."""

import io
import random
import zipfile

import numpy as np
import pytest
from hostile_archives import Entry, zip_of
from weight_reading import bounded

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.weights import zips

NAMES = {"one.txt": b"one" * 100, "kernel:0.npy": b"0", "folder/two": b"", "folder/drei ä.bin": bytes(range(256)) * 40}


class Unseekable(io.RawIOBase):
    """zipfile writes data descriptors to what can't seek."""

    def __init__(self):
        self.data = bytearray()

    def writable(self):
        return True

    def write(self, data):
        self.data += data
        return len(data)


def write(tmp_path, data, name="a.zip"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def zipped(method, *, seekable=True, wide=False):
    target = io.BytesIO() if seekable else Unseekable()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in NAMES.items():
            with archive.open(zipfile.ZipInfo(name) if not method else name, "w", force_zip64=wide) as member:
                member.write(data)
        archive.writestr("folder/", b"")
    return target.getvalue() if seekable else bytes(target.data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("seekable", [True, False], ids=["plain", "with descriptors"])
@pytest.mark.parametrize("wide", [True, False], ids=["zip64", "narrow"])
def test_members_are_those_that_zipfile_reads(tmp_path, method, seekable, wide):
    data = zipped(method, seekable=seekable, wide=wide)
    path = write(tmp_path, data)
    found = zips.members(path)
    assert {member.name: zips.read(path, member, 1 << 20) for member in found} == NAMES
    for member in found:
        if member.method == zips.STORED:
            assert data[member.data_offset : member.data_offset + member.nbytes] == NAMES[member.name]
            assert zips.part(path, member, 0, member.nbytes) == NAMES[member.name]


def test_an_archive_in_an_archive_is_read_in_place(tmp_path):
    inner = zipped(zipfile.ZIP_STORED)
    path = write(tmp_path, zip_of([Entry("x", b"123"), Entry("inner.zip", inner)]))
    [_, nested] = zips.members(path)
    assert {member.name: zips.read(path, member, 1 << 20) for member in zips.members(path, nested)} == NAMES


def test_more_than_65535_members_need_zip64_and_are_read(tmp_path):
    path = tmp_path / "many.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(70_000):
            archive.writestr(zipfile.ZipInfo(f"{number}"), b"")
    assert len(zips.members(path)) == 70_000


GOOD = Entry("a", b"abc" * 50)
HOSTILE = {
    "encrypted": [Entry("a", b"abc", flags=1)],
    "encrypted for the directory only": [Entry("a", b"abc", central={"flags": 1})],
    "encrypted for the local header only": [Entry("a", b"abc", local={"flags": 1})],
    "other flags in the local header": [Entry("a", b"abc", local={"flags": 2})],
    "another name in the local header": [Entry("a", b"abc", local={"name": b"b"})],
    "a longer name in the local header": [Entry("a", b"abc", local={"name": b"ab"})],
    "another method in the local header": [Entry("a", b"abc", local={"method": 8})],
    "another checksum in the local header": [Entry("a", b"abc", local={"crc": 7})],
    "another size in the local header": [Entry("a", b"abc", local={"nbytes": 2})],
    "another size in the directory": [Entry("a", b"abc", central={"nbytes": 2})],
    "zeros in the local header without a descriptor": [Entry("a", b"abc", local={"crc": 0, "packed": 0, "nbytes": 0})],
    "a descriptor that disagrees": [Entry("a", b"abc", flags=8, descriptor=bytes(16))],
    "no descriptor": [Entry("a", b"abc", flags=8, descriptor=b""), GOOD],
    "one name twice": [Entry("b", b"1"), Entry("b", b"2")],
    "one header for two": [Entry("a", b"abc"), Entry("b", b"abc", offset=0)],
    "one member for two": [Entry("a", b"abc"), Entry("a", b"abc", offset=0)],
    "a member inside of another": [Entry("a", zip_of([Entry("b", b"x" * 50)])), Entry("b", b"x" * 50, offset=31)],
    "dots": [Entry("../a", b"abc")],
    "dots within": [Entry("a/../../b", b"abc")],
    "absolute": [Entry("/a", b"abc")],
    "a drive": [Entry("c:/a", b"abc")],
    "backslash": [Entry("a\\b", b"abc")],
    "zero byte": [Entry("a\0b", b"abc")],
    "empty name": [Entry("", b"abc")],
    "a folder with contents": [Entry("a/", b"abc")],
    "stored sizes that differ": [Entry("a", b"abc", local={"nbytes": 9}, central={"nbytes": 9})],
    "more than deflate can": [Entry("a", bytes(100), 8, local={"nbytes": 1 << 30}, central={"nbytes": 1 << 30})],
    "a bomb": [Entry("a", bytes(90 << 20), 8)],
    "a second name": [Entry("a", b"abc", central={"extra": b"\x75\x70\x05\x00\x01\0\0\0\0"})],
    "two wide sizes": [Entry("a", b"abc", central={"extra": b"\x01\0\x08\0" + bytes(8) + b"\x01\0\x08\0" + bytes(8)})],
}
DAMAGED = {
    "a part of several": zip_of([GOOD], count=2),
    "a comment": zip_of([GOOD], comment=b"hello"),
    "a second end in the comment": zip_of([GOOD], comment=zip_of([Entry("b", b"2")])),
    "something before it": b"#!/bin/sh\n" + zip_of([GOOD]),
    "a gap before the directory that is not counted": zip_of([GOOD], gap=b"x" * 9)[:-6] + bytes(6),
    "method 99": zip_of([Entry("a", b"abc", 99)]),
    "invalid UTF-8": zip_of([Entry(b"\xff", b"abc", flags=0x800)]),
    "no archive": b"PK\x03\x04" + bytes(100),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_readers_could_see_differently_is_refused(tmp_path, kind):
    path = write(tmp_path, zip_of(HOSTILE[kind]))
    with bounded(), pytest.raises(HostileModelError, match=r"^a\.zip"):
        zips.members(path)


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_whole_archive_is_a_bad_model(tmp_path, kind):
    with pytest.raises(BadModelError):
        zips.members(write(tmp_path, DAMAGED[kind]))


def test_a_directory_of_a_million_members_is_not_begun(tmp_path):
    data = zip_of([GOOD])
    end = data[-22:]
    wide = b"PK\x06\x06" + (44).to_bytes(8, "little") + bytes(12)
    count = (1_000_000).to_bytes(8, "little")
    start = int.from_bytes(end[16:20], "little")
    size = int.from_bytes(end[12:16], "little")
    wide += count + count + size.to_bytes(8, "little") + start.to_bytes(8, "little")
    locator = b"PK\x06\x07" + bytes(4) + (len(data) - 22).to_bytes(8, "little") + (1).to_bytes(4, "little")
    end = end[:8] + b"\xff" * 4 + end[12:]
    with pytest.raises(HostileModelError, match="1000000 members"):
        zips.members(write(tmp_path, data[:-22] + wide + locator + end))


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (Entry("a", b"abc", local={"crc": 7}, central={"crc": 7}), BadModelError),
        (Entry("a", bytes(1000), 8, packed=b"\xff" * 30), BadModelError),
        (Entry("a", bytes(900), 8, local={"nbytes": 800}, central={"nbytes": 800}), HostileModelError),
        (Entry("a", bytes(900), 8, local={"nbytes": 1000}, central={"nbytes": 1000}), BadModelError),
    ],
    ids=["checksum", "garbled", "more than declared", "less than declared"],
)
def test_a_member_that_is_not_what_it_says_is_refused_when_it_is_read(tmp_path, entry, error):
    path = write(tmp_path, zip_of([entry]))
    [member] = zips.members(path)
    with pytest.raises(error):
        zips.read(path, member, 1 << 20)


def test_a_member_over_the_limit_is_not_read(tmp_path):
    path = write(tmp_path, zip_of([Entry("a", bytes(1000), 8)]))
    [member] = zips.members(path)
    with pytest.raises(BadModelError, match="at most 999"):
        zips.read(path, member, 999)


@pytest.mark.parametrize("percent", range(0, 100, 2))
def test_an_archive_that_was_cut_off_is_a_bad_model(tmp_path, percent):
    data = zipped(zipfile.ZIP_DEFLATED)
    with pytest.raises(BadModelError):
        zips.members(write(tmp_path, data[: len(data) * percent // 100]))


def test_mutated_archives_are_refused_or_read_within_the_file(tmp_path):
    np.savez(tmp_path / "good.npz", a=np.arange(9), b=np.ones((3, 3)))
    good = (tmp_path / "good.npz").read_bytes()
    chance = random.Random("mutated archives")
    path = tmp_path / "bad.npz"
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 8, 0x7F, 0xFF, chance.randrange(256)))
        path.write_bytes(data)
        try:
            for member in zips.members(path):
                assert 0 <= member.data_offset <= member.data_offset + member.compressed_nbytes <= len(data)
                zips.read(path, member, 1 << 20)
        except BadModelError as error:
            assert "\n" not in str(error)  # noqa: PT017
