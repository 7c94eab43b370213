"""FAULTS.md row 21: an encrypted model answers like any other, and its plaintext is nowhere but in memory, while it is loaded."""

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from nacl.signing import SigningKey
from onnx import TensorProto, helper, numpy_helper
from plaintext import Plaintext, files_below

import tether
from tether import errors
from tether.cli import tether as command
from tether.security.volatile import SETTING

PROMPT = 30.0
SHARED = Path("/dev/shm")
X = np.random.default_rng(5).random((3, 64), dtype=np.float32)
CUSTOM = """
import numpy as np

SECRET_OF_THE_AUTHOR = "{secret}"


class Mine:
    def load(self, path):
        self.weights = np.load(path / "weights.npy")
        print("loaded", SECRET_OF_THE_AUTHOR)

    def predict(self, x):
        return {{"y": x @ self.weights}}
"""


def write_onnx(path, seed=0, hidden=256):
    """Two layers of random weights; gives the function that it is."""
    chance = np.random.default_rng(seed)
    first, second = chance.standard_normal((64, hidden), np.float32), chance.standard_normal((hidden, 10), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "first"], ["h"]), helper.make_node("MatMul", ["h", "second"], ["y"])],
        f"confidential graph {seed} {chance.bytes(8).hex()}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return lambda x: x @ first @ second


def write_custom(folder, seed=0):
    chance = np.random.default_rng(seed + 100)
    weights = chance.standard_normal((64, 10), np.float32)
    folder.mkdir()
    np.save(folder / "weights.npy", weights)
    (folder / "model.py").write_text(CUSTOM.format(secret=chance.bytes(24).hex()))
    return lambda x: x @ weights


def until(condition, what):
    deadline = time.monotonic() + PROMPT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Temporary files and memory of the test's own, so that all of it can be searched; with a short path, for the sockets."""
    assert tmp_path  # made first: it is to lie elsewhere
    temporary = Path(tempfile.mkdtemp(prefix="t"))
    memory = Path(tempfile.mkdtemp(prefix="tether-test-", dir=SHARED))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(SETTING, str(memory))
    yield temporary, memory
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(memory, ignore_errors=True)


def plain_files(memory):
    """What lies in memory, without the locks."""
    return [path for path in files_below(memory) if path.name != "lock" and path.suffix != ".owner"]


@pytest.mark.chaos
def test_row_21_plaintext_is_in_memory_only_and_gone_with_the_model(places, tmp_path, chaos, measured):
    temporary, memory = places
    sources = tmp_path / "sources"
    sources.mkdir()
    begun, shared = time.monotonic(), set(SHARED.iterdir())
    contents, known = [], Path(tether.__file__).with_name("types.py").read_bytes()

    def found_on_disk():
        return plaintext.found_in(temporary, tmp_path, spare=[sources]), plaintext.found_in_names(tmp_path / "data")

    with tether.up(workers=1, data=tmp_path / "data") as lab:
        for seed in range(chaos.count(10, 1)):
            model, folder = sources / f"digits-{seed}.onnx", sources / f"custom-{seed}"
            answer, custom = write_onnx(model, seed), write_custom(folder, seed)
            version = lab.publish("digits", model, example=X, encrypt=True)
            assert (version.encrypted, lab.publish("mine", folder, example=X, encrypt=True).encrypted) == (True, True)
            contents += [path.read_bytes() for path in (model, *folder.iterdir())] + [X.tobytes(), answer(X).tobytes()]
            plaintext = Plaintext(contents, known)
            np.testing.assert_allclose(lab.infer("digits", X), answer(X), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(lab.infer("mine", X), custom(X), rtol=1e-4, atol=1e-4)
            assert found_on_disk() == ({}, [])
            loaded = plaintext.found_in(memory)
            assert {path.name for path in loaded} >= {model.name, "weights.npy", "model.py"}  # so it would be found elsewhere, too
            assert {path.relative_to(memory).parts[1].partition("-")[0] for path in loaded} == {"checkout"}
            assert {path.stat().st_mode & 0o077 for path in memory.iterdir()} == {0}

        np.testing.assert_array_equal(lab.example("digits")["x"], X)
        assert lab.models["digits"].weights["first"].shape == (64, 256)
        assert lab.verify("digits").ok
        worker = next(service for service in lab.status().services if service.role == "worker")
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: plain_files(memory) == [], "the next worker did not sweep")
        np.testing.assert_allclose(lab.infer("digits", X, timeout=PROMPT), answer(X), rtol=1e-4, atol=1e-4)
        assert found_on_disk() == ({}, [])
    assert plain_files(memory) == []
    assert found_on_disk() == ({}, [])
    assert not any(plaintext.hits_in(path) for path in set(SHARED.iterdir()) - shared - {memory} if path.is_file())  # other labs' too
    nbytes = sum(path.stat().st_size for path in files_below(tmp_path / "data"))
    measured(f"row 21: {plaintext.count} windows of plaintext, none in {nbytes / 1e6:.1f} MB of data folder, logs and temporary files")
    chaos.record(21, f"{plaintext.count} windows, 0 hits in {nbytes / 1e6:.0f} MB", time.monotonic() - begun)


