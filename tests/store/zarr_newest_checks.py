"""What only zarr ≥ 3.3 has; `test_zarr_newest.py` runs this in an environment that has it."""

import importlib.metadata
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from store_models import INFO, LAB

from tether.errors import ChunkAlteredError
from tether.store import DraftStore, Manifest, VersionStore, encode, signed_message
from tether.store.format.weights import tensor_arrays
from tether.types import StoredTensor

FUSED = {"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}
STRICT = {"array.read_missing_chunks": False}
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
KERNEL = np.random.default_rng(1).random((3000, 1000), dtype="f4")


@pytest.fixture
def version(repository):
    file = repository.add_bytes("model.bin", b"header" + KERNEL.tobytes())
    tensors = tensor_arrays([file], [StoredTensor("kernel", "float32", KERNEL.shape, "model.bin", 6, KERNEL.nbytes)])
    data = encode(Manifest(framework="onnx", entry="model.bin", info=INFO, arrays=(file, *tensors)))
    return VersionStore(repository, repository.publish("m", data, LAB.public, LAB.sign(signed_message(data))).digest)


def test_this_is_the_newest_zarr_and_it_finds_our_types_by_their_entry_points():
    assert tuple(map(int, zarr.__version__.split(".")[:2])) >= (3, 4)
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"].get("zarr.data_type", {})
    found = importlib.metadata.entry_points(group="zarr.data_type")
    assert {entry.name for entry in found} == set(declared)
    for entry in found:
        assert entry.load()._zarr_v3_name == entry.name
        assert zarr.zeros((2,), dtype=entry.name).dtype == np.dtype(getattr(ml_dtypes, entry.name))


@pytest.mark.parametrize("pipeline", [{}, FUSED], ids=["batched", "fused"])
def test_either_pipeline_reads_a_version_whole_and_in_parts(version, pipeline):
    with zarr.config.set(pipeline | STRICT):
        array = version.weights["kernel"]
        np.testing.assert_array_equal(array[:], KERNEL)
        np.testing.assert_array_equal(array[1040:1060, 3:5], KERNEL[1040:1060, 3:5])
        np.testing.assert_array_equal(array.oindex[[5, 2900], :7], KERNEL[[5, 2900], :7])


@pytest.mark.parametrize("pipeline", [{}, FUSED], ids=["batched", "fused"])
def test_either_pipeline_raises_for_damage(repository, version, pipeline):
    (pack,) = (repository.root / "packs").iterdir()
    whole = pack.read_bytes()
    at = whole.index(KERNEL[2000:2001].tobytes())
    pack.chmod(0o644)
    pack.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with zarr.config.set(pipeline), pytest.raises(ChunkAlteredError, match="tensors/kernel"):
        version.weights["kernel"][:]


@pytest.mark.parametrize("pipeline", [{}, FUSED], ids=["batched", "fused"])
def test_a_chunk_that_was_never_written_is_an_error_where_zarr_is_asked_for_one(repository, pipeline):
    draft = DraftStore(repository.root, "run")
    with zarr.config.set(pipeline):
        array = zarr.create_array(draft, name="a", shape=(4,), chunks=(2,), dtype="f4", fill_value=7)
        array[:2] = 1
        digest = draft.publish(repository, "run", LAB).digest
        opened = zarr.open_array(VersionStore(repository, digest), path="a", mode="r")
        assert opened[:].tolist() == [1, 1, 7, 7]
        with zarr.config.set(STRICT):
            strict = zarr.open_array(VersionStore(repository, digest), path="a", mode="r")
            assert strict[:2].tolist() == [1, 1]
            with pytest.raises(zarr.errors.ChunkNotFoundError):
                strict[:]


@pytest.mark.parametrize("pipeline", [{}, FUSED], ids=["batched", "fused"])
def test_parts_of_shards_come_through_get_ranges(repository, pipeline):
    draft = DraftStore(repository.root, "run")
    with zarr.config.set(pipeline):
        zarr.create_array(draft, name="s", data=KERNEL, chunks=(100, 1000), shards=(3000, 1000), compressors=None)
        version = VersionStore(repository, draft.publish(repository, "run", LAB).digest)
        array = zarr.open_array(version, path="s", mode="r")
        before = version.nbytes_read
        np.testing.assert_array_equal(array[2950:2960], KERNEL[2950:2960])
        assert version.nbytes_read - before < 1_000_000  # one inner chunk and the shard's index, of 12 MB
        np.testing.assert_array_equal(array[::500], KERNEL[::500])
