import os
import socket
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from store_models import COLLEAGUE, INFO, LAB, files_in, files_of, manifest_of, publish

from tether import store
from tether.errors import (
    BadModelError,
    BadNameError,
    BadSignatureError,
    ConflictError,
    DigestMismatchError,
    FormatTooNewError,
    MalformedManifestError,
    MissingBlobsError,
    NoModelFileError,
    PayloadTooLargeError,
    StoreError,
    UnknownAliasError,
    UnknownModelError,
    UnknownVersionError,
)
from tether.ports import SignedManifest
from tether.store import BLOB_NBYTES, Repository
from tether.store.format.manifest import MAX_NBYTES
from tether.types import ModelRef

ref = ModelRef.parse


def reopen(repository, **options):
    repository.close()
    return Repository.open(repository.root, **options)


# --- publish, resolve, check out


def test_a_published_version_is_checked_out_byte_for_byte(repository):
    published = publish(repository, 1, tags={"task": "digits"})

    assert (published.version, published.created) == (1, True)
    assert files_in(repository.checkout(published.digest)) == files_of(1)
    record = repository.resolve(ref("digits"))
    assert (record.name, record.version, record.digest, record.publisher) == ("digits", 1, published.digest, LAB.public)
    assert record.tags == {"task": "digits"}
    assert record.nbytes == sum(map(len, files_of(1).values()))
    assert repository.manifest(published.digest).attributes == {"seed": 1}
    assert repository.signature(published.digest, LAB.public) is not None


