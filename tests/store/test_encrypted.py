import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_models import COLLEAGUE, LAB, seeded

from tether.errors import ChunkAlteredError, InternalError, LockedModelError, MalformedManifestError, MissingBlobsError
from tether.store.format.encrypted import ModelContext, ModelKey, Opener, Sealer, on_ciphertext, open_manifest, seal_manifest
from tether.store.format.layout import BLOB_NBYTES
from tether.store.format.manifest import ArrayEntry, Encryption, Manifest, Seal, Segment, decode, digest_of, encode, signed_message
from tether.store.format.weights import tensor_arrays
from tether.store.packing.files import cut_bytes
from tether.types import ModelInfo, StoredTensor, TensorSpec

KEY = ModelKey(bytes(range(32)))
OTHER_KEY = ModelKey(bytes(range(1, 33)))
DIGITS = ModelContext(LAB.public, "digits")
INFO = ModelInfo(
    "onnx", "onnx", (TensorSpec("secret_input_pixels", "FP32", (-1, 4)),), (TensorSpec("secret_output_labels", "INT64", (-1,)),),
    batched=True, pure=True, code=False, requirements=("secret-requirement==1.0",),
)  # fmt: skip
WINDOW = 16


def sealed_of(data, key=KEY, context=DIGITS):
    seal, ciphertext = Sealer(key, context).seal(data)
    return seal, bytes(ciphertext)


