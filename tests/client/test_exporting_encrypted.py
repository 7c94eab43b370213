"""What a gateway says of an encrypted version is believed only where the signed manifest proves that it is one."""

import msgspec
import pytest

from tether.client.exporting import checked_segment, fetch_file, is_encrypted, stored_files
from tether.errors import ChunkAlteredError, MalformedManifestError
from tether.store.format.encrypted import ModelContext, ModelKey, Sealer, seal_manifest
from tether.store.format.manifest import ArrayEntry, Manifest, Segment, digest_of, encode
from tether.types import ModelInfo

KEY, CONTEXT = ModelKey(bytes(32)), ModelContext("ab" * 32, "digits")
DATA = bytes(range(256)) * 10
INFO = ModelInfo("onnx", "onnx", (), (), batched=True, pure=True, code=False)


@pytest.fixture
def answer():
    seal, _ = Sealer(KEY, CONTEXT).seal(DATA)
    arrays = (ArrayEntry("files/m.onnx", "uint8", (len(DATA),), (Segment(seal.digest, 0, len(DATA)),)),)
    manifest = Manifest(framework="onnx", entry="m.onnx", info=INFO, arrays=arrays)
    public = seal_manifest(manifest, [seal], KEY, CONTEXT).public
    return {"manifest": msgspec.to_builtins(manifest), "public": msgspec.to_builtins(public)}, digest_of(encode(public)), seal.digest


def test_it_is_encrypted_if_the_manifest_of_its_digest_says_so(answer):
    told, digest, _ = answer
    assert is_encrypted(told, digest)
    assert not is_encrypted({"manifest": told["manifest"]}, digest)  # its blobs are checked by their digests, then


def test_a_plain_version_can_not_be_passed_off_as_an_encrypted_one_to_escape_the_check(answer):
    told, digest, _ = answer
    plain = Manifest(framework="onnx", entry="m.onnx", info=INFO, arrays=msgspec.convert(told["manifest"], Manifest).arrays)
    for public, version in [
        (told["public"], "0" * 64),
        (msgspec.to_builtins(plain), digest_of(encode(plain))),
        ({"framework": "onnx"}, digest),
        (None, digest),
    ]:
        with pytest.raises(ChunkAlteredError, match="another manifest"):
            is_encrypted(told | {"public": public}, version)


async def test_its_blobs_are_asked_for_by_version_and_must_have_their_length(answer):
    told, _, blob = answer
    asked = []

    class Lab:
        async def get_blob(self, digest, version=None):
            asked.append((digest, version))
            return DATA

    (file,) = stored_files(told["manifest"], "digits:1")
    assert await fetch_file(Lab(), file, 1 << 20) == DATA
    assert asked == [(blob, "digits:1")]
    with pytest.raises(MalformedManifestError):
        checked_segment(DATA[:-1], file.segments[0], file.path, sealed=True)
    with pytest.raises(ChunkAlteredError):
        checked_segment(DATA, file.segments[0], file.path)
