"""Other libraries open what we publish: zarr's own types, xarray, tensorstore, Dask; and bfloat16 and float8 in all of them."""

import json
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import zarr
from store_models import INFO, LAB
from zarr.codecs import BytesCodec
from zarr.storage import LocalStore

from tether.errors import ChunkAlteredError, NotFoundError, UnsupportedError
from tether.store import DraftStore, Manifest, VersionStore, encode, kvstore, signed_message
from tether.store.format.layout import DTYPES
from tether.store.format.weights import tensor_arrays
from tether.types import StoredTensor

tensorstore = pytest.importorskip("tensorstore")
xarray = pytest.importorskip("xarray")

MACHINE_LEARNING = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def values_of(name):
    """1.5 and its neighbours: none whose bytes read the same in both orders."""
    return (np.arange(24).reshape(6, 4) * 0.25 + 1.5).astype(numpy_dtype(name))


@pytest.fixture
def version(repository):
    """One weight of every element type that a version may hold."""
    arrays = {name: values_of(name) for name in DTYPES}
    offsets = np.cumsum([0, *(array.nbytes for array in arrays.values())])
    file = repository.add_bytes("model.bin", b"".join(array.tobytes() for array in arrays.values()))
    stored = [
        StoredTensor(f"layer/{name}", name, array.shape, "model.bin", int(offset), array.nbytes)
        for (name, array), offset in zip(arrays.items(), offsets[:-1], strict=True)
    ]
    data = encode(Manifest(framework="onnx", entry="model.bin", info=INFO, arrays=(file, *tensor_arrays([file], stored))))
    return VersionStore(repository, repository.publish("m", data, LAB.public, LAB.sign(signed_message(data))).digest)


@pytest.mark.parametrize("name", DTYPES)
def test_zarr_and_tensorstore_read_every_element_type(repository, version, name):
    array = version.weights[f"layer/{name}"]
    assert array.dtype == numpy_dtype(name)
    np.testing.assert_array_equal(array[...], values_of(name))
    spec = {"driver": "zarr3", "kvstore": kvstore(repository, version.digest, array.path)}
    opened = tensorstore.open(spec, open=True, read=True).result()
    assert opened.dtype.name == name
    np.testing.assert_array_equal(opened.read().result(), values_of(name))


def test_xarray_opens_all_weights_as_one_dataset_and_the_version_as_a_tree(version):
    data = xarray.open_zarr(version, group="tensors", consolidated=False, chunks=None)
    assert len(data.data_vars) == len(data.sizes) / 2 == len(DTYPES)
    np.testing.assert_array_equal(data["layer=2Ffloat32"].values, values_of("float32"))
    tree = xarray.open_datatree(version, engine="zarr", consolidated=False)
    assert tree["files/model.bin"].shape == (version.manifest.nbytes,)
    assert tree.attrs["tether"]["entry"] == "model.bin"


def test_dask_computes_on_weights_that_travelled_as_pickles(version):
    import dask.array

    lazy = pickle.loads(pickle.dumps(dask.array.from_zarr(version.weights["layer/float64"])))  # noqa: S301 (our own bytes)
    assert float(lazy.sum().compute(scheduler="threads")) == values_of("float64").sum()


# --- the types


@pytest.mark.parametrize("name", MACHINE_LEARNING)
@pytest.mark.parametrize("endian", ["little", "big"])
def test_the_types_of_machine_learning_round_trip_in_either_byte_order(tmp_path, name, endian):
    several = numpy_dtype(name).itemsize > 1
    array = zarr.create_array(
        LocalStore(tmp_path / "a"),
        shape=(6, 4),
        chunks=(4, 4),
        dtype=numpy_dtype(name),
        serializer=BytesCodec(endian=endian if several else None),
        compressors=None,
        fill_value=1.5,
    )
    array[:] = values_of(name)
    stored = (tmp_path / "a/c/0/0").read_bytes()
    first = np.frombuffer(stored[: numpy_dtype(name).itemsize], numpy_dtype(name).newbyteorder(endian) if several else numpy_dtype(name))

    assert float(first[0]) == 1.5
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a")[:], values_of(name))
    opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}}).result()
    np.testing.assert_array_equal(opened.read().result(), values_of(name))
    assert float(opened.fill_value) == 1.5


@pytest.mark.parametrize("name", MACHINE_LEARNING)
def test_what_tensorstore_writes_in_these_types_zarr_reads(tmp_path, name):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/b/"}}
    written = tensorstore.open(
        spec, create=True, dtype=tensorstore.dtype(name), shape=[6, 4], fill_value=numpy_dtype(name).type(-2)
    ).result()
    written[:4].write(values_of(name)[:4]).result()

    array = zarr.open_array(tmp_path / "b")
    assert array.dtype == numpy_dtype(name)
    assert float(array.fill_value) == -2
    np.testing.assert_array_equal(array[:4], values_of(name)[:4])