class Written:
    """A plain manifest over sealed blobs, as a publish makes it: two files, tensors in one of them."""

    def __init__(self, seed="", key=KEY, context=DIGITS, nbytes=9_000_000, files=2):
        chance = seeded(seed)
        self.files = {f"secret/folder/weights-{index}.bin": chance.randbytes(nbytes // (index + 1)) for index in range(files)}
        self.blobs, seals, sealer = {}, {}, Sealer(key, context)

        def put(digest, data):
            seal, ciphertext = sealer.seal(data)
            seals[digest], self.blobs[seal.digest] = seal, bytes(ciphertext)

        arrays = [cut_bytes(name, data, put) for name, data in self.files.items()]
        tensors = [StoredTensor("secret.encoder.weight", "float32", (500, 1000), next(iter(self.files)), 64, 2_000_000)]
        arrays += tensor_arrays(arrays, tensors) if nbytes > 2_000_064 else []
        self.seals = tuple(seals.values())
        arrays.sort(key=lambda array: array.path)
        attributes = {"secret attribute": "secret value of it", "seed": seed}
        self.manifest = Manifest(
            framework="onnx", entry=next(iter(self.files)), info=INFO, arrays=on_ciphertext(arrays, seals), attributes=attributes
        )
        self.public, private = seal_manifest(self.manifest, self.seals, key, context)
        self.blobs |= {sealed.seal.digest: bytes(sealed.ciphertext) for sealed in private}

    def opened(self, key=KEY, context=DIGITS):
        return open_manifest(self.public, key, context, self.blobs.__getitem__)


@pytest.fixture(scope="module")
def written():
    return Written()


# --- blobs


@given(st.binary(max_size=200))
def test_what_was_sealed_opens_and_is_as_long_as_it_was(data):
    seal, ciphertext = sealed_of(data)

    assert Opener(KEY, DIGITS).open(seal, ciphertext) == data
    assert (len(ciphertext), seal.nbytes, seal.digest) == (len(data), len(data), digest_of(ciphertext))


def test_buffers_of_the_caller_are_used_and_nothing_behind_them_is_touched():
    data = os.urandom(100_000)
    buffer = bytearray(b"x" * 100_100)

    seal, ciphertext = Sealer(KEY, DIGITS).seal(memoryview(data), buffer)
    assert buffer[:100_000] == ciphertext != data
    plain = bytearray(b"y" * 100_100)
    Opener(KEY, DIGITS).open_into(seal, ciphertext, memoryview(plain))

    assert plain[:100_000] == data
    assert plain[100_000:] == b"y" * 100
    assert buffer[100_000:] == b"x" * 100
    with pytest.raises(InternalError, match="buffer"):
        Opener(KEY, DIGITS).open_into(seal, ciphertext, bytearray(99_999))


def test_the_same_content_gives_the_same_blob_so_that_versions_share_it():
    data = os.urandom(70_000)

    assert sealed_of(data) == sealed_of(bytearray(data)) == sealed_of(memoryview(data))


def test_another_model_another_publisher_and_another_key_give_other_blobs():
    data = os.urandom(1000)
    contexts = [DIGITS, ModelContext(LAB.public, "letters"), ModelContext(COLLEAGUE.public, "digits")]

    sealed = [sealed_of(data, key, context) for key in (KEY, OTHER_KEY) for context in contexts]

    assert len({seal.digest for seal, _ in sealed}) == len({seal.nonce for seal, _ in sealed}) == len(sealed)


def test_names_that_run_together_are_not_the_same_context():
    data = b"content"
    one, two = ModelContext("ab", "c"), ModelContext("a", "bc")

    seal, ciphertext = sealed_of(data, KEY, one)

    with pytest.raises(ChunkAlteredError):
        Opener(KEY, two).open(seal, ciphertext)


def test_the_cipher_is_aes_256_gcm():
    """Opened by hand: a file of the format can be read without this code."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    data = os.urandom(5000)
    seal, ciphertext = sealed_of(data)
    bound = msgspec.json.encode(["aes-256-gcm", "blob", LAB.public, "digits", 5000])

    assert AESGCM(KEY.derived("encryption")).decrypt(seal.nonce, ciphertext + seal.tag, bound) == data


def test_any_flipped_bit_of_ciphertext_tag_or_nonce_is_noticed_and_nothing_is_shown():
    data = os.urandom(64)
    seal, ciphertext = sealed_of(data)
    opener = Opener(KEY, DIGITS)

    for bit in range(8 * (64 + 16 + 12)):
        flipped = bytearray(ciphertext + seal.tag + seal.nonce)
        flipped[bit // 8] ^= 1 << bit % 8
        wrong = Seal(seal.digest, 64, bytes(flipped[80:]), bytes(flipped[64:80]))
        out = bytearray(b"z" * 64)
        with pytest.raises(ChunkAlteredError) as caught:
            opener.open_into(wrong, flipped[:64], out, "tensors/conv1")
        assert out == bytes(64)
        assert caught.value.args[1:] == (seal.digest, "tensors/conv1")
        assert seal.digest in str(caught.value)
        assert "tensors/conv1" in str(caught.value)


def test_a_blob_cut_off_prolonged_or_exchanged_is_noticed():
    one, two = sealed_of(os.urandom(5000)), sealed_of(os.urandom(5000))
    opener = Opener(KEY, DIGITS)

    for seal, ciphertext in [
        (one[0], one[1][:-1]), (one[0], b""), (one[0], one[1] + b"\0"), (one[0], two[1]), (two[0], one[1]),
        (msgspec.structs.replace(one[0], nbytes=4999), one[1][:-1]),
        (msgspec.structs.replace(one[0], nonce=two[0].nonce), one[1]),
        (msgspec.structs.replace(one[0], tag=two[0].tag), one[1]),
    ]:  # fmt: skip
        with pytest.raises(ChunkAlteredError):
            opener.open(seal, ciphertext)


def test_a_blob_of_another_model_or_of_a_manifest_does_not_pass_for_one_of_this_even_under_the_same_key():
    data = os.urandom(5000)
    other = sealed_of(data, KEY, ModelContext(LAB.public, "letters"))
    (private,) = Sealer(KEY, DIGITS).seal_private(data)

    for seal, ciphertext in (other, private):
        with pytest.raises(ChunkAlteredError):
            Opener(KEY, DIGITS).open(seal, ciphertext)
    with pytest.raises(ChunkAlteredError):
        Opener(OTHER_KEY, DIGITS).open(*sealed_of(data))


def test_the_same_bytes_as_blob_and_as_private_part_have_different_nonces():
    """One nonce for two tags would give away GCM's authentication key."""
    data = os.urandom(100)
    (private,) = Sealer(KEY, DIGITS).seal_private(data)

    assert private.seal.nonce != sealed_of(data)[0].nonce


def test_threads_share_a_sealer_and_an_opener():
    contents = [seeded(index).randbytes(200_000) for index in range(16)]
    sealer, opener = Sealer(KEY, DIGITS), Opener(KEY, DIGITS)

    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda data: opener.open(*sealer.seal(data)), contents))

    assert opened == contents


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_row_21_no_two_of_many_blobs_have_one_nonce(chaos):
    count, begun = chaos.count(10_000_000, 100_000), time.monotonic()
    sealer, nonces = Sealer(KEY, DIGITS), bytearray()

    for index in range(count):
        nonces += sealer.seal(index.to_bytes(4, "big")).seal.nonce

    first, second, third = np.frombuffer(nonces, dtype="<u4").reshape(-1, 3).T
    order = np.lexsort((first, second, third))
    again = [np.diff(part[order].astype(np.int64)) == 0 for part in (first, second, third)]
    assert not np.any(again[0] & again[1] & again[2])
    chaos.record(21, f"{count} blobs, {count} nonces", time.monotonic() - begun)


