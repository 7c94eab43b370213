"""A publisher is killed at every named point and many random ones while another process reads."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crashing import UPLOADS, uploads
from store_models import publish, seeded

from tether.store import Repository
from tether.store.faults import POINTS
from tether.types import ModelRef

SCRIPT = Path(__file__).with_name("crashing.py")
FULL, SMALL = 1000, 50
"""Kills of `make chaos` and of `make test`."""
INSTANTS = 25
"""Kills at instants of `make test`."""
WHOLE = 25
"""Each of so many times all versions are read again; otherwise a thousand kills would read half a million."""
WARM = 6
"""Publishes before the kills at instants, by which it is known how long one takes."""
IN_BLOBS = 20
"""Of the kills, how many lie inside of the writing of a blob."""
TIMES = {"stage": 5, "stage.journal": 5, "blob": 5, "checkout": 6}
"""How often a publish of these models surely passes a point; the others: once."""


def kills(seed, count):
    chance = seeded(seed)
    reached = [point for point in POINTS if not point.startswith("format.")]
    points = reached + ["blob"] * IN_BLOBS
    points += [chance.choice(reached) for _ in range(count - len(points))]
    chance.shuffle(points)
    return [f"{point}#{chance.randint(1, TIMES.get(point, 1))}" for point in points]


class Process:
    def __init__(self, *arguments):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate(timeout=30)

    def ask(self, *job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        out, error = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, error
        return out


@pytest.fixture(scope="module")
def publisher():
    with Process("serve") as process:
        yield process


@pytest.mark.chaos
@pytest.mark.timeout(2400)
def test_row_14_killed_anywhere_a_publish_is_seen_whole_or_not_at_all(publisher, tmp_path, chaos):
    root, count, begun = str(tmp_path / "store"), chaos.count(FULL, SMALL), time.monotonic()
    assert publisher.ask("publish", root, 0) == [0, None]
    with Process("read", root) as reader:
        _kill_and_publish(publisher, root, chaos.seed, count)
        report = json.loads(reader.end())

    assert report["reads"] > count
    assert report["order"] == sorted(set(report["order"])), "the reader saw versions out of order"
    chaos.record(14, f"{count} kills, {report['reads']} reads, 0 mixed, 0 lost", time.monotonic() - begun)


def _kill_and_publish(publisher, root, seed, count):
    """Kill a publish at each point in turn, look at what is left, publish again. Version n + 1 has seed n."""
    for number, point in enumerate(kills(seed, count), start=1):
        status, answer = publisher.ask("crash", root, point, number)
        assert (status, answer) == (-9, None), f"{point} (seed {seed}, kill {number}) did not kill: {answer}"

        status, found = publisher.ask("inspect", root, number % WHOLE == 0)
        assert status == 0, found
        versions, latest, content, problems, leftovers = found
        assert (problems, leftovers) == (0, 0), point
        assert (content, versions, latest) in {(number - 1, number, number), (number, number + 1, number + 1)}, point
        if point.startswith(("clean", "checkout", "catalog.commit")):
            assert content == number, f"{point}: the commit had returned"

        assert publisher.ask("publish", root, number) == [0, None], point
    assert publisher.ask("inspect", root, True)[1] == [number + 1, number + 1, number, 0, 0]


@pytest.mark.chaos
@pytest.mark.timeout(2400)
def test_row_14_killed_at_any_instant_a_publish_is_seen_whole_or_not_at_all(publisher, tmp_path, chaos):
    """As above, but between any two instructions, the opening of the store among them."""
    root, count, begun = str(tmp_path / "store"), chaos.count(FULL, INSTANTS), time.monotonic()
    assert publisher.ask("publish", root, 0) == [0, None]
    times = []
    for number in range(1, WARM):
        start = time.monotonic()
        assert publisher.ask("publish", root, number) == [0, None]
        times.append(time.monotonic() - start)
    seconds, chance, survived = min(times), seeded(f"{chaos.seed} instants"), 0  # one that the disk held up says nothing
    with Process("read", root) as reader:
        for number in range(WARM, count + WARM):
            status, (ended, _) = publisher.ask("kill", root, "publish", number, chance.random() * seconds)
            assert (status, ended) in {(0, -9), (0, 0)}
            survived += ended == 0
            seconds *= 0.9 if ended == 0 else 1.0  # the machine was busier when it was measured
            status, found = publisher.ask("inspect", root, number % WHOLE == 0)
            assert status == 0, found
            versions, latest, content, problems, leftovers = found
            assert (problems, leftovers) == (0, 0)
            assert (content, versions, latest) in {(number - 1, number, number), (number, number + 1, number + 1)}
            assert publisher.ask("publish", root, number) == [0, None]
        report = json.loads(reader.end())

    assert survived < count / 2
    assert report["reads"] > count
    assert report["order"] == sorted(set(report["order"])), "the reader saw versions out of order"
    chaos.record(14, f"{count} kills at any instant, {report['reads']} reads, 0 mixed, 0 lost", time.monotonic() - begun)


@pytest.mark.chaos
def test_row_14_of_an_interrupted_upload_only_what_was_in_flight_is_sent_again(publisher, tmp_path, chaos):
    root, count, begun = str(tmp_path / "store"), chaos.count(FULL // 5, INSTANTS), time.monotonic()
    assert publisher.ask("publish", root, 0) == [0, None]
    start = time.monotonic()
    assert publisher.ask("kill", root, "upload", count, 60)[1][1] == UPLOADS
    seconds, chance, sent = time.monotonic() - start, seeded(f"{chaos.seed} uploads"), 0
    for number in range(count):
        status, (_, acknowledged) = publisher.ask("kill", root, "upload", number, chance.random() * seconds)
        assert status == 0
        status, lacking = publisher.ask("missing", root, number)

        assert status == 0, lacking
        assert lacking == list(uploads(number))[len(uploads(number)) - len(lacking) :], "a blob that was acknowledged is gone"
        assert UPLOADS - acknowledged - 1 <= len(lacking) <= UPLOADS - acknowledged
        sent += acknowledged

    assert sent
    chaos.record(14, f"{count} uploads killed, {sent} blobs acknowledged, 0 of them sent again", time.monotonic() - begun)


@pytest.mark.chaos
@pytest.mark.parametrize("point", POINTS)
def test_killed_while_the_store_is_made_the_next_start_makes_it(publisher, tmp_path, point):
    root = str(tmp_path / "store")

    assert publisher.ask("crash", root, point, 1) == [-9, None]

    assert publisher.ask("publish", root, 1) == [0, None]
    assert publisher.ask("inspect", root, True) == [0, [1, 1, 1, 0, 0]]


def test_a_reader_alone_finds_the_committed_version_of_a_writer_that_died(publisher, tmp_path):
    root = tmp_path / "store"
    assert publisher.ask("crash", str(root), "clean", 7) == [-9, None]

    with Repository.open(root, read_only=True) as reader:
        record = reader.resolve(ModelRef("digits"))

        assert reader.manifest(record.digest).attributes == {"seed": 7}
        assert reader.verify().problems == ()


def test_crash_points_do_nothing_unless_asked_for(repository, monkeypatch):
    monkeypatch.setenv("TETHER_CRASH_AT", "blob#1000")
    assert publish(repository, 1).created
