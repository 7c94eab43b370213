"""Inside a published model: its weights as zarr arrays, what versions share, what changed between them."""

import json
import pickle
import urllib.request

import numpy as np
import onnx
import pytest
import tensorstore
from conftest import WEIGHTS, write_model
from onnx import TensorProto, helper, numpy_helper

from tether import errors
from tether.client.publishing import Source, cut_file, draft
from tether.lab import loop


def write_deep(path, layers, note="n"):
    """`layers`: weights `(256, 256)` of consecutive products. `note` changes the header's length only."""
    names = [f"layer{number}.weight" for number in range(len(layers))]
    nodes = [helper.make_node("MatMul", [f"h{number}", name], [f"h{number + 1}"]) for number, name in enumerate(names)]
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["batch", 256])],
        [helper.make_tensor_value_info(f"h{len(layers)}", TensorProto.FLOAT, ["batch", 256])],
        [numpy_helper.from_array(layer, name) for layer, name in zip(layers, names, strict=True)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name=note)
    onnx.save(made, path)
    return path


@pytest.fixture
def layers():
    return list(np.random.default_rng(8).standard_normal((6, 256, 256), np.float32))


def test_weights_are_zarr_arrays_and_reading_one_reads_no_other(lab, layers, tmp_path):
    version = lab.publish("inside", write_deep(tmp_path / "m.onnx", layers))

    weights = lab.models["inside"].weights
    layer = weights["layer3.weight"]

    assert list(weights) == [f"layer{number}.weight" for number in range(6)]
    assert weights.nbytes_read == 0
    np.testing.assert_array_equal(layer[:], layers[3])
    assert weights.nbytes_read == layers[3].nbytes < version.nbytes / 5
    np.testing.assert_array_equal(version.weights["layer0.weight"][10:12, :5], layers[0][10:12, :5])
    with pytest.raises(KeyError):
        weights["layer9.weight"]


def test_tensorstore_reads_a_weight_through_the_gateway(lab, layers, tmp_path):
    version = lab.publish("elsewhere", write_deep(tmp_path / "m.onnx", layers))

    opened = tensorstore.open({"driver": "zarr3", "kvstore": version.kvstore("tensors/layer2.weight")}, read=True).result()

    np.testing.assert_array_equal(opened[:3].read().result(), layers[2][:3])


def test_a_description_that_left_its_lab_says_so(lab, tmp_path):
    version = pickle.loads(pickle.dumps(lab.publish("travels", write_model(tmp_path / "m.onnx"))))  # noqa: S301 (our own)

    with pytest.raises(errors.UnsupportedError, match=r"lab\.models\['travels'\]"):
        _ = version.weights


def test_a_fine_tune_sends_what_changed_and_the_diff_names_it(lab, layers, tmp_path):
    first = lab.publish("tuned", write_deep(tmp_path / "a.onnx", layers))
    layers[5] = layers[5] * np.float32(1.5)
    second = lab.publish("tuned", write_deep(tmp_path / "b.onnx", layers, note="a longer name of the program that wrote it"))

    found = lab.diff("tuned", first.version, second.version)

    (change,) = found.tensors
    assert (change.name, change.kind, found.unchanged) == ("layer5.weight", "changed", 5)
    assert change.relative == pytest.approx(0.5, rel=1e-5)
    assert found.new_nbytes < 1.1 * layers[5].nbytes
    assert "layer5.weight" in found._repr_html_()
    assert lab.diff("tuned", "latest", 1).tensors[0].relative == pytest.approx(1 / 3, rel=1e-5)


def test_the_same_file_is_the_same_version_however_a_client_cut_it(lab, layers, tmp_path):
    path = write_deep(tmp_path / "m.onnx", layers)
    ours = lab.publish("cut", path)
    crude = cut_file(Source("m.onnx", path))

    async def publish():
        client = lab.operations.client
        for blob in crude.blobs:
            await client.put_blob(blob.digest, blob.read())
        return await client.publish("cut", draft([crude], "m.onnx", framework=None, aliases=[], tags={}))

    answer = loop.run(publish())

    assert len(crude.blobs) == 1
    assert (answer["version"], answer["digest"], answer["created"]) == (ours.version, ours.digest, False)


def test_a_draft_can_not_bring_files_that_are_tethers_own(lab):
    crude = cut_file(Source(".tether/tensors.bin", b"mine"))

    with pytest.raises(errors.MalformedRequestError, match=r"tensors\.bin"):
        loop.run(lab.operations.client.publish("own", draft([crude], "", framework=None, aliases=[], tags={})))


def test_a_deleted_version_is_gone_and_its_number_stays_taken(lab, tmp_path):
    lab.publish("gone", write_model(tmp_path / "a.onnx"))
    lab.publish("gone", write_model(tmp_path / "b.onnx", scale=2))

    lab.delete("gone", 2)

    assert [version.version for version in lab.models["gone"].versions] == [1]
    np.testing.assert_allclose(lab.infer("gone", np.eye(16, dtype=np.float32)), WEIGHTS, rtol=1e-5)
    assert lab.publish("gone", write_model(tmp_path / "c.onnx", scale=3)).version == 3


def test_the_diff_over_http_is_json(lab, layers, tmp_path):
    lab.publish("http-diff", write_deep(tmp_path / "a.onnx", layers))
    lab.publish("http-diff", write_deep(tmp_path / "b.onnx", [np.zeros_like(layers[0]), *layers[1:]]))
    request = urllib.request.Request(
        f"{lab.gateway}/tether/v1/models/http-diff/diff/2/1", headers={"Authorization": f"Bearer {lab.operations.client._api_key}"}
    )

    with urllib.request.urlopen(request) as reply:
        found = json.load(reply)

    (change,) = found["tensors"]
    assert (change["name"], change["relative"], change["share"]) == ("layer0.weight", None, 1.0)
