import asyncio
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import zarr
from store_models import INFO, LAB, files_of, publish
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from tether import store
from tether.errors import ChunkAlteredError, ChunkMissingError
from tether.store import BLOB_NBYTES, Repository, VersionStore
from tether.store.layout import node_name

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
        array = group[node_name(f"files/{name}")]
        assert (array.dtype, array.shape, array.ndim) == (np.uint8, (len(data),), 1)
        assert array[:].tobytes() == data
    assert group["files/big.bin"].chunks == (BLOB_NBYTES,)
    assert group["files/big.bin"][BLOB_NBYTES - 5 : BLOB_NBYTES + 5].tobytes() == BIG[BLOB_NBYTES - 5 : BLOB_NBYTES + 5]
    assert {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)} == {
        node_name(f"files/{name}") for name in FILES
    }


def test_the_group_says_what_the_version_is(opened):
    attributes = store.open_group(opened._repository, opened._digest).attrs.asdict()

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
    copy._repository.close()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_sum, array).result(60) == sum(BIG)


def test_versions_of_other_bytes_are_not_equal(repository):
    one, two = (VersionStore(repository, publish(repository, seed).digest) for seed in (1, 2))

    assert one != two
    assert one != "a string"
    assert repr(one).startswith("VersionStore(")
