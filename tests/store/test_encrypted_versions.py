"""An encrypted version is read as any other by who has its key; without it, and on disk, there is nothing to read."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from sealed_models import publish_sealed, tensor_file
from store_models import COLLEAGUE, LAB, files_in, publish, seeded

from tether import store
from tether.errors import ChunkAlteredError, ConfigError, InternalError, LockedModelError, NoSpaceError, UnsupportedError
from tether.security.volatile import SETTING
from tether.store import Repository, VersionStore
from tether.store.format.diff import diff
from tether.store.format.encrypted import ModelContext
from tether.store.format.layout import Piece
from tether.store.hierarchy.elsewhere import kvstore
from tether.store.replicas.replicated import Replicated
from tether.store.sealing import Sealing
from tether.testing.blob_sources import MemoryBlobSource
from tether.types import ModelRef

VALUES = {
    "large": np.random.default_rng(1).standard_normal((2600, 1024), dtype=np.float32),
    "small": np.arange(12, dtype=np.int64).reshape(3, 4),
    "middle": np.random.default_rng(2).standard_normal(30_000).astype(np.float16),
    "empty": np.zeros((0, 3), np.float32),
}
DATA, TENSORS = tensor_file(VALUES)
FILES = {"model.bin": DATA, "weights/more.bin": seeded("more").randbytes(5_000_000), "empty": b""}
DIGITS = ModelContext(LAB.public, "digits")


@pytest.fixture
def memory(monkeypatch):
    """A tmpfs of the test's own."""
    base = Path("/dev/shm") / f"tether-test-{os.getpid()}-{os.urandom(4).hex()}"
    base.mkdir(mode=0o700)
    monkeypatch.setenv(SETTING, str(base))
    yield base
    shutil.rmtree(base)


def plain_in(base):
    """The files that lie in memory, without the locks."""
    return [path for path in base.rglob("*") if path.is_file() and path.name != "lock" and path.suffix != ".owner"]


@pytest.fixture
def digest(repository):
    return publish_sealed(repository, FILES, TENSORS).digest


def array_of(repository, digest, path):
    return next(array for array in repository.manifest(digest).arrays if array.path == path)


def test_what_a_file_is_sealed_with_is_written_down_many_at_a_time(repository, tmp_path):
    (tmp_path / "m").write_bytes(seeded("m").randbytes(6 << 20))
    intake = Sealing(repository, LAB.public, lambda: 0.0).intake("digits")
    before = repository.change_count()
    intake.add_file(tmp_path / "m", "m", [Piece(start, 1 << 19) for start in range(0, 6 << 20, 1 << 19)])
    assert repository.change_count() == before
    intake.settle()
    assert repository.change_count() == before + 1


def test_its_manifest_and_arrays_are_read_like_those_of_a_plain_one(repository, digest):
    manifest = repository.manifest(digest)
    assert (manifest.entry, {array.path for array in manifest.files()}) == ("model.bin", {f"files/{name}" for name in FILES})
    assert all(array.path.startswith("files/") for array in repository.public_manifest(digest).arrays)
    for name, data in FILES.items():
        array = array_of(repository, digest, f"files/{name}")
        assert repository.read_array(array, 0, array.nbytes) == data
        assert bytes(repository.load_file(digest, name)) == data
    assert repository.read_array(array_of(repository, digest, "files/model.bin"), 4_194_000, 4_195_000) == DATA[4_194_000:4_195_000]


@pytest.mark.parametrize("threads", [1, 3])
def test_its_weights_come_into_memory_of_their_own(repository, digest, threads):
    found = repository.load_tensors(digest, threads=threads)
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found[name], value)
        assert not found[name].flags.writeable
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert not any(line.endswith(".pack") for line in maps.splitlines() if str(repository.root) in line)
    assert list(repository.load_tensors(digest, ["small"])) == ["small"]


