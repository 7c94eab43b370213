"""A published model over HTTP: as HTTP has it, and as zarr, xarray and tensorstore open it."""

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from gateway_rig import AUTH, KEY, ask, running
from obstore.store import HTTPStore
from zarr.storage import FsspecStore, ObjectStore

from tether.manager.operations import Operations
from tether.security.identity import Identity
from tether.store import BLOB_NBYTES, DraftStore, Manifest, Repository, encode, gateway_kvstore, signed_message
from tether.store.format.weights import tensor_arrays, tensor_path
from tether.store.hierarchy.zarr_keys import node_of
from tether.types import ModelInfo, ModelRef, StoredTensor

LAB = Identity(bytes(range(32)))
INFO = ModelInfo("onnx", "onnx", (), (), batched=True, pure=True, code=False)
BIG = np.random.default_rng(0).bytes(2 * BLOB_NBYTES + 77)
KERNEL = np.arange(60, dtype="f4").reshape(5, 12)
NAMES = ("bias", "dense/kernel", " !#$&'()*+,:;<=>?@[]^`{|}%\"\\~/ü\n..")
V1 = "/tether/v1/zarr"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A gateway before a real manager's operations; `digits` has files and weights, `written` was written as a zarr store."""
    root = tmp_path_factory.mktemp("zarr")
    with Repository.open(root / "store", own=LAB.public) as repository, running() as rig:
        rig.repository = repository
        rig.dispatcher.management = Operations(repository, LAB, root / "publishing")
        files = [repository.add_bytes("big.bin", BIG), repository.add_bytes("model.bin", KERNEL.tobytes())]
        tensors = tensor_arrays(files, [StoredTensor(name, "float32", (5, 12), "model.bin", 0, 240) for name in NAMES])
        data = encode(Manifest(framework="onnx", entry="model.bin", info=INFO, arrays=(*files, *tensors)))
        rig.digest = repository.publish("digits", data, LAB.public, LAB.sign(signed_message(data)), alias=["prod"]).digest
        draft = DraftStore(repository.root, "written")
        zarr.create_array(draft, name="run/loss", data=KERNEL, chunks=(2, 12), attributes={"unit": "nats"})
        draft._draft.write("notes/huge", BIG)
        draft.publish(repository, "written", LAB)
        yield rig


def get(rig, path, headers=None, method="GET"):
    return ask(rig, method, f"{V1}/{path}", headers=AUTH | (headers or {}))


@pytest.fixture
def fsspec_store(published):
    base = f"http://127.0.0.1:{published.port}{V1}/digits/"
    return FsspecStore.from_url(base, storage_options={"client_kwargs": {"headers": AUTH}}, read_only=True)


def test_a_path_is_read_by_any_reference_to_the_version(published):
    for ref in ("digits", "digits@prod", "digits:1", f"digits:sha-{published.digest[:8]}"):
        status, headers, document = get(published, f"{ref}/tensors/bias/zarr.json")
        assert (status, headers["content-type"]) == (200, "application/json")
        assert document["attributes"]["name"] == "bias"
        status, headers, value = get(published, f"{ref}/tensors/dense=2Fkernel/c/0/0")
        assert (status, headers["content-type"], value) == (200, "application/octet-stream", KERNEL.tobytes())


def test_what_is_not_there_is_404_and_what_is_no_reference_400_and_no_key_401(published):
    for path in ("digits/tensors/bias/c/1/0", "digits/tensors/nothing/zarr.json", "digits/", "digits:9/zarr.json", "other/zarr.json"):
        status, headers, error = get(published, path)
        assert (status, headers["content-type"]) == (404, "application/json")
        assert error["code"] in {"not_found", "unknown_model", "unknown_version"}
    assert get(published, "di gits/zarr.json".replace(" ", "%20"))[0] == 400
    assert ask(published, "GET", f"{V1}/digits/zarr.json")[0] == 401
    assert get(published, "digits/zarr.json", method="POST")[0] == 405


def test_ranges_are_those_of_the_whole_value(published):
    chunk = "digits/files/big.bin/c/0"
    for asked, start, stop in [
        ("bytes=0-9", 0, 10),
        ("bytes=4194300-99999999", 4194300, BLOB_NBYTES),
        ("bytes=4194303-", 4194303, BLOB_NBYTES),
        ("bytes=-7", BLOB_NBYTES - 7, BLOB_NBYTES),
        ("bytes=-99999999", 0, BLOB_NBYTES),
    ]:
        status, headers, value = get(published, chunk, {"Range": asked})
        assert (status, value) == (206, BIG[start:stop])
        assert headers["content-range"] == f"bytes {start}-{stop - 1}/{BLOB_NBYTES}"
    for ignored in ("bytes=5-2", "bytes=0-1,4-5", "lines=0-1", "bytes=a-b"):
        status, _, value = get(published, chunk, {"Range": ignored})
        assert (status, value) == (200, BIG[:BLOB_NBYTES])
    for beyond in ("bytes=4194304-", "bytes=-0"):
        status, headers, error = get(published, chunk, {"Range": beyond})
        assert (status, headers["content-range"], error["code"]) == (416, f"bytes */{BLOB_NBYTES}", "bad_range")


