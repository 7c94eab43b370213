"""Weights in memory: exact, verified, mapped where they lie in one piece, and never altered ones."""

import errno
import gc
import os
import resource
import threading
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_models import INFO, LAB, publish, seeded

from tether import store
from tether.errors import ChunkAlteredError, ChunkMissingError, NotFoundError, StoreError
from tether.store import BLOB_NBYTES, Repository
from tether.store.format.layout import Piece
from tether.store.format.weights import tensor_arrays as entries_of
from tether.store.loading import tensor_arrays
from tether.types import StoredTensor

VALUES = {
    "embedding": np.random.default_rng(1).standard_normal((1500, 1024), dtype=np.float32),
    "small": np.arange(12, dtype=np.int64).reshape(3, 4),
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False, True]),
    "half": np.arange(70_000).astype(ml_dtypes.bfloat16),
    "tiny": np.arange(-8, 8).astype(ml_dtypes.float8_e4m3fn),
    "tiny2": np.arange(-8, 8).astype(ml_dtypes.float8_e5m2fnuz),
}


def write_model(path, values, header=b"header", align=64):
    """A file of tensors behind a header; gives where they lie."""
    data, tensors = bytearray(header), []
    for name, value in values.items():
        data += bytes(-len(data) % align)
        tensors.append(StoredTensor(name, str(value.dtype), value.shape, path.name, len(data), value.nbytes))
        data += value.tobytes()
    path.write_bytes(data)
    return tensors


def publish_model(repository, path, tensors, name="m"):
    files = repository.add_files(path, {path.name: [Piece(tensor.offset, tensor.nbytes) for tensor in tensors]})
    arrays = tuple(sorted(files + entries_of(files, tensors), key=lambda array: array.path))
    data = store.encode(store.Manifest(framework="onnx", entry=path.name, info=INFO, arrays=arrays))
    return repository.publish(name, data, LAB.public, LAB.sign(store.signed_message(data))).digest


