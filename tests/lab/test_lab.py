"""A lab as a researcher uses it: publish, call, alias, roll back."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import WEIGHTS, write_model

import tether
from tether import errors

X = np.random.default_rng(5).random((3, 16), dtype=np.float32)


@pytest.fixture
def tiny(lab, tmp_path, request):
    """A published model under a name of its own."""
    name = f"tiny-{abs(hash(request.node.nodeid)) % 10**8}"
    return lab.publish(name, write_model(tmp_path / "model.onnx"), example=X[:1])


def test_a_published_model_answers(lab, tiny):
    np.testing.assert_allclose(lab.infer(tiny.name, X), X @ WEIGHTS, rtol=1e-5)
    assert (tiny.version, tiny.framework, tiny.example) == (1, "onnx", True)


def test_the_same_bytes_again_are_the_same_version_however_the_example_is_given(lab, tiny, tmp_path):
    again = lab.publish(tiny.name, tmp_path / "model.onnx", example={"x": X[:1].astype(np.float64)})
    np.testing.assert_array_equal(lab.example(tiny.name)["x"], X[:1])
    assert (again.version, again.digest) == (tiny.version, tiny.digest)
    assert len(lab.models[tiny.name].versions) == 1


def test_versions_aliases_and_rollback_decide_what_a_name_means(lab, tiny, tmp_path):
    second = lab.publish(tiny.name, write_model(tmp_path / "second.onnx", scale=2))
    lab.alias(tiny.name, "old", 1)
    assert second.version == 2
    np.testing.assert_allclose(lab.infer(tiny.name, X), X @ WEIGHTS * 2, rtol=1e-5)
    np.testing.assert_allclose(lab.infer(f"{tiny.name}:1", X), X @ WEIGHTS, rtol=1e-5)
    np.testing.assert_allclose(lab.infer(f"{tiny.name}@old", X), X @ WEIGHTS, rtol=1e-5)
    moved = lab.rollback(tiny.name)
    assert (moved.alias, moved.before, moved.after) == ("latest", 2, 1)
    np.testing.assert_allclose(lab.infer(tiny.name, X), X @ WEIGHTS, rtol=1e-5)


def test_the_files_come_back_byte_for_byte(lab, tiny, tmp_path):
    lab.export(tiny.name, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert lab.verify(tiny.name).ok


async def test_many_requests_at_once_each_get_their_own_rows(lab, tiny):
    inputs = [np.random.default_rng(seed).random((1 + seed % 5, 16), dtype=np.float32) for seed in range(200)]
    answers = await asyncio.gather(*(lab.ainfer(tiny.name, each) for each in inputs))
    for sent, got in zip(inputs, answers, strict=True):
        np.testing.assert_allclose(got, sent @ WEIGHTS, rtol=1e-5)


def test_status_names_every_service(lab):
    status = lab.status()
    assert {service.name: service.state for service in status.services} == dict.fromkeys(
        ["orchestrator", "manager", "worker-1", "worker-2", "gateway"], "running"
    )
    assert set(lab.workers) == {"worker-1", "worker-2"}


def test_a_second_up_on_the_folder_attaches_and_says_so(lab, capsys):
    with tether.up(data=lab.status().data) as attached:
        assert attached.gateway == lab.gateway
    assert "attached" in capsys.readouterr().out
    assert lab.status().services


@pytest.mark.parametrize(
    ("inputs", "error", "says"),
    [
        ({"z": X}, errors.BadInputError, "x"),
        (X.astype(np.complex64), errors.BadInputError, "complex"),
        (X[0], errors.BadInputError, "16"),
        (X[:, :15], errors.BadInputError, "16"),
    ],
)
def test_wrong_inputs_are_named(lab, tiny, inputs, error, says):
    with pytest.raises(error, match=says):
        lab.infer(tiny.name, inputs)


@pytest.mark.parametrize(
    ("reference", "error"),
    [("nobody", errors.UnknownModelError), ("Not A Name", errors.BadNameError)],
)
def test_unknown_models_are_said_to_be_unknown(lab, reference, error):
    with pytest.raises(error):
        lab.infer(reference, X)


def test_an_unknown_version_is_said_to_be_unknown(lab, tiny):
    with pytest.raises(errors.UnknownVersionError, match="has versions 1"):
        lab.infer(tiny.name, X, version=9)


def test_models_that_are_none_are_refused_and_nothing_is_stored(lab, tmp_path):
    (tmp_path / "corrupt.onnx").write_bytes(b"\x08\x08" + bytes(range(256)))
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    for name, kind in [
        ("corrupt.onnx", errors.BadModelError),
        ("empty.onnx", errors.NoModelFileError),
        ("folder", errors.NoModelFileError),
        ("missing.onnx", errors.NoModelFileError),
        ("notes.txt", errors.UnknownFrameworkError),
    ]:
        with pytest.raises(kind):
            lab.publish("never", tmp_path / name)
    with pytest.raises(errors.UnknownFrameworkError):
        lab.publish("never", write_model(tmp_path / "good.onnx"), framework="abacus")
    assert "never" not in lab.models


def test_an_example_that_the_model_cannot_take_is_refused(lab, tmp_path):
    with pytest.raises((errors.BadModelError, errors.BadInputError)):
        lab.publish("never", write_model(tmp_path / "model.onnx"), example=np.zeros((1, 3), np.float32))
    assert "never" not in lab.models


def test_every_service_comes_up_at_its_first_try(lab):
    facts = json.loads((Path(lab.status().data) / "run" / "lab.json").read_text())
    assert {service["name"]: service["restarts"] for service in facts["services"]} == dict.fromkeys(
        ["orchestrator", "manager", "worker-1", "worker-2", "gateway"], 0
    )
