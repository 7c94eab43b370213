"""Row 109: wall clocks that are set while a lab runs, and differ between its processes. Monotonic ones can't be set from outside.

The lab's processes read their wall clock through a file: a `sitecustomize` on their PYTHONPATH adds what it says to `time.time`.
"""

import random
import signal
import time

import numpy as np
import psutil
import pytest
from chaos_lab import EXITS, MEMORY, PATIENT, Client, Load, pids, together, until, write_echo

import tether

pytestmark = pytest.mark.chaos
SHIFTED = """
import sys, time

def shifted(real=time.time):
    for name in ({all!r}, {own!r} + ".".join(sys.argv[1:2])):
        try:
            return real() + float(open(name).read())
        except (OSError, ValueError):
            pass
    return real()

time.time = shifted
"""
PATIENCE = 300
"""Seconds that may pass between an event and a look at it, here; less than clocks are set by."""


class Clocks:
    """Of a lab: `shift` sets those of all its processes, or of those of a role."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "sitecustomize.py").write_text(SHIFTED.format(all=str(folder / "all"), own=str(folder / "of.")))

    def shift(self, seconds, role=None):
        for path in self.folder.glob("of.*"):
            path.unlink()
        (self.folder / "all").unlink(missing_ok=True)
        (self.folder / ("all" if role is None else f"of.{role}")).write_text(str(seconds))


@pytest.fixture
def clocks(tmp_path):
    (tmp_path / "site").mkdir()
    return Clocks(tmp_path / "site")


@pytest.fixture
def shifting_lab(tmp_path, clocks, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(clocks.folder))
    monkeypatch.setenv("DASK_TETHER__RUNNER__MEMORY", MEMORY)
    (tmp_path / "patient.py").write_text(PATIENT)
    with tether.up(workers=2, data=tmp_path / "data", swarm=False) as lab:
        lab.publish("patient", tmp_path / "patient.py", example={"x": np.zeros(1)})
        lab.publish("echo", write_echo(tmp_path / "echo.onnx"))
        for model in ("patient", "echo"):
            lab.infer(model, np.zeros(1))
        until(lambda: all(len(worker.models) == 2 for worker in lab.workers.values()))
        yield lab


def condemned(lab):
    return sum(event.kind == "input-condemned" for event in lab.recent_events())


@pytest.mark.timeout(900)
def test_row_109_wall_clocks_that_are_set_cost_nobody_an_answer(shifting_lab, clocks, chaos, measured, tmp_path):
    lab, chance, begun = shifting_lab, random.Random(f"row 109, {chaos.seed}"), time.monotonic()
    assert together([(Client(lab), "patient", EXITS)])[0][:2] == (422, "poison_input")
    until(lambda: condemned(lab) == 1)
    shifts = [(3600, None), (-3600, None), (600, "gateway"), (-600, "worker"), (600, "orchestrator"), (-600, "manager")]
    shifts = shifts[: chaos.count(6, 3)]
    with Load(lab, "echo") as load:
        for number, (seconds, role) in enumerate(shifts * chaos.count(10, 1)):
            clocks.shift(seconds, role)
            before = pids(lab)
            victim = chance.choice(sorted(before))
            psutil.Process(before[victim]).send_signal(signal.SIGKILL)
            until(lambda victim=victim, before=before: victim in pids(lab) and pids(lab)[victim] != before[victim])
            assert together([(Client(lab), "patient", EXITS)])[0][:2] == (422, "poison_input")
            lab.publish(f"later-{number}", write_echo(tmp_path / "echo.onnx"))
            lab.infer(f"later-{number}", np.zeros(1))
            told = lab.recent_events()[-1].at - time.time()
            assert abs(told - (seconds if role in {None, "gateway"} else 0)) < PATIENCE, "the gateway's clock was not set"
    counts = f"wall clocks set {number + 1} times by up to an hour, a worker killed each time, {load.answered} requests, "
    counts += f"{len(load.flaws)} failed, {condemned(lab)} input found out"
    measured(f"row 109: {counts}")
    chaos.record(109, counts, time.monotonic() - begun)
    assert (load.flaws, load.late, condemned(lab)) == ([], 0, 1)