def is_mapped(array):
    """Whether its memory is that of a pack, as the system tells."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        start, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return ".pack" in line
    raise AssertionError


def assert_same(found, values):
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()
        assert not found[name].flags.writeable


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    with Repository.open(folder / "store", own=LAB.public) as repository:
        digest = publish_model(repository, folder / "model.bin", write_model(folder / "model.bin", VALUES))
        yield repository, digest, folder / "model.bin"


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_every_tensor_is_loaded_exactly_and_mapped_in_place(whole, threads):
    repository, digest, _ = whole

    found = repository.load_tensors(digest, threads=threads)

    assert_same(found, VALUES)
    assert all(is_mapped(array) and array.flags.aligned for name, array in found.items() if name != "empty")
    assert_same(dict(repository.iter_tensors(repository.manifest(digest), threads=threads)), VALUES)


def test_a_file_is_one_range_of_memory(whole):
    repository, digest, path = whole

    view = repository.load_file(digest, "model.bin")

    assert view.readonly
    assert bytes(view) == path.read_bytes()
    with pytest.raises(NotFoundError, match="no file"):
        repository.load_file(digest, "other.bin")


def test_some_tensors_are_loaded_without_reading_the_others(whole, monkeypatch):
    repository, digest, _ = whole
    manifest, read, real = repository.manifest(digest), [], os.preadv

    def counting(descriptor, views, offset):
        read.append(real(descriptor, views, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    found = repository.load_tensors(manifest, ["half", "scalar"])

    assert list(found) != []
    assert_same({name: found[name] for name in ("half", "scalar")}, {name: VALUES[name] for name in ("half", "scalar")})
    assert sum(read) < 2 * VALUES["half"].nbytes
    assert repository.load_tensors(manifest, []) == {}
    with pytest.raises(NotFoundError, match="no tensor 'nothing'"):
        repository.load_tensors(manifest, ["nothing"])


def test_each_blob_is_read_once_also_where_many_tensors_share_it(repository, tmp_path, monkeypatch):
    values = {f"bias{number}": np.full(100, number, np.float32) for number in range(200)}
    digest = publish_model(repository, tmp_path / "m.bin", write_model(tmp_path / "m.bin", values))
    manifest, read, real = repository.manifest(digest), [], os.preadv

    def counting(descriptor, views, offset):
        read.append(real(descriptor, views, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    found = repository.load_tensors(manifest)

    assert_same(found, values)
    assert sum(read) <= (tmp_path / "m.bin").stat().st_size


def test_tensors_that_lie_askew_or_in_pieces_are_copied(repository, tmp_path):
    chance = np.random.default_rng(2)
    big = chance.standard_normal(3_000_000, dtype=np.float32)
    first = publish_model(repository, tmp_path / "a.bin", write_model(tmp_path / "a.bin", {"w": big}))
    tuned = big.copy()
    tuned[2_500_000:] += 1
    second = publish_model(repository, tmp_path / "a.bin", write_model(tmp_path / "a.bin", {"w": tuned}))
    askew = publish_model(repository, tmp_path / "b.bin", write_model(tmp_path / "b.bin", VALUES, header=b"x", align=1))

    assert is_mapped(repository.load_tensors(first)["w"])
    found = repository.load_tensors(second)
    assert not is_mapped(found["w"])
    assert_same(found, {"w": tuned})
    assert_same(repository.load_tensors(askew), VALUES)
    assert bytes(repository.load_file(second, "a.bin")) == (tmp_path / "a.bin").read_bytes()


@settings(max_examples=20)
@given(st.data())
def test_any_cut_of_any_arrays_reads_back(tmp_path_factory, data):
    chance = seeded(data.draw(st.integers(0, 1 << 32)))
    blobs = [chance.randbytes(chance.randrange(1, 300)) for _ in range(8)]
    arrays, expected = [], {}
    for number in range(5):
        segments, content = [], b""
        for _ in range(chance.randrange(0, 5)):
            blob = chance.choice(blobs)
            start = chance.randrange(len(blob))
            part = blob[start : chance.randrange(start + 1, len(blob) + 1)]
            segments.append(store.Segment(store.digest_of(blob), start, len(part)))
            content += part
        arrays.append(store.ArrayEntry(f"tensors/{number}", "uint8", (len(content),), tuple(segments)))
        expected[str(number)] = np.frombuffer(content, np.uint8)
    with Repository.open(tmp_path_factory.mktemp("cut") / "store", own=LAB.public) as repository:
        for blob in blobs:
            repository.put_blob(store.digest_of(blob), blob)
        manifest = store.Manifest(framework="onnx", entry="", info=INFO, arrays=tuple(arrays))
        encoded = store.encode(manifest)
        repository.publish("m", encoded, LAB.public, LAB.sign(store.signed_message(encoded)))

        assert_same(repository.load_tensors(manifest), expected)


def test_no_altered_byte_is_handed_out_and_whole_tensors_come_first(whole):
    repository, digest, _ = whole
    (pack,) = (repository.root / "packs").glob("*.pack")
    original = pack.read_bytes()
    at = original.index(VALUES["half"].tobytes()) + 1000
    try:
        pack.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        with pytest.raises(ChunkAlteredError, match="tensors/half") as caught:
            repository.load_tensors(digest)
        named = {segment.digest for array in repository.manifest(digest).tensors() for segment in array.segments}
        assert caught.value.args[1] in named
        assert_same(repository.load_tensors(digest, ["embedding"]), {"embedding": VALUES["embedding"]})
        seen = []
        with pytest.raises(ChunkAlteredError):
            seen.extend(name for name, _ in repository.iter_tensors(digest))
        assert "embedding" in seen

        pack.write_bytes(original[: at - 500])
        with pytest.raises(ChunkAlteredError):
            repository.load_tensors(digest)
        pack.write_bytes(b"")
        with pytest.raises(ChunkAlteredError):
            repository.load_file(digest, "model.bin")
        pack.unlink()
        with pytest.raises(ChunkMissingError, match="not in the store"):
            repository.load_tensors(digest)
    finally:
        pack.write_bytes(original)
    assert_same(repository.load_tensors(digest), VALUES)


@pytest.mark.parametrize(
    ("number", "error", "said"), [(errno.EIO, ChunkAlteredError, "altered"), (errno.ENXIO, StoreError, "disk refused")]
)
def test_a_disk_that_fails_to_read_is_an_error_and_no_signal(whole, monkeypatch, number, error, said):
    repository, digest, _ = whole

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        for read in (repository.load_tensors, repository.checkout, lambda digest: repository.load_file(digest, "model.bin")):
            with pytest.raises(error, match=said):
                read(digest)


def test_a_tensor_that_was_dropped_gives_its_memory_back_while_the_others_come(repository, tmp_path):
    """Askew, so that each is copied; anonymous memory, so that it counts."""
    count, extent = 12, 1 << 20
    values = {f"t{number:02}": np.random.default_rng(number).standard_normal(extent, np.float32) for number in range(count)}
    digest = publish_model(repository, tmp_path / "m.bin", write_model(tmp_path / "m.bin", values, b"!", align=1))

    seen: list[weakref.ref[object]] = []
    for _, array in repository.iter_tensors(digest):
        seen.append(weakref.ref(memory_of(array)))
        del array
        assert sum(each() is not None for each in seen) <= 1

    assert len(seen) == count


def memory_of(array):
    """The innermost array: it goes when nothing views it any more."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_a_version_of_more_packs_than_there_are_descriptors_is_loaded(repository):
    blobs = [seeded(f"pack {number}").randbytes(2_000 + number) for number in range(60)]
    for count in range(1, len(blobs) + 1):
        repository.put_blob(store.digest_of(blobs[count - 1]), blobs[count - 1])
        segments = tuple(store.Segment(store.digest_of(blob), 0, len(blob)) for blob in blobs[:count])
        file = store.ArrayEntry("files/m.bin", "uint8", (sum(map(len, blobs[:count])),), segments)
        singly = [StoredTensor("last", "uint8", (2_059,), "m.bin", file.nbytes - 2_059, 2_059)] if count == len(blobs) else []
        data = store.encode(store.Manifest(framework="onnx", entry="m.bin", info=INFO, arrays=(file, *entries_of([file], singly))))
        digest = repository.publish("m", data, LAB.public, LAB.sign(store.signed_message(data))).digest

    few, many = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (numbers, no paths)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 24, many))
    try:
        whole = repository.load_file(digest, "m.bin").tobytes()
        tensors = {name: array.tobytes() for name, array in repository.load_tensors(digest).items()}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, many))

    assert whole == b"".join(blobs)
    assert tensors == {"last": blobs[-1]}


