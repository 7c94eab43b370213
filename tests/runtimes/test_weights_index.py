"""The tensor index of a model: one call for every format, one set of rules, names that do not collide in folders of many files."""

import io
import os
import sys

import hostile_files as hostile
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weight_reading import read_tensors

from tether.errors import BadModelError, HostileModelError, NoModelFileError, NoSpaceError, StoreError
from tether.runtimes.weights import CONVERTED, boundaries, limits, read_index
from tether.runtimes.weights.sinks import Sink
from tether.store.format import layout, weights
from tether.types import StoredTensor

FLOATS = np.arange(4, dtype="<f4")
ONNX = hostile.model(hostile.tensor("w", [4], raw=FLOATS.tobytes()))
SAFETENSORS = hostile.safetensors_file({"w": hostile.entry(0, 16, [4], "F32")}, FLOATS.tobytes())


def test_the_store_and_the_readers_agree_on_names_and_limits():
    assert layout.CONVERTED == CONVERTED
    assert layout.DTYPES == limits.DTYPES
    assert weights.MAX_TENSORS == limits.MAX_TENSORS


def test_a_folder_of_one_file_has_its_names_as_they_are(tmp_path):
    (tmp_path / "model.py").write_bytes(b"")
    (tmp_path / "m.safetensors").write_bytes(SAFETENSORS)
    assert [(tensor.name, tensor.file) for tensor in read_index(tmp_path, "custom")] == [("w", "m.safetensors")]