@pytest.mark.parametrize("threads", [1, 3])
def test_small_blobs_side_by_side_are_read_at_once_and_the_altered_one_is_named(repository, threads, monkeypatch):
    values = {f"bias{number:02}": np.random.default_rng(number).standard_normal(7_000) for number in range(60)}
    data, tensors = tensor_file(values)
    digest = publish_sealed(repository, {"model.bin": data}, tensors, name="small").digest
    manifest, reads, real = repository.manifest(digest), [], os.preadv

    def counting(descriptor, views, offset):
        reads.append(offset)
        return real(descriptor, views, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", counting)
        for name, array in repository.load_tensors(manifest, threads=threads).items():
            np.testing.assert_array_equal(array, values[name])
    assert len(reads) < 10 < len({segment.digest for array in manifest.tensors() for segment in array.segments})

    blob = next(array for array in manifest.tensors() if array.path == "tensors/bias30").segments[0].digest
    location = repository._catalog.locate(blob)
    with (repository.root / "packs" / location.pack).open("r+b") as pack:
        pack.seek(location.offset)
        pack.write(bytes(16))
    with pytest.raises(ChunkAlteredError, match=blob):
        repository.load_tensors(manifest, threads=threads)
    whole = [array.path.removeprefix("tensors/") for array in manifest.tensors() if all(part.digest != blob for part in array.segments)]
    for name, array in repository.load_tensors(manifest, whole, threads=threads).items():
        np.testing.assert_array_equal(array, values[name])


def test_zarr_diff_and_export_know_nothing_of_it(repository, digest, tmp_path):
    weights = VersionStore(repository, digest).weights
    np.testing.assert_array_equal(weights["large"][100:103, 5], VALUES["large"][100:103, 5])
    changed = VALUES | {"small": VALUES["small"] + 1}
    data, tensors = tensor_file(changed)
    second = publish_sealed(repository, FILES | {"model.bin": data}, tensors)
    found = diff(repository.manifest(digest), repository.manifest(second.digest), repository.read_array)
    assert [(change.name, change.kind) for change in found.tensors] == [("small", "changed")]
    assert found.shared_nbytes > 0.9 * len(DATA)
    repository.export(ModelRef("digits", version=2), tmp_path / "out")
    assert files_in(tmp_path / "out") == FILES | {"model.bin": data}


def test_another_process_of_the_lab_reads_it_through_a_pickle_and_the_key_does_not_travel(repository, digest):
    opened = pickle.loads(pickle.dumps(VersionStore(repository, digest)))  # noqa: S301 (our own bytes)
    np.testing.assert_array_equal(opened.weights["middle"][:], VALUES["middle"])
    array = pickle.loads(pickle.dumps(array_of(repository, digest, "tensors/small")))  # noqa: S301
    with pytest.raises(InternalError, match="parted from its key"):
        repository.read_array(array, 0, array.nbytes)


def test_the_same_bytes_are_the_same_version_and_a_second_one_stores_what_changed(repository, digest):
    again = publish_sealed(repository, FILES, TENSORS)
    assert (again.digest, again.created) == (digest, False)
    before = sum(path.stat().st_size for path in (repository.root / "packs").iterdir())
    publish_sealed(repository, FILES | {"small.bin": b"new"}, TENSORS)
    assert sum(path.stat().st_size for path in (repository.root / "packs").iterdir()) < before + 50_000


def test_its_checkout_lies_in_memory_alone_and_goes_when_it_is_discarded(repository, digest, memory):
    folder = repository.checkout(digest)
    assert memory in folder.parents
    assert files_in(folder) == FILES
    assert list((repository.root / "cache").iterdir()) == []
    inode = (folder / "model.bin").stat().st_ino
    assert (repository.checkout(digest) / "model.bin").stat().st_ino == inode  # looked at again, not written again
    (folder / "model.bin").chmod(0o600)
    (folder / "model.bin").write_bytes(b"altered")
    assert files_in(repository.checkout(digest)) == FILES
    repository.discard(digest)
    assert plain_in(memory) == []
    repository.checkout(digest)
    repository.close()
    assert plain_in(memory) == []


def test_where_no_memory_can_hold_it_its_checkout_says_so_and_leaves_nothing(repository, digest, monkeypatch, tmp_path, memory):
    with monkeypatch.context() as patched:
        patched.setenv(SETTING, str(tmp_path))
        with pytest.raises(ConfigError, match="tmpfs"):
            repository.checkout(digest)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(NoSpaceError, match="shm-size"):
            repository.checkout(digest)
    assert plain_in(memory) == []
    assert files_in(repository.checkout(digest)) == FILES


def test_it_cannot_be_copied_out_for_tensorstore(repository, digest):
    with pytest.raises(UnsupportedError, match="encrypted"):
        kvstore(repository, digest)


@pytest.mark.usefixtures("digest")
def test_nothing_of_it_is_in_the_store_and_a_plain_version_beside_it_reads_as_ever(repository):
    plain = publish(repository, 3, name="plain")
    stored = b"".join(path.read_bytes() for path in repository.root.rglob("*") if path.is_file())
    for content in FILES.values():
        assert not any(content[at : at + 16] in stored for at in range(0, max(0, len(content) - 16), 50_021))
    for word in (b"model.bin", b"more.bin", b"middle"):
        assert word not in stored
    assert repository.verify().problems == ()
    assert repository.manifest(plain.digest).arrays


# --- without the key


def test_a_store_without_keys_verifies_and_collects_what_it_cannot_read(repository, digest, tmp_path):
    shutil.copytree(repository.root, tmp_path / "elsewhere" / "store")
    with Repository.open(tmp_path / "elsewhere" / "store", keys=tmp_path / "nowhere") as copy:
        with copy._catalog.writing() as db:
            db.execute("DELETE FROM model_keys")
        for read in (copy.manifest, copy.checkout, copy.load_tensors):
            with pytest.raises(LockedModelError, match="tether allow") as caught:
                read(digest)
            assert caught.value.args[1] == copy.public_manifest(digest).encryption.key
        assert copy.verify().problems == ()
        assert copy.verify(ModelRef("digits")).checked == len(set(copy.public_manifest(digest).blobs())) + 1
        copy.gc(grace=0.0)
        assert copy.missing(copy.public_manifest(digest).blobs()) == []
    assert not (tmp_path / "nowhere").exists()


def test_the_private_part_is_verified_and_mended_like_any_blob(repository, digest):
    public = repository.public_manifest(digest)
    private = public.encryption.private[0].digest
    good, location = repository.read_blob(private), repository._catalog.locate(private)
    with (repository.root / "packs" / location.pack).open("r+b") as pack:
        pack.seek(location.offset)
        pack.write(bytes(16))
    (problem,) = repository.verify(ModelRef("digits")).problems
    assert (problem.digest, "private" in problem.path) == (private, True)
    with pytest.raises(ChunkAlteredError):
        repository.manifest(digest)
    assert repository.repair({private: good}.get).repaired == (private,)
    assert repository.manifest(digest).entry == "model.bin"


@pytest.mark.parametrize("where", ["tensor", "file", "checkout", "all"])
def test_a_flipped_bit_of_ciphertext_is_named_before_anything_is_used(repository, digest, where, memory):
    array = array_of(repository, digest, "tensors/large")
    blob = array.segments[1].digest
    location = repository._catalog.locate(blob)
    with (repository.root / "packs" / location.pack).open("r+b") as pack:
        pack.seek(location.offset + 1000)
        byte = pack.read(1)
        pack.seek(location.offset + 1000)
        pack.write(bytes([byte[0] ^ 1]))
    reads = {
        "tensor": lambda: repository.read_array(array, 0, array.nbytes),
        "file": lambda: repository.load_file(digest, "model.bin"),
        "checkout": lambda: repository.checkout(digest),
        "all": lambda: repository.load_tensors(digest),
    }
    with pytest.raises(ChunkAlteredError, match=blob) as caught:
        reads[where]()
    assert caught.value.args[1] == blob
    assert plain_in(memory) == []


@pytest.mark.parametrize("kind", ["spliced", "reordered", "truncated", "of another model", "of another version"])
def test_ciphertext_that_is_not_in_its_place_is_never_opened(repository, digest, kind, memory):
    """As whoever can write to the store's disk might do: the catalog's index is in nobody's signature."""
    large = array_of(repository, digest, "tensors/large").segments
    first, second = (repository._catalog.locate(segment.digest) for segment in large[:2])
    same = {"model.bin": DATA.replace(b"header", b"HEADER"), "weights/more.bin": seeded("other").randbytes(5_000_000)}
    placed = {
        "spliced": lambda: {large[0].digest: second},
        "reordered": lambda: {large[0].digest: second, large[1].digest: first},
        "truncated": lambda: {large[0].digest: first._replace(nbytes=first.nbytes - 1)},
        "of another model": lambda: {large[0].digest: blob_in(repository, publish_sealed(repository, FILES, TENSORS, name="other"))},
        "of another version": lambda: {large[0].digest: blob_in(repository, publish_sealed(repository, same))},
    }[kind]()
    with repository._catalog.writing() as db:
        for blob, location in placed.items():
            update = "UPDATE blobs SET pack = (SELECT id FROM packs WHERE name = ?), offset = ?, nbytes = ? WHERE digest = ?"
            db.execute(update, (location.pack, location.offset, location.nbytes, bytes.fromhex(blob)))
    assert repository._catalog.locate(large[0].digest) == placed[large[0].digest]
    array = array_of(repository, digest, "tensors/large")
    for read in (
        lambda: repository.read_array(array, 0, array.nbytes),
        lambda: repository.load_tensors(digest),
        lambda: repository.checkout(digest),
        lambda: repository.read_plain_blob(array, large[0].digest),
    ):
        with pytest.raises(ChunkAlteredError, match=large[0].digest):
            read()
    assert repository.verify(ModelRef("digits", version=1)).problems
    assert plain_in(memory) == []


def blob_in(repository, published):
    blob = repository.public_manifest(published.digest).encryption.seals[0].digest
    return repository._catalog.locate(blob)


# --- sharing


def test_an_envelope_opens_the_model_on_another_data_folder(repository, digest, tmp_path):
    data, signature = repository.manifest_bytes(digest), repository.signature(digest, LAB.public)
    with Repository.open(tmp_path / "peer" / "store", own=COLLEAGUE.public) as peer:
        for blob in repository.public_manifest(digest).blobs():
            peer.put_blob(blob, repository.read_blob(blob))
        peer.publish("digits", data, LAB.public, signature)
        with pytest.raises(LockedModelError):
            peer.manifest(digest)
        envelope = repository.keys.grant(DIGITS, COLLEAGUE.public)
        assert peer.keys.accept(envelope, COLLEAGUE).context == DIGITS
        np.testing.assert_array_equal(peer.load_tensors(digest)["large"], VALUES["large"])
        assert [path.name for path in (tmp_path / "peer" / "keys").glob("cluster-*.key")]

        repository.keys.revoke(COLLEAGUE.public)
        later = publish_sealed(repository, FILES | {"later.bin": b"not for them"}, TENSORS)
        for blob in repository.public_manifest(later.digest).blobs():
            peer.put_blob(blob, repository.read_blob(blob))
        peer.publish("digits", repository.manifest_bytes(later.digest), LAB.public, repository.signature(later.digest, LAB.public))
        with pytest.raises(LockedModelError):
            peer.manifest(later.digest)
        assert peer.manifest(digest).entry == "model.bin"


def test_rotating_the_cluster_key_changes_nothing_for_readers(repository, digest):
    repository.keys.rotate_cluster()
    with Repository.open(repository.root, read_only=True) as reader:
        assert bytes(reader.load_file(digest, "model.bin")) == DATA


# --- what was sent


def test_what_was_sent_before_a_crash_need_not_be_sent_again(repository):
    blobs = {store.digest_of(data): data for data in (seeded(number).randbytes(50_000) for number in range(100))}
    sealing = Sealing(repository, LAB.public, clock=lambda: 0.0)
    for digest, data in blobs.items():
        sealing.put_blob("digits", digest, data)
    lacking = Sealing(repository, LAB.public).intake("digits").missing(blobs)  # another process: what was not written down is lost
    assert 0 < len(lacking) < 64
    assert sealing.intake("digits").missing(blobs) == []
    assert Sealing(repository, LAB.public).intake("digits").missing(blobs) == []
    assert len(Sealing(repository, LAB.public).intake("letters").missing(blobs)) == 100
    repository.clear_staging()
    assert len(Sealing(repository, LAB.public).intake("digits").missing(blobs)) == 100


async def test_what_is_fetched_from_elsewhere_is_decrypted_where_it_is_read(repository, digest, tmp_path, memory):
    origin = MemoryBlobSource.of(repository)
    key = repository.key_of(digest)
    with Repository.open(tmp_path / "worker" / "store") as local, Replicated(local, [origin]) as replica:
        with pytest.raises(LockedModelError):
            replica.manifest(digest)
        local.lend_key(*key)
        array = next(array for array in replica.manifest(digest).arrays if array.path == "tensors/large")
        assert replica.read_array(array, 4_000_000, 4_300_000) == VALUES["large"].tobytes()[4_000_000:4_300_000]
        assert await replica.aread_array(array, 100, 200) == VALUES["large"].tobytes()[100:200]
        assert len(origin.asked) < len(repository.public_manifest(digest).blobs())
        streamed = {name: tensor async for name, tensor in replica.stream_tensors(digest)}
        for name, value in (streamed | replica.load_tensors(digest, ["small"]) | await replica.aload_tensors(digest, ["middle"])).items():
            np.testing.assert_array_equal(value, VALUES[name])
        np.testing.assert_array_equal(VersionStore(replica, digest).weights["large"][2000:], VALUES["large"][2000:])
        folder = await replica.acheckout(digest, "digits")
        assert (memory in folder.parents, files_in(folder)) == (True, FILES)
        stored = b"".join(path.read_bytes() for path in (tmp_path / "worker").rglob("*") if path.is_file())
        assert DATA[1000:1016] not in stored
    assert not (tmp_path / "worker" / "keys").exists()
