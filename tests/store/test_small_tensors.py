"""Thousands of small tensors: what is done for many at once gives what doing it one by one gives, also where something is wrong."""

import errno
import os
import string
import tempfile
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_models import INFO, LAB, seeded

from tether import store
from tether.errors import ChunkAlteredError, MalformedManifestError, NoSpaceError, StoreError
from tether.store.format import layout, weights
from tether.store.format.layout import Piece, path_problem, slices
from tether.store.format.manifest import ArrayEntry, Manifest, Segment, decode, encode
from tether.store.format.weights import Ranges, tensor_path
from tether.store.packing import disk, pending
from tether.store.packing.disk import begin_sync, write_parts_at
from tether.store.packing.pending import PendingPack
from tether.types import StoredTensor

CLOSE = st.text(string.ascii_letters + "./\\%~ -[]^é\x1f\x7f\n", max_size=12)
"""Texts that are nearly paths."""


def model(path, count=300, seed="small"):
    """A file of small tensors, and their values by name."""
    chance = np.random.default_rng(seeded(seed).getrandbits(64))
    values = {f"layers.{index}.bias": chance.standard_normal(int(chance.integers(64, 8_192)), np.float32) for index in range(count)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"header".ljust(64) + b"".join(value.tobytes() for value in values.values()))
    return values


def tensors_in(path, values):
    offset, found = 64, []
    for name, value in values.items():
        found.append(StoredTensor(name, "float32", value.shape, path.name, offset, value.nbytes))
        offset += value.nbytes
    return found


def add(repository, path, values):
    return repository.add_files(path, {path.name: [Piece(each.offset, each.nbytes) for each in tensors_in(path, values)]})


def publish_model(repository, path, values):
    files = add(repository, path, values)
    arrays = (*files, *weights.tensor_arrays(files, tensors_in(path, values)))
    data = encode(Manifest(framework="onnx", entry=path.name, info=INFO, arrays=arrays))
    return repository.publish("m", data, LAB.public, LAB.sign(store.signed_message(data))).digest


def assert_loads(repository, digest, values):
    found = repository.load_tensors(digest)
    assert found.keys() == values.keys()
    assert all(np.array_equal(found[name], value) and not found[name].flags.writeable for name, value in values.items())


def damage(repository, digest):
    """Change a byte in the middle of a blob."""
    (place,) = repository._blobs.locate([digest]).values()
    path = repository.root / "packs" / place.pack
    path.chmod(0o600)
    with path.open("rb+") as file:
        file.seek(place.offset + place.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return place


# --- the format


@given(CLOSE | st.text(max_size=300) | st.integers(250, 1100).map(lambda count: "a" * count))
def test_a_path_that_is_plain_at_a_glance_has_no_problem(path):
    if layout._plain(path) and len(path) <= layout._MAX_PART_NBYTES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "_plain", lambda _: None)
            assert path_problem(path) is None
    assert path_problem("a/b.c-d_e~f/x y") is None


@given(
    CLOSE
    | st.text(max_size=300).filter(lambda text: text.isprintable())
    | st.sampled_from(["zarr.json", ".", "", "%", "a" * 255, "a" * 256])
)
def test_a_name_that_is_its_own_path_is_spelt_as_any_other(name):
    found = tensor_path(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_plain", lambda _: None)
        assert tensor_path(name) == found


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(0, 300), st.integers(0, 300))
def test_ranges_are_the_slices_that_walking_from_the_start_finds(sizes, offset, nbytes):
    segments = tuple(Segment(store.digest_of(bytes([index])), 7 * index, size) for index, size in enumerate(sizes))
    array = ArrayEntry("files/a", "uint8", (sum(sizes),), segments)

    expected = [
        Segment(segments[index].digest, segments[index].offset + piece.offset, piece.nbytes)
        for index, piece in slices(sizes, offset, offset + nbytes)
    ]
    assert list(Ranges(array).segments(offset, nbytes)) == expected


def test_a_manifest_of_a_later_format_is_told_from_a_malformed_one():
    array = ArrayEntry("files/m", "uint8", (1,), (Segment(store.digest_of(b"m"), 0, 1),))
    fields = msgspec.json.decode(encode(Manifest(framework="onnx", entry="m", info=INFO, arrays=(array,))))

    def spelt(**changes):
        return msgspec.json.encode(fields | changes, order="sorted")

    for changes in ({"format": 2}, {"format": 2, "layers": []}, {"format": 2, "arrays": {}}):
        with pytest.raises(MalformedManifestError, match="has format 2; this Tether understands 1: update it"):
            decode(spelt(**changes))
    with pytest.raises(MalformedManifestError, match="can't be read"):
        decode(spelt(layers=[]))


