"""A worker's encrypted models: their files are in memory while they are loaded, whether the lab's store is on this host or far away."""

import os
import shutil
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tether.errors import (
    BadModelError,
    ChunkAlteredError,
    ChunkMissingError,
    LoadFailedError,
    LockedModelError,
    NoSpaceError,
    WorkerLostError,
)
from tether.manager.operations import Operations
from tether.runtimes import inspect
from tether.security.identity import Identity
from tether.security.volatile import SETTING
from tether.store import Manifest, Repository, Segment, digest_of, signed_message
from tether.store.format.layout import cut
from tether.store.format.manifest import ArrayEntry
from tether.store.sealing import Sealing
from tether.types import ModelVersion
from tether.worker.discretion import discretion, withheld
from tether.worker.engine import Engine
from tether.worker.manager_blobs import ManagerBlobs
from tether.worker.model_files import ModelFiles, load_pinned
from tether.worker.runner import load_model

LAB = Identity(bytes(range(32)))
X = np.random.default_rng(5).random((3, 64), dtype=np.float32)
WEIGHTS = np.random.default_rng(6).standard_normal((64, 10)).astype(np.float32)
CUSTOM = """
import os, tempfile
import numpy as np

class Mine:
    inputs, outputs = [("x", "FP32", (-1, 64))], [("y", "FP32", (-1, 10))]

    def load(self, path):
        self.weights = np.load(path / "weights.npy")
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.write(self.weights.tobytes())
        print("the secret sentence of this model", flush=True)

    def predict(self, x):
        if x[0, 0] < 0:
            os._exit(3)
        return {"y": x @ self.weights}
"""