# --- keys


def test_a_key_prints_as_its_id_and_pickles():
    shown = f"{KEY!r} {KEY} {[KEY]}"

    assert KEY.id in shown
    assert repr(KEY.secret) not in shown
    assert KEY.secret.hex() not in shown
    assert pickle.loads(pickle.dumps(KEY)).id == KEY.id  # noqa: S301 (our own bytes)
    assert KEY.id != OTHER_KEY.id


def test_what_is_derived_from_a_key_for_each_purpose_is_different():
    derived = {KEY.derived(purpose) for purpose in ("id", "encryption", "nonce", "index")}

    assert len(derived | {KEY.secret}) == 5


# --- manifests


def test_a_sealed_manifest_opens_to_the_one_that_was_sealed(written):
    assert written.opened() == written.manifest
    assert decode(encode(written.public)) == written.public


def test_the_blobs_of_a_sealed_manifest_open_to_the_files(written):
    seals = {seal.digest: seal for seal in written.public.encryption.seals}
    opener = Opener(KEY, DIGITS)

    for array in written.opened().files():
        data = b"".join(opener.open(seals[part.digest], written.blobs[part.digest], array.path) for part in array.segments)
        assert data == written.files[array.path.removeprefix("files/")]


def test_every_blob_that_a_version_needs_is_named_by_its_public_manifest(written):
    assert set(written.public.blobs()) == written.blobs.keys()
    assert written.public.nbytes == written.manifest.nbytes


def test_no_window_of_the_plaintext_is_in_what_is_stored(written):
    stored = encode(written.public) + b"".join(written.blobs.values())

    for data in written.files.values():
        assert not any(data[at : at + WINDOW] in stored for at in range(0, len(data) - WINDOW, 100_003))
    for secret in (b"secret", b"weights-", b"pixels", b"encoder.weight"):
        assert secret not in stored


def test_no_window_at_all_of_a_small_model_is_in_what_is_stored():
    written = Written(nbytes=5_000)
    stored = encode(written.public) + b"".join(written.blobs.values())
    windows = {stored[at : at + WINDOW] for at in range(len(stored) - WINDOW + 1)}

    for data in written.files.values():
        assert windows.isdisjoint(data[at : at + WINDOW] for at in range(len(data) - WINDOW + 1))


def test_the_public_manifest_tells_sizes_and_kind_and_nothing_else(written):
    shown = msgspec.json.decode(encode(written.public))

    assert [array["path"] for array in shown["arrays"]] == ["files/0", "files/1"]
    assert (shown["entry"], shown["attributes"], shown["info"]["inputs"], shown["info"]["outputs"]) == ("", {}, [], [])
    assert shown["info"]["requirements"] == []
    assert (shown["framework"], shown["info"]["format"], shown["info"]["code"]) == ("onnx", "onnx", False)


def test_sealing_the_same_model_again_gives_the_same_manifest_so_that_publishing_it_again_makes_no_version(written):
    assert encode(Written().public) == encode(written.public)


def test_versions_share_the_blobs_that_did_not_change():
    one, two = Written("one"), Written("one", files=3)

    assert len(one.blobs.keys() & two.blobs.keys()) == len(one.seals)


def test_more_files_than_ten_keep_their_places():
    many = Written(nbytes=50_000, files=23)

    assert many.opened() == many.manifest
    assert [array.path for array in many.public.arrays][:3] == ["files/0", "files/1", "files/10"]


def test_a_version_that_was_written_as_a_zarr_store_is_sealed_with_its_keys():
    seal, ciphertext = sealed_of(b"{} is a key's value")
    written = Written(nbytes=2_000)
    blobs = written.blobs | {seal.digest: ciphertext}
    array = ArrayEntry("keys/group/zarr.json", "uint8", (seal.nbytes,), (Segment(seal.digest, 0, seal.nbytes),))
    manifest = msgspec.structs.replace(written.manifest, arrays=(*written.manifest.arrays, array))

    public, private = seal_manifest(manifest, [*written.seals, seal], KEY, DIGITS)
    blobs |= {sealed.seal.digest: sealed.ciphertext for sealed in private}

    assert [entry.path for entry in public.arrays] == ["files/0", "files/1", "files/2"]
    assert open_manifest(public, KEY, DIGITS, blobs.__getitem__) == manifest