def test_a_folder_of_arrays_that_is_an_array_is_named_with_what_lies_in_it():
    segment = Segment(store.digest_of(b"m"), 0, 1)
    paths = ("files/a", "files/a-b", "files/a/b/c")
    arrays = tuple(ArrayEntry(path, "uint8", (1,), (segment,)) for path in paths)

    with pytest.raises(MalformedManifestError, match="'files/a' is also the folder of 'files/a/b/c'"):
        encode(Manifest(framework="onnx", entry="", info=INFO, arrays=arrays))


# --- publishing


def test_neighbours_in_the_file_are_neighbours_in_the_pack(repository, tmp_path):
    values = model(tmp_path / "m.bin")
    digest = publish_model(repository, tmp_path / "m.bin", values)

    (file,) = repository.manifest(digest).files()
    located = repository._blobs.locate(segment.digest for segment in file.segments)
    places = [located[segment.digest] for segment in file.segments]
    assert len(places) > 30
    assert len({place.pack for place in places}) == 1
    assert all(one.offset + one.nbytes == two.offset for one, two in pairwise(places))
    assert_loads(repository, digest, values)


def test_of_a_run_only_what_is_new_or_damaged_is_written(repository, tmp_path):
    before = model(tmp_path / "a" / "m.bin")
    first = add(repository, tmp_path / "a" / "m.bin", before)[0]
    publish_model(repository, tmp_path / "a" / "m.bin", before)
    damaged = damage(repository, first.segments[7].digest)
    after = dict(before) | {"layers.200.bias": before["layers.200.bias"] + 1}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "m.bin").write_bytes(b"header".ljust(64) + b"".join(value.tobytes() for value in after.values()))

    digest = publish_model(repository, tmp_path / "b" / "m.bin", after)

    (second,) = repository.manifest(digest).files()
    located = repository._blobs.locate(segment.digest for segment in second.segments)
    moved = {each for each, place in located.items() if place.pack != damaged.pack}
    assert moved == {first.segments[7].digest} | {each.digest for each in set(second.segments) - set(first.segments)}
    assert_loads(repository, digest, after)


def test_a_run_that_the_disk_refuses_is_taken_back_and_goes_to_another_file(repository, tmp_path, monkeypatch):
    values, write, limit = model(tmp_path / "m.bin"), PendingPack.write_run, 2 << 20

    def limited(pack, first, parts, point):
        if first.offset + sum(map(len, parts)) > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        write(pack, first, parts, point)

    monkeypatch.setattr(PendingPack, "write_run", limited)
    with pytest.raises(NoSpaceError):
        add(repository, tmp_path / "m.bin", values)
    kept = sum(slot.pack.data.exists() for slot in repository._staging._slots.values())
    monkeypatch.setattr(PendingPack, "write_run", write)

    assert kept > 10
    assert_loads(repository, publish_model(repository, tmp_path / "m.bin", values), values)


def test_a_publish_that_seals_the_pack_between_place_and_write_loses_nothing(repository, tmp_path, monkeypatch):
    values, fill, sealed = model(tmp_path / "m.bin"), type(repository._staging).fill_all, []

    def late(staging, blobs):
        blobs = list(blobs)
        if not sealed:
            sealed.append(len(blobs))
            with staging._changed:
                staging._forget([slot for slot, _ in blobs[::2]])
        return fill(staging, blobs)

    monkeypatch.setattr(type(repository._staging), "fill_all", late)
    digest = publish_model(repository, tmp_path / "m.bin", values)

    assert sealed[0] > 2
    assert_loads(repository, digest, values)


def test_equal_tensors_of_one_run_are_one_blob(repository, tmp_path):
    value = np.arange(20_000, dtype=np.float32)
    values = dict.fromkeys("abcdefgh", value)
    (tmp_path / "m.bin").write_bytes(b"header".ljust(64) + value.tobytes() * len(values))

    digest = publish_model(repository, tmp_path / "m.bin", values)

    assert_loads(repository, digest, values)
    assert len(set(repository.manifest(digest).blobs())) == 2