def test_a_value_larger_than_a_blob_is_sent_as_it_is_read(published):
    status, headers, value = get(published, "written/notes/huge")
    assert (status, headers["content-length"], value) == (200, str(len(BIG)), BIG)
    status, headers, value = get(published, "written/notes/huge", {"Range": f"bytes=5-{BLOB_NBYTES + 9}"})
    assert (status, value) == (206, BIG[5 : BLOB_NBYTES + 10])
    assert get(published, "written/notes/huge", {"Range": f"bytes=-{BLOB_NBYTES + 9}"})[2] == BIG[-BLOB_NBYTES - 9 :]


def test_head_has_the_size_and_nothing_else(published):
    for path, size in (("digits/files/big.bin/c/2", BLOB_NBYTES), ("written/notes/huge", len(BIG))):
        status, headers, value = get(published, path, method="HEAD")
        assert (status, headers["content-length"], headers["accept-ranges"], value) == (200, str(size), "bytes", b"")
    assert get(published, "digits/nothing", method="HEAD")[0] == 404


def test_a_fixed_version_is_cached_for_ever_and_a_moving_one_asked_for_again(published):
    moving, fixed = (get(published, f"{ref}/tensors/bias/c/0/0")[1] for ref in ("digits", "digits:1"))
    assert "immutable" in fixed["cache-control"]
    assert moving["cache-control"] == "private, no-cache"
    assert moving["etag"] == fixed["etag"]
    for method in ("GET", "HEAD"):
        status, headers, value = get(published, "digits/tensors/bias/c/0/0", {"If-None-Match": f'"x", W/{moving["etag"]}'}, method)
        assert (status, headers["etag"], value) == (304, moving["etag"], b"")
    assert get(published, "digits/tensors/bias/c/0/0", {"If-None-Match": '"x"'})[2] == KERNEL.tobytes()
    assert get(published, "digits/tensors/bias/c/0/0", {"Range": "bytes=0-3", "If-Range": moving["etag"]})[0] == 206
    assert get(published, "digits/tensors/bias/c/0/0", {"Range": "bytes=0-3", "If-Range": '"x"'})[::2] == (200, KERNEL.tobytes())
    assert get(published, "digits/tensors/bias/zarr.json")[1]["etag"] != moving["etag"]


def test_damage_is_an_error_and_never_a_missing_chunk(published):
    pack = max((published.repository.root / "packs").iterdir(), key=lambda path: path.stat().st_size)
    whole = pack.read_bytes()
    pack.chmod(0o644)
    at = whole.index(BIG[:64])
    try:
        pack.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
        status, _, error = get(published, "digits/files/big.bin/c/0")
        assert (status, error["code"]) == (503, "chunk_altered")
    finally:
        pack.write_bytes(whole)


def test_zarr_opens_it_over_http_without_listing(fsspec_store):
    group = zarr.open_group(fsspec_store, mode="r")

    assert group.attrs["tether"]["entry"] == "model.bin"
    assert {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)} == {
        "files/big.bin",
        "files/model.bin",
        *(node_of(tensor_path(name)) for name in NAMES),
    }
    for name in NAMES:
        np.testing.assert_array_equal(group[node_of(tensor_path(name))][...], KERNEL)
    assert group["files/big.bin"][:].tobytes() == BIG


def test_xarray_opens_the_weights_over_http(published):
    options = {"client_kwargs": {"headers": AUTH}}
    data = xarray.open_zarr(f"http://127.0.0.1:{published.port}{V1}/digits/tensors", storage_options=options, chunks=None)

    assert set(data.data_vars) == {node_of(tensor_path(name)).removeprefix("tensors/") for name in NAMES}
    assert data["bias"].dims == ("bias_0", "bias_1")
    np.testing.assert_array_equal(data["dense=2Fkernel"].values, KERNEL)


@pytest.mark.parametrize("name", NAMES)
def test_tensorstore_opens_a_weight_over_http(published, name):
    url = f"http://127.0.0.1:{published.port}/"
    spec = gateway_kvstore(url, ModelRef.parse("digits@prod"), node_of(tensor_path(name)), KEY)
    opened = tensorstore.open({"driver": "zarr3", "kvstore": spec}, open=True, read=True).result()

    np.testing.assert_array_equal(opened.read().result(), KERNEL)


def test_a_written_store_keeps_its_attributes_over_http(published):
    spec = gateway_kvstore(f"http://127.0.0.1:{published.port}", ModelRef.parse("written:1"), "run/loss", KEY)
    opened = tensorstore.open({"driver": "zarr3", "kvstore": spec}, open=True, read=True).result()
    np.testing.assert_array_equal(opened[3:5].read().result(), KERNEL[3:5])
    assert get(published, "written/run/loss/zarr.json")[2]["attributes"] == {"unit": "nats"}
    root = get(published, "written/zarr.json")[2]["attributes"]
    assert root["tether"]["framework"] == "custom"


def test_zarrs_object_store_opens_it_over_http(published):
    headers = {"default_headers": AUTH, "allow_http": True}
    store = ObjectStore(HTTPStore.from_url(f"http://127.0.0.1:{published.port}{V1}/digits:1/", client_options=headers), read_only=True)

    np.testing.assert_array_equal(zarr.open_array(store, path="tensors/dense=2Fkernel", mode="r")[1:3], KERNEL[1:3])
    assert zarr.open_group(store, mode="r")["files/big.bin"][-9:].tobytes() == BIG[-9:]
    data = xarray.open_dataset(store, group="tensors", engine="zarr")
    np.testing.assert_array_equal(data["bias"].values, KERNEL)
