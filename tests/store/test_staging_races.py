"""Threads that stage, publish and are refused at the same moment: nobody's pack is swept away, nothing acknowledged is lost."""

import errno
import os
import threading

import pytest
from collecting import content, publish_manifest
from store_models import INFO

from tether import store
from tether.errors import DigestMismatchError, NoSpaceError, StoreError
from tether.store.packing import staging as staging_module
from tether.store.packing.pending import PendingPack
from tether.store.packing.staging import Planned


def draft_of(blob):
    array = store.ArrayEntry("files/model.onnx", "uint8", (len(blob),), (store.Segment(store.digest_of(blob), 0, len(blob)),))
    return store.encode(store.Manifest(framework="onnx", entry="model.onnx", info=INFO, arrays=(array,)))


def put(repository, blob):
    repository.put_blob(store.digest_of(blob), blob)


def in_thread(work, *arguments):
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    thread.join()


def test_a_pack_that_a_publish_copies_to_is_not_taken_for_an_unused_one(repository, monkeypatch):
    """A small part of a pending pack is copied to a fresh one; an upload that needs a new pack meanwhile clears unused ones away."""
    wanted, hashed = content("wanted", 3_000), []
    for number in range(8):
        put(repository, content(f"beside {number}", 3_000))
    put(repository, wanted)

    def digest_of(data):
        if not hashed and threading.current_thread() is threading.main_thread():
            hashed.append(True)
            repository._staging._uploads.pack = None
            in_thread(put, repository, b"another upload")
        return store.digest_of(data)

    monkeypatch.setattr(staging_module, "digest_of", digest_of)
    assert publish_manifest(repository, draft_of(wanted)).created

    assert hashed
    assert repository.read_blob(store.digest_of(wanted)) == wanted
    assert repository.staged_blob(store.digest_of(b"another upload")) == b"another upload"


def test_a_publish_settles_also_where_another_thread_cleared_the_same_pack_away(repository, monkeypatch):
    wanted = content("wanted", 3_000)
    put(repository, wanted)
    staging = repository._staging
    pack, settle, others = staging._slots[store.digest_of(wanted)].pack, staging.settle, []
    with staging._changed:
        staging._new_pack()

    def need_a_pack():
        with staging._changed:
            staging._new_pack()  # clears the unused one away
        with staging._leaving(pack):
            pass

    def with_a_reader(digests):
        pack.users += 1
        with staging._changed:
            others.append(threading.Thread(target=need_a_pack))
            others[0].start()
            settle(digests)  # waits for the reader, which leaves when the other thread had its turn
        others[0].join()

    monkeypatch.setattr(staging, "settle", with_a_reader)
    assert publish_manifest(repository, draft_of(wanted)).created
    assert repository.read_blob(store.digest_of(wanted)) == wanted


def test_what_one_thread_was_told_is_staged_stays_when_the_disk_refuses_it_to_another(repository, monkeypatch):
    blob, staging, write = content("both", 5_000), repository._staging, PendingPack.write
    put(repository, b"first")
    one, other = (staging.reserve(Planned(store.digest_of(blob), len(blob), 0), staging._uploads) for _ in range(2))

    def refuse(*_):
        monkeypatch.setattr(PendingPack, "write", write)
        assert staging.fill(other, blob)  # is done first
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(PendingPack, "write", refuse)
    with pytest.raises(StoreError):
        staging.fill(one, blob)
    assert repository.staged_blob(store.digest_of(blob)) == blob


def test_after_a_limit_of_the_file_size_the_rest_goes_to_another_file(repository, tmp_path, monkeypatch):
    source, write, limit = tmp_path / "model.bin", PendingPack.write, 10 << 20
    source.write_bytes(content("limit", 14 << 20))

    def limited(pack, slot, data, point):
        if slot.offset + len(data) > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        write(pack, slot, data, point)

    monkeypatch.setattr(PendingPack, "write", limited)
    with pytest.raises(NoSpaceError):
        repository.add_files(source)
    (array,) = repository.add_files(source)
    assert repository.missing(segment.digest for segment in array.segments) == []


def test_plans_that_the_disk_refuses_leave_nothing_and_the_next_is_kept(repository, monkeypatch):
    def plan(number):
        digest = store.digest_of(str(number).encode())
        repository.plan([store.ArrayEntry("files/x", "uint8", (1_000,), (store.Segment(digest, 0, 1_000),))])
        return digest

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(PendingPack, "record", refuse)
        for number in range(70):
            with pytest.raises(NoSpaceError):
                plan(number)
    assert list((repository.root / "staging").iterdir()) == []
    assert plan(70) in repository._staging._slots


def test_blobs_that_never_came_are_not_kept_in_mind(repository):
    for number in range(20):
        with pytest.raises(DigestMismatchError):
            repository.put_blob(store.digest_of(str(number).encode()), b"no")
    with repository._promises.held() as promised:
        assert promised == {}