def test_the_disk_begins_to_write_before_the_publish(repository, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(pending, "begin_sync", lambda descriptor: begun.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(pending, "_BEGIN", 1 << 20)
    values = model(tmp_path / "m.bin")

    add(repository, tmp_path / "m.bin", values)

    assert 2 <= len(begun) <= (tmp_path / "m.bin").stat().st_size >> 20


@pytest.mark.parametrize("there", [True, False])
def test_where_the_system_can_not_be_told_to_begin_nothing_happens(tmp_path, monkeypatch, there):
    if not there:
        monkeypatch.setattr(disk, "_sync_file_range", lambda: None)
    with (tmp_path / "a").open("wb") as file:
        file.write(b"a" * 5_000)
        begin_sync(file.fileno())
    begin_sync(1 << 20)  # no such file: the answer is not heeded, what is wrong is told by `sync`

    assert (tmp_path / "a").read_bytes() == b"a" * 5_000


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=9), st.integers(1, 40), st.integers(1, 4))
def test_parts_are_written_one_behind_the_other_however_little_the_system_takes_at_once(parts, most, at_once):
    def little(descriptor, buffers, offset):
        return os.pwrite(descriptor, b"".join(buffers)[:most], offset)

    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", little)
        patch.setattr(disk, "_MOST_PARTS", at_once)
        assert write_parts_at(file.fileno(), 5, [memoryview(part) for part in parts]) == sum(map(len, parts))
        assert os.pread(file.fileno(), 1_000, 5) == b"".join(parts)


# --- reading


def test_many_blobs_are_found_at_once_and_those_that_are_not_there_are_left_out(repository, tmp_path):
    blobs = [number.to_bytes(2, "big") for number in range(1_200)]
    path = tmp_path / "m.bin"
    path.write_bytes(b"".join(blob * 40 for blob in blobs))
    (file,) = repository.add_files(path, {path.name: [Piece(80 * index, 80) for index in range(1_200)]})
    for blob in blobs:
        repository.put_blob(store.digest_of(blob), blob)
    segments = tuple(Segment(store.digest_of(blob), 0, 2) for blob in blobs)
    data = encode(Manifest(framework="onnx", entry="", info=INFO, arrays=(file, ArrayEntry("files/n", "uint8", (2_400,), segments))))
    repository.publish("m", data, LAB.public, LAB.sign(store.signed_message(data)))
    wanted = [store.digest_of(blob) for blob in blobs]

    found = repository._catalog.locate_many([*wanted, store.digest_of(b"absent"), *wanted[:5]])

    assert found == {digest: repository._catalog.locate(digest) for digest in wanted}


def test_an_altered_blob_among_many_is_named_with_its_array(repository, tmp_path):
    values = model(tmp_path / "m.bin")
    digest = publish_model(repository, tmp_path / "m.bin", values)
    (file,) = repository.manifest(digest).files()
    wrong = file.segments[9].digest
    damage(repository, wrong)
    users = [array.path for array in repository.manifest(digest).tensors() if wrong in {part.digest for part in array.segments}]

    for threads in (1, 2):
        with pytest.raises(ChunkAlteredError) as caught:
            repository.load_tensors(digest, threads=threads)
        assert (caught.value.args[1], caught.value.args[2] in users) == (wrong, True)


def test_a_bad_place_spoils_its_blob_and_not_those_beside_it(repository, tmp_path, monkeypatch):
    values = model(tmp_path / "m.bin")
    digest = publish_model(repository, tmp_path / "m.bin", values)
    manifest, read = repository.manifest(digest), os.preadv
    (file,) = manifest.files()
    (place,) = repository._blobs.locate([file.segments[9].digest]).values()

    def preadv(descriptor, buffers, start, *flags):
        if start <= place.offset + 5 < start + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, start, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ChunkAlteredError, match=file.segments[9].digest):
        repository.load_tensors(manifest)
    spoilt = {
        array.path for array in manifest.tensors() if file.segments[9] in {Segment(p.digest, 0, place.nbytes) for p in array.segments}
    }
    others = [name for name in values if tensor_path(name) not in spoilt]
    assert len(spoilt) < 20
    assert repository.load_tensors(manifest, others).keys() == set(others)


def test_another_refusal_of_the_disk_is_told_as_one(repository, tmp_path, monkeypatch):
    values = model(tmp_path / "m.bin")
    manifest = repository.manifest(publish_model(repository, tmp_path / "m.bin", values))

    def preadv(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(StoreError, match="disk refused"):
        repository.load_tensors(manifest)
