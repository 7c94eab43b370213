"""Rollouts, drains and restarts of a real lab, as people ask for them."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import until, write_model

from tether.cli import tether as command
from tether.errors import BadInputError, ConflictError, NotFoundError, UnknownVersionError, UnknownWorkerError

X = np.ones((1, 16), np.float32)


@pytest.fixture(scope="module")
def rolled(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rolled")
    lab.publish("rolled", write_model(folder / "1.onnx"), alias="prod")
    lab.publish("rolled", write_model(folder / "2.onnx", scale=2.0))
    lab.infer("rolled", X)
    return lab


@pytest.fixture
def tell(lab, monkeypatch):
    """What a command prints; its exit code is 0, or as it is said."""
    monkeypatch.setenv("TETHER_HOME", lab.status().data)

    def run(*arguments, code=0):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == code, done.output
        return done.output

    return run


def test_what_can_not_be_rolled_out_is_said(rolled):
    with pytest.raises(NotFoundError, match="tether rollout rolled VERSION"):
        rolled.rollout("rolled")
    with pytest.raises(UnknownVersionError):
        rolled.rollout("rolled", 9)
    with pytest.raises(ConflictError, match="already"):
        rolled.rollout("rolled", 1)
    with pytest.raises(BadInputError, match="ascending"):
        rolled.rollout("rolled", 2, steps=(1.0, 0.5))
    for nonsense in (
        {"steps": 5},
        {"steps": "abc"},
        {"every": float("nan")},
        {"every": -1},
        {"shadow": "x"},
        {"requests": -1},
        {"slower": 1},
    ):
        with pytest.raises(BadInputError):
            rolled.rollout("rolled", 2, **nonsense)


@pytest.mark.parametrize("nonsense", [float("nan"), -1.0, "soon", None])
def test_what_is_no_time_to_wait_is_said_and_nothing_is_done(rolled, nonsense):
    before = rolled.workers
    for ask in (rolled.drain, rolled.restart):
        with pytest.raises(BadInputError, match="patience must be"):
            ask("worker-1", patience=nonsense)
    with pytest.raises(BadInputError, match="timeout must be"):
        rolled.restart("worker-1", timeout=nonsense)
    assert {name: (each.state, each.pid) for name, each in rolled.workers.items()} == {
        name: (each.state, each.pid) for name, each in before.items()
    }


def test_a_version_is_rolled_out_shown_stopped_and_promoted(rolled, tell):
    assert "rolled:2 in place of 1: loading" in tell("rollout", "rolled", "2", "--steps", "0.5,1", "--every", "600")
    until(lambda: rolled.rollout("rolled").state == "canary")
    assert "rollout: rolled:2 in place of 1: canary 50%" in tell("show", "rolled")
    answers = [float(rolled.infer("rolled", X)[0, 0]) for _ in range(8)]
    assert sorted(set(answers)) == [480.0, 960.0]
    assert answers.count(480.0) == 4
    assert json.loads(tell("rollout", "rolled", "--abort", "--json"))["state"] == "aborted"
    assert {float(rolled.infer("rolled", X)[0, 0]) for _ in range(4)} == {480.0}
    rolled.rollout("rolled", 2, steps=(1.0,), every=0.1, shadow=True)
    until(lambda: not rolled.rollout("rolled").goes_on)
    assert (rolled.rollout("rolled").state, rolled.models["rolled"].aliases["prod"]) == ("promoted", 2)
    assert float(rolled.infer("rolled", X)[0, 0]) == 960.0
    assert rolled.rollback("rolled").after == 1


def test_a_worker_is_drained_and_goes_on(rolled, tell):
    assert "worker-1 is drained" in tell("drain", "worker-1")
    assert (rolled.workers["worker-1"].state, rolled.workers["worker-1"].models) == ("drained", ())
    assert float(rolled.infer("rolled", X)[0, 0]) == 480.0
    tell("drain", "worker-1", "--undo")
    until(lambda: "rolled:1" in rolled.workers["worker-1"].models)
    assert rolled.workers["worker-1"].state == "running"
    with pytest.raises(UnknownWorkerError, match="worker-1, worker-2"):
        rolled.drain("worker-9")
    with pytest.raises(UnknownWorkerError):
        rolled.restart("worker-9")