def test_a_private_part_of_several_blobs():
    plain = Written(nbytes=100)
    empty = tuple(ArrayEntry(f"tensors/{index:04}", "uint8", (0,), (), "n" * 1_000) for index in range(9_000))
    large = msgspec.structs.replace(plain.manifest, arrays=(*plain.manifest.arrays, *empty))

    public, private = seal_manifest(large, plain.seals, KEY, DIGITS)

    assert [sealed.seal.nbytes for sealed in private][:2] == [BLOB_NBYTES] * 2
    assert len(private) == 3
    blobs = {sealed.seal.digest: sealed.ciphertext for sealed in private}
    assert open_manifest(decode(encode(public)), KEY, DIGITS, blobs.__getitem__) == large
    swapped = msgspec.structs.replace(
        public, encryption=msgspec.structs.replace(public.encryption, private=public.encryption.private[1::-1])
    )
    with pytest.raises((MalformedManifestError, ChunkAlteredError)):
        open_manifest(swapped, KEY, DIGITS, blobs.__getitem__)


def test_a_plain_manifest_has_the_bytes_it_always_had():
    array = ArrayEntry("files/m.onnx", "uint8", (3,), (Segment(digest_of(b"abc"), 0, 3),))
    info = ModelInfo("onnx", "onnx", (), (), batched=True, pure=True, code=False)

    data = encode(Manifest(framework="onnx", entry="m.onnx", info=info, arrays=(array,)))

    assert b"encryption" not in data
    assert digest_of(data) == "77d1e73dd6da88d23a154c102fe9d0eb5c884c5ebf4e2ea42517e444feca7f82"
    with pytest.raises(MalformedManifestError, match="canonical"):
        decode(data.replace(b',"entry"', b',"encryption":null,"entry"'))


def test_the_wrong_key_says_which_one_is_needed_and_the_wrong_model_is_an_alteration(written):
    with pytest.raises(LockedModelError, match=f"model key {KEY.id}") as caught:
        written.opened(OTHER_KEY)
    assert caught.value.args[1] == KEY.id
    with pytest.raises(ChunkAlteredError, match="private part"):
        written.opened(context=ModelContext(LAB.public, "letters"))


def test_an_altered_or_exchanged_private_part_is_noticed(written):
    (private,) = written.public.encryption.private
    altered = bytearray(written.blobs[private.digest])
    altered[100] ^= 1

    with pytest.raises(ChunkAlteredError, match=private.digest):
        open_manifest(written.public, KEY, DIGITS, (written.blobs | {private.digest: altered}).__getitem__)

    other = Written("other")
    mixed = msgspec.structs.replace(
        written.public, encryption=msgspec.structs.replace(written.public.encryption, private=other.public.encryption.private)
    )
    with pytest.raises(MalformedManifestError, match="other files"):
        open_manifest(mixed, KEY, DIGITS, other.blobs.__getitem__)


def test_a_private_part_of_another_kind_of_model_is_refused(written):
    lies = msgspec.structs.replace(written.public, info=msgspec.structs.replace(written.public.info, code=True))

    with pytest.raises(MalformedManifestError, match="another kind"):
        open_manifest(lies, KEY, DIGITS, written.blobs.__getitem__)


def test_a_tensor_outside_of_the_files_can_not_be_sealed(written):
    stray = sealed_of(bytes(4))[0]
    arrays = [*written.manifest.arrays, ArrayEntry("tensors/stray", "float32", (1,), (Segment(stray.digest, 0, 4),))]
    arrays.sort(key=lambda array: array.path)

    with pytest.raises(MalformedManifestError, match="none of its files"):
        seal_manifest(msgspec.structs.replace(written.manifest, arrays=tuple(arrays)), [*written.seals, stray], KEY, DIGITS)


def test_a_blob_without_seal_and_a_manifest_sealed_twice_are_refused(written):
    with pytest.raises(MalformedManifestError, match="seals"):
        seal_manifest(written.manifest, written.seals[1:], KEY, DIGITS)
    with pytest.raises(MalformedManifestError, match="already"):
        seal_manifest(written.public, written.seals, KEY, DIGITS)
    with pytest.raises(MalformedManifestError, match="not encrypted"):
        open_manifest(written.manifest, KEY, DIGITS, written.blobs.__getitem__)
    with pytest.raises(MissingBlobsError) as caught:
        on_ciphertext(written.manifest.arrays, {})
    assert len(caught.value.args[1]) == len(written.seals)


def changed(public, **changes):
    return msgspec.structs.replace(public, **changes)


