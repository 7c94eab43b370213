"""Blobs are written once, where their pack will have them: planned, in any order, resumed after a death, sealed or copied."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_models import INFO, LAB, files_in, manifest_of, publish, seeded

from tether import store
from tether.errors import MissingBlobsError, NoModelFileError
from tether.store import Repository
from tether.store.format.layout import BLOB_NBYTES, Piece
from tether.store.format.packs import place
from tether.store.packing.pack_files import scan
from tether.store.packing.pending import PendingPack, State
from tether.store.packing.staging import Planned, Staging


def blobs_of(seed, count=12, nbytes=50_000):
    chance = seeded(seed)
    return [chance.randbytes(chance.randrange(1, nbytes)) for _ in range(count)]


def draft_of(blobs, name="model.bin"):
    segments = tuple(store.Segment(store.digest_of(blob), 0, len(blob)) for blob in blobs)
    return store.ArrayEntry(f"files/{name}", "uint8", (sum(map(len, blobs)),), segments)


def publish_draft(repository, *arrays):
    data = store.encode(store.Manifest(framework="onnx", entry="", info=INFO, arrays=arrays))
    return repository.publish("digits", data, LAB.public, LAB.sign(store.signed_message(data)))


def pack_files(repository):
    return sorted((repository.root / "packs").glob("*.pack"), key=lambda path: path.stat().st_mtime)


def staged(repository):
    return sorted(path.suffix for path in (repository.root / "staging").iterdir())


def one_range(repository, array):
    """Whether the array is one range of one pack, as aligned as in its file."""
    located = repository._blobs.locate(segment.digest for segment in array.segments)
    places = [located[segment.digest] for segment in array.segments]
    ends = [place.offset + place.nbytes for place in places]
    follows = all(place.offset == end for place, end in zip(places[1:], ends, strict=False))
    return follows and len({place.pack for place in places}) == 1 and places[0].offset % 64 == 0


# --- order and place


def test_planned_blobs_lie_in_the_order_of_their_file_however_they_come(repository):
    blobs = blobs_of("order")
    one, two = draft_of(blobs[:7], "one"), draft_of(blobs[7:], "two")
    repository.plan([one, two])
    shuffled = blobs[:]
    seeded("shuffle").shuffle(shuffled)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda blob: repository.put_blob(store.digest_of(blob), blob), shuffled))

    published = publish_draft(repository, one, two)

    assert all(one_range(repository, array) for array in (one, two))
    assert files_in(repository.checkout(published.digest)) == {"one": b"".join(blobs[:7]), "two": b"".join(blobs[7:])}
    assert len(pack_files(repository)) == 1
    assert staged(repository) == []


def test_the_pack_of_a_publish_is_the_file_that_was_staged(repository, tmp_path):
    source = tmp_path / "model.bin"
    source.write_bytes(seeded("big").randbytes(3 * BLOB_NBYTES + 5))
    arrays = repository.add_files(source, {"model.bin": [Piece(100, 5_000_000), Piece(5_000_100, 300)]})
    (pending,) = (repository.root / "staging").glob("*.pending")
    inode = pending.stat().st_ino

    publish_draft(repository, *arrays)

    (pack,) = pack_files(repository)
    assert pack.stat().st_ino == inode
    assert pack.stat().st_size < source.stat().st_size + 64 + 44 * len(arrays[0].segments) + 56 + 64
    assert one_range(repository, arrays[0])
    assert [segment.nbytes for segment in arrays[0].segments[:3]] == [100, BLOB_NBYTES, 5_000_000 - BLOB_NBYTES]


def test_files_are_cut_at_tensors_and_what_is_stored_is_not_written_again(repository, tmp_path):
    tensors = [seeded(f"layer {number}").randbytes(100_000) for number in range(6)]
    ranges = {name: [Piece(start + 100_000 * number, 100_000) for number in range(6)] for name, start in (("a.bin", 40), ("b.bin", 77))}
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a.bin").write_bytes(b"h" * 40 + b"".join(tensors))
    first = repository.add_files(tmp_path / "a", ranges)
    publish_draft(repository, *first)
    tensors[2] = seeded("tuned").randbytes(100_000)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/b.bin").write_bytes(b"longer header".ljust(77) + b"".join(tensors))

    second = repository.add_files(tmp_path / "b", ranges)
    published = publish_draft(repository, *second)

    assert pack_files(repository)[1].stat().st_size < 101_000
    assert files_in(repository.checkout(published.digest))["b.bin"] == (tmp_path / "b/b.bin").read_bytes()
    located = repository._blobs.locate(segment.digest for array in second for segment in array.segments)
    offset = 0
    for segment in second[0].segments:
        in_pack_of = first[0] if segment in first[0].segments else second[0]
        if in_pack_of is second[0]:
            assert located[segment.digest].offset % 64 == offset % 64
        offset += segment.nbytes


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_place_is_the_next_that_is_aligned_as_in_the_file(end, phase):
    found = place(end, phase)

    assert found % 64 == phase % 64
    assert 0 <= found - end < 64


def test_a_file_that_shrinks_while_it_is_read_is_told(repository, tmp_path, monkeypatch):
    source = tmp_path / "model.bin"
    source.write_bytes(bytes(3 * BLOB_NBYTES))
    real = os.preadv

    def shrinking(descriptor, views, offset):
        os.truncate(source, BLOB_NBYTES)
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(NoModelFileError, match="became shorter"):
        repository.add_files(source)


def test_a_folder_of_many_files_is_taken_in_order_by_several_threads(repository, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    for number in range(300):
        (source / f"{number:03}.bin").write_bytes(seeded(f"small {number}").randbytes(number * 7))

    arrays = repository.add_files(source)

    assert [array.path for array in arrays] == sorted(array.path for array in arrays)
    published = publish_draft(repository, *arrays)
    assert files_in(repository.checkout(published.digest)) == files_in(source)
    (pack,) = pack_files(repository)
    assert [line.digest for line in scan(pack)] == list(dict.fromkeys(segment.digest for array in arrays for segment in array.segments))


# --- sealing or copying


def test_blobs_that_lie_among_much_else_are_copied_and_the_rest_stays_staged(repository):
    other, mine = blobs_of("other"), blobs_of("mine", 3)
    for blob in [*other[:6], *mine, *other[6:]]:
        repository.put_blob(store.digest_of(blob), blob)
    draft = draft_of(mine)

    published = publish_draft(repository, draft)

    (pack,) = pack_files(repository)
    assert pack.stat().st_size < sum(map(len, mine)) + 3 * 108 + 200
    assert files_in(repository.checkout(published.digest)) == {"model.bin": b"".join(mine)}
    assert repository.missing(map(store.digest_of, other)) == []
    repository.close()
    with Repository.open(repository.root) as again:
        assert again.missing(map(store.digest_of, other)) == []
        publish_draft(again, draft_of(other))
        assert again.verify().problems == ()
        assert staged(again) == []


def test_what_was_added_beside_the_uploads_shares_their_pack(repository):
    blobs = blobs_of("uploads")
    draft = draft_of(blobs)
    repository.plan([draft])
    for blob in blobs:
        repository.put_blob(store.digest_of(blob), blob)
    example = repository.add_bytes(".tether/example.npz", b"an example")

    publish_draft(repository, example, draft)

    assert len(pack_files(repository)) == 1
    assert one_range(repository, draft)


def test_room_that_was_never_used_is_a_hole_and_not_in_the_index(repository):
    blobs = blobs_of("half", 20)
    repository.plan([draft_of(blobs)])
    for blob in blobs[:15]:
        repository.put_blob(store.digest_of(blob), blob)

    publish_draft(repository, draft_of(blobs[:15]))

    (pack,) = pack_files(repository)
    assert len(scan(pack)) == 15
    assert repository.missing(map(store.digest_of, blobs)) == [store.digest_of(blob) for blob in blobs[15:]]
    for blob in blobs[15:]:
        repository.put_blob(store.digest_of(blob), blob)
    assert publish_draft(repository, draft_of(blobs)).version == 2


def test_a_promised_size_that_is_wrong_costs_the_place_and_nothing_else(repository):
    blobs = blobs_of("lie", 3)
    array = draft_of(blobs)
    parts = tuple(store.Segment(segment.digest, 0, max(1, segment.nbytes // 2)) for segment in array.segments)
    repository.plan([store.ArrayEntry("files/a", "uint8", (sum(part.nbytes for part in parts),), parts)])
    for blob in blobs:
        repository.put_blob(store.digest_of(blob), blob)

    published = publish_draft(repository, array)

    assert files_in(repository.checkout(published.digest)) == {"model.bin": b"".join(blobs)}


def test_uploads_go_on_while_their_pack_is_sealed_under_them(repository):
    stop = threading.Event()
    chance = seeded("busy")
    extra = [chance.randbytes(2000) for _ in range(400)]

    def upload():
        for blob in extra:
            if stop.is_set():
                return
            repository.put_blob(store.digest_of(blob), blob)

    thread = threading.Thread(target=upload)
    thread.start()
    for seed in range(8):
        publish(repository, seed)
    stop.set()
    thread.join()
    for blob in extra:
        repository.put_blob(store.digest_of(blob), blob)

    assert repository.missing(map(store.digest_of, extra)) == []
    publish_draft(repository, draft_of(extra))
    assert repository.verify().problems == ()


# --- after a death


def test_what_was_staged_before_a_death_is_here_and_the_rest_goes_where_it_was_planned(repository):
    blobs = blobs_of("resumed")
    draft = draft_of(blobs)
    repository.plan([draft])
    for blob in blobs[::2]:
        repository.put_blob(store.digest_of(blob), blob)
    repository.close()

    with Repository.open(repository.root) as again:
        assert again.missing(map(store.digest_of, blobs)) == [store.digest_of(blob) for blob in blobs[1::2]]
        again.plan([draft])
        for blob in blobs[1::2]:
            again.put_blob(store.digest_of(blob), blob)
        publish_draft(again, draft)

        assert one_range(again, draft)
        assert len(pack_files(again)) == 1


def test_an_interrupted_publish_of_files_goes_on_in_the_same_pack(repository, tmp_path, monkeypatch):
    source = tmp_path / "model.bin"
    source.write_bytes(seeded("resume").randbytes(6 * BLOB_NBYTES))
    real = os.preadv

    def failing(descriptor, views, offset):
        if offset >= 3 * BLOB_NBYTES:
            raise OSError(5, "Input/output error")
        return real(descriptor, views, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(NoModelFileError, match="can't be read"):
            repository.add_files(source)
    repository.close()

    with Repository.open(repository.root) as again:
        arrays = again.add_files(source)
        publish_draft(again, *arrays)
        assert one_range(again, arrays[0])
        assert len(pack_files(again)) == 1


@pytest.mark.parametrize("damage", ["zeros", "garbage", "cut", "swapped lines"])
def test_a_journal_that_a_power_cut_damaged_claims_nothing_wrong(repository, damage):
    blobs = blobs_of("journal")
    data = manifest_of(repository, {f"{number}": blob for number, blob in enumerate(blobs)})
    repository.close()
    (journal,) = (repository.root / "staging").glob("*.journal")
    whole = journal.read_bytes()
    assert len(whole) == 56 * len(blobs)
    journal.write_bytes(
        {
            "zeros": whole[:200] + bytes(len(whole) - 200),
            "garbage": whole[:200] + seeded("garbage").randbytes(len(whole) - 200),
            "cut": whole[:-20],
            "swapped lines": whole[56:112] + whole[:56] + whole[112:],
        }[damage]
    )

    with Repository.open(repository.root) as again:
        lacking = set(again.missing(map(store.digest_of, blobs)))
        for blob in blobs:
            assert store.digest_of(blob) in lacking or again.read_draft_blob(store.digest_of(blob)) == blob
        for blob in blobs:
            again.put_blob(store.digest_of(blob), blob)
        again.publish("digits", data, LAB.public, LAB.sign(store.signed_message(data)))
        assert again.verify().problems == ()
        assert len(again.manifest(again.models()[0].versions[0].digest).arrays) == len(blobs)


def test_a_journal_of_another_name_is_not_believed(tmp_path):
    pack = PendingPack.create(tmp_path / "a.journal", tmp_path / "a.pending")
    slot = pack.reserve(store.digest_of(b"x"), 1, 0)
    slot.state = State.FILLED
    pack.record([slot])
    pack.close()
    (tmp_path / "a.journal").rename(tmp_path / "b.journal")

    assert not PendingPack.load(tmp_path / "b.journal", tmp_path / "a.pending").slots


def test_a_pack_whose_fsync_failed_is_never_sealed_its_blobs_are_copied(repository, monkeypatch):
    blobs = blobs_of("suspect")
    draft = draft_of(blobs)
    for blob in blobs:
        repository.put_blob(store.digest_of(blob), blob)
    (pending,) = (repository.root / "staging").glob("*.pending")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _refuse)
        with pytest.raises(OSError, match="disk refused"):
            publish_draft(repository, draft)

    inode = pending.stat().st_ino
    assert publish_draft(repository, draft).created
    (pack,) = pack_files(repository)
    assert pack.stat().st_ino != inode
    assert repository.verify().problems == ()
    assert staged(repository) == []


def _refuse(*_):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("clear", [False, True])
def test_a_pack_that_was_sealed_for_a_publish_that_failed_serves_the_next(repository, monkeypatch, clear):
    blobs = blobs_of("sealed")
    draft = draft_of(blobs)
    for blob in blobs:
        repository.put_blob(store.digest_of(blob), blob)
    with monkeypatch.context() as patch:
        patch.setattr(repository._catalog, "add_version", _refuse)
        with pytest.raises(OSError, match="Input/output error"):
            publish_draft(repository, draft)
    assert len(pack_files(repository)) == 1
    assert repository.missing(map(store.digest_of, blobs)) == []

    if clear:
        repository.clear_staging()
        assert pack_files(repository) == []
        with pytest.raises(MissingBlobsError):
            publish_draft(repository, draft)
    else:
        assert publish_draft(repository, draft).created
        assert len(pack_files(repository)) == 1
        assert repository.verify().problems == ()


def test_plans_beyond_the_limit_keep_no_room_and_uploads_work_all_the_same(tmp_path):
    (tmp_path / "staging").mkdir()
    (tmp_path / "packs").mkdir()
    staging = Staging(tmp_path / "staging", tmp_path / "packs")
    for number in range(200):
        staging.plan([Planned(store.digest_of(str(number).encode()), 3, 0)])

    assert len(list((tmp_path / "staging").glob("*.pending"))) == 64
    staging.put(store.digest_of(b"199"), b"199")
    assert staging.read(store.digest_of(b"199")) == b"199"
    staging.close()