def test_arrays_outlive_the_store_and_the_pack(repository, tmp_path):
    digest = publish_model(repository, tmp_path / "m.bin", write_model(tmp_path / "m.bin", VALUES))
    before = _descriptors()
    found = repository.load_tensors(digest)
    repository.close()
    for pack in (repository.root / "packs").iterdir():
        pack.unlink()

    assert_same(found, VALUES)
    del found
    gc.collect()
    assert _descriptors() <= before


def _descriptors():
    return sum(1 for _ in Path("/dev/fd").iterdir())


def test_a_pack_that_was_rewritten_under_a_reader_is_found_again(repository, tmp_path, monkeypatch):
    digest = publish_model(repository, tmp_path / "m.bin", write_model(tmp_path / "m.bin", VALUES))
    manifest = repository.manifest(digest)
    with Repository.open(tmp_path / "other", own=LAB.public) as other:
        publish(other, files={"noise": b"first", **{name: value.tobytes() for name, value in VALUES.items()}})
        publish_model(other, tmp_path / "m.bin", write_model(tmp_path / "m.bin", VALUES))
        moved = [pack.rename(repository.root / "packs" / pack.name) for pack in (other.root / "packs").glob("*.pack")]
    (old,) = set((repository.root / "packs").glob("*.pack")) - set(moved)
    stale = repository._catalog.locate_many

    def late(digests):
        """The catalog's answer is used after the garbage collector was there."""
        answer = stale(digests)
        if old.exists():
            old.unlink()
            repository.rebuild_index()
        return answer

    monkeypatch.setattr(repository._catalog, "locate_many", late)
    assert_same(repository.load_tensors(manifest), VALUES)


def test_a_consumer_that_stops_early_leaves_no_thread(whole):
    repository, digest, _ = whole
    tensors = {array.path: array for array in repository.manifest(digest).tensors()}
    found = tensor_arrays(repository._blobs, tensors, threads=3)
    next(found)
    found.close()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("store")]


def test_a_tensor_of_many_blobs_is_still_one_range(repository, tmp_path):
    value = np.frombuffer(np.random.default_rng(3).bytes(2 * BLOB_NBYTES + 4096), np.float64)
    digest = publish_model(repository, tmp_path / "m.bin", write_model(tmp_path / "m.bin", {"w": value}))

    (entry,) = repository.manifest(digest).tensors()
    found = repository.load_tensors(digest)

    assert len(entry.segments) == 3
    assert is_mapped(found["w"])
    assert_same(found, {"w": value})
