import asyncio
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import msgspec
import numpy as np
import pytest
import zarr
from store_models import INFO, LAB, files_of, publish
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from tether import store
from tether.errors import ChunkAlteredError, ChunkMissingError, UnsupportedError
from tether.store import BLOB_NBYTES, Repository, VersionStore
from tether.store.format.layout import slices
from tether.store.format.weights import MAX_TENSORS, tensor_arrays
from tether.store.hierarchy.zarr_keys import node_of
from tether.types import StoredTensor

BIG = np.random.default_rng(0).bytes(2 * BLOB_NBYTES + 77)
FILES = files_of(1) | {"big.bin": BIG, "inner/zarr.json": b"{}", "inner/100%.txt": b"x", "__init__.py": b""}
PROTOTYPE = default_buffer_prototype()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with Repository.open(tmp_path_factory.mktemp("zarr") / "store", own=LAB.public) as repository:
        digest = publish(repository, 1, files=FILES).digest
        yield VersionStore(repository, digest)


@pytest.fixture
def tensors(repository):
    """A version that has typed arrays whose chunks end inside of blobs."""
    values = {
        "f": np.arange(3_000_000, dtype="float32").reshape(3000, 1000),
        "s": np.array(2.5),
        "b": np.array([True, False]),
        "z": np.zeros((0, 3)),
    }
    arrays = []
    for name, value in values.items():
        entry = repository.add_bytes(name, value.tobytes())
        arrays.append(store.ArrayEntry(f"tensors/{name}", str(value.dtype), value.shape, entry.segments))
    data = store.encode(store.Manifest(framework="onnx", entry="", info=INFO, arrays=tuple(arrays)))
    digest = repository.publish("t", data, LAB.public, LAB.sign(store.signed_message(data))).digest
    return repository, digest, values


@pytest.fixture
def model(repository):
    """A version whose weights lie in a file, with names that frameworks give."""
    kernel = np.random.default_rng(1).random((3000, 1000), dtype="f4")
    whole = b"header" + kernel.tobytes() + b"\1\2\3\4"
    file = repository.add_bytes("model.safetensors", whole)
    stored = [
        StoredTensor("dense/kernel", "float32", kernel.shape, file.path.removeprefix("files/"), 6, kernel.nbytes),
        StoredTensor("dense/kernel_0", "uint8", (), "model.safetensors", 6 + kernel.nbytes, 1),
        StoredTensor("100% ~sure?", "int16", (2, 0), "model.safetensors", 0, 0),
        StoredTensor("x" * 300, "uint8", (4,), "model.safetensors", 6 + kernel.nbytes, 4),
    ]
    data = store.encode(store.Manifest(framework="onnx", entry="", info=INFO, arrays=(file, *tensor_arrays([file], stored))))
    digest = repository.publish("m", data, LAB.public, LAB.sign(store.signed_message(data))).digest
    return VersionStore(repository, digest), kernel


class Recording:
    """Versions that note which blobs are read."""

    def __init__(self, repository):
        self.manifest, self._read = repository.manifest, repository.read_array
        self.asked = []

    def read_array(self, array, start, stop):
        sizes = [segment.nbytes for segment in array.segments]
        self.asked.append((array.path, [index for index, _ in slices(sizes, start, stop)]))
        return self._read(array, start, stop)


def read(opened, key, byte_range=None):
    found = asyncio.run(opened.get(key, PROTOTYPE, byte_range))
    return None if found is None else found.to_bytes()


def listed(iterator):
    async def collect():
        return [item async for item in iterator]

    return asyncio.run(collect())


def test_every_file_reads_back_through_zarr(opened):
    group = zarr.open_group(opened, mode="r")

    for name, data in FILES.items():
        array = group[node_of(f"files/{name}")]
        assert (array.dtype, array.shape, array.ndim) == (np.uint8, (len(data),), 1)
        assert array[:].tobytes() == data
    assert group["files/big.bin"].chunks == (BLOB_NBYTES,)
    assert group["files/big.bin"][BLOB_NBYTES - 5 : BLOB_NBYTES + 5].tobytes() == BIG[BLOB_NBYTES - 5 : BLOB_NBYTES + 5]
    assert {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)} == {
        node_of(f"files/{name}") for name in FILES
    }


