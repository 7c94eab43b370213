"""Where a lab's models run and why, through all of its processes: labels, region, what no worker has, and `explain`."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import until, write_model

import tether
from tether.cli import tether as command
from tether.errors import NoDeviceError, UnknownModelError


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two workers in one region, with a label."""
    folder = tmp_path_factory.mktemp("labelled")
    with tether.up(workers=2, data=folder / "data", swarm=False, region="eu-west", labels=["disk=fast"]) as lab:
        lab.publish("tiny", write_model(folder / "tiny.onnx"), framework="onnx")
        yield lab


ROW = np.ones((1, 16), np.float32)


def holdings(lab):
    """What each worker has, as `explain` says it."""
    (version,) = lab.explain("tiny").versions
    return {each.worker: each.holding for each in version.workers}


def test_a_model_runs_where_its_labels_are_and_explain_says_so(labelled):
    labelled.serve("tiny", region="eu-west", labels={"disk": "fast"}, max_copies=1)
    labelled.infer("tiny", ROW)
    assert sorted(holdings(labelled).values()) == ["", "loaded"]
    labelled.serve("tiny", min_copies=2, max_copies=None)
    until(lambda: set(holdings(labelled).values()) == {"loaded"})
    site = status(labelled)["workers"][0]["site"]
    assert site == {"region": "eu-west", "labels": ["disk=fast"]}


def test_what_no_worker_has_is_refused_at_once_with_what_is_lacking(labelled):
    labelled.serve("tiny", labels=["gpu=a100"])
    with pytest.raises(NoDeviceError, match=r"where gpu=a100 is, and no worker does: start one \(`tether worker .*--label gpu=a100`\)"):
        until(lambda: labelled.infer("tiny", ROW, timeout=30) is None)
    called = CliRunner().invoke(command, ["explain", "tiny", "--data", str(Path(labelled.status().data))], prog_name="tether")
    assert called.exit_code == 0, called.output
    assert called.output.count("it has no label gpu=a100") == 2
    labelled.reset_serving("tiny")
    labelled.infer("tiny", ROW)
    with pytest.raises(UnknownModelError):
        labelled.explain("nobodys")


def status(lab):
    called = CliRunner().invoke(command, ["status", "--json", "--data", str(Path(lab.status().data))], prog_name="tether")
    return json.loads(called.output)