def resealed(public, **changes):
    return msgspec.structs.replace(public, encryption=msgspec.structs.replace(public.encryption, **changes))


def broken(public):
    encryption = public.encryption
    first, *rest = encryption.seals
    replaced = msgspec.structs.replace
    yield "update Tether", resealed(public, scheme="rot13")
    yield "32 hex digits", resealed(public, key="ab" * 15)
    yield "private part has 0", resealed(public, private=())
    yield "private part has 17", resealed(public, private=encryption.private * 17)
    yield "4 MiB", resealed(public, private=(*encryption.private, first))
    yield "seals", resealed(public, seals=tuple(rest))
    yield "sorted", resealed(public, seals=(first, first, *rest))
    yield "sorted", resealed(public, seals=encryption.seals[::-1])
    yield "nonce", resealed(public, seals=(replaced(first, nonce=b"short"), *rest))
    yield "tag", resealed(public, seals=(replaced(first, tag=b""), *rest))
    yield "digest", resealed(public, seals=(replaced(first, digest="../x"), *rest))
    yield "size", resealed(public, seals=(replaced(first, nbytes=BLOB_NBYTES + 1), *rest))
    yield "size", resealed(public, seals=(replaced(first, nbytes=0), *rest))
    yield "seals are not those", resealed(public, seals=(replaced(first, nbytes=1), *rest))
    yield "one nonce", resealed(public, seals=(replaced(first, nonce=rest[0].nonce), *rest))
    yield "one nonce", resealed(public, seals=(replaced(first, nonce=encryption.private[0].nonce), *rest))
    yield "shows an entry", changed(public, entry="0")
    yield "shows an entry", changed(public, attributes={"a": 1})
    yield "shows an entry", changed(public, info=INFO)
    yield "not called", changed(public, arrays=(replaced(public.arrays[0], path="files/model.onnx"), *public.arrays[1:]))


def test_an_encrypted_manifest_that_breaks_a_rule_is_refused(written):
    for reason, manifest in broken(written.public):
        with pytest.raises(MalformedManifestError, match=reason):
            encode(manifest)
        fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
        with pytest.raises(MalformedManifestError):
            decode(msgspec.json.encode(fields, order="sorted"))


def test_base64_that_is_not_canonical_is_refused(written):
    data = encode(written.public)
    tag = msgspec.json.encode(written.public.encryption.seals[0].tag).strip(b'"')
    assert tag.endswith(b"==")
    other = tag[:-3] + bytes([tag[-3] + 1]) + b"=="  # the same 16 bytes to a lax decoder

    with pytest.raises(MalformedManifestError):
        decode(data.replace(tag, other))


def test_a_sealed_version_is_published_and_stored_like_any_other_and_its_folder_shows_nothing(repository):
    written = Written(nbytes=3_000_000)
    for digest, ciphertext in written.blobs.items():
        repository.put_blob(digest, ciphertext)
    data = encode(written.public)

    published = repository.publish("digits", data, LAB.public, LAB.sign(signed_message(data)))

    opened = open_manifest(repository.public_manifest(published.digest), KEY, DIGITS, repository.read_blob)
    assert opened == written.manifest
    assert repository.verify().problems == ()
    assert repository.missing(written.public.blobs()) == []
    stored = b"".join(path.read_bytes() for path in repository.root.rglob("*") if path.is_file())
    for content in written.files.values():
        assert not any(content[at : at + WINDOW] in stored for at in range(0, len(content) - WINDOW, 50_021))
    assert b"secret" not in stored


def test_what_sealing_and_opening_cost(measured):
    data, sealer, opener = os.urandom(BLOB_NBYTES), Sealer(KEY, DIGITS), Opener(KEY, DIGITS)
    buffer, plain = bytearray(BLOB_NBYTES), bytearray(BLOB_NBYTES)
    sealing = opening = float("inf")
    for _ in range(20):
        begun = time.perf_counter()
        seal, ciphertext = sealer.seal(data, buffer)
        between = time.perf_counter()
        opener.open_into(seal, ciphertext, plain)
        sealing, opening = min(sealing, between - begun), min(opening, time.perf_counter() - between)

    assert plain == data
    measured(
        f"a blob of 4 MiB: sealed at {BLOB_NBYTES / sealing / 1e9:.1f} GB/s (hashed twice), opened at {BLOB_NBYTES / opening / 1e9:.1f}"
    )


def test_an_encryption_prints_no_secret(written):
    assert isinstance(written.public.encryption, Encryption)
    assert KEY.secret.hex() not in repr(written.public)
