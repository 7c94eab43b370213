"""Drafts of encrypted versions: written in memory alone, published as ciphertext; a draft that lies on the disk is not called encrypted."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zarr
from sealed_models import publish_sealed
from store_models import INFO, LAB

from tether.errors import BadNameError, ConflictError, MissingBlobsError, StoreError
from tether.security.volatile import SETTING
from tether.store import DraftStore, Manifest, VersionStore, open_group
from tether.store.hierarchy.draft import WEIGHTS_ONLY
from tether.store.sealing import Sealing

CANARY = "canary-7f1e6a"
VALUES = np.frombuffer((CANARY.encode() + b"-weights") * 60_000, np.uint8)
"""1.3 MB: in a file of its own; what is small lies in the draft's table."""


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """A tmpfs of the test's own."""
    base = Path("/dev/shm") / f"tether-test-{os.getpid()}-{os.urandom(4).hex()}"
    base.mkdir(mode=0o700)
    monkeypatch.setenv(SETTING, str(base))
    yield base
    shutil.rmtree(base)


def write(draft):
    group = zarr.open_group(draft, mode="w", attributes={"author": CANARY})
    group.create_array(f"{CANARY}-layer/weights", data=VALUES, compressors=None)
    group.create_array("small", data=VALUES[:100], compressors=None)


def found_in(folder):
    """The files below a folder that say the canary in their name or their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if CANARY in str(path.relative_to(folder)) or CANARY.encode() in path.read_bytes()]


def test_it_is_published_encrypted_and_no_name_or_value_of_it_is_on_the_disk(repository, memory, tmp_path):
    draft = DraftStore.encrypted("run")
    write(draft)
    assert found_in(memory)  # a search that finds nothing anywhere shows nothing
    about = msgspec.structs.replace(WEIGHTS_ONLY, attributes={"note": CANARY})
    published = draft.publish(repository, "run", LAB, about=about)

    assert repository.public_manifest(published.digest).encryption is not None
    assert found_in(tmp_path) == []
    group = open_group(repository, published.digest)
    np.testing.assert_array_equal(group[f"{CANARY}-layer/weights"][:], VALUES)
    np.testing.assert_array_equal(group["small"][:], VALUES[:100])
    assert (group.attrs["author"], group.attrs["tether"]["attributes"]) == (CANARY, {"note": CANARY})
    assert draft.publish(repository, "run", LAB, about=about).created is False
    draft.discard()
    assert found_in(memory) == []


def test_a_second_version_stores_what_changed_only(repository):
    draft = DraftStore.encrypted("run")
    data = np.random.default_rng(1).random((4, 500_000))
    array = zarr.create_array(draft, name="a", data=data, chunks=(1, 500_000), compressors=None)
    first = repository.public_manifest(draft.publish(repository, "run", LAB).digest)
    array[2] = 0.5
    second = repository.public_manifest(draft.publish(repository, "run", LAB).digest)

    new = set(second.blobs()) - set(first.blobs())
    assert len(new - {seal.digest for seal in second.encryption.private}) == 1  # a row is one blob of 4 MB


def test_a_model_that_was_encrypted_takes_no_draft_from_the_disk_unless_that_is_said(repository):
    publish_sealed(repository, {"model.onnx": b"weights"}, name="run")
    draft = DraftStore(repository.root, "run")
    write(draft)
    with pytest.raises(ConflictError, match=r"DraftStore\.encrypted\('run'\).*encrypt=False"):
        draft.publish(repository, "run", LAB)
    with pytest.raises(ConflictError, match="lies on the disk in plain"):
        draft.publish(repository, "other", LAB, encrypt=True)
    assert draft.publish(repository, "other", LAB).version == 1
    plain = draft.publish(repository, "run", LAB, encrypt=False)
    assert (plain.version, repository.public_manifest(plain.digest).encryption) == (2, None)
    with DraftStore.encrypted("run") as private:
        write(private)
        assert private.publish(repository, "run", LAB).version == 3
        assert repository.public_manifest(private.publish(repository, "run", LAB, encrypt=False).digest).encryption is None


def test_files_beside_the_written_arrays_are_encrypted_too_or_refused(repository):
    draft = DraftStore.encrypted("run")
    write(draft)
    intake = Sealing(repository, LAB.public).intake("run")
    about = Manifest(framework="onnx", entry="model.onnx", info=INFO, arrays=(intake.add_bytes("model.onnx", b"weights " * 100),))
    intake.settle()
    group = open_group(repository, draft.publish(repository, "run", LAB, about=about).digest)
    assert group["files/model.onnx"][:].tobytes() == b"weights " * 100
    plain = Manifest(framework="onnx", entry="other.onnx", info=INFO, arrays=(repository.add_bytes("other.onnx", b"others " * 100),))
    with pytest.raises(MissingBlobsError, match="not encrypted yet"):
        draft.publish(repository, "run", LAB, about=plain)


def unpickled(data):
    return pickle.loads(data)  # noqa: S301 (our own bytes)


def fill(draft):
    draft.set_sync("theirs", zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(b"x" * 100_000))


def test_other_processes_write_it_too_and_it_ends_with_the_one_that_began_it(memory):
    draft = DraftStore.encrypted("run")
    assert unpickled(pickle.dumps(draft)) == draft == draft.with_read_only(read_only=True)
    assert unpickled(pickle.dumps(draft)).is_encrypted
    process = multiprocessing.get_context("spawn").Process(target=fill, args=(draft,))
    process.start()
    process.join()
    assert draft.get_sync("theirs").to_bytes() == b"x" * 100_000

    code = "import pickle, sys; from tether.store import DraftStore; sys.stdout.write(pickle.dumps(DraftStore.encrypted('run')).hex())"
    began = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before = sorted(memory.rglob("*"))
    for use in (fill, lambda ended: ended.get_sync("theirs")):
        with pytest.raises(StoreError, match="begin it again"):
            use(unpickled(bytes.fromhex(began.stdout)))
    draft.discard()
    with pytest.raises(StoreError, match="begin it again"):
        draft.get_sync("theirs")
    assert not [path for path in memory.rglob("*") if path not in before]


def test_a_name_that_no_model_can_have_leaves_nothing_in_memory(memory):
    with pytest.raises(BadNameError):
        DraftStore.encrypted("../run")
    assert not list(memory.iterdir())


def test_a_plain_version_reads_as_before(repository):
    draft = DraftStore(repository.root, "run")
    write(draft)
    assert VersionStore(repository, draft.publish(repository, "run", LAB).digest).weights is not None