def test_the_group_says_what_the_version_is(opened):
    attributes = store.open_group(opened._reader.versions, opened.digest).attrs["tether"]

    assert attributes["framework"] == "onnx"
    assert attributes["entry"] == "model.onnx"
    assert attributes["info"]["format"] == "onnx"
    assert attributes["attributes"] == {"seed": 1}


def test_typed_arrays_read_back_across_blob_borders(tensors):
    repository, digest, values = tensors

    for name, value in values.items():
        array = store.open_array(repository, digest, f"tensors/{name}")
        assert array.dtype == value.dtype
        np.testing.assert_array_equal(array[...], value)


def test_a_missing_or_altered_chunk_raises_and_is_named_and_is_never_a_fill_value(tmp_path):
    with Repository.open(tmp_path / "store") as repository:
        digest = publish(repository, 1, files={"big.bin": BIG}).digest
        array = store.open_array(repository, digest, "files/big.bin")
        second = repository.manifest(digest).arrays[0].segments[1]
        (pack,) = (repository.root / "packs").iterdir()
        whole = pack.read_bytes()

        pack.write_bytes(whole[: BLOB_NBYTES + 100] + b"?" + whole[BLOB_NBYTES + 101 :])
        assert array[:100].tobytes() == BIG[:100]
        with pytest.raises(ChunkAlteredError, match=rf"{second.digest}.*files/big.bin") as caught:
            array[BLOB_NBYTES : BLOB_NBYTES + 1]
        assert caught.value.args[1] == second.digest
        pack.unlink()
        with pytest.raises(ChunkMissingError, match=r"files/big.bin"):
            array[:]


def test_byte_ranges_are_those_of_the_padded_chunk(opened):
    whole = read(opened, "files/big.bin/c/2")

    assert whole == BIG[2 * BLOB_NBYTES :].ljust(BLOB_NBYTES, b"\0")
    for request, expected in [
        (RangeByteRequest(10, 90), whole[10:90]),
        (RangeByteRequest(100, 200), whole[100:200]),
        (RangeByteRequest(BLOB_NBYTES - 3, BLOB_NBYTES + 9), whole[-3:]),
        (OffsetByteRequest(70), whole[70:]),
        (OffsetByteRequest(BLOB_NBYTES + 5), b""),
        (SuffixByteRequest(7), whole[-7:]),
        (SuffixByteRequest(BLOB_NBYTES + 7), whole),
    ]:
        assert read(opened, "files/big.bin/c/2", request) == expected
    assert read(opened, "zarr.json", RangeByteRequest(0, 1)) == b"{"
    with pytest.raises(ValueError, match="Unexpected byte_range"):
        read(opened, "zarr.json", (0, 2))
    ranges = [("zarr.json", RangeByteRequest(0, 1)), ("no", None), ("files/big.bin/c/0", SuffixByteRequest(1))]
    found = asyncio.run(opened.get_partial_values(PROTOTYPE, ranges))
    assert [part and part.to_bytes() for part in found] == [b"{", None, BIG[BLOB_NBYTES - 1 : BLOB_NBYTES]]


def test_listing_follows_zarrs_contract(opened):
    keys = listed(opened.list())

    assert len(keys) == len(set(keys))
    assert {key for key in keys if key.startswith("files/big.bin")} == {
        "files/big.bin/zarr.json",
        *(f"files/big.bin/c/{n}" for n in range(3)),
    }
    assert sorted(listed(opened.list_prefix("files/weights/"))) == sorted(key for key in keys if key.startswith("files/weights/"))
    assert sorted(listed(opened.list_dir(""))) == ["files", "zarr.json"]
    assert sorted(listed(opened.list_dir("files/big.bin"))) == sorted(listed(opened.list_dir("files/big.bin/"))) == ["c", "zarr.json"]
    assert listed(opened.list_dir("files/big")) == []
    assert asyncio.run(opened.exists("files/big.bin/c/0"))
    assert not asyncio.run(opened.exists("files/big.bin/c/3"))
    assert read(opened, "files/big.bin/c/3") is None
    assert [asyncio.run(opened.getsize(key)) for key in keys] == [len(read(opened, key)) for key in keys]
    with pytest.raises(FileNotFoundError):
        asyncio.run(opened.getsize("no"))
    assert not asyncio.run(opened.is_empty(""))
    assert asyncio.run(opened.is_empty("fil"))


