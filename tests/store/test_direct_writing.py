"""What comes from elsewhere is written past the system's cache: the same bytes wherever they lie, the usual way where that is refused."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_models import INFO, LAB, files_in, seeded

from tether import store
from tether.store.format.layout import BLOB_NBYTES
from tether.store.packing import direct
from tether.store.packing.direct import DirectWriting, whole_blocks

LARGE = 2 << 20


@given(st.integers(0, 1 << 40), st.integers(0, BLOB_NBYTES))
def test_whole_blocks_are_all_that_lie_within(offset, nbytes):
    whole = whole_blocks(offset, nbytes)
    assert 0 <= whole.start <= whole.stop
    if whole.stop > whole.start:
        assert whole.stop <= nbytes
        assert (offset + whole.start) % 4096 == (offset + whole.stop) % 4096 == 0
    assert whole.start < 4096
    assert nbytes - whole.stop < 4096


def written(path: Path, pieces):
    """The file that comes of (offset, bytes), and how many of them went past the cache."""
    path.touch()
    usual, writing = os.open(path, os.O_RDWR), DirectWriting(path)
    try:
        count = 0
        for offset, data in pieces:
            if writing.write(usual, offset, data, "stage"):
                count += 1
            else:
                os.pwrite(usual, data, offset)
        return path.read_bytes(), count
    finally:
        writing.close()
        os.close(usual)


@pytest.mark.parametrize("first", [0, 16, 64, 4095, 4096, 5000])
def test_neighbours_at_any_offset_are_written_whole_in_any_order(tmp_path, first):
    chance = seeded(f"neighbours {first}")
    blobs = [chance.randbytes(LARGE + chance.randrange(5000)) for _ in range(4)]
    offsets = [first + sum(map(len, blobs[:index])) for index in range(4)]
    found, count = written(tmp_path / "file", [(offsets[index], blobs[index]) for index in (2, 0, 3, 1)])
    assert found == bytes(first) + b"".join(blobs)
    assert count == (4 if _knows_direct(tmp_path) else 0)


def _knows_direct(folder: Path) -> bool:
    path = folder / "probe"
    path.touch()
    try:
        os.close(os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 1 << 30)))
    except OSError:
        return False
    return True


def test_small_blobs_go_the_usual_way(tmp_path):
    assert written(tmp_path / "file", [(0, bytes(1000)), (1000, b"x" * (LARGE // 4))]) == (bytes(1000) + b"x" * (LARGE // 4), 0)


def test_where_the_file_system_refuses_it_all_goes_the_usual_way(tmp_path, monkeypatch):
    data, writes = seeded("refused").randbytes(3 * LARGE), []

    def refuse(_descriptor, offset, _data):
        writes.append(offset)
        raise OSError(errno.EINVAL, "blocks of this disk are larger")

    monkeypatch.setattr(direct, "write_at", refuse)
    assert written(tmp_path / "file", [(at, data[at : at + LARGE]) for at in range(0, len(data), LARGE)]) == (data, 0)
    assert len(writes) <= 1, "it was asked once"


def test_a_full_disk_is_no_refusal(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    if not _knows_direct(tmp_path):
        pytest.skip("this disk can't be written to past the cache")
    monkeypatch.setattr(direct, "write_at", full)
    with pytest.raises(OSError, match="full"):
        written(tmp_path / "file", [(0, bytes(LARGE))])


def test_a_slow_disk_is_left_to_the_cache(tmp_path, monkeypatch):
    if not _knows_direct(tmp_path):
        pytest.skip("this disk can't be written to past the cache")
    ticks = iter(range(1 << 20))
    monkeypatch.setattr(direct.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(direct, "_TRIED_NBYTES", 3 * LARGE)
    data = seeded("slow").randbytes(6 * LARGE)
    assert written(tmp_path / "file", [(at, data[at : at + LARGE]) for at in range(0, len(data), LARGE)]) == (data, 3)


def test_a_version_of_planned_blobs_is_that_which_was_sent(repository):
    data = seeded("planned").randbytes(2 * BLOB_NBYTES + LARGE + 77)
    blobs = [data[at : at + BLOB_NBYTES] for at in range(0, len(data), BLOB_NBYTES)]
    segments = tuple(store.Segment(store.digest_of(blob), 0, len(blob)) for blob in blobs)
    arrays = (store.ArrayEntry("files/model.bin", "uint8", (len(data),), segments),)
    repository.plan(arrays)
    for blob in reversed(blobs):
        repository.put_blob(store.digest_of(blob), blob)
    manifest = store.encode(store.Manifest(framework="onnx", entry="", info=INFO, arrays=arrays))
    published = repository.publish("digits", manifest, LAB.public, LAB.sign(store.signed_message(manifest)))
    assert files_in(repository.checkout(published.digest)) == {"model.bin": data}
    assert not repository.verify().problems
