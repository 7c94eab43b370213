"""Stores of several hosts over one folder of packs: each with its own catalog, none deletes what another needs."""

import fcntl
import json
import os
import shutil
import threading

import pytest
from collecting import DAY, HOUR, Clock, content, files_of_version, nbytes_in, opened, packs_in, publish_files, publish_manifest
from store_models import INFO, manifest_of

from tether.errors import ConflictError, MissingBlobsError, NotFoundError, StoreError
from tether.store import Manifest, Repository, decode, digest_of, encode
from tether.store.collecting.sharing import SHARED_GRACE
from tether.store.format.layout import Piece
from tether.types import ModelRef

SHARED, OLD, NEW = content("shared"), content("old", 20_000), content("new")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "packs"


@pytest.fixture
def host_a(tmp_path, folder, clock):
    with opened(tmp_path / "a", clock, packs=folder) as repository:
        yield repository


@pytest.fixture
def host_b(tmp_path, folder, clock, host_a):  # noqa: ARG001 (the first to use the folder)
    with opened(tmp_path / "b", clock, packs=folder) as repository:
        yield repository


def record_of(repository):
    return json.loads((repository.root / "packs" / "stores" / f"{repository._shared._record.id}.json").read_bytes())


def replicate(repository, manifest):
    """As a peer's manifest comes: nothing is sent but itself."""
    assert repository.missing(decode(manifest).blobs()) == []
    return publish_manifest(repository, manifest)


def test_what_one_host_published_the_other_needs_no_blob_for(host_a, host_b):
    manifest = manifest_of(host_a, {"a": SHARED, "b": OLD})
    publish_manifest(host_a, manifest)

    replicate(host_b, manifest)

    assert files_of_version(host_b, "digits", 1) == {"a": SHARED, "b": OLD}
    assert len(packs_in(host_a.root)) == 1
    assert host_b.verify().problems == ()


def test_both_publish_the_same_model_and_there_is_one_pack(host_a, host_b):
    publish_files(host_a, {"a": SHARED, "b": OLD})
    publish_files(host_b, {"a": SHARED, "b": OLD})

    assert len(packs_in(host_a.root)) == 1
    assert files_of_version(host_a, "digits", 1) == files_of_version(host_b, "digits", 1) == {"a": SHARED, "b": OLD}


def test_a_data_folder_remembers_where_its_packs_are_and_readers_find_them(host_a, folder, clock):
    root = host_a.root
    publish_files(host_a, {"a": SHARED})
    digest = host_a.resolve(ModelRef("digits")).digest
    host_a.close()

    with opened(root, clock) as again, Repository.open(root, read_only=True) as reader:
        publish_files(again, {"a": NEW})
        assert (reader.checkout(digest) / "a").read_bytes() == SHARED
        assert files_of_version(reader, "digits", 2) == {"a": NEW}
        assert len(packs_in(root)) == len(list(folder.glob("*.pack"))) == 2
        assert len(list((folder / "stores").glob("*.json"))) == 1


def test_a_pack_goes_when_no_store_needs_it_and_not_before(host_a, host_b, clock):
    manifest = manifest_of(host_a, {"a": OLD})
    publish_manifest(host_a, manifest)
    replicate(host_b, manifest)
    clock.advance(2 * DAY)
    host_a.delete_version("digits", 1)
    clock.advance(2 * DAY)

    report = host_a.gc()
    assert report.freed_nbytes == 0
    assert f"needed by host {os.uname().nodename} ({host_b.root}), last heard of " in "\n".join(report.lines())
    assert files_of_version(host_b, "digits", 1) == {"a": OLD}

    host_b.delete_version("digits", 1)
    clock.advance(2 * DAY)
    host_b.gc()
    assert packs_in(host_b.root) == {}
    host_a.gc()
    assert not host_a.is_stored(digest_of(OLD))


def test_what_another_host_just_wrote_is_not_garbage_whatever_grace_is_given(host_a, host_b, clock):
    publish_files(host_a, {"a": OLD})
    (record,) = [path for path in (host_a.root / "packs/stores").glob("*.json") if path.stem == record_of(host_a)["id"]]
    record.write_bytes(json.dumps(record_of(host_a) | {"needs": {}}).encode())  # as before its claim

    host_b.gc(grace=0)
    clock.advance(SHARED_GRACE - 1)
    host_b.gc(grace=0)

    assert files_of_version(host_a, "digits", 1) == {"a": OLD}


