"""The index of ONNX files: every tensor where the onnx package finds it, and nothing that a hostile file could win."""

import os

import hostile_files as hostile
import numpy as np
import pytest
import runtime_models as models
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_reading import bounded, check_ranges, mutations, read_tensors, survives

from tether.errors import BadModelError
from tether.runtimes import protobuf
from tether.runtimes.weights import CONVERTED, boundaries, read_index
from tether.testing.requirements import needs

WHOLE = [
    "FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "BOOL", "FLOAT16", "DOUBLE", "UINT32", "UINT64", "COMPLEX64",
    "COMPLEX128", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ",
]  # fmt: skip
CASES = hostile.onnx_cases()


def save(path, *tensors, nodes=()):
    from onnx import helper

    graph = helper.make_graph(nodes, "g", [], [], tensors)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def sample(element, *, raw):
    """A tensor of (3, 5) small numbers, as onnx makes it."""
    from onnx import TensorProto, helper, numpy_helper

    kind = getattr(TensorProto, element)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    low = 0 if np.dtype(dtype).kind in ("b", "u") else -7
    array = np.random.default_rng(3).integers(low, 2 if element == "BOOL" else 7, (3, 5)).astype(dtype)
    if raw:
        return numpy_helper.from_array(array, element), array
    return helper.make_tensor(element, kind, array.shape, array.reshape(-1)), array


@needs("onnx")
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_every_element_type_is_read_as_onnx_reads_it(tmp_path, raw):
    made = [sample(element, raw=raw) for element in WHOLE]
    found, data = read_tensors(save(tmp_path / "m.onnx", *(each for each, _ in made)), "onnx", tmp_path)
    by_name = {tensor.name: tensor for tensor in found}
    assert set(by_name) == set(WHOLE)
    for tensor, array in made:
        assert data(by_name[tensor.name]) == array.tobytes()
        assert (by_name[tensor.name].shape, by_name[tensor.name].dtype) == (array.shape, str(array.dtype))
    in_place = {tensor.name for tensor in found if tensor.file == "m.onnx"}
    assert in_place == (set(WHOLE) if raw else {"FLOAT", "DOUBLE", "COMPLEX64", "COMPLEX128"})
    assert all(tensor.offset % 64 == 0 for tensor in found if tensor.file == CONVERTED)


@needs("onnx")
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("element", ["INT4", "UINT4", "FLOAT4E2M1"])
def test_elements_of_less_than_a_byte_are_given_as_their_bytes(tmp_path, element, raw):
    tensor, _ = sample(element, raw=raw)
    packed, _ = sample(element, raw=True)
    (found,), data = read_tensors(save(tmp_path / "m.onnx", tensor), "onnx", tmp_path)
    assert (found.dtype, found.shape, data(found)) == ("uint8", (8,), packed.raw_data)


@needs("onnx")
def test_numbers_of_every_size_are_decoded(tmp_path):
    from onnx import TensorProto, helper

    edges = [0, 1, -1, 127, 128, -128, (1 << 31) - 1, -(1 << 31), (1 << 63) - 1, -(1 << 63)] * 20_000
    tensor = helper.make_tensor("n", TensorProto.INT64, [len(edges)], edges)
    (found,), data = read_tensors(save(tmp_path / "m.onnx", tensor), "onnx", tmp_path)
    assert np.array_equal(np.frombuffer(data(found), "<i8"), np.array(edges))


def test_typed_data_in_several_parts_is_put_together(tmp_path):
    floats = np.arange(6, dtype="<f4")
    packed = hostile.field(4, floats[:3].tobytes()) + hostile.field(4, floats[3:5].tobytes())
    single = hostile.varint(4 << 3 | 5) + floats[5:].tobytes()
    ints = hostile.field(7, b"".join(map(hostile.varint, [1, 300]))) + hostile.field(7, -2)
    path = tmp_path / "m.onnx"
    path.write_bytes(hostile.model(hostile.tensor("f", [6], more=packed + single), hostile.tensor("i", [3], hostile.INT64, more=ints)))
    found, data = read_tensors(path, "onnx", tmp_path)
    assert [data(tensor) for tensor in found] == [floats.tobytes(), np.array([1, 300, -2], "<i8").tobytes()]
    assert read_index(path, "onnx") == []