def test_nothing_can_be_written(opened):
    value = PROTOTYPE.buffer.from_bytes(b"x")

    for write in (
        opened.set("a", value),
        opened.delete("zarr.json"),
        opened.delete_dir("files"),
        opened.clear(),
        opened.set_if_not_exists("a", value),
    ):
        with pytest.raises(ValueError, match="read-only"):
            asyncio.run(write)
    assert opened.read_only
    assert not opened.supports_writes
    assert not opened.supports_deletes
    with pytest.raises(ValueError, match="read-only"):
        opened.with_read_only(read_only=False)
    assert opened.with_read_only(read_only=True) == opened


def _sum(array):
    return int(np.asarray(array[:]).sum())


def test_a_store_pickles_equal_and_reads_in_another_process(opened):
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301 (our own bytes)
    array = zarr.open_group(opened, mode="r")["files/big.bin"]

    assert copy == opened
    assert hash(copy) == hash(opened)
    assert read(copy, "files/big.bin/c/0") == BIG[:BLOB_NBYTES]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_sum, array).result(60) == sum(BIG)


def test_the_weights_go_by_the_names_that_the_framework_gave_them(model):
    version, kernel = model

    assert set(version.weights) == {"dense/kernel", "dense/kernel_0", "100% ~sure?", "x" * 300}
    assert (len(version.weights), "dense" in version.weights, "dense/kernel" in version.weights) == (4, False, True)
    assert version.weights["100% ~sure?"].shape == (2, 0)
    assert version.weights["x" * 300][:].tolist() == [1, 2, 3, 4]
    assert version.weights["dense/kernel_0"][()] == 1
    assert version.weights["dense/kernel"].attrs["name"] == "dense/kernel"
    with pytest.raises(KeyError):
        version.weights["dense"]
    read_before = version.nbytes_read
    np.testing.assert_array_equal(version.weights["dense/kernel"][:10], kernel[:10])
    assert version.nbytes_read - read_before == 1048 * 4000  # one chunk of three, and not the rest of the model
    assert version.weights.nbytes_read == version.nbytes_read
    assert repr(version.weights).startswith("Weights(4 of ")


def test_dimension_names_are_of_one_array_each_and_never_an_arrays_own(model):
    version, _ = model
    group = zarr.open_group(version, mode="r")["tensors"]
    dimensions = [name for _, array in group.arrays() for name in array.metadata.dimension_names or ()]

    assert len(dimensions) == len(set(dimensions)) == 5
    assert not set(dimensions) & set(group.array_keys())
    assert group["dense=2Fkernel"].metadata.dimension_names == ("dense=2Fkernel_0_", "dense=2Fkernel_1")


def test_a_part_of_an_array_reads_the_blobs_that_hold_it_and_no_others(repository, model):
    version, kernel = model
    versions = Recording(repository)
    array = VersionStore(versions, version.digest).weights["dense/kernel"]

    np.testing.assert_array_equal(array[2990:], kernel[2990:])
    assert [path for path, _ in versions.asked] == ["tensors/dense%2Fkernel"]
    assert len(versions.asked[0][1]) < len(repository.manifest(version.digest).arrays[0].segments)


