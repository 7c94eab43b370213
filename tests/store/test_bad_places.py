"""A place on the disk that can't be read is damage like any other: named, healed, passed by; it stops nothing else."""

import errno
import fcntl
import filecmp
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from collecting import DAY, Clock, content, opened, publish_manifest
from store_models import INFO, publish

from tether import store
from tether.errors import ChunkAlteredError, MissingBlobsError, StoreError
from tether.store.packing import disk

FILES = {"model.onnx": content("bad place", 30_000)}
DIGEST = store.digest_of(FILES["model.onnx"])


@contextmanager
def bad_place(monkeypatch, path, offset):
    """The byte at `offset` of this file can't be read, wherever it is renamed to."""
    inode, read, read_into, compare = path.stat().st_ino, os.pread, os.preadv, filecmp.cmp

    def check(descriptor, start, nbytes):
        if os.fstat(descriptor).st_ino == inode and start <= offset < start + nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def pread(descriptor, nbytes, start):
        check(descriptor, start, nbytes)
        return read(descriptor, nbytes, start)

    def preadv(descriptor, buffers, start, *flags):
        check(descriptor, start, sum(map(len, buffers)))
        return read_into(descriptor, buffers, start, *flags)

    def cmp(one, other, *options, **more):
        if inode in {Path(one).stat().st_ino, Path(other).stat().st_ino}:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return compare(one, other, *options, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        patch.setattr(os, "preadv", preadv)
        patch.setattr(filecmp, "cmp", cmp)
        yield


def draft_of(*blobs):
    segments = tuple(store.Segment(store.digest_of(blob), 0, len(blob)) for blob in blobs)
    array = store.ArrayEntry("files/model.onnx", "uint8", (sum(map(len, blobs)),), segments)
    return store.encode(store.Manifest(framework="onnx", entry="model.onnx", info=INFO, arrays=(array,)))


def test_a_bad_place_in_a_pack_is_named_and_publishing_again_heals_it(repository, monkeypatch):
    publish(repository, files=FILES)
    (place,) = repository._blobs.locate([DIGEST]).values()

    with bad_place(monkeypatch, repository.root / "packs" / place.pack, place.offset + 5_000):
        with pytest.raises(ChunkAlteredError, match=DIGEST):
            repository.read_blob(DIGEST)
        assert [each.code for each in repository.verify().problems] == [ChunkAlteredError.code]

        assert not publish(repository, files=FILES).created

        assert repository.read_blob(DIGEST) == FILES["model.onnx"]
        assert repository.verify().problems == ()


def test_a_bad_place_keeps_a_collection_from_nothing_else(tmp_path, monkeypatch):
    clock = Clock()
    with opened(tmp_path / "store", clock) as repository:
        kept = [_half_dead(repository, number) for number in range(3)]
        clock.advance(2 * DAY)
        (place,) = repository._blobs.locate(kept[:1]).values()
        with bad_place(monkeypatch, repository.root / "packs" / place.pack, place.offset + 5):
            report = repository.gc()

        assert [each.digest for each in report.problems] == kept[:1]
        assert report.freed_nbytes > 2 * 190_000
        assert [repository.read_blob(digest) for digest in kept]


def _half_dead(repository, number):
    """A pack of its own, of which less than half is needed."""
    kept, dead = content(f"kept {number}", 10_000 + number), content(f"dead {number}", 200_000)
    for blob in (kept, dead):
        repository.put_blob(store.digest_of(blob), blob)
    version = publish_manifest(repository, draft_of(kept, dead)).version
    publish_manifest(repository, draft_of(kept))
    repository.delete_version("digits", version)
    return store.digest_of(kept)


def test_a_bad_place_in_what_was_staged_asks_for_that_blob_again(tmp_path, monkeypatch):
    blob = FILES["model.onnx"]
    with opened(tmp_path / "store", Clock()) as repository:
        repository.put_blob(DIGEST, blob)
    with opened(tmp_path / "store", Clock()) as repository:
        (pending,) = (repository.root / "staging").glob("*.pending")
        with bad_place(monkeypatch, pending, 5_000):
            with pytest.raises(MissingBlobsError):
                publish_manifest(repository, draft_of(blob))
            repository.put_blob(DIGEST, blob)
            assert publish_manifest(repository, draft_of(blob)).created
        assert repository.read_blob(DIGEST) == blob


def test_a_pack_whose_fsync_failed_is_not_believed_by_the_next_process_either(tmp_path, monkeypatch):
    blob = content("suspect", 100_000)
    with opened(tmp_path / "store", Clock()) as repository:
        repository.put_blob(store.digest_of(blob), blob)
        (pending,) = (repository.root / "staging").glob("*.pending")
        inode = pending.stat().st_ino
        (tmp_path / "kept").hardlink_to(pending)  # so that no other file gets its number
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _refuse)
            with pytest.raises(StoreError):
                publish_manifest(repository, draft_of(blob))

    with opened(tmp_path / "store", Clock()) as repository:
        if repository.missing([store.digest_of(blob)]):
            repository.put_blob(store.digest_of(blob), blob)
        assert publish_manifest(repository, draft_of(blob)).created
        assert all(path.stat().st_ino != inode for path in (repository.root / "packs").glob("*.pack"))


@pytest.mark.parametrize(("refusal", "also_fsync"), [(None, 0), (errno.ENOTSUP, 1)])
def test_where_the_system_knows_a_fuller_sync_that_is_asked_for(tmp_path, monkeypatch, refusal, also_fsync):
    """As on macOS; a file system that has no such thing gets an fsync."""
    asked, synced = [], []

    def control(_, command):
        asked.append(command)
        if refusal:
            raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", synced.append)
    disk.write_atomically(tmp_path / "file", b"data", "format")
    assert asked == [51, 51]
    assert len(synced) == 2 * also_fsync


def _refuse(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