@needs("onnx")
def test_external_data_lies_in_its_file(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = models.onnx_rows(folder, 1 << 14, external=True)
    found, data = read_tensors(folder, "onnx", tmp_path)
    width = found[0].shape[1]
    assert {tensor.file for tensor in found} == {"weights.bin"}
    assert b"".join(map(data, found)) == b"".join(np.linspace(-1, 1, n * width, dtype="<f4").tobytes() for n in (4, 2))
    with pytest.raises(BadModelError, match="publish the folder"):
        read_index(path, "onnx")
    assert list(boundaries(folder, "onnx")) == ["weights.bin"]
    assert boundaries(path, "onnx") == {}


def test_large_constants_are_weights_and_small_ones_are_not(tmp_path):
    values = np.arange(256, dtype="<f4").tobytes()
    nodes = [
        hostile.constant(b"large", hostile.tensor("", [256], raw=values)),
        hostile.constant(b"small", hostile.tensor("", [4], raw=bytes(16), more=hostile.field(12, bytes(2000)))),
        hostile.constant(b"other", hostile.tensor("", [256], raw=values), operator=b"Identity"),
    ]
    path = tmp_path / "m.onnx"
    path.write_bytes(hostile.model(nodes=nodes))
    (found,), data = read_tensors(path, "onnx", tmp_path)
    assert (found.name, data(found)) == ("large", values)


@pytest.mark.parametrize("label", CASES)
def test_a_hostile_file_is_refused_or_listed_within_bounds(tmp_path, label):
    case = CASES[label]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "m.onnx").write_bytes(case.content())
    if case.around:
        case.around(folder)
    with bounded():
        if isinstance(case.outcome, int):
            assert len(read_index(folder, "onnx")) == case.outcome
        else:
            with pytest.raises(case.outcome) as caught:
                read_index(folder, "onnx")
            assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused_or_listed_cleanly(tmp_path):
    good = hostile.model(*(hostile.tensor(f"w{n}", [4, 4], raw=bytes(64)) for n in range(20)))
    for percent in range(100):
        data = good[: len(good) * percent // 100]
        (tmp_path / "m.onnx").write_bytes(data)
        assert survives(tmp_path / "m.onnx", "onnx", tmp_path) is None


GOOD = hostile.model(
    hostile.tensor("raw", [2, 3], raw=bytes(24)),
    hostile.tensor("typed", [3], hostile.INT64, more=hostile.field(7, b"\x01\x80\x01\x02")),
    hostile.tensor("floats", [2], more=hostile.field(4, bytes(8))),
    nodes=[hostile.constant(b"c", hostile.tensor("", [256], raw=bytes(1024)))],
)


@settings(max_examples=100, deadline=None)
@given(mutations(GOOD))
def test_no_mutation_leads_out_of_the_file(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / "mutated.onnx").write_bytes(data)
    survives(folder / "mutated.onnx", "onnx", folder)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_lead_out_of_the_file(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.onnx").write_bytes(hostile.field(7, data))
    survives(folder / "any.onnx", "onnx", folder)


def test_weights_are_jumped_over_not_read(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    each = 4 << 20
    tensors = [hostile.tensor(f"w{n}", [each // 4]) + b"\x4a" + hostile.varint(each) for n in range(256)]
    heads = [b"\x2a" + hostile.varint(len(tensor) + each) + tensor for tensor in tensors]
    with path.open("wb") as file:
        file.write(b"\x3a" + hostile.varint(sum(map(len, heads)) + 256 * each))
        for head in heads:
            file.write(head)
            file.seek(each, os.SEEK_CUR)
        file.truncate(file.tell())
    read = []

    monkeypatch.setattr(protobuf, "os", _Counting(read))

    found = read_index(path, "onnx")

    assert len(found) == 256
    check_ranges(found, path.stat().st_size)
    assert sum(read) < 2 << 20


class _Counting:
    """`os`, with what is read counted."""

    fstat = staticmethod(os.fstat)

    def __init__(self, read):
        self._read = read

    def pread(self, descriptor, nbytes, at):
        data = os.pread(descriptor, nbytes, at)
        self._read.append(len(data))
        return data