def test_an_encrypted_model_stays_encrypted_and_goes_through_every_door(lab, tmp_path):
    answer = write_onnx(tmp_path / "one.onnx", 7)
    version = lab.publish("hidden", tmp_path / "one.onnx", encrypt=True, alias="prod")
    assert "encrypted" in repr(version)
    assert "encrypted" in version._repr_html_()
    again = lab.publish("hidden", tmp_path / "one.onnx", encrypt=True)
    assert (again.version, again.digest) == (version.version, version.digest)
    with pytest.raises(errors.ConflictError, match="--no-encrypt"):
        lab.publish("hidden", tmp_path / "one.onnx")
    lab.export("hidden", tmp_path / "out")
    assert (tmp_path / "out" / "one.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()
    plain = lab.publish("hidden", tmp_path / "one.onnx", encrypt=False)
    assert (plain.version, plain.encrypted) == (2, False)
    np.testing.assert_allclose(lab.infer("hidden", X, version=1), answer(X), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(lab.models["hidden"][1].weights["second"][:], lab.models["hidden"][2].weights["second"][:])
    assert lab.diff("hidden", 1, 2).tensors == ()


def test_files_mend_an_encrypted_model(own_lab, tmp_path):
    lab = own_lab
    write_onnx(tmp_path / "one.onnx", 7)
    lab.publish("hidden", tmp_path / "one.onnx", encrypt=True)
    (pack,) = (tmp_path / "data" / "store" / "packs").glob("*.pack")
    with pack.open("r+b") as file:
        file.seek(200)
        file.write(bytes(64))
    assert not lab.verify("hidden").ok
    assert lab.repair("hidden", tmp_path / "one.onnx").repaired
    assert lab.verify("hidden").ok


def test_the_keys_are_given_taken_and_rotated_from_the_command_line(lab, tmp_path):
    write_onnx(tmp_path / "one.onnx", 9)
    data = lab.status().data

    def tether_(*arguments, given=None):
        return CliRunner().invoke(command, [*map(str, arguments), "--data", data], input=given, catch_exceptions=True)

    done = tether_("publish", "shared", tmp_path / "one.onnx", "--encrypt")
    assert (done.exit_code, done.stdout.split()[-1]) == (0, "encrypted"), done.stderr
    assert "encrypted: 1" in tether_("show", "shared").stdout
    peer = SigningKey(bytes(range(32))).verify_key.encode().hex()
    envelope = tether_("allow", peer, "--scope", "decrypt:shared")
    assert (envelope.exit_code, len(envelope.stdout.split())) == (0, 1), envelope.stderr
    refused = tether_("accept", given=envelope.stdout)
    assert (refused.exit_code, "not for this lab" in refused.stderr) == (1, True)
    taken = tether_("disallow", peer, "--scope", "decrypt:shared")
    assert (taken.exit_code, "can't be recalled" in taken.stdout) == (0, True), taken.stderr
    rotated = tether_("rotate")
    assert (rotated.exit_code, "back it up" in rotated.stdout) == (0, True), rotated.stderr
    assert len(list((Path(data) / "keys").glob("cluster-*.key"))) == 1
    assert tether_("allow", peer, "--scope", "decrypt:nothing-of-this-name").exit_code == 1
    np.testing.assert_array_equal(lab.models["shared"].weights["first"].shape, (64, 256))