def test_many_files_have_their_paths_before_the_names(tmp_path):
    for name in ("a.safetensors", "a.onnx", "b.onnx", "sub/c.safetensors", "b/d.SAFETENSORS"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(ONNX if path.suffix == ".onnx" else SAFETENSORS)
    assert {tensor.file: tensor.name for tensor in read_index(tmp_path, "custom")} == {
        "a.safetensors": "a.safetensors/w",
        "a.onnx": "a.onnx/w",
        "b.onnx": "b.onnx/w",  # `b/w` might be in the folder b
        "b/d.SAFETENSORS": "b/d/w",
        "sub/c.safetensors": "sub/c/w",
    }


def test_a_custom_model_may_hold_files_that_only_look_like_weights(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not at all")
    (tmp_path / "b.onnx").write_bytes(ONNX)
    (tmp_path / "c.npy").write_bytes(b"")
    (tmp_path / "d.npz").write_bytes(hostile.npz([("x.npy", hostile.npy(hostile.npy_header("'>f4'"), bytes(16))), ("y.npy", b"no")]))
    (tmp_path / "e.npy").write_bytes(hostile.npy(hostile.npy_header("'>f4'"), FLOATS.astype(">f4").tobytes()))
    (tmp_path / "model.py").symlink_to(tmp_path / "b.onnx")
    found, data = read_tensors(tmp_path, "custom", tmp_path)
    assert [(tensor.name, tensor.offset, data(tensor)) for tensor in found] == [
        ("b/w", found[0].offset, FLOATS.tobytes()),
        ("e", 0, FLOATS.tobytes()),  # what d.npz had written before it turned out to be none is gone
    ]


def test_what_only_an_attack_writes_is_refused_in_a_custom_model_too(tmp_path):
    (tmp_path / "a.onnx").write_bytes(ONNX)
    (tmp_path / "z.safetensors").write_bytes(hostile.safetensors_cases()["overlap"].content())
    for read in (read_index, boundaries):
        with pytest.raises(HostileModelError, match="overlap"):
            read(tmp_path, "custom")


def test_weights_behind_links_are_not_looked_at(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.onnx").write_bytes(ONNX)
    (folder / "m.onnx").symlink_to(tmp_path / "secret.onnx")
    assert read_index(folder, "custom") == []


def test_one_source_file_has_no_weights(tmp_path):
    (tmp_path / "model.py").write_bytes(b"")
    assert read_index(tmp_path / "model.py", "custom") == []
    assert boundaries(tmp_path / "model.py", "custom") == {}


def test_boundaries_are_the_ranges_of_each_file_once(tmp_path):
    tied = hostile.external("a", [4], location="w.bin"), hostile.external("b", [2, 2], location="w.bin")
    (tmp_path / "m.onnx").write_bytes(hostile.model(hostile.tensor("w", [4], raw=FLOATS.tobytes()), *tied))
    (tmp_path / "w.bin").write_bytes(bytes(64))
    offset = (tmp_path / "m.onnx").read_bytes().index(FLOATS.tobytes())
    assert boundaries(tmp_path, "onnx") == {"m.onnx": [(offset, 16)], "w.bin": [(0, 16)]}


@pytest.mark.parametrize("model_format", ["onnx", "pt2", "torchscript", "savedmodel", "keras", "custom"])
def test_boundaries_of_what_is_no_model_are_none(tmp_path, model_format):
    for path in (tmp_path / "absent", tmp_path):
        assert boundaries(path, model_format) == {}
    (tmp_path / "empty").touch()
    assert boundaries(tmp_path / "empty", model_format) == {}


def test_a_file_that_is_gone_says_so(tmp_path):
    with pytest.raises(NoModelFileError, match="can't be read"):
        read_index(tmp_path / "m.onnx", "onnx")


def test_no_framework_is_imported(tmp_path):
    import subprocess

    (tmp_path / "m.onnx").write_bytes(ONNX)
    code = (
        "import sys; from pathlib import Path; from tether.runtimes.weights import read_index;"
        f"assert read_index(Path({str(tmp_path / 'm.onnx')!r}), 'onnx');"
        "assert not {'onnx', 'onnxruntime', 'torch', 'tensorflow', 'zarr', 'h5py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def stored(name="w", dtype="uint8", shape=(4,), offset=0, nbytes=4, file="f"):
    return StoredTensor(name, dtype, shape, file, offset, nbytes)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([stored(), stored()], "two tensors of the name"),
        ([stored("n" * 5000)], "5000 characters"),
        ([stored("\ud800")], "not valid Unicode"),
        ([stored(nbytes=5)], "5 bytes are not uint8"),
        ([stored(dtype="object")], "there is no object"),
        ([stored(shape=(-4,))], "there is no uint8"),
        ([stored(shape=(1,) * 33, nbytes=1)], "33 axes"),
        ([stored(offset=97)], "does not have"),
        ([stored(offset=-1)], "does not have"),
        ([stored("a"), stored("b", offset=2)], "overlap"),
        ([stored("a", shape=(8,), nbytes=8), stored("b", offset=2)], "overlap"),
        ([stored(str(n)) for n in range(11)], "more than"),
    ],
)
def test_each_rule_is_checked(tensors, message):
    with pytest.raises(BadModelError, match=message):
        limits.checked(tensors, lambda _: 100, room=10)


def test_tied_weights_and_views_of_a_storage_are_fine():
    tied = [stored("a"), stored("b"), stored("c", offset=4), stored("empty", shape=(0,), nbytes=0, offset=2)]
    views = [stored("a"), stored("b", offset=2)]
    assert limits.checked(tied, lambda _: 100) == tied
    assert limits.checked(views, lambda _: 100, views=True) == views


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.binary(max_size=9), max_size=4)), max_size=9))
def test_converted_tensors_lie_aligned_one_after_the_other(tensors):
    file = io.BytesIO()
    sink = Sink(file, 10_000)
    for number, (_, chunks) in enumerate(tensors):
        data = b"".join(chunks)
        placed = sink.put(str(number), "uint8", (len(data),), chunks)
        assert placed.offset % 64 == 0
        assert file.getvalue()[placed.offset :] == data
        assert (placed.file, placed.nbytes, sink.nbytes) == (CONVERTED, len(data), file.tell())


@pytest.mark.parametrize(("chunks", "message"), [([b"123"], "less data"), ([b"123", b"45"], "more data"), ([], "less data")])
def test_converted_data_has_to_be_what_the_shape_says(chunks, message):
    with pytest.raises(BadModelError, match=message):
        Sink(io.BytesIO(), 100).put("w", "uint8", (4,), chunks)


def test_nothing_is_unpacked_beyond_the_limit_or_without_a_file():
    def never():
        raise AssertionError
        yield b""

    with pytest.raises(HostileModelError, match="over 100 bytes"):
        Sink(io.BytesIO(), 100).put("w", "uint8", (101,), never())
    assert Sink(None, 0).put("w", "uint8", (1 << 60,), never()) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_is_an_error_of_the_disk():
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(NoSpaceError, match="disk is full"):  # noqa: PTH123
        Sink(full, 100).put("w", "uint8", (4,), [b"1234"])


def test_a_disk_that_fails_is_an_error_of_the_store(tmp_path):
    (tmp_path / "f").touch()
    with (tmp_path / "f").open("rb", buffering=0) as unwritable, pytest.raises(StoreError, match="can't be unpacked"):
        Sink(unwritable, 100).put("w", "uint8", (4,), [b"1234"])
