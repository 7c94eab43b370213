"""The index of .npy and .npz files: every array as numpy loads it, nothing unpickled, nothing unpacked beyond bounds."""

import io

import hostile_files as hostile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_reading import bounded, mutations, read_tensors

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.weights import CONVERTED, boundaries, read_index
from tether.runtimes.weights.limits import checked
from tether.runtimes.weights.numpy_files import index
from tether.runtimes.weights.sinks import Sink

NPY, NPZ = hostile.npy_cases(), hostile.npz_cases()
RANDOM = np.random.default_rng(5)
ARRAYS = {
    "plain": RANDOM.random((3, 4), dtype=np.float32),
    "fortran": np.asfortranarray(RANDOM.random((30, 40, 10))),
    "fortran vector": np.asfortranarray(RANDOM.random((1, 40, 1))),
    "big-endian": RANDOM.random((5, 3)).astype(">f8"),
    "both": np.asfortranarray(RANDOM.random((7, 3)).astype(">f4")),
    "large": np.asfortranarray(RANDOM.random((3, 2, 700_000), dtype=np.float32)),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 3)),
    "flags": RANDOM.random((2, 3)) > 0.5,
    "complex": RANDOM.random(5) + 1j,
    "bytes": np.arange(9, dtype=np.int8),
}
LEFT_OUT = {"text": np.array(["a", "bc"]), "record": np.zeros(3, [("a", "f4"), ("b", "i4")]), "time": np.zeros(2, "M8[s]")}


def little(array):
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_an_archive_gives_every_array_as_numpy_loads_it(folder, tmp_path, save):
    save(folder / "a.npz", **ARRAYS, **LEFT_OUT)
    found, data = read_tensors(folder, "custom", tmp_path)
    assert {tensor.name: (tensor.dtype, tensor.shape, data(tensor)) for tensor in found} == {
        name: (little(array).dtype.name, array.shape, little(array).tobytes()) for name, array in ARRAYS.items()
    }
    moved = {tensor.name for tensor in found if tensor.file == CONVERTED}
    assert moved == ({"fortran", "big-endian", "both", "large"} if save is np.savez else set(ARRAYS))
    assert {tensor.name for tensor in read_index(folder, "custom")} == set(ARRAYS) - moved


def test_single_arrays_are_named_as_their_files(folder, tmp_path):
    (folder / "deep").mkdir()
    for name, array in (ARRAYS | LEFT_OUT).items():
        np.save(folder / "deep" / f"{name}.npy", array)
    found, data = read_tensors(folder, "custom", tmp_path)
    assert {tensor.name: data(tensor) for tensor in found} == {f"deep/{name}": little(array).tobytes() for name, array in ARRAYS.items()}


def test_what_deflates_to_far_more_than_the_model_has_is_refused(folder, tmp_path):
    np.savez_compressed(folder / "a.npz", zeros=np.zeros(20_000_000))
    with pytest.raises(HostileModelError):
        boundaries(folder, "custom")
    with bounded(), pytest.raises(HostileModelError):
        read_tensors(folder, "custom", tmp_path)


def read(path, data, folder):
    path.write_bytes(data)
    with (folder / "converted.bin").open("w+b") as converted:
        sink = Sink(converted, 1 << 26)
        return checked(index(path, path.name, sink), lambda name: sink.nbytes if name == CONVERTED else len(data))


@pytest.mark.parametrize("label", [*(f"npy: {label}" for label in NPY), *(f"npz: {label}" for label in NPZ)])
def test_a_hostile_file_is_refused_or_listed_within_bounds(tmp_path, label):
    kind, _, label = label.partition(": ")
    case = {"npy": NPY, "npz": NPZ}[kind][label]
    with bounded():
        if isinstance(case.outcome, int):
            assert len(read(tmp_path / f"m.{kind}", case.content(), tmp_path)) == case.outcome
        else:
            with pytest.raises(case.outcome) as caught:
                read(tmp_path / f"m.{kind}", case.content(), tmp_path)
            assert "\n" not in str(caught.value)


def saved(save, *arrays):
    buffer = io.BytesIO()
    save(buffer, *arrays)
    return buffer.getvalue()


GOOD = [
    saved(np.save, ARRAYS["plain"]),
    saved(np.save, ARRAYS["both"]),
    saved(np.savez, ARRAYS["plain"], ARRAYS["both"]),
    saved(np.savez_compressed, ARRAYS["plain"], ARRAYS["both"]),
]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(GOOD).flatmap(mutations))
def test_what_we_take_of_a_mutation_numpy_takes_alike(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "mutated.npz"
    try:
        found = read(path, data, folder)
    except BadModelError:
        return
    loaded = np.load(io.BytesIO(data))
    for tensor in found:
        file = folder / "converted.bin" if tensor.file == CONVERTED else path
        ours = file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert len(ours) == tensor.nbytes
        if not isinstance(loaded, np.ndarray) and tensor.file == CONVERTED:  # a stored member's checksum is for numpy to refuse
            assert ours == little(loaded[tensor.name]).tobytes()
