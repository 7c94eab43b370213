"""The power is cut at random instants of publishing; `powercuts.py` says how and what that proves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tether.testing.requirements import needs

SCRIPT = Path(__file__).with_name("powercuts.py")
FULL, SMALL = 1000, 20
"""Images of `make chaos` and of `make test`."""

pytestmark = [needs("mounts"), pytest.mark.chaos]


def cut_power(folder, seed, images, *options):
    """In a mount namespace of its own: whatever becomes of it, nothing stays mounted."""
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, SCRIPT, folder, str(seed), str(images), *options]
    path = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(1800)
def test_row_13_what_was_acknowledged_survives_a_power_cut_and_nothing_torn_is_seen(tmp_path, chaos, measured):
    count, begun = chaos.count(FULL, SMALL), time.monotonic()

    report = cut_power(tmp_path, chaos.seed, count)

    assert report["flaws"] == []
    assert report["acknowledged"] > count / 3
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(report["kinds"].items()))
    measured(f"power cuts: {kinds}, {report['acknowledged']} acknowledged, {time.monotonic() - begun:.1f} s")
    chaos.record(13, f"{count} images ({kinds}), {report['acknowledged']} acknowledged, 0 lost, 0 torn", time.monotonic() - begun)


def test_row_13_the_same_cuts_lose_versions_of_a_store_that_does_not_fsync(tmp_path, chaos):
    """Else the test above could not fail."""
    report = cut_power(tmp_path, chaos.seed, 15, "--without-fsync")  # what the system had not written yet is chance: 9 to 15 lose

    assert sum("acknowledged" in flaw and ("Store" in flaw or "chunk" in flaw or "found" in flaw) for flaw in report["flaws"]) >= 3
