"""A draft that is to be encrypted: sealed on arrival, put together in memory, resumed by the digests of its plaintext."""

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tether.errors import (
    BadEnvelopeError,
    BadModelError,
    BadNameError,
    ConfigError,
    ConflictError,
    DigestMismatchError,
    LockedModelError,
    MissingBlobsError,
    NotFoundError,
    PayloadTooLargeError,
)
from tether.manager import publishing
from tether.manager.operations import Operations
from tether.security.identity import Identity
from tether.security.volatile import SETTING
from tether.store import BLOB_NBYTES, Repository, digest_of
from tether.wire.npz import to_npz

LAB, COLLEAGUE = Identity(bytes(range(32))), Identity(bytes(range(1, 33)))
WEIGHTS = np.random.default_rng(3).standard_normal((600, 400)).astype(np.float32)
X = np.random.default_rng(4).random((2, 600), dtype=np.float32)


def model_bytes(scale=1.0):
    """y = x @ W + b; W raw, b in the other spelling that ONNX has, which is converted."""
    bias = helper.make_tensor("b", TensorProto.FLOAT, [400], [scale * float(value) for value in WEIGHTS[0]])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "confidential",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 600])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 400])],
        [numpy_helper.from_array(WEIGHTS, "W"), bias],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


class Draft:
    """Files as a client cuts them, and the body that names them."""

    def __init__(self, files, **fields):
        self.blobs, described = {}, []
        for path, data in files.items():
            parts = [data[start : start + 100_000] for start in range(0, len(data), 100_000)]
            self.blobs |= {digest_of(part): part for part in parts}
            described.append({"path": path, "nbytes": len(data), "segments": [[digest_of(part), 0, len(part)] for part in parts]})
        self.body = {"files": described, "entry": next(iter(files)), **fields}


@pytest.fixture
def memory(monkeypatch):
    base = Path(tempfile.mkdtemp(prefix="tether-test-", dir="/dev/shm"))
    monkeypatch.setenv(SETTING, str(base))
    yield base
    shutil.rmtree(base)


@pytest.fixture
def repository(tmp_path):
    with Repository.open(tmp_path / "data" / "store", own=LAB.public) as repository:
        yield repository


@pytest.fixture
def operations(repository, tmp_path):
    return Operations(repository, LAB, tmp_path / "data" / "publishing")


async def publish(operations, name, draft):
    """As a client does it; gives the answer, and what had to be sent."""
    sent = []
    for _ in range(3):
        try:
            return await operations.publish(name, draft.body), sent
        except MissingBlobsError as error:
            for digest in error.args[1]:
                await operations.put_blob(digest, draft.blobs[digest], name if draft.body.get("encrypt") else None)
                sent.append(digest)
    raise AssertionError(sent)


