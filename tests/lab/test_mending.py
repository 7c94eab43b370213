"""What can't be mended is said with what to do about it; an index is read again also where no lab runs."""

import random
import sqlite3

import pytest
from click.testing import CliRunner
from conftest import write_model

from tether.cli import tether as command
from tether.errors import ConflictError, NoLabError
from tether.lab.mending import advice, rebuild_index
from tether.security.identity import Identity
from tether.store import Manifest, Repository, digest_of, encode, signed_message
from tether.types import ModelInfo

LAB = Identity(bytes(range(32)))
INFO = ModelInfo("onnx", "onnx", (), (), batched=True, pure=True, code=False)
DATA = random.Random("mending").randbytes(200_000)


def test_each_kind_of_what_nobody_has_is_said_with_what_to_do():
    paths = {"a": "files/model.onnx", "b": "files/.tether/expected.npz", "c": "files/.tether/expected.npz"}
    nothing_given = advice("digits", ("a", "b", "c", "d"), paths, given=False)
    given = advice("digits", ("a", "b"), paths, given=True)

    assert nothing_given[0] == "nobody has a of model.onnx: give the published files with --from"
    assert nothing_given[1].startswith(".tether/expected.npz is Tether's own, not one of the published files")
    assert "publish digits again with its example" in nothing_given[1]
    assert nothing_given[2].startswith("d is in none of the published files")
    assert len(nothing_given) == 3
    assert given[0].startswith("a of model.onnx is not in what was given: give the files as they were published")
    assert not any("--from" in line for line in given)
    (written,) = advice("digits", ("e",), {"e": "keys/weights/zarr.json"}, given=False)
    assert written.startswith("e of keys/weights/zarr.json is in no file")
    assert "--from" not in written


@pytest.fixture
def store(tmp_path):
    """The folder of a store with one version, whose index is wrong: it says that the blob lies at another place."""
    with Repository.open(tmp_path / "data" / "store", own=LAB.public) as repository:
        arrays = (repository.add_bytes("m.onnx", DATA),)
        manifest = encode(Manifest(framework="onnx", entry="m.onnx", info=INFO, arrays=arrays))
        repository.publish("net", manifest, LAB.public, LAB.sign(signed_message(manifest)))
    with sqlite3.connect(tmp_path / "data" / "store" / "catalog.sqlite") as db:
        db.execute("UPDATE blobs SET offset = offset + 64")
    db.close()
    return tmp_path / "data" / "store"


def run(*words):
    return CliRunner().invoke(command, list(words))


def test_where_no_lab_runs_the_index_of_the_data_folder_is_read_again(store):
    with Repository.open(store, read_only=True) as repository:
        assert repository.verify().problems

    result = run("repair", "--index", "--data", str(store.parent))

    assert (result.exit_code, result.output) == (0, "index read again from 1 packs\n")
    with Repository.open(store) as repository:
        assert repository.verify().problems == ()
        assert repository.read_blob(digest_of(DATA)) == DATA
        with pytest.raises(ConflictError, match="already writes the store"):
            rebuild_index(str(store.parent))


def test_where_there_is_no_store_none_is_made(tmp_path):
    with pytest.raises(NoLabError, match="no store"):
        rebuild_index(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_neither_a_name_nor_the_index_is_a_usage_error(store):
    assert run("repair", "--data", str(store.parent)).exit_code == 2
    assert run("repair", "--from", str(store), "--data", str(store.parent)).exit_code == 2


def test_a_lab_that_runs_reads_its_index_again_and_says_what_no_published_file_can_mend(own_lab, tmp_path):
    path = write_model(tmp_path / "model.onnx")
    own_lab.publish("net", path, example=[[0.0] * 16])
    at = ["--url", own_lab.gateway, "--api-key", own_lab.operations.client._api_key]
    pack = next((tmp_path / "data/store/packs").glob("*.pack"))
    with Repository.open(tmp_path / "data/store", read_only=True) as reader:
        version = reader.models()[0].versions[0]
        expected = next(array for array in reader.manifest(version.digest).arrays if array.path == "files/.tether/expected.npz")
        blob = reader.read_blob(expected.segments[0].digest)
    data = pack.read_bytes()
    pack.chmod(0o644)
    pack.write_bytes(data.replace(blob, bytes(len(blob))))
    assert pack.read_bytes() != data

    index = run("repair", "--index", *at)
    assert (index.exit_code, index.output) == (0, "index read again from 1 packs\n")
    result = run("repair", "net", "--from", str(path), *at)
    assert result.exit_code == 1
    assert ".tether/expected.npz is Tether's own" in result.output
    assert "--from" not in result.output
    again = own_lab.publish("net", path, example=[[0.0] * 16])
    assert (again.version, own_lab.verify("net").ok) == (1, True)