def write_onnx(path):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(WEIGHTS, "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_custom(folder):
    folder.mkdir()
    np.save(folder / "weights.npy", WEIGHTS)
    (folder / "model.py").write_text(CUSTOM)
    return folder


def publish(repository, path, name, info=None):
    """Encrypted, as the manager does it, without its sandbox."""
    intake, arrays = Sealing(repository, LAB.public).intake(name), []
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    for file in files:
        data, segments = file.read_bytes(), []
        for offset, nbytes in cut(len(data)):
            part = data[offset : offset + nbytes]
            intake.put(digest_of(part), part)
            segments.append(Segment(digest_of(part), 0, nbytes))
        arrays.append(ArrayEntry(f"files/{file.name}", "uint8", (len(data),), tuple(segments)))
    info = info or inspect(path)
    entry = path.name if path.is_file() else ""
    data = intake.finished(Manifest(framework=info.framework, entry=entry, info=info, arrays=tuple(arrays)))
    published = repository.publish(name, data, LAB.public, LAB.sign(signed_message(data)))
    return ModelVersion(name, published.version, published.digest)


@pytest.fixture
def memory(monkeypatch):
    base = Path("/dev/shm") / f"tether-test-{os.getpid()}-{os.urandom(4).hex()}"
    base.mkdir(mode=0o700)
    monkeypatch.setenv(SETTING, str(base))
    yield base
    shutil.rmtree(base)


def plain_files(memory):
    return [path for path in memory.rglob("*") if path.is_file() and path.name != "lock" and path.suffix != ".owner"]


@pytest.fixture
def lab(tmp_path):
    with Repository.open(tmp_path / "lab" / "store", own=LAB.public) as repository:
        yield repository


class Manager:
    """The manager's operations, asked as a worker asks them."""

    def __init__(self, lab, tmp_path):
        self.operations, self.asked = Operations(lab, LAB, tmp_path / "publishing"), []

    async def ask(self, operation, **arguments):
        self.asked.append(operation)
        return await getattr(self.operations, operation)(**arguments)

    async def close(self):
        pass


@pytest.fixture
def manager(lab, tmp_path):
    return Manager(lab, tmp_path)


@pytest.fixture(params=["beside", "far"])
def engine(request, lab, manager, tmp_path, memory):
    """Of a worker on the lab's host, and of one elsewhere."""
    store = lab.root if request.param == "beside" else tmp_path / "worker" / "store"
    files = ModelFiles(store, tmp_path / "worker" / "replica", ManagerBlobs(manager.ask, manager.close), 1 << 30)
    (tmp_path / "sockets").mkdir()
    engine = Engine(tmp_path / "sockets", files.fetch, partial(load_pinned, 1))
    yield engine
    engine.close()
    files.close()
    assert plain_files(memory) == []


def run(engine, model):
    return engine._servers[model].loaded.run({"x": X})["y"]


def found_on_disk(tmp_path):
    needle = WEIGHTS.tobytes()[1000:1016]
    spare = {"source.onnx", "weights.npy"}
    return [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in spare and needle in path.read_bytes()]


def test_it_answers_and_its_files_go_with_it(engine, lab, tmp_path, memory):
    model = publish(lab, write_onnx(tmp_path / "source.onnx"), "net")
    engine.load(model)
    np.testing.assert_allclose(run(engine, model), X @ WEIGHTS, rtol=1e-5)
    assert [path.name for path in plain_files(memory)] == ["source.onnx"]
    assert found_on_disk(tmp_path) == []
    assert engine.unload(model)
    assert plain_files(memory) == []
    engine.load(model)
    np.testing.assert_allclose(run(engine, model), X @ WEIGHTS, rtol=1e-5)


def test_what_a_code_model_unpacks_is_in_memory_too_and_what_it_prints_in_no_log(engine, lab, tmp_path, memory, caplog, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    model = publish(lab, write_custom(tmp_path / "custom"), "mine")
    caplog.set_level("DEBUG")
    engine.load(model)
    np.testing.assert_allclose(run(engine, model), X @ WEIGHTS, rtol=1e-5)
    assert len(plain_files(memory)) == 3  # its two files, and what it wrote aside
    assert list(temporary.iterdir()) == []
    with pytest.raises(Exception, match="the model's process died") as died:
        engine._servers[model].loaded.run({"x": -X})
    np.testing.assert_allclose(run(engine, model), X @ WEIGHTS, rtol=1e-5)  # started again, from the same files
    engine.unload(model)
    assert plain_files(memory) == []
    assert "secret sentence" not in caplog.text + str(died.value)


def test_a_load_that_fails_leaves_nothing(engine, lab, tmp_path, memory, monkeypatch):
    model = publish(lab, write_onnx(tmp_path / "source.onnx"), "net")
    with monkeypatch.context() as patched:
        patched.setattr("tether.worker.model_files.load_model", lambda *_, **__: 1 / 0)
        with pytest.raises(Exception, match="ZeroDivisionError"):
            engine.load(model)
    assert plain_files(memory) == []


def test_damage_is_mended_from_the_manager_or_named(lab, tmp_path, memory, manager):
    model = publish(lab, write_onnx(tmp_path / "source.onnx"), "net")
    blob = lab.public_manifest(model.digest).arrays[0].segments[0].digest
    location = lab._catalog.locate(blob)
    files = ModelFiles(lab.root, tmp_path / "worker", ManagerBlobs(manager.ask, manager.close), 1 << 30)
    with (lab.root / "packs" / location.pack).open("r+b") as pack:
        pack.seek(location.offset)
        pack.write(bytes(100))
    with pytest.raises(Exception, match=blob):
        files.fetch(model)
    assert plain_files(memory) == []
    with pytest.raises(ChunkAlteredError):
        lab.checkout(model.digest)
    files.close()


def test_a_version_that_the_lab_can_not_open_says_what_to_do(lab, tmp_path, memory, manager):
    model = publish(lab, write_onnx(tmp_path / "source.onnx"), "net")
    with lab._catalog.writing() as db:
        db.execute("DELETE FROM model_keys")
    for store in (lab.root, tmp_path / "elsewhere"):
        files = ModelFiles(store, tmp_path / "worker", ManagerBlobs(manager.ask, manager.close), 1 << 30)
        with pytest.raises(LockedModelError, match="tether allow"):
            files.fetch(model)
        files.close()
    assert plain_files(memory) == []


CANARY = "canary_5b7e"


def write_broken_onnx(path):
    """Two shapes that do not fit; ONNX Runtime names node and tensors in what it says of it."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", f"{CANARY}_weights"], ["y"], name=f"{CANARY}_node")],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(WEIGHTS[:5], f"{CANARY}_weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_broken_custom(folder):
    write_custom(folder)
    lines = f"self.weights = np.load(path / 'weights.npy')\n        raise ValueError('{CANARY}', self.weights[0])"
    (folder / "model.py").write_text(CUSTOM.replace('self.weights = np.load(path / "weights.npy")', lines))
    return folder


def write_once_custom(folder, mark):
    """It can be loaded once; `mark` is a file that tells whether it was."""
    write_custom(folder)
    lines = f"if os.path.exists({str(mark)!r}):\n            raise ValueError('{CANARY}')\n        open({str(mark)!r}, 'w').close()"
    (folder / "model.py").write_text(CUSTOM.replace("def load(self, path):", f"def load(self, path):\n        {lines}"))
    return folder


@pytest.mark.parametrize("kind", ["onnx", "custom"])
def test_why_it_can_not_be_loaded_is_told_without_a_word_of_what_is_in_it(engine, lab, tmp_path, kind, caplog, capfd):
    caplog.set_level("DEBUG")
    broken = write_broken_onnx(tmp_path / "net.onnx") if kind == "onnx" else write_broken_custom(tmp_path / "net")
    whole = write_onnx(tmp_path / "whole.onnx") if kind == "onnx" else write_custom(tmp_path / "whole")
    model = publish(lab, broken, "net", info=inspect(whole))
    with pytest.raises(BadModelError) as plainly:
        load_model(broken, inspect(whole))
    assert CANARY in str(plainly.value)  # it is told of a plain one
    capfd.readouterr()
    caplog.clear()

    with pytest.raises(BadModelError, match="encrypted, so that only the kind of failure is said here, bad_model: to see more") as told:
        engine.load(model)

    out, err = capfd.readouterr()
    said = "".join(traceback.format_exception(told.value)) + repr(told.value.args) + caplog.text + out + err
    assert CANARY not in said
    assert "shape" not in said.lower()


def test_why_it_can_not_be_started_again_is_told_as_little(lab, manager, memory, tmp_path):
    model = publish(lab, write_once_custom(tmp_path / "net", memory / "begun"), "net", info=inspect(write_custom(tmp_path / "whole")))
    files = ModelFiles(lab.root, tmp_path / "worker", ManagerBlobs(manager.ask, manager.close), 1 << 30)
    loaded = load_pinned(1, files.fetch(model))
    with pytest.raises(WorkerLostError):
        loaded.run({"x": -X})
    with pytest.raises(BadModelError, match="only the kind of failure is said here, bad_model") as told:
        loaded.run({"x": X})
    loaded.close()
    files.close()
    assert CANARY not in "".join(traceback.format_exception(told.value)) + repr(told.value.args)


@pytest.mark.usefixtures("memory")
def test_why_it_can_not_move_into_a_process_of_its_own_is_told_as_little(lab, manager, tmp_path):
    model = publish(lab, write_onnx(tmp_path / "net.onnx"), "net")
    files = ModelFiles(lab.root, tmp_path / "worker", ManagerBlobs(manager.ask, manager.close), 1 << 30)
    source = files.fetch(model)
    loaded = load_pinned(1, source)
    source.path.unlink()
    write_broken_onnx(source.path)
    with pytest.raises(BadModelError, match="only the kind of failure is said here, bad_model") as told:
        loaded.isolate()
    assert CANARY not in "".join(traceback.format_exception(told.value)) + repr(told.value.args)
    assert loaded.run({"x": X})["y"].shape == (3, 10)  # it stays where it is
    loaded.close()
    files.close()


@pytest.mark.usefixtures("memory")
def test_a_file_whose_blob_is_gone_is_not_named(lab, manager, tmp_path, caplog, capfd):
    secret = write_onnx(tmp_path / f"{CANARY}.onnx")
    model = publish(lab, secret, "net")
    blob = lab.public_manifest(model.digest).arrays[0].segments[0].digest
    lab._catalog.forget_pack(lab._catalog.locate(blob).pack)
    files = ModelFiles(lab.root, tmp_path / "worker", ManagerBlobs(manager.ask, manager.close), 1 << 30)
    with pytest.raises(ChunkMissingError) as told:
        files.fetch(model)
    files.close()
    out, err = capfd.readouterr()
    assert CANARY not in "".join(traceback.format_exception(told.value)) + caplog.text + out + err


def test_of_keys_trust_and_room_all_is_said():
    for error in (LockedModelError("no key", "id"), NoSpaceError("full"), BadModelError("not ours")):
        with pytest.raises(type(error)) as told, discretion(is_needed=True):
            raise error
        assert (str(told.value) == str(error)) is not isinstance(error, BadModelError)
    with pytest.raises(BadModelError, match="not ours"), discretion(is_needed=False):
        raise BadModelError("not ours")
    assert isinstance(withheld(KeyError("secret")), LoadFailedError)
    assert "secret" not in str(withheld(KeyError("secret")))
