"""Versions that another lab signed: data from anyone, code only from who is trusted for it."""

import base64

import pytest
from conftest import write_model

from tether import errors
from tether.lab.loop import run_async
from tether.security.identity import Identity
from tether.store import Manifest, Repository, encode, signed_message
from tether.types import ModelInfo, TensorSpec

SPEC = TensorSpec("x", "FP32", (-1, 16))
CODE = ModelInfo("custom", "custom", (SPEC,), (TensorSpec("y", "FP32", (-1, 16)),), batched=True, pure=True, code=True)
DATA = ModelInfo("onnx", "onnx", (SPEC,), (TensorSpec("y", "FP32", (-1, 4)),), batched=True, pure=True, code=False)
DOUBLE = """
class Double:
    inputs = [("x", "FP32", (-1, 16))]
    outputs = [("y", "FP32", (-1, 16))]
    pure = True

    def load(self, path):
        pass

    def predict(self, x):
        return {"y": 2 * x}
"""


class OtherLab:
    """Signs versions and gives what a peer would send."""

    def __init__(self, folder):
        self.identity = Identity.load_or_create(folder / "identity")
        self.repository = Repository.open(folder / "store")

    def version(self, path, info):
        arrays = self.repository.add_files(path)
        manifest = encode(Manifest(framework=info.framework, entry=path.name, info=info, arrays=tuple(arrays)))
        signature = self.identity.sign(signed_message(manifest)).hex()
        digests = [segment.digest for array in arrays for segment in array.segments]
        body = {"manifest": base64.b64encode(manifest).decode(), "publisher": self.identity.public, "signature": signature}
        return body, {digest: self.repository.read_draft_blob(digest) for digest in digests}


@pytest.fixture
def other(tmp_path):
    lab = OtherLab(tmp_path)
    yield lab
    lab.repository.close()


async def send(lab, name, body, blobs):
    client = lab.operations.client
    for digest, data in blobs.items():
        await client.put_blob(digest, data)
    return await client.publish(name, body)


async def test_code_of_a_stranger_is_refused_until_its_key_is_trusted(lab, other, tmp_path):
    (tmp_path / "double.py").write_text(DOUBLE)
    version = other.version(tmp_path / "double.py", CODE)
    with pytest.raises(errors.UntrustedCodeError, match=f"tether trust {other.identity.public} --code"):
        await run_async(send(lab, "double", *version))
    await lab.atrust(other.identity.public)
    answer = await run_async(send(lab, "double", *version))
    assert answer["name"] == f"{other.identity.public[:12]}~double"


async def test_data_of_a_stranger_is_taken_and_served_under_its_publisher(lab, other, tmp_path):
    answer = await run_async(send(lab, "weights", *other.version(write_model(tmp_path / "model.onnx"), DATA)))
    assert answer["name"] == f"{other.identity.public[:12]}~weights"
    assert (await lab.ainfer(answer["name"], [[1.0] * 16])).shape == (1, 4)


async def test_a_manifest_that_was_changed_after_it_was_signed_is_refused(lab, other, tmp_path):
    body, blobs = other.version(write_model(tmp_path / "model.onnx"), DATA)
    forged = base64.b64decode(body["manifest"]).replace(b'"pure":true', b'"pure":false')
    with pytest.raises((errors.BadSignatureError, errors.MalformedManifestError)):
        await run_async(send(lab, "weights", body | {"manifest": base64.b64encode(forged).decode()}, blobs))


async def test_trust_needs_a_key(lab):
    with pytest.raises(errors.BadNameError, match="64 hex digits"):
        await lab.atrust("alice")