def test_stores_that_need_the_same_half_of_a_pack_end_with_one_rewritten_pack(host_a, host_b, clock):
    large = manifest_of(host_a, {"a": SHARED, "b": OLD})
    publish_manifest(host_a, large)
    replicate(host_b, large)
    small = manifest_of(host_a, {"a": SHARED})
    for repository in (host_a, host_b):
        publish_manifest(repository, small)
        repository.delete_version("digits", 1)
    clock.advance(2 * DAY)
    assert len(packs_in(host_a.root)) == 1

    for repository in (host_a, host_b, host_a):  # the first finds that the other, as far as it said, needs all of it
        repository.gc()
        clock.advance(HOUR)
    host_b.gc()
    host_a.gc()

    assert nbytes_in(host_a.root) < 6_000
    for repository in (host_a, host_b):
        assert files_of_version(repository, "digits", 2) == {"a": SHARED}
        assert repository.verify().problems == ()


def test_a_pack_of_which_another_store_needs_the_other_part_is_not_rewritten(host_a, host_b, clock):
    large = manifest_of(host_a, {"a": OLD, "b": content("b", 20_000), "c": content("c", 20_000)})
    publish_manifest(host_a, large)
    assert host_b.missing([digest_of(content("b", 20_000))]) == []
    publish_manifest(host_b, manifest_of(host_b, {"b": content("b", 20_000)}))
    publish_manifest(host_a, manifest_of(host_a, {"a": OLD}))
    host_a.delete_version("digits", 1)
    clock.advance(2 * DAY)
    for repository in (host_b, host_a, host_b, host_a):
        repository.gc()
        clock.advance(2 * DAY)

    assert len(packs_in(host_a.root)) == 1
    assert files_of_version(host_a, "digits", 2) == {"a": OLD}
    assert files_of_version(host_b, "digits", 1) == {"b": content("b", 20_000)}


def test_a_store_that_was_silent_for_long_is_named_with_what_to_do_and_kept_for_until_then(host_a, tmp_path, folder, clock):
    manifest = manifest_of(host_a, {"a": OLD})
    publish_manifest(host_a, manifest)
    with opened(tmp_path / "b", clock, packs=folder) as gone:
        replicate(gone, manifest)
        identity = record_of(gone)["id"]
    host_a.delete_version("digits", 1)
    clock.advance(100 * DAY)

    lines = host_a.gc().lines()
    assert any(f"if it is gone for good: tether gc --forget {identity}" in line for line in lines)
    assert len(packs_in(host_a.root)) == 1
    with pytest.raises(NotFoundError, match="dry-run"):
        host_a.forget_store("0" * 32)
    with pytest.raises(ConflictError, match="itself"):
        host_a.forget_store(record_of(host_a)["id"])

    assert str(tmp_path / "b") in host_a.forget_store(identity)
    host_a.gc()
    assert packs_in(host_a.root) == {}
    with pytest.raises(StoreError, match="does not know this store"):
        opened(tmp_path / "b", clock)
    with opened(tmp_path / "b", clock, packs=folder) as back:
        assert [problem.code for problem in back.verify().problems] == ["chunk_missing"]


def test_a_publish_that_relies_on_a_pack_which_another_host_deleted_is_told_what_to_send(host_a, host_b, clock):
    manifest = manifest_of(host_a, {"a": OLD})
    publish_manifest(host_a, manifest)
    assert host_b.missing(decode(manifest).blobs()) == []
    host_a.delete_version("digits", 1)
    clock.advance(2 * DAY)
    host_a.gc()
    assert packs_in(host_a.root) == {}

    with pytest.raises(MissingBlobsError) as told:
        publish_manifest(host_b, manifest)

    assert told.value.args[1] == [digest_of(OLD)]
    assert publish_files(host_b, {"a": OLD}).version == 1
    assert files_of_version(host_b, "digits", 1) == {"a": OLD}


def test_a_publish_here_and_a_collection_there_at_once_never_make_a_hole(host_a, host_b, clock):
    """B publishes what is garbage for A, which collects without end; whatever B was acknowledged is whole."""
    stop, errors = threading.Event(), []

    def collect():
        try:
            while not stop.is_set():
                host_a.gc(grace=0)
        except Exception as error:
            errors.append(error)

    collector = threading.Thread(target=collect)
    manifests = [manifest_of(host_a, {"a": content(number, 9_000)}) for number in range(12)]
    for number, manifest in enumerate(manifests, start=1):
        publish_manifest(host_a, manifest)
        host_a.delete_version("digits", number)
    assert all(host_b.missing(decode(manifest).blobs()) == [] for manifest in manifests)
    clock.advance(2 * DAY)
    collector.start()
    held = []
    for number, manifest in enumerate(manifests):
        try:
            held.append((publish_manifest(host_b, manifest).version, number))
        except MissingBlobsError:
            continue
    stop.set()
    collector.join(60)

    assert errors == []
    for version, number in held:
        assert files_of_version(host_b, "digits", version) == {"a": content(number, 9_000)}


