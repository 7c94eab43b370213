"""ONNX files from anyone: damaged, hostile or unsuitable ones are errors of Tether's, within the sandbox's limits."""

import os
import random

import hostile_graphs as graphs
import numpy as np
import pytest
import runtime_models as models
from hostile_files import field
from weight_reading import bounded

from tether.errors import BadInputError, BadModelError, HostileModelError, ModelFailedError
from tether.runtimes import inspect, load
from tether.runtimes.inspecting import inspect_in_sandbox
from tether.runtimes.onnx_files import external_files
from tether.sandbox import Limits
from tether.testing.requirements import needs

pytestmark = [needs("onnx"), needs("onnxruntime")]
LIMITS = Limits(seconds=20, memory_nbytes=1 << 30)
ONES = {"x": np.ones((1, 4), np.float32)}


def one_node(operator, inputs=(), outputs=("y",), *, more=(), **attributes):
    """A serialized model of one node."""
    from onnx import TensorProto, helper

    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in names] for names in (inputs, outputs)]
    graph = helper.make_graph([helper.make_node(operator, inputs, outputs, **attributes)], "g", *ports, *more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("kind", ["random", "half", "all but one byte", "text", "huge length", "bomb", "overflowing shape"])
async def test_a_file_that_is_none_is_an_error_within_the_limits(tmp_path, kind):
    good = models.onnx_rows(tmp_path).read_bytes()
    data = {
        "random": random.Random(7).randbytes(4096),
        "half": good[: len(good) // 2],
        "all but one byte": good[:-1],
        "text": b"<!DOCTYPE html><title>404</title>",
        "huge length": b"\x08\x09\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        "bomb": graphs.sparse_bomb(),
        "overflowing shape": good.replace(b"\x08\x04\x08\x01", b"\x08\xff\xff\xff\xff\xff\xff\xff\x3f\x08\x08", 1),
    }[kind]
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    with pytest.raises(BadModelError) as caught:
        await inspect_in_sandbox(path, limits=LIMITS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inside", [False, True], ids=["initializer", "constant"])
def test_a_sparse_tensor_of_gigabytes_is_refused_before_it_is_unpacked(tmp_path, inside):
    (tmp_path / "m.onnx").write_bytes(graphs.sparse_bomb(inside=inside))
    with bounded(), pytest.raises(HostileModelError, match="sparse"):
        inspect(tmp_path / "m.onnx")


@pytest.mark.parametrize(("dims", "error"), [([1] * 1000, "axes"), (b"\x01" * 1000, "axes"), (b"\x80", "cut off"), ([-1, -1], "unpacks")])
def test_sparse_shapes_that_are_none_are_refused(tmp_path, dims, error):
    shape = field(3, dims) if isinstance(dims, bytes) else b"".join(field(3, each) for each in dims)
    (tmp_path / "m.onnx").write_bytes(field(7, field(15, shape)))
    with pytest.raises(BadModelError, match=error):
        external_files(tmp_path / "m.onnx")


def test_a_sparse_tensor_of_a_sensible_size_is_fine(tmp_path):
    (tmp_path / "m.onnx").write_bytes(field(7, field(15, field(3, 1000) + field(3, b"\xe8\x07"))))
    assert external_files(tmp_path / "m.onnx") == set()


@pytest.mark.parametrize("cut", range(5, 100, 10))
def test_a_file_cut_anywhere_is_an_error(tmp_path, cut):
    good = models.onnx_rows(tmp_path, 1 << 10).read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(good[: len(good) * cut // 100])
    with pytest.raises(BadModelError):
        inspect(path)


async def test_a_model_that_never_ends_on_its_example_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(graphs.endless_loop())
    np.savez(tmp_path / "example.npz", x=np.ones(1, np.float32))
    with pytest.raises(BadModelError, match="took longer than 2 s"):
        await inspect_in_sandbox(tmp_path / "m.onnx", example=tmp_path / "example.npz", limits=Limits(2, 1 << 30))


def test_a_run_that_never_ends_can_be_interrupted(tmp_path):
    import threading

    (tmp_path / "m.onnx").write_bytes(graphs.endless_loop())
    model = load(tmp_path / "m.onnx", inspect(tmp_path / "m.onnx"))
    stop = threading.Event()

    def interrupt():
        while not stop.wait(0.05):
            model.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(ModelFailedError, match="terminate"):
            model.run({"x": np.ones(1, np.float32)})
    finally:
        stop.set()
        thread.join()
        model.close()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "..\\secret", "", "nul\0"])
def test_weights_outside_the_folder_are_refused_by_their_name(tmp_path, name):
    path = external(tmp_path, name)
    (tmp_path / "secret").write_bytes(b"\0" * 64)
    with pytest.raises(BadModelError, match="outside its folder"):
        inspect(path)


@pytest.mark.parametrize("kind", ["symlink", "symlinked folder", "hardlink", "absent"])
def test_weights_that_lie_elsewhere_under_a_good_name_are_refused(tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 64)
    path = external(tmp_path, "sub/w.bin" if kind == "symlinked folder" else "w.bin")
    match kind:
        case "symlink":
            (path / "w.bin").symlink_to(secret)
        case "symlinked folder":
            (tmp_path / "elsewhere").mkdir()
            (tmp_path / "elsewhere" / "w.bin").write_bytes(b"\0" * 64)
            (path / "sub").symlink_to(tmp_path / "elsewhere")
        case "hardlink":
            os.link(secret, path / "w.bin")
    with pytest.raises(BadModelError, match=r"link|not there"):
        inspect(path)


def external(tmp_path, location):
    """A folder whose model keeps a weight at `location`."""
    from onnx import TensorProto

    model = one_node("Identity", (), ("z",))
    model.graph.node[0].input.append("w")
    weight = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder


def test_a_single_file_with_weights_beside_it_says_to_publish_the_folder(tmp_path):
    path = models.onnx_rows(tmp_path, external=True)
    assert external_files(path) == {"weights.bin"}
    with pytest.raises(BadModelError, match="publish the folder"):
        inspect(path)


def test_graphs_nested_beyond_reason_are_refused(tmp_path):
    def message(number, body):
        size, length = len(body), b""
        while size > 0x7F:
            length += bytes([size & 0x7F | 0x80])
            size >>= 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + body

    graph = b""
    for _ in range(60):  # node → attribute → graph: three levels each
        graph = message(1, message(5, message(6, graph)))
    path = tmp_path / "deep.onnx"
    path.write_bytes(message(7, graph))
    with pytest.raises(BadModelError, match="nested deeper"):
        inspect(path)


@needs("skl2onnx")
def test_outputs_that_are_maps_say_how_to_convert_without_them(tmp_path):
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    x = np.random.default_rng(0).standard_normal((20, 4), dtype=np.float32)
    classifier = LogisticRegression().fit(x, x[:, 0] > 0)
    for zipmap in (True, False):
        (tmp_path / "m.onnx").write_bytes(to_onnx(classifier, x[:1], options={"zipmap": zipmap}).SerializeToString())
        if zipmap:
            with pytest.raises(BadModelError, match="zipmap"):
                inspect(tmp_path / "m.onnx")
    assert len(inspect(tmp_path / "m.onnx").outputs) == 2


def test_text_that_is_not_utf_8_is_the_callers_to_mend(tmp_path):
    path = models.onnx_echo(tmp_path, ["BYTES"])
    model = load(path, inspect(path))
    words = np.empty((1, 3), object)
    words[:] = b"\xff"
    with pytest.raises(BadInputError, match="not UTF-8"):
        model.run({"x_bytes": words})
    model.close()


def test_nothing_is_printed_to_the_terminal(tmp_path, capfd):
    path = models.onnx_rows(tmp_path)
    model = load(path, inspect(path))
    with pytest.raises(BadInputError):
        model.run({"x": np.ones((1, 5), np.float32)})
    model.close()
    assert capfd.readouterr() == ("", "")