@pytest.mark.parametrize("name", MACHINE_LEARNING)
def test_a_fill_value_is_a_number_a_special_one_or_its_bits(tmp_path, name):
    for given, kept in [(float("nan"), "NaN"), ("NaN", "NaN"), (0.5, 0.5), (2, 2.0)]:
        store = LocalStore(tmp_path / str(given))
        zarr.create_array(store, shape=(2,), dtype=name, fill_value=given)
        assert json.loads((tmp_path / str(given) / "zarr.json").read_text())["fill_value"] == kept
        np.testing.assert_array_equal(zarr.open_array(store)[:].astype("f4"), np.float32(given))
    dtype = zarr.open_array(store).metadata.data_type
    bits = np.array(1.5, numpy_dtype(name)).tobytes()[::-1].hex()
    assert float(dtype.from_json_scalar(f"0x{bits}", zarr_format=3)) == 1.5
    for wrong in (f"0x{bits}00", "0xzz", "one", True, None, [1]):
        with pytest.raises(TypeError, match=f"a {name}|bits of"):
            dtype.from_json_scalar(wrong, zarr_format=3)
    with pytest.raises(ValueError, match="zarr_format=3"):
        dtype.to_json(zarr_format=2)


def test_infinity_is_kept_where_the_type_has_it(tmp_path):
    for name in ("bfloat16", "float8_e5m2"):
        zarr.create_array(LocalStore(tmp_path / name), shape=(2,), dtype=name, fill_value=float("-inf"))
        assert json.loads((tmp_path / name / "zarr.json").read_text())["fill_value"] == "-Infinity"
        assert np.isneginf(zarr.open_array(tmp_path / name)[:].astype("f4")).all()


def test_registering_twice_changes_nothing_and_importing_the_store_is_enough():
    code = """
import tether.store.hierarchy.draft, zarr, ml_dtypes, numpy as np
from tether.store.hierarchy import dtypes
before = dict(zarr.core.dtype.data_type_registry.contents)
dtypes.register()
assert zarr.core.dtype.data_type_registry.contents == before
assert zarr.zeros((2,), dtype=ml_dtypes.bfloat16)[:].dtype == np.dtype(ml_dtypes.bfloat16)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- tensorstore without a gateway


def test_a_spec_of_a_group_or_of_all_copies_just_that(repository, version):
    spec = kvstore(repository, version.digest, "tensors/layer=2Fint8")
    copied = repository.root / "cache" / f"{version.digest}.zarr"
    assert sorted(path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()) == [
        "tensors/layer=2Fint8/c/0/0",
        "tensors/layer=2Fint8/zarr.json",
    ]
    assert spec == {"driver": "file", "path": f"{copied}/tensors/layer=2Fint8/"}
    whole = kvstore(repository, version.digest)
    array = tensorstore.open({"driver": "zarr3", "kvstore": whole, "path": "files/model.bin"}).result()
    assert array.read().result().tobytes() == zarr.open_group(version, mode="r")["files/model.bin"][:].tobytes()
    assert zarr.open_group(whole["path"], mode="r").attrs["tether"]["entry"] == "model.bin"
    with pytest.raises(NotFoundError, match="nothing"):
        kvstore(repository, version.digest, "tensors/nothing")


def test_each_spec_mends_the_copy_that_it_names(repository, version):
    path = "tensors/layer=2Fint8"
    copied = repository.root / "cache" / f"{version.digest}.zarr" / path / "c/0/0"
    for damage in (b"", b"?" * 24):
        kvstore(repository, version.digest, path)
        copied.write_bytes(damage)
        kvstore(repository, version.digest, path)
        assert copied.read_bytes() == values_of("int8").tobytes()


def test_no_spec_is_given_of_a_version_that_is_damaged_or_encrypted(repository, version, monkeypatch):
    for pack in (repository.root / "packs").iterdir():
        whole = pack.read_bytes()
        at = whole.index(values_of("float64").tobytes())
        pack.chmod(0o644)
        pack.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    with pytest.raises(ChunkAlteredError):
        kvstore(repository, version.digest, "tensors/layer=2Ffloat64")

    class Sealed:
        encryption = object()

    monkeypatch.setattr(repository, "public_manifest", lambda _digest: Sealed())
    with pytest.raises(UnsupportedError, match="gateway"):
        kvstore(repository, version.digest)


def test_tensorstore_opens_what_was_written_as_a_zarr_store(repository):
    draft = DraftStore(repository.root, "run")
    zarr.create_array(draft, name="half", data=values_of("bfloat16"), chunks=(4, 4), shards=(8, 8))
    digest = draft.publish(repository, "run", LAB).digest
    opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore(repository, digest, "half")}).result()
    np.testing.assert_array_equal(opened.read().result(), values_of("bfloat16"))