def test_a_copy_of_a_data_folder_does_not_speak_for_the_store_it_was_copied_from(host_a, tmp_path, folder, clock):
    publish_files(host_a, {"a": OLD})
    root = host_a.root
    host_a.close()
    shutil.copytree(root, tmp_path / "copy", symlinks=True)

    with opened(root, clock) as original, opened(tmp_path / "copy", clock) as copy:
        assert record_of(copy)["id"] != record_of(original)["id"]
        copy.delete_version("digits", 1)
        clock.advance(2 * DAY)
        copy.gc()
        copy.gc()
        assert files_of_version(original, "digits", 1) == {"a": OLD}
    with opened(root, clock) as again:
        assert len(list((folder / "stores").glob("*.json"))) == 2
        again.gc()
        assert files_of_version(again, "digits", 1) == {"a": OLD}


def test_a_folder_that_is_not_mounted_is_said_to_be_and_nothing_is_forgotten(host_a, folder, clock):
    publish_files(host_a, {"a": OLD})
    root = host_a.root
    host_a.close()
    folder.rename(folder.with_name("away"))

    with pytest.raises(StoreError, match="mount it"):
        opened(root, clock)
    folder.mkdir()  # the mount point without what is mounted
    with pytest.raises(StoreError, match="mount it"):
        opened(root, clock)

    folder.rmdir()
    folder.with_name("away").rename(folder)
    with opened(root, clock) as again:
        assert files_of_version(again, "digits", 1) == {"a": OLD}


def test_a_store_with_packs_of_its_own_is_told_how_to_share_them(tmp_path, folder, clock):
    root = tmp_path / "store"
    with opened(root, clock) as alone:
        publish_files(alone, {"a": OLD})

    with pytest.raises(ConflictError, match=r"move .*packs"):
        opened(root, clock, packs=folder)

    folder.mkdir(exist_ok=True)
    for pack in (root / "packs").iterdir():
        pack.rename(folder / pack.name)
    (root / "packs").rmdir()
    with opened(root, clock, packs=folder) as sharing:
        assert list(record_of(sharing)["needs"]) == list(packs_in(root))
        assert files_of_version(sharing, "digits", 1) == {"a": OLD}
    with pytest.raises(ConflictError, match="not in"):
        opened(root, clock, packs=tmp_path / "elsewhere")


def test_nothing_is_deleted_while_another_store_s_record_can_not_be_read(host_a, host_b, clock):
    publish_files(host_a, {"a": OLD})
    host_a.delete_version("digits", 1)
    clock.advance(2 * DAY)
    (host_a.root / "packs/stores" / f"{record_of(host_b)['id']}.json").write_bytes(b"{")

    report = host_a.gc()

    assert report.freed_nbytes == 0
    assert "can't be read" in "\n".join(report.lines())
    host_b.gc()
    assert host_a.gc().freed_nbytes > 0


def test_a_pack_with_a_broken_index_is_not_set_aside_while_another_store_reads_its_blobs(host_a, host_b, tmp_path):
    """Its blobs lie as in their file, so that those that are moved make another pack."""
    source = tmp_path / "model.onnx"
    source.write_bytes(content("cut", 400_000))
    cuts = {source.name: [Piece(100_001, 100_000), Piece(300_033, 90_000)]}
    manifest = encode(Manifest(framework="onnx", entry=source.name, info=INFO, arrays=tuple(host_a.add_files(source, cuts))))
    publish_manifest(host_a, manifest)
    replicate(host_b, manifest)
    (name,) = packs_in(host_a.root)
    with (host_a.root / "packs" / name).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"X")

    assert host_a.repair(lambda _: None).repaired

    assert len(packs_in(host_a.root)) == 2
    for host in (host_a, host_b):
        assert files_of_version(host, "digits", 1) == {source.name: source.read_bytes()}


def test_an_index_is_rebuilt_from_the_shared_packs_alone(host_a, host_b):
    manifest = manifest_of(host_a, {"a": SHARED, "b": OLD})
    publish_manifest(host_a, manifest)
    replicate(host_b, manifest)
    publish_files(host_b, {"c": NEW}, name="own")

    host_a.rebuild_index()
    host_b.rebuild_index()

    assert host_a.is_stored(digest_of(NEW))
    assert files_of_version(host_b, "digits", 1) == files_of_version(host_a, "digits", 1)
    assert host_b.verify().problems == ()


def test_starting_does_not_sweep_away_what_another_host_is_writing(tmp_path, folder, clock):
    folder.mkdir()
    half = folder / "new.0.12345-abcdef.partial"
    half.write_bytes(b"half")

    with opened(tmp_path / "b", clock, packs=folder):
        assert half.exists()

    os.utime(half, (0, 0))
    with opened(tmp_path / "c", clock, packs=folder):
        assert not half.exists()


def test_who_waits_for_the_folder_s_lock_is_told_after_a_while(host_a, monkeypatch):
    monkeypatch.setattr("tether.store.collecting.sharing._LOCK_TIMEOUT", 0.1)
    with (host_a.root / "packs/stores/lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another host has held"):
            publish_files(host_a, {"a": OLD})
    assert publish_files(host_a, {"a": OLD}).created