def test_files_of_every_size_around_a_blob_come_back(repository, tmp_path):
    source = tmp_path / "model"
    (source / "inner").mkdir(parents=True)
    for nbytes in (0, 1, BLOB_NBYTES - 1, BLOB_NBYTES, BLOB_NBYTES + 1, 2 * BLOB_NBYTES):
        (source / "inner" / f"{nbytes}.bin").write_bytes(os.urandom(nbytes))

    arrays = repository.add_files(source)
    data = store.encode(store.Manifest(framework="onnx", entry="", info=INFO, arrays=tuple(arrays)))
    published = repository.publish("digits", data, LAB.public, LAB.sign(store.signed_message(data)))

    assert [array.nbytes for array in sorted(arrays, key=lambda array: array.nbytes)][-1] == 2 * BLOB_NBYTES
    assert files_in(repository.checkout(published.digest)) == files_in(source)
    repository.export(ref("digits"), tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(source)


def test_a_single_file_is_added_under_its_name(repository, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"abc")

    (entry,) = repository.add_files(tmp_path / "m.onnx")

    assert (entry.path, entry.shape) == ("files/m.onnx", (3,))


def test_versions_count_per_model_and_the_same_bytes_are_no_new_version(repository):
    first, second = publish(repository, 1), publish(repository, 2)
    before = repository.change_count()
    again = publish(repository, 1)

    assert (first.version, second.version) == (1, 2)
    assert (again.version, again.created, again.digest) == (1, False, first.digest)
    assert repository.change_count() == before
    assert list((repository.root / "staging").iterdir()) == []
    assert publish(repository, 1, name="other").version == 1


def test_what_two_versions_share_is_stored_once(repository):
    publish(repository, 1)
    before = sum(path.stat().st_size for path in (repository.root / "packs").iterdir())
    files = files_of(1) | {"readme.txt": b"new"}
    publish(repository, files=files)
    after = sum(path.stat().st_size for path in (repository.root / "packs").iterdir())

    assert after - before < 500
    assert len(list((repository.root / "packs").iterdir())) == 2


def test_a_publish_without_its_blobs_names_them_and_works_once_they_are_sent(repository, tmp_path):
    with Repository.open(tmp_path / "other") as other:
        data = manifest_of(other, files_of(3))
    wanted = store.decode(data).blobs()

    with pytest.raises(MissingBlobsError) as caught:
        repository.publish("digits", data, LAB.public, LAB.sign(store.signed_message(data)))
    assert caught.value.args[1] == wanted
    assert repository.missing(wanted) == wanted

    manifest_of(repository, files_of(3))
    assert repository.missing([*wanted, "00" * 32, "nonsense"]) == ["00" * 32, "nonsense"]
    assert repository.publish("digits", data, LAB.public, LAB.sign(store.signed_message(data))).created


def test_a_staged_blob_that_was_cut_by_a_power_loss_is_asked_for_again(repository):
    data = manifest_of(repository, files_of(3))
    victim = store.decode(data).blobs()[1]
    content = repository.read_draft_blob(victim)
    (pending,) = (repository.root / "staging").glob("*.pending")
    pending.write_bytes(pending.read_bytes().replace(content, bytes(len(content))))

    with reopen(repository) as again:
        with pytest.raises(MissingBlobsError) as caught:
            again.publish("digits", data, LAB.public, LAB.sign(store.signed_message(data)))

        assert caught.value.args[1] == [victim]
        assert list((again.root / "packs").iterdir()) == []
        assert publish(again, 3).created
        assert again.verify().problems == ()


def test_publishing_a_known_version_whose_pack_is_gone_says_what_to_send(repository):
    data = manifest_of(repository, files_of(1))
    signature = LAB.sign(store.signed_message(data))
    repository.publish("digits", data, LAB.public, signature)
    for pack in (repository.root / "packs").glob("*.pack"):
        pack.unlink()

    with pytest.raises(MissingBlobsError) as caught:
        repository.publish("digits", data, LAB.public, signature)

    assert set(caught.value.args[1]) == set(store.decode(data).blobs())
    manifest_of(repository, files_of(1))
    assert not repository.publish("digits", data, LAB.public, signature).created
    assert repository.verify().problems == ()


def test_put_blob_refuses_other_bytes_and_too_many(repository):
    with pytest.raises(DigestMismatchError):
        repository.put_blob(store.digest_of(b"a"), b"b")
    with pytest.raises(DigestMismatchError):
        repository.put_blob("../../etc/passwd", b"b")
    with pytest.raises(PayloadTooLargeError):
        repository.put_blob("00" * 32, bytes(BLOB_NBYTES + 1))
    publish(repository, files={"a": b"stored"})
    with pytest.raises(DigestMismatchError):
        repository.put_blob(store.digest_of(b"stored"), b"other")


def test_a_stored_blob_is_not_staged_again(repository):
    publish(repository, files={"a": b"stored"})

    repository.put_blob(store.digest_of(b"stored"), b"stored")

    assert list((repository.root / "staging").iterdir()) == []
    assert repository.read_blob(store.digest_of(b"stored")) == b"stored"


def test_a_wrong_signature_publishes_nothing(repository):
    data = manifest_of(repository, files_of(1))

    for publisher, signature in [
        (LAB.public, COLLEAGUE.sign(store.signed_message(data))),
        (LAB.public, LAB.sign(data)),
        ("zz", b""),
        (COLLEAGUE.public, LAB.sign(store.signed_message(data))),
    ]:
        with pytest.raises(BadSignatureError):
            repository.publish("digits", data, publisher, signature)
    assert repository.models() == []


def test_what_its_publisher_did_not_sign_is_not_parsed(repository):
    noise = b"[" * 1_000
    for use in (
        lambda: repository.publish("digits", noise, LAB.public, bytes(64)),
        lambda: repository.hold([SignedManifest(noise, LAB.public, bytes(64))]),
    ):
        with pytest.raises(BadSignatureError):
            use()
    with pytest.raises(MalformedManifestError, match="at most"):
        repository.publish("digits", bytes(MAX_NBYTES + 1), LAB.public, bytes(64))


def test_any_range_of_an_array_of_many_segments_is_read_without_walking_to_it(repository):
    blob, count = bytes(range(250)), 1_000
    repository.put_blob(store.digest_of(blob), blob)
    segments = tuple(store.Segment(store.digest_of(blob), index % 100, 100) for index in range(count))
    array = store.ArrayEntry("files/m", "uint8", (100 * count,), segments)
    data = store.encode(store.Manifest(framework="onnx", entry="m", info=INFO, arrays=(array,)))
    (array,) = repository.manifest(repository.publish("digits", data, LAB.public, LAB.sign(store.signed_message(data))).digest).arrays
    whole = b"".join(blob[index % 100 : index % 100 + 100] for index in range(count))

    for start, stop in [(0, 0), (0, 1), (99, 101), (100, 200), (50_050, 50_750), (99_999, 100_000), (0, 100_000), (100_000, 100_000)]:
        assert repository.read_array(array, start, stop) == whole[start:stop]
    assert len(repository._blobs._ranges) == 1


def test_a_segment_beyond_its_blob_is_refused(repository):
    entry = repository.add_bytes("a", b"abc")
    segment = store.Segment(entry.segments[0].digest, 1, 3)
    data = store.encode(
        store.Manifest(framework="onnx", entry="", info=INFO, arrays=(store.ArrayEntry("files/a", "uint8", (3,), (segment,)),))
    )

    with pytest.raises(MalformedManifestError, match="outside"):
        repository.publish("digits", data, LAB.public, LAB.sign(store.signed_message(data)))


def test_arrays_may_share_parts_of_blobs(repository):
    (whole,) = repository.add_bytes("whole", b"0123456789").segments
    parts = (store.Segment(whole.digest, 2, 3), store.Segment(whole.digest, 0, 2), store.Segment(whole.digest, 7, 3))
    arrays = (store.ArrayEntry("files/parts", "uint8", (8,), parts), store.ArrayEntry("tensors/t", "uint16", (4,), parts))
    data = store.encode(store.Manifest(framework="onnx", entry="", info=INFO, arrays=arrays))
    published = repository.publish("digits", data, LAB.public, LAB.sign(store.signed_message(data)))

    path = repository.checkout(published.digest)
    assert files_in(path) == {"parts": b"23401789"}
    (path / "parts").unlink()
    (path / "parts").write_bytes(b"23401788")
    assert files_in(repository.checkout(published.digest)) == {"parts": b"23401789"}
    assert store.open_array(repository, published.digest, "tensors/t")[1:3].tobytes() == b"4017"


# --- what may not be published


@pytest.mark.parametrize("kind", ["link", "link to a folder", "pipe", "socket", "reserved", "newline", "not UTF-8"])
def test_a_folder_with_what_is_no_plain_file_is_refused_with_advice(repository, tmp_path, kind, monkeypatch):
    source = tmp_path / "m"
    source.mkdir()
    (source / "m.onnx").write_bytes(b"abc")
    match kind:
        case "link":
            (source / "l").symlink_to("/etc/passwd")
        case "link to a folder":
            (source / "l").symlink_to("/etc", target_is_directory=True)
        case "pipe":
            os.mkfifo(source / "p")
        case "socket":
            monkeypatch.chdir(source)
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind("s")
        case "reserved":
            (source / ".tether").mkdir()
            (source / ".tether" / "x").write_bytes(b"")
        case "newline":
            (source / "a\nb").write_bytes(b"")
        case _:
            (source / os.fsdecode(b"\xff")).write_bytes(b"")

    with pytest.raises((BadModelError, NoModelFileError), match=r"put|move|rename|readable"):
        repository.add_files(source)


def test_a_missing_path_and_an_empty_folder_hold_no_model(repository, tmp_path):
    (tmp_path / "empty").mkdir()

    for path in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(NoModelFileError):
            repository.add_files(path)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(BadModelError, match="symbolic link"):
        repository.add_files(tmp_path / "link")


# --- names, aliases, rollback


def test_a_bare_name_means_prod_where_it_exists_else_latest(repository):
    publish(repository, 1, alias=["prod"])
    publish(repository, 2)

    assert repository.resolve(ref("digits")).version == 1
    assert repository.resolve(ref("digits@latest")).version == 2
    assert repository.resolve(ref("digits:2")).version == 2
    assert repository.models()[0].default == 1
    repository.delete_alias("digits", "prod")
    assert repository.resolve(ref("digits")).version == 2
    assert repository.models()[0].default == 2


def test_a_version_is_found_by_the_start_of_its_digest(repository):
    first, _ = publish(repository, 1), publish(repository, 2)

    assert repository.resolve(ref(f"digits:sha-{first.digest[:8]}")).version == 1
    with pytest.raises(UnknownVersionError):
        repository.resolve(ref("digits:sha-0000000000"))


def test_what_is_not_there_is_named(repository):
    publish(repository, 1)

    with pytest.raises(UnknownModelError, match="'other'"):
        repository.resolve(ref("other"))
    with pytest.raises(UnknownModelError, match="nobody"):
        repository.resolve(ref("nobody/digits"))
    with pytest.raises(UnknownVersionError, match="it has 1"):
        repository.resolve(ref("digits:9"))
    with pytest.raises(UnknownAliasError, match="latest"):
        repository.resolve(ref("digits@prod"))
    with pytest.raises(BadNameError):
        publish(repository, 2, name="Stats!")
    with pytest.raises(BadNameError):
        publish(repository, 2, alias=["../x"])


def test_rollback_walks_back_through_what_the_alias_was(repository):
    for seed in (1, 2, 3):
        publish(repository, seed, alias=["prod"])

    assert repository.rollback("digits") == ("prod", 3, 2)
    assert repository.rollback("digits") == ("prod", 2, 1)
    with pytest.raises(ConflictError, match="never pointed"):
        repository.rollback("digits")
    assert repository.set_alias("digits", "prod", 3) == ("prod", 1, 3)
    assert repository.rollback("digits", "prod") == ("prod", 3, 1)
    assert repository.rollback("digits", "latest") == ("latest", 3, 2)
    assert repository.resolve(ref("digits")).version == 1


def test_rollback_moves_latest_where_there_is_no_prod(repository):
    publish(repository, 1)
    publish(repository, 2)

    assert repository.rollback("digits") == ("latest", 2, 1)
    assert publish(repository, 3).version == 3
    assert repository.resolve(ref("digits")).version == 3
    with pytest.raises(UnknownAliasError):
        repository.rollback("digits", "prod")


def test_publishing_known_bytes_with_an_alias_moves_the_alias(repository):
    publish(repository, 1)
    publish(repository, 2)

    assert not publish(repository, 1, alias=["prod"]).created

    assert repository.models()[0].aliases == {"latest": 2, "prod": 1}


def test_a_deleted_version_is_gone_its_number_too_and_an_alias_protects_it(repository):
    publish(repository, 1, alias=["prod"])
    publish(repository, 2)
    publish(repository, 3)

    with pytest.raises(ConflictError, match="@prod"):
        repository.delete_version("digits", 1)
    repository.delete_version("digits", 3)
    assert repository.models()[0].aliases == {"latest": 2, "prod": 1}
    with pytest.raises(UnknownVersionError):
        repository.resolve(ref("digits:3"))
    assert publish(repository, 3).version == 4
    with pytest.raises(ConflictError):
        repository.delete_alias("digits", "latest")


def test_a_model_without_versions_is_unknown_and_its_numbers_go_on(repository):
    publish(repository, 1)
    repository.delete_version("digits", 1)

    assert repository.models() == []
    with pytest.raises(UnknownModelError):
        repository.resolve(ref("digits"))
    assert publish(repository, 1).version == 2
    assert repository.models()[0].aliases == {"latest": 2}


def test_a_colleagues_model_has_its_own_numbers_and_name(repository):
    publish(repository, 1)
    publish(repository, 2, by=COLLEAGUE)
    publish(repository, 3, by=COLLEAGUE, name="faces")
    label = COLLEAGUE.public[:12]

    assert repository.resolve(ref("digits")).publisher == LAB.public
    assert repository.resolve(ref("digits"), COLLEAGUE.public).name == f"{label}~digits"
    with pytest.raises(UnknownModelError):
        repository.resolve(ref("faces"))

    repository.name_publisher(COLLEAGUE.public, "alice")
    assert repository.resolve(ref("alice~digits")).version == 1
    assert repository.resolve(ref("faces")).name == "alice~faces"
    assert [model.name for model in repository.models()] == ["alice~digits", "alice~faces", "digits"]
    repository.set_alias("alice~faces", "prod", 1)
    with pytest.raises(ConflictError, match="already"):
        repository.name_publisher("00" * 32, "alice")


def test_two_publishers_under_petnames_make_a_bare_name_ambiguous(tmp_path):
    with Repository.open(tmp_path / "store", own="00" * 32) as repository:
        for who, label in ((LAB, "anna"), (COLLEAGUE, "bob")):
            publish(repository, 1, by=who)
            repository.name_publisher(who.public, label)

        with pytest.raises(ConflictError, match="anna/digits, bob/digits"):
            repository.resolve(ref("digits"))


def test_trust_is_per_publisher_and_scope_and_ones_own_lab_has_all(repository):
    assert repository.trusted(LAB.public, "code")
    assert not repository.trusted(COLLEAGUE.public, "code")

    repository.trust(COLLEAGUE.public, ["code"])
    assert repository.trusted(COLLEAGUE.public, "code")
    assert not repository.trusted(COLLEAGUE.public, "other")
    repository.distrust(COLLEAGUE.public, ["code"])
    assert not repository.trusted(COLLEAGUE.public, "code")


def test_each_change_counts_and_reading_does_not(repository):
    counts = [repository.change_count()]
    for change in (
        lambda: publish(repository, 1),
        lambda: publish(repository, 2),
        lambda: repository.set_alias("digits", "prod", 1),
        lambda: repository.rollback("digits", "latest"),
        lambda: repository.delete_alias("digits", "prod"),
        lambda: repository.delete_version("digits", 2),
    ):
        change()
        counts.append(repository.change_count())
    repository.checkout(repository.resolve(ref("digits")).digest)

    assert counts == sorted(set(counts))
    assert repository.change_count() == counts[-1]


# --- checkouts, export, verify


def test_a_checkout_that_was_altered_is_mended_before_it_is_handed_out_again(repository):
    published = publish(repository, 1)
    path = repository.checkout(published.digest)
    (path / "model.onnx").unlink()
    (path / "model.onnx").write_bytes(b"x" * len(files_of(1)["model.onnx"]))
    (path / "weights/a.bin").unlink()
    (path / "weights/b.bin").unlink()
    (path / "weights/b.bin").symlink_to(path / "weights/shared.bin")
    (path / "weights/deep/c.bin").unlink()
    (path / "weights/deep").rmdir()
    (path / "weights/deep").write_bytes(b"a file now")
    (path / "extra").mkdir()
    (path / "extra/evil.py").write_bytes(b"import os")
    (path / "weights/link").symlink_to("/etc")

    assert files_in(repository.checkout(published.digest)) == files_of(1)
    assert not (path / "extra").exists()
    assert not (path / "weights/link").is_symlink()


def test_a_checkout_is_read_only_and_can_be_discarded(repository):
    published = publish(repository, 1)
    path = repository.checkout(published.digest)

    assert (path / "model.onnx").stat().st_mode & 0o777 == 0o444
    repository.discard(published.digest)
    repository.discard(published.digest)
    assert list((repository.root / "cache").iterdir()) == []
    assert files_in(repository.checkout(published.digest)) == files_of(1)


def test_many_readers_may_check_out_and_discard_the_same_version_at_once(repository):
    published = publish(repository, 1)
    barrier = threading.Barrier(4)

    def read(_):
        with Repository.open(repository.root, read_only=True) as reader:
            barrier.wait(10)
            return [files_in(reader.checkout(published.digest)) == files_of(1) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(seen) for seen in pool.map(read, range(4)))
    assert [path.name for path in (repository.root / "cache").iterdir()] == [published.digest]


def test_export_leaves_out_tethers_own_files_and_never_overwrites(repository, tmp_path):
    publish(repository, 1)
    target = tmp_path / "deep" / "out"

    repository.export(ref("digits:1"), target)

    assert files_in(target) == {name: data for name, data in files_of(1).items() if not name.startswith(".tether/")}
    with pytest.raises(ConflictError, match="not empty"):
        repository.export(ref("digits:1"), target)
    assert sorted(path.name for path in target.parent.iterdir()) == ["out"]


def test_verify_counts_what_it_read_and_finds_nothing_wrong(repository):
    publish(repository, 1)
    publish(repository, 2)

    one, everything = repository.verify(ref("digits:1")), repository.verify()

    assert one.problems == everything.problems == ()
    assert 0 < one.checked < everything.checked
    assert 0 < one.nbytes < everything.nbytes


def test_the_index_is_rebuilt_from_the_packs(repository):
    published = publish(repository, 1)
    publish(repository, 2)
    repository.close()
    with sqlite3.connect(repository.root / "catalog.sqlite") as database:
        database.execute("DROP TABLE blobs")
    database.close()

    with Repository.open(repository.root) as again:
        assert again.verify().problems == ()
        assert files_in(again.checkout(published.digest)) == files_of(1)
        assert again.rebuild_index() == 2
        again.discard(published.digest)
        assert files_in(again.checkout(published.digest)) == files_of(1)


def test_an_unknown_pack_is_adopted_and_leftovers_are_swept(repository, tmp_path):
    with Repository.open(tmp_path / "other") as other:
        publish(other, 7)
        (pack,) = (other.root / "packs").iterdir()
    repository.close()
    pack.rename(repository.root / "packs" / pack.name)
    for leftover in (
        "packs/new.0.1-abc.partial", "manifests/x.0.1-abc.partial", "staging/x.partial", "staging/y.pending",
        "cache/x.1.999999999-ab.partial", f"staging/{'00' * 32}",
    ):  # fmt: skip
        (repository.root / leftover).write_bytes(b"half")

    with Repository.open(repository.root) as again:
        assert not list(again.root.glob("*/*.partial"))
        assert list((again.root / "staging").iterdir()) == []
        manifest_of(again, files_of(7))
        assert list((again.root / "staging").iterdir()) == []


def test_what_nobody_published_in_a_day_is_given_up_and_can_be_given_up_before(repository):
    old, young = b"old", b"young"
    repository.put_blob(store.digest_of(old), old)
    (journal,) = (repository.root / "staging").glob("*.journal")
    os.utime(journal, (1, 1))
    with reopen(repository) as again:
        assert again.missing([store.digest_of(old)]) == [store.digest_of(old)]
        assert list((again.root / "staging").iterdir()) == []
        again.put_blob(store.digest_of(young), young)
    with Repository.open(repository.root) as again:
        assert again.missing([store.digest_of(young)]) == []
        again.clear_staging()
        assert again.missing([store.digest_of(young)]) == [store.digest_of(young)]
        assert list((again.root / "staging").iterdir()) == []


def test_a_store_that_is_never_closed_gives_up_what_nobody_published_in_a_day_when_it_collects(repository):
    old, young = b"old", b"young"
    repository.put_blob(store.digest_of(old), old)
    (journal,) = (repository.root / "staging").glob("*.journal")
    repository.gc()
    assert repository.missing([store.digest_of(old)]) == []

    os.utime(journal, (1, 1))
    repository.gc(dry_run=True)
    assert repository.missing([store.digest_of(old)]) == []
    repository.gc()

    assert repository.missing([store.digest_of(old)]) == [store.digest_of(old)]
    assert list((repository.root / "staging").iterdir()) == []
    repository.put_blob(store.digest_of(young), young)
    assert repository.staged_blob(store.digest_of(young)) == young


# --- opening


def test_names_that_an_earlier_process_gave_are_durable_before_a_publish_relies_on_them(repository, monkeypatch):
    """It may have died between a rename and the sync of the folder."""
    folders, synced, fsync = [repository.root / name for name in ("", "packs", "manifests")], set(), os.fsync
    repository.close()

    def noted(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with Repository.open(repository.root):
        assert {folder.stat().st_ino for folder in folders} <= synced


def test_a_second_writer_is_refused_with_the_pid_of_the_first(repository):
    with pytest.raises(ConflictError, match=f"process {os.getpid()} already writes"):
        Repository.open(repository.root)
    repository.close()
    repository.close()
    Repository.open(repository.root).close()


def test_a_newer_format_is_refused_with_both_numbers_and_left_alone(tmp_path):
    (tmp_path / "format").write_text("7\n")

    for read_only in (True, False):
        with pytest.raises(FormatTooNewError, match=r"format 7.*up to 1"):
            Repository.open(tmp_path, read_only=read_only)
    assert [path.name for path in tmp_path.iterdir()] == ["format"]


def test_a_format_that_is_no_number_is_said(tmp_path):
    (tmp_path / "format").write_text("one\n")

    with pytest.raises(StoreError, match="holds no format number"):
        Repository.open(tmp_path)


def test_a_reader_without_a_store_says_what_to_start_and_makes_nothing(tmp_path):
    with pytest.raises(StoreError, match="tether up"):
        Repository.open(tmp_path / "store", read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_sees_each_commit_and_writes_nothing(repository):
    publish(repository, 1)
    with Repository.open(repository.root, read_only=True) as reader:
        assert reader.resolve(ref("digits")).version == 1
        count = reader.change_count()
        publish(repository, 2)
        assert reader.change_count() > count
        assert reader.resolve(ref("digits")).version == 2
        for write in (
            lambda: publish(reader, 3),
            lambda: reader.put_blob(store.digest_of(b"x"), b"x"),
            lambda: reader.set_alias("digits", "prod", 1),
            lambda: reader.trust(LAB.public, ["code"]),
            reader.rebuild_index,
        ):
            with pytest.raises(ConflictError, match="reading only"):
                write()


def test_a_reader_opens_after_the_writer_has_left(repository):
    publish(repository, 1)
    repository.close()
    before = files_in(repository.root)

    with Repository.open(repository.root, read_only=True) as reader:
        assert reader.resolve(ref("digits")).version == 1
    assert {name for name in files_in(repository.root) if not name.startswith("catalog.sqlite-")} == set(before)


def test_own_is_remembered(repository):
    publish(repository, 1)
    publish(repository, 2, by=COLLEAGUE)

    with reopen(repository) as again:
        assert again.resolve(ref("digits")).publisher == LAB.public


def test_publishing_from_many_threads_gives_each_its_number(repository):
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda seed: publish(repository, seed).version, range(8)))

    assert sorted(versions) == list(range(1, 9))
    assert repository.verify().problems == ()
    assert repository.models()[0].aliases == {"latest": 8}


def test_importing_the_store_imports_neither_zarr_nor_a_framework():
    code = "import sys, tether.store; sys.exit(bool({'zarr', 'torch', 'onnxruntime', 'tensorflow', 'distributed'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