def plain_on_disk(tmp_path, *contents):
    windows = [data[at : at + 16] for data in contents for at in range(64, len(data) - 16, max(16, len(data) // 50))]
    stored = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    return sum(window in data for window in windows for data in stored)


async def test_it_is_sealed_on_arrival_put_together_in_memory_and_published(operations, repository, tmp_path, memory, monkeypatch):
    seen = []
    real = publishing.inspect_in_sandbox

    async def watched(path, *arguments, **options):
        found = await real(path, *arguments, **options)
        seen.extend([memory in Path(path).parents, memory in Path(options["limits"].scratch).parents])
        seen.append(plain_on_disk(tmp_path, data, X.tobytes()))
        return found

    monkeypatch.setattr(publishing, "inspect_in_sandbox", watched)
    data = model_bytes()
    draft = Draft({"net.onnx": data, ".tether/example.npz": to_npz({"x": X})}, encrypt=True)
    answer, sent = await publish(operations, "net", draft)
    assert (answer["encrypted"], answer["created"], sorted(sent)) == (True, True, sorted(draft.blobs))
    assert seen == [True, True, 0]
    assert [path for path in memory.rglob("*") if path.is_file() and path.name != "lock"] == []
    assert plain_on_disk(tmp_path, data, X.tobytes(), WEIGHTS.tobytes()) == 0

    described = (await operations.model("net"))["versions"][0]
    assert (described["encrypted"], described["example"], described["info"]["inputs"][0]["name"]) == (True, True, "x")
    found = repository.load_tensors(answer["digest"])
    np.testing.assert_array_equal(found["W"], WEIGHTS)
    np.testing.assert_array_equal(found["b"], WEIGHTS[0])  # converted in the sandbox, and sealed as well
    paths = {array.path for array in repository.manifest(answer["digest"]).files()}
    assert {"files/.tether/example.npz", "files/.tether/expected.npz"} < paths
    again, sent = await publish(operations, "net", draft)
    assert (again["version"], again["created"], sent) == (1, False, [])


async def test_a_second_version_sends_what_changed_and_an_interrupted_one_what_is_lacking(operations, repository, tmp_path):
    data = model_bytes()
    draft = Draft({"net.onnx": data}, encrypt=True)
    with pytest.raises(MissingBlobsError) as missing:
        await operations.publish("net", draft.body)
    first, *rest = missing.value.args[1]
    await operations.put_blob(first, draft.blobs[first], "net")
    with pytest.raises(MissingBlobsError) as missing:
        await operations.publish("net", draft.body)
    assert missing.value.args[1] == rest
    restarted = Operations(repository, LAB, tmp_path / "data" / "publishing")
    _, sent = await publish(restarted, "net", draft)
    assert sent == rest
    _, sent = await publish(restarted, "net", Draft({"net.onnx": model_bytes(2.0)}, encrypt=True))
    assert 0 < len(sent) <= 2
    _, sent = await publish(restarted, "other", Draft({"net.onnx": data}, encrypt=True))
    assert len(sent) == len(draft.blobs)  # of another model, whose blobs are others


async def test_a_model_that_was_encrypted_gets_no_plain_version_by_oversight(operations):
    draft = Draft({"net.onnx": model_bytes()})
    await publish(operations, "net", Draft({"net.onnx": model_bytes()}, encrypt=True))
    with pytest.raises(ConflictError, match="encrypt=False"):
        await operations.publish("net", draft.body)
    draft.body["encrypt"] = False
    answer, _ = await publish(operations, "net", draft)
    assert (answer["version"], answer["encrypted"]) == (2, False)
    assert [version["encrypted"] for version in (await operations.models())[0]["versions"]] == [True, False]


async def test_a_plain_lab_makes_no_cluster_key(operations, tmp_path):
    answer, _ = await publish(operations, "net", Draft({"net.onnx": model_bytes()}))
    assert answer["encrypted"] is False
    assert not (tmp_path / "data" / "keys").exists()


async def test_where_there_is_no_memory_to_use_nothing_is_published(operations, monkeypatch, tmp_path):
    monkeypatch.setenv(SETTING, str(tmp_path))
    with pytest.raises(ConfigError, match="tmpfs"):
        await publish(operations, "net", Draft({"net.onnx": model_bytes()}, encrypt=True))
    assert await operations.models() == []


async def test_what_is_no_model_leaves_nothing_in_memory(operations, memory):
    with pytest.raises(BadModelError):
        await publish(operations, "net", Draft({"net.onnx": os.urandom(5000)}, encrypt=True))
    assert [path for path in memory.rglob("*") if path.is_file() and path.name != "lock"] == []


async def test_blobs_to_encrypt_are_checked_like_others(operations):
    with pytest.raises(DigestMismatchError):
        await operations.put_blob(digest_of(b"a"), b"b", "net")
    with pytest.raises(PayloadTooLargeError):
        await operations.put_blob(digest_of(b"a"), bytes(BLOB_NBYTES + 1), "net")
    with pytest.raises(BadNameError):
        await operations.put_blob(digest_of(b"a"), b"a", "../net")


async def test_its_blobs_come_decrypted_for_who_names_the_version(operations, repository):
    data = model_bytes()
    answer, _ = await publish(operations, "net", Draft({"net.onnx": data}, encrypt=True))
    described = await operations.manifest("net", 1)
    assert digest_of(repository.manifest_bytes(answer["digest"])) == answer["digest"] == described["digest"]
    assert described["public"]["encryption"]["key"]
    (array,) = (each for each in described["manifest"]["arrays"] if each["path"] == "files/net.onnx")
    parts = [await operations.get_blob(digest, "net:1") for digest, _, _ in array["segments"]]
    assert b"".join(parts) == data
    assert await operations.get_blob(array["segments"][0][0]) != parts[0]
    with pytest.raises(NotFoundError):
        await operations.get_blob(digest_of(b"another"), "net:1")
    value = await operations.read_zarr("net", "files/net.onnx/c/0", 0, 100)
    assert value["data"] == data[:100]


async def test_grants_are_made_taken_and_accepted(operations, repository, tmp_path):
    answer, _ = await publish(operations, "net", Draft({"net.onnx": model_bytes()}, encrypt=True))
    with pytest.raises(LockedModelError, match="--encrypt"):
        await operations.admission.allow(COLLEAGUE.public, ["decrypt:other"])
    envelope = (await operations.admission.allow(COLLEAGUE.public, ["decrypt:net"]))["envelopes"]["net"]
    other = Identity(bytes(range(2, 34)))
    await operations.admission.allow(other.public, ["decrypt:net"])

    with Repository.open(tmp_path / "peer" / "store", own=COLLEAGUE.public) as theirs:
        for blob in repository.public_manifest(answer["digest"]).blobs():
            theirs.put_blob(blob, repository.read_blob(blob))
        data, signature = repository.manifest_bytes(answer["digest"]), repository.signature(answer["digest"], LAB.public)
        theirs.publish("net", data, LAB.public, signature)
        theirs.name_publisher(LAB.public, "lab")
        peer = Operations(theirs, COLLEAGUE, tmp_path / "peer" / "publishing")
        listed = (await peer.models())[0]["versions"][0]
        assert (listed["encrypted"], listed["framework"]) == (True, "onnx")
        with pytest.raises(LockedModelError, match="tether allow"):
            await peer.manifest("lab~net", 1)
        with pytest.raises(BadEnvelopeError):
            await peer.admission.accept("no envelope at all")
        accepted = await peer.admission.accept(f"{envelope[:40]}\n{envelope[40:]}\n")
        assert accepted == {"publisher": LAB.public, "name": "net", "new_keys": 1}
        assert (await peer.model("lab~net"))["versions"][0]["info"]["inputs"][0]["name"] == "x"
        assert next(iter(peer.catalog().values())).versions[1][1].inputs[0].name == "x"

    taken = await operations.admission.disallow(COLLEAGUE.public, ["decrypt:net"])
    assert (taken["models"], list(taken["envelopes"]["net"])) == (["net"], [other.public])
    _, sent = await publish(operations, "net", Draft({"net.onnx": model_bytes()}, encrypt=True))
    assert sent  # under the new key all blobs are others
    rotated = await operations.admission.rotate()
    assert (rotated["rewrapped"], rotated["resumed"]) == (2, False)
    assert (await operations.verify("net", None))["ok"]
    operations.close()
    peer.close()


async def test_a_cancelled_publish_leaves_nothing_in_memory(operations, memory, monkeypatch):
    reached = asyncio.Event()

    async def stuck(*_, **__):
        reached.set()
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(publishing, "inspect_in_sandbox", stuck)
    draft = Draft({"net.onnx": model_bytes()}, encrypt=True)
    task = asyncio.create_task(publish(operations, "net", draft))
    await asyncio.wait_for(reached.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [path for path in memory.rglob("*") if path.is_file() and path.name != "lock"] == []
