"""Rows 9 to 11: workers that fail, one that stalls, one that is broken; what the gateway makes of it."""

import contextlib
import time
from urllib.request import urlopen

import numpy as np
import pytest
from chaos_lab import pids, until
from open_load import OpenLoad
from prometheus_client.parser import text_string_to_metric_families

import tether
from tether.lab import loop

pytestmark = pytest.mark.chaos
MOODY = """
import os, random, time

class Moody:
    inputs = outputs = [("x", "FP64", (-1,))]
    pure = True

    def predict(self, x):
        with open({mood!r}) as file:
            mood, who, share = file.read().split()
        if who in ("all", str(os.getppid())):
            if mood == "fails":
                raise RuntimeError("out of order")
            if mood == "stalls" and random.random() < float(share):
                time.sleep(0.2)
        return {{"x": x}}
"""
"""Says x, but for the copies whose worker is told otherwise: by a file, as nothing else comes into its process."""


class Mood:
    """What the copies of `moody` are told."""

    def __init__(self, lab, path):
        self.lab, self.path = lab, path

    def say(self, what, worker="none", share=0.0):
        """`worker`: its process, "all" or "none"; `share`: of the calls that stall."""
        new = self.path.with_suffix(".new")
        new.write_text(f"{what} {worker} {share}")
        new.replace(self.path)

    def counts(self, metric):
        """Of the gateway's counter for `moody`, by cause or outcome."""
        with urlopen(f"{self.lab.status().gateway}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == f"tether_{metric}_total"]
        return {
            next(value for name, value in sample.labels.items() if name != "model"): sample.value
            for sample in samples
            if sample.labels["model"] == "moody"
        }

    def events(self, since, *kinds):
        """(seconds, kind, worker) of what happened after that number."""
        found = loop.run(self.lab.operations.client.events(since, 0))["events"]
        return [(event["at"], event["kind"], event["worker"]) for event in found if event["kind"] in kinds]

    @property
    def last(self):
        """Number of the latest event."""
        return loop.run(self.lab.operations.client.events(None, 0))["seq"]


@pytest.fixture(scope="module")
def moody(tmp_path_factory, chaos, request):
    """Three workers, two in a small run, each with a copy of a model that is in the mood that it is told."""
    folder = tmp_path_factory.mktemp("moody")
    with contextlib.ExitStack() as stack:
        small = chaos.scale < 1
        lab = request.getfixturevalue("lab") if small else stack.enter_context(tether.up(workers=3, data=folder / "data", swarm=False))
        mood = Mood(lab, folder / "mood")
        mood.say("serves")
        (folder / "moody.py").write_text(MOODY.format(mood=str(mood.path)))
        lab.publish("moody", folder / "moody.py", example={"x": np.zeros(1)})
        lab.serve("moody", policy="round_robin", min_copies=len(lab.workers))
        lab.infer("moody", np.zeros(1))
        until(lambda: all("moody:1" in worker.models for worker in lab.workers.values()))
        yield mood


class MoodyLoad(OpenLoad):
    """To the model that may be in any mood."""

    model = "moody"


def load(mood, rate):
    return MoodyLoad(mood.lab.status().gateway, rate=rate)


def extra(mood, before, metric="retries"):
    now = mood.counts(metric)
    return sum(count - before.get(label, 0.0) for label, count in now.items())


@pytest.mark.timeout(600)
def test_row_09_retries_do_not_storm_when_all_workers_fail(moody, chaos, measured):
    begun, seconds, rate = time.monotonic(), chaos.count(60, 2), 50
    before, seen = moody.counts("retries"), moody.last
    with load(moody, rate) as asked:
        time.sleep(0.5)
        moody.say("fails", "all")
        time.sleep(seconds)
        moody.say("serves")
        until(lambda: asked.asked[-1].status == 200)
    again, failed = extra(moody, before), len(asked.failed)
    out = {worker for _, _, worker in moody.events(seen, "worker-ejected")}
    counts = (
        f"{len(asked.asked)} requests, {failed} while all workers failed for {seconds} s, {again:.0f} sent again, "
        f"{len(out)} workers ejected; the slowest {asked.slowest:.2f} s"
    )
    measured(f"row 9: {counts}")
    chaos.record(9, counts, time.monotonic() - begun)
    assert failed > rate * seconds / 2
    assert {each.status for each in asked.failed} == {422}
    assert not asked.wrong
    assert again <= max(0.1 * failed, 55 + seconds)


@pytest.mark.timeout(600)
def test_row_10_a_second_request_cuts_the_tail_of_a_worker_that_stalls(moody, chaos, measured):
    begun, seconds, rate = time.monotonic(), chaos.count(120, 2), 60
    share = 0.02 if chaos.scale >= 1 else 0.4
    moody.lab.serve("moody", policy="power_of_two")
    with load(moody, rate) as calm:  # what the machine itself is good for, busy as it may be
        time.sleep(seconds / 2)
    moody.say("stalls", next(iter(pids(moody.lab).values())), share)
    with load(moody, rate) as alone:
        time.sleep(seconds)
    moody.lab.serve("moody", hedge=0.95)
    before = moody.counts("hedges")
    with load(moody, rate) as hedged:
        time.sleep(seconds)
        until(lambda: moody.counts("hedges").get("sent", 0.0) > before.get("sent", 0.0))
    moody.lab.serve("moody", hedge=None, policy="round_robin")
    moody.say("serves")
    sent = moody.counts("hedges").get("sent", 0.0) - before.get("sent", 0.0)
    counts = (
        f"{len(hedged.asked)} requests, {sent:.0f} sent twice; p99.9 {alone.quantile(0.999) * 1000:.0f} ms without, "
        f"{calm.quantile(0.999) * 1000:.0f} ms where nothing stalls, "
        f"{hedged.quantile(0.999) * 1000:.0f} ms with, p50 {hedged.quantile(0.5) * 1000:.1f} ms"
    )
    measured(f"row 10: {counts}")
    chaos.record(10, counts, time.monotonic() - begun)
    assert (alone.failed, hedged.failed, alone.wrong, hedged.wrong) == ([], [], [], [])
    assert sent <= 0.05 * len(hedged.asked) + 10  # what a burst may take at once
    if chaos.scale >= 1:
        assert hedged.quantile(0.999) <= 0.4 * alone.quantile(0.999)


@pytest.mark.timeout(600)
def test_row_11_a_worker_that_fails_is_left_out_and_back_when_it_is_mended(moody, chaos, measured):
    begun, rounds = time.monotonic(), chaos.count(20, 1)
    name, pid = next(iter(pids(moody.lab).items()))
    failures, out, back = [], [], []
    with load(moody, 40) as asked:
        for _ in range(rounds):
            seen, before, at = moody.last, moody.counts("retries"), time.time()
            moody.say("fails", pid)
            gone = until(lambda seen=seen: moody.events(seen, "worker-ejected"))
            failures.append(extra(moody, before))
            out.append(gone[0][0] - at)
            time.sleep(chaos.count(10, 1))
            moody.say("serves")
            at = time.time()
            here = until(lambda seen=seen: moody.events(seen, "worker-back"))
            back.append(here[-1][0] - at)
            assert {worker for _, _, worker in [*gone, *here]} == {name}
    counts = (
        f"{rounds} times, {len(asked.asked)} requests, {len(asked.failed)} failed; out after {max(failures):.0f} errors, {max(out):.1f} s "
        f"at most, back {max(back):.1f} s after it was mended"
    )
    measured(f"row 11: {counts}")
    chaos.record(11, counts, time.monotonic() - begun)
    assert (asked.failed, asked.wrong) == ([], [])
    if chaos.scale >= 1:
        assert max(failures) <= 6
        assert max(out) <= 1.5
        assert max(back) <= 5.0
