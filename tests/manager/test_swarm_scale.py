"""`benchmarks/swarm_scale`, its small size: it ends, the same seed gives the same numbers, and the origin of eight labs is spared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "swarm_scale"
PROCESSORS = {"seconds", "seconds of CPU"}
"""Figures of the machine, of rows that are not lookups'."""


def run(folder, seed, hash_seed):
    out = folder / f"{seed}-{hash_seed}.json"
    command = [sys.executable, BENCHMARK, "--small", "--seed", seed, "--out", out]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def simulated(found):
    parts = ("lookups", "downloads", "planning")
    return [{name: value for name, value in row.items() if name not in PROCESSORS} for part in parts for row in found[part]]


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return run(tmp_path_factory.mktemp("swarm-scale"), "story", "1")


def test_the_same_seed_gives_the_same_numbers_in_another_process_and_another_seed_does_not(once, tmp_path):
    again, _ = run(tmp_path, "story", "2")
    other, _ = run(tmp_path, "another", "1")
    assert simulated(again) == simulated(once[0])
    assert simulated(other) != simulated(once[0])


def test_eight_labs_cost_the_origin_little_more_than_one_copy(once, measured):
    for eight, longest in zip(once[0]["downloads"], (2, 3), strict=False):
        measured(
            f"eight labs, {eight['blobs']} blobs, lines alike: the origin sends {eight['origin sends']:.2f} copies, "
            f"all after {eight['all after']:.2f} lines"
        )
        assert (eight["labs"], eight["done"]) == (8, 8)
        assert 1 <= eight["origin sends"] <= 1.1
        assert 1 <= eight["half after"] <= eight["all after"] < longest


def test_labs_that_come_late_and_leave_hold_up_nobody_who_stays(once):
    for row in once[0]["downloads"][2:]:
        leaving = round(row["leaving"] * row["labs"])
        assert row["labs"] - leaving <= row["done"] <= row["labs"]


def test_what_is_announced_lies_on_twenty_nodes_and_is_found(once):
    for row in once[0]["lookups"]:
        assert row["announce"]["stored"] == pytest.approx(20, abs=0.5)
        assert row["lookup"]["found"] == 1
        assert row["lookup"]["first after"] <= row["lookup"]["seconds"]
    small, larger = once[0]["lookups"]
    assert small["announce"]["sent"] < larger["announce"]["sent"] < 3 * small["announce"]["sent"]


def test_as_many_copies_are_made_as_were_lost(once):
    for row in once[0]["planning"]:
        assert (row["made"], row["dropped"], row["short"]) == (row["lost"], 0, 0)


def test_the_tables_are_printed(once):
    assert all(f"\n{part}\n" in once[1] for part in ("lookups", "downloads", "planning"))
    assert "| 8 | 64 | alike | all |" in once[1]