def test_several_ranges_of_one_value_read_each_blob_once_and_none_for_the_gaps(repository):
    data = bytes(range(200)) * 2
    segments = tuple(segment for start in range(0, 400, 100) for segment in repository.add_bytes("f", data[start : start + 100]).segments)
    array = store.ArrayEntry("files/f", "uint8", (400,), segments)
    manifest = store.encode(store.Manifest(framework="onnx", entry="", info=INFO, arrays=(array,)))
    digest = repository.publish("r", manifest, LAB.public, LAB.sign(store.signed_message(manifest))).digest
    versions = Recording(repository)
    opened = VersionStore(versions, digest)
    wanted = [
        RangeByteRequest(350, 360),
        RangeByteRequest(10, 20),
        RangeByteRequest(20, 105),
        SuffixByteRequest(7),
        RangeByteRequest(30, 30),
        None,
    ]

    found = dict(opened.get_ranges_sync("files/f/c/0", wanted[:5], prototype=PROTOTYPE))
    assert [found[index].to_bytes() for index in range(5)] == [data[350:360], data[10:20], data[20:105], data[-7:], b""]
    assert versions.asked == [("files/f", [0, 1]), ("files/f", [3])]

    async def batches():
        return [batch async for batch in opened.get_ranges("files/f/c/0", wanted, prototype=PROTOTYPE)]

    (batch,) = asyncio.run(batches())
    assert dict(batch)[5].to_bytes() == data
    with pytest.raises(BaseExceptionGroup) as caught:
        opened.get_ranges_sync("files/g/c/0", wanted, prototype=PROTOTYPE)
    assert isinstance(caught.value.exceptions[0], FileNotFoundError)
    assert dict(opened.get_ranges_sync("zarr.json", [RangeByteRequest(0, 1)], prototype=PROTOTYPE))[0].to_bytes() == b"{"


def test_keys_that_only_look_like_chunks_are_not_there(tensors):
    opened = VersionStore(tensors[0], tensors[1])

    for key in (
        "c/0/0",
        "c/00/0",
        "c/+0/0",
        "c/0",
        "c/0/0/0",
        "c/3/0",
        "c/0/1",
        "c/-1/0",
        "c/٠/0",
        "c/" + "9" * 30 + "/0",
        "c//0",
        "c",
        "c/0/",
    ):
        there = key == "c/0/0"
        assert asyncio.run(opened.exists(f"tensors/f/{key}")) is there
        assert (read(opened, f"tensors/f/{key}") is None) is not there
    assert asyncio.run(opened.exists("tensors/s/c"))
    assert not asyncio.run(opened.exists("tensors/z/c/0/0"))
    assert listed(opened.list_dir("tensors/z")) == ["zarr.json"]
    assert listed(opened.list_dir("tensors/f/c")) == ["0", "1", "2"]
    assert listed(opened.list_dir("tensors/f/c/0")) == ["0"]
    assert (
        listed(opened.list_dir("tensors/f/c/3"))
        == listed(opened.list_dir("tensors/f/c/0/0"))
        == listed(opened.list_dir("tensors/f/x"))
        == []
    )


def test_a_version_of_65536_weights_opens_at_once_and_lists_a_folder_of_it_in_no_time(repository):
    file = repository.add_bytes("model.bin", bytes(range(256)))
    segment = file.segments[0]
    names = (f"layer.{number}" for number in range(MAX_TENSORS))
    arrays = [store.ArrayEntry(f"tensors/{name}", "float32", (64,), (segment,)) for name in names]
    manifest = store.Manifest(framework="onnx", entry="", info=INFO, arrays=(file, *arrays))

    class Given:
        def manifest(self, _digest):
            return manifest

        def read_array(self, _array, start, stop):
            return bytes(256)[start:stop]

    started = time.perf_counter()
    opened = VersionStore(Given(), "0" * 64)
    group = zarr.open_group(opened, mode="r")
    assert group["tensors/layer.77"][3] == opened.weights["layer.65000"][3]
    assert time.perf_counter() - started < 2  # 0.2 s; what each chunk or folder took would be far more
    assert len(listed(opened.list_dir("tensors"))) == MAX_TENSORS + 1
    started = time.perf_counter()
    for node in (f"tensors/layer.{number}" for number in range(1000)):
        assert listed(opened.list_prefix(f"{node}/")) == [f"{node}/zarr.json", f"{node}/c/0"]
    assert time.perf_counter() - started < 5  # 0.1 s


def test_an_encrypted_version_is_never_read_as_if_it_were_plain(opened):
    class Sealed:
        def manifest(self, _digest):
            return msgspec.structs.replace(opened.manifest, encryption=object())

    with pytest.raises(UnsupportedError, match="encrypted"):
        VersionStore(Sealed(), opened.digest)


def test_versions_of_other_bytes_are_not_equal(repository):
    one, two = (VersionStore(repository, publish(repository, seed).digest) for seed in (1, 2))

    assert one != two
    assert one != "a string"
    assert repr(one).startswith("VersionStore(")
