"""Row 12: inputs that end the process of their model cost two workers at most, and nobody else an answer."""

import contextlib
import threading
import time

import numpy as np
import pytest
from chaos_lab import ABORTS, EATS, EXITS, PROMPT, SEGFAULTS, SPINS, Load, pids, until
from click.testing import CliRunner

from tether.cli import tether
from tether.errors import DeadlineExceededError, PoisonInputError, TetherError
from tether.lab import loop

LEAST = np.iinfo(np.int64).min
"""Divided by -1 it is no number of 64 bits; the processor stops whoever asks for it (SIGFPE), and ONNX Runtime asks."""
DEATHS = (SEGFAULTS, EATS, ABORTS, EXITS)
"""The first ones are those of a small run."""


class Ratios(threading.Thread):
    """Calls a model all the while with inputs that are in order, and checks each answer."""

    def __init__(self, lab, model):
        super().__init__(daemon=True)
        self.lab, self.model, self.answered, self.flaws = lab, model, 0, []
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.04):
            rows = self.answered % 5 + 1
            x, d = np.arange(rows), np.full(rows, 2)
            try:
                answer = self.lab.infer(self.model, {"x": x, "d": d}, timeout=PROMPT)
            except TetherError as error:
                self.flaws.append((self.model, error.code, str(error)))
                continue
            self.answered += 1
            if not np.array_equal(answer, x // d):
                self.flaws.append((self.model, answer))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join(2 * PROMPT)


def overflow(number):
    """One of many inputs that end ONNX Runtime."""
    return {"x": np.array([LEAST, number]), "d": np.array([-1, 1])}


def refused(lab, model, inputs):
    """Seconds until the input was told that it is poison."""
    begun = time.monotonic()
    with pytest.raises(PoisonInputError):
        lab.infer(model, inputs, timeout=PROMPT)
    return time.monotonic() - begun


def command(lab, *arguments):
    """What it prints."""
    done = CliRunner().invoke(tether, [*arguments, "--data", str(lab.status().data)], prog_name="tether")
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_row_12_poison_costs_two_workers_at_most_and_nobody_else_an_answer(lab, chaos, measured):
    """Inputs of a data format, which runs in its worker, and of a class; beside them what is in order, to the same two and to another."""
    count, kinds, begun = chaos.count(50, 1), DEATHS[: chaos.count(4, 2)], time.monotonic()
    client = lab.operations.client
    loop.run(client.forgive("patient"))  # what tests before this one ended it with, in the same lab
    loads = [Ratios(lab, "ratio"), Ratios(lab, "other"), Load(lab, "patient", clients=2)]
    with contextlib.ExitStack() as stack:
        for load in loads:
            stack.enter_context(load)
        before, seen = pids(lab), loop.run(client.events(None, 0))["seq"]
        first = refused(lab, "ratio", overflow(0))
        until(lambda: all(worker.state == "running" and "ratio:1" in worker.models for worker in lab.workers.values()))
        after = pids(lab)
        again = [refused(lab, "ratio", overflow(0)) for _ in range(20)]
        others = [refused(lab, "ratio", overflow(number)) for number in range(1, count + 1)]
        deaths = [refused(lab, "patient", np.array([kind, number])) for kind in kinds for number in range(count)]
        for number in range(count):
            with pytest.raises(DeadlineExceededError):
                lab.infer("patient", np.array([SPINS, number]), timeout=0.5)
    cost = {worker for worker, pid in pids(lab).items() if after[worker] != pid}
    held = {row["model"]: row for row in loop.run(client.quarantine())}
    told = {event["kind"] for event in loop.run(client.events(seen, 0))["events"]}

    lives = sum(after[worker] != before[worker] for worker in before)
    answered, wrong = sum(load.answered for load in loads), [flaw for load in loads for flaw in load.flaws]
    counts = (
        f"{1 + len(others + deaths)} poison inputs and {count} that spin, {lives} workers ended by the first, {len(cost)} by the others; "
        f"told after {first:.1f} s, then in {max(others + deaths):.1f} s at most, again in {np.median(again) * 1000:.0f} ms; "
        f"{answered} other requests, {len(wrong)} failed"
    )
    measured(f"row 12: {counts}")
    chaos.record(12, counts, time.monotonic() - begun)
    assert (wrong, loads[-1].late) == ([], 0)
    assert lives <= 2
    assert cost == set()
    assert held["ratio"]["isolated"]
    assert (len(held["ratio"]["poison"]), len(held["patient"]["poison"])) == (1 + len(others), len(deaths))
    assert "other" not in held or held["other"]["poison"] == []
    assert {"version-isolated", "input-condemned"} <= told
    assert "patient" in command(lab, "quarantine")
    assert "ratio" not in until(lambda: (shown := command(lab, "quarantine", "--clear", "ratio")) and "ratio" not in shown and shown)
    refused(lab, "ratio", overflow(0))
    assert {worker for worker, pid in pids(lab).items() if after[worker] != pid} == cost
