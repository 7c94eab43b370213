"""The index of safetensors files: what the library reads, and refused by us whatever breaks a rule of the format."""

import hostile_files as hostile
import numpy as np
import pytest
from hypothesis import given, settings
from weight_reading import bounded, mutations, read_tensors

from tether.errors import HostileModelError
from tether.runtimes.weights import read_index
from tether.runtimes.weights.limits import DTYPES as ITEMS
from tether.runtimes.weights.limits import checked
from tether.runtimes.weights.safetensors import index
from tether.runtimes.weights.sinks import Sink
from tether.testing.requirements import needs

CASES = hostile.safetensors_cases()
DTYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16", "float32", "float64",
    "complex64", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A custom model's folder, whose one weight file is named `m.safetensors`."""
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@needs("safetensors")
def test_every_element_type_is_read_as_the_library_reads_it(folder, tmp_path):
    from safetensors import TensorSpec, serialize

    arrays = {name: np.frombuffer(np.random.default_rng(7).bytes(15 * ITEMS[name]), np.uint8) for name in DTYPES}
    made = {name: TensorSpec(dtype=name, shape=[3, 5], data_ptr=array.ctypes.data, data_len=array.nbytes) for name, array in arrays.items()}
    (folder / "m.safetensors").write_bytes(serialize(made, {"format": "pt"}))

    found, data = read_tensors(folder, "custom", tmp_path)

    assert {tensor.name: (tensor.dtype, tensor.shape, data(tensor)) for tensor in found} == {
        name: (name, (3, 5), array.tobytes()) for name, array in arrays.items()
    }


@needs("safetensors")
def test_what_numpy_arrays_become_is_found(folder, tmp_path):
    from safetensors.numpy import save_file

    arrays = {f"layer.{n}.weight": np.random.default_rng(n).random((n, 7), dtype=np.float32) for n in range(20)} | {"scalar": np.array(1.5)}
    save_file(arrays, folder / "m.safetensors")
    found, data = read_tensors(folder, "custom", tmp_path)
    assert {tensor.name: data(tensor) for tensor in found} == {name: array.tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize("label", CASES)
def test_a_hostile_file_is_refused_or_listed_within_bounds(tmp_path, label):
    case = CASES[label]
    path = tmp_path / "m.safetensors"
    path.write_bytes(case.content())
    with bounded(nbytes=400 << 20):
        read = lambda: checked(index(path, path.name, Sink(None, 0)), lambda _: path.stat().st_size)  # noqa: E731
        if isinstance(case.outcome, int):
            assert len(read()) == case.outcome
        else:
            with pytest.raises(case.outcome) as caught:
                read()
            assert "\n" not in str(caught.value)


GOOD = hostile.safetensors_file(
    {"__metadata__": {"format": "pt"}, "a": hostile.entry(0, 24, [2, 3], "F32"), "b": hostile.entry(24, 26, [1], "BF16")}, bytes(26)
)


def test_a_file_cut_anywhere_gives_nothing(folder):
    for nbytes in range(len(GOOD)):
        (folder / "m.safetensors").write_bytes(GOOD[:nbytes])
        assert read_index(folder, "custom") == []


@needs("safetensors")
@settings(max_examples=100, deadline=None)
@given(mutations(GOOD))
def test_what_we_take_of_a_mutation_the_library_takes_alike(tmp_path_factory, data):
    from safetensors import deserialize

    folder = tmp_path_factory.getbasetemp() / "safetensors"
    folder.mkdir(exist_ok=True)
    (folder / "m.safetensors").write_bytes(data)
    try:
        ours = read_index(folder, "custom")
    except HostileModelError:
        return
    if ours:
        theirs = {name: (tuple(entry["shape"]), bytes(entry["data"])) for name, entry in deserialize(data)}
        assert {tensor.name: (tensor.shape, data[tensor.offset : tensor.offset + tensor.nbytes]) for tensor in ours} == theirs
