"""What labs say of themselves reaches who knows them: region, cards, load, what they hold, also while they are not connected."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from conftest import until, write_model

import tether
from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("pythonmonkey"), pytest.mark.usefixtures("on_the_net")]
ROWS = np.ones((2, 16), np.float32)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """This machine has no card: a program in the driver's place names two."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def cli(*words):
    command = [sys.executable, "-m", "tether", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.usefixtures("driver")
def test_a_lab_shows_where_the_others_are_with_which_cards_and_what_they_hold_also_when_they_are_not_connected(tmp_path):
    with (
        tether.up(workers=1, data=tmp_path / "hers", region="eu-west", gpus=2, pretend_gpus=True) as hers,
        tether.up(workers=1, data=tmp_path / "his") as his,
    ):
        hers.publish("digits", write_model(tmp_path / "m.onnx", 2.0))
        hers.publish("faces", write_model(tmp_path / "m.onnx", 3.0))
        hers.infer("digits", ROWS)
        invitation = str(hers.invite(scope="replicate", label="bob"))  # which brings her to the swarm
        his.name_peer(hers.address, "alice")
        assert his.peers["alice"].versions is None, "nobody looks for her before there is a reason to be on the swarm"
        his.invite("anything")
        alice = until(lambda: (found := his.peers["alice"]).gpus and found)
        assert (alice.region, alice.cards, alice.load) == ("eu-west", "2 × NVIDIA H100 80GB HBM3, 79.6 GiB", 0)
        assert (alice.versions, alice.models, alice.serves, alice.stranger, alice.route) == (2, (), True, False, None)

        his.replicate("digits", invitation)
        alice = his.peers["alice"]
        assert (alice.models, alice.route is not None) == (("alice~digits",), True)
        assert "eu-west" in his.peers._repr_html_()
        (row,) = json.loads(cli("peers", "--json", "--data", tmp_path / "his"))["peers"]
        assert (row["petname"], row["region"], row["versions"], row["models"]) == ("alice", "eu-west", 2, ["alice~digits"])
        assert "eu-west" in cli("peers", "--data", tmp_path / "his")
        bob = until(lambda: next((each for each in hers.peers.values() if each.label == "bob" and each.versions), None))
        assert (bob.models, bob.region, bob.gpus) == (("digits",), "", ())
        assert (tmp_path / "hers" / "region").read_text() == "eu-west"  # for the next start
