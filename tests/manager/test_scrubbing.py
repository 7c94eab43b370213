"""The background scrub finds damage, goes on where it stopped, and rests between rounds."""

import random
import time

import pytest
from structlog.testing import capture_logs

from tether import store
from tether.manager.scrubbing import Scrubber
from tether.security.identity import Identity
from tether.types import ModelInfo

LAB = Identity(bytes(range(32)))
INFO = ModelInfo("onnx", "onnx", (), (), batched=True, pure=True, code=False)
PROMPT = 20.0


@pytest.fixture
def repository(tmp_path):
    """A store with three models in three packs."""
    with store.Repository.open(tmp_path / "store", own=LAB.public) as repository:
        for name in ("a", "b", "c"):
            arrays = (repository.add_bytes("m.onnx", random.Random(name).randbytes(300_000)),)
            manifest = store.encode(store.Manifest(framework="onnx", entry="m.onnx", info=INFO, arrays=arrays))
            repository.publish(name, manifest, LAB.public, LAB.sign(store.signed_message(manifest)))
        yield repository


def scrubbed(repository, notes, *, until, **options):
    scrubber = Scrubber(repository, notes, **options)
    scrubber.start()
    try:
        deadline = time.monotonic() + PROMPT
        while not until(scrubber):
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        scrubber.stop()
    return scrubber


def damage(repository):
    pack = sorted((repository.root / "packs").glob("*.pack"))[1]
    pack.chmod(0o644)
    with pack.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")


def test_a_whole_store_has_no_problems_and_is_read_once_a_week(repository, tmp_path):
    done = scrubbed(repository, tmp_path / "notes", until=lambda each: each.rounds == 1, rate=1e9)
    again = Scrubber(repository, tmp_path / "notes", rate=1e9)
    again.start()
    again.stop()
    later = scrubbed(repository, tmp_path / "notes", until=lambda each: each.rounds == 1, rate=1e9, clock=lambda: time.time() + 8 * 86400)
    assert (done.problems, again.rounds, later.rounds) == (0, 0, 1)


def test_damage_is_said_in_the_log(repository, tmp_path):
    damage(repository)

    with capture_logs() as logs:
        done = scrubbed(repository, tmp_path / "notes", until=lambda each: each.rounds == 1, rate=1e9)

    assert done.problems == 1
    (line,) = [line for line in logs if line["event"] == "damaged"]
    assert len(line["digest"]) == 64


def test_a_stopped_round_goes_on_where_it_was(repository, tmp_path):
    notes = tmp_path / "notes"
    slow = scrubbed(repository, notes, until=lambda _: True, rate=1e6)
    assert slow.rounds == 0

    began = time.monotonic()
    done = scrubbed(repository, notes, until=lambda each: each.rounds == 1, rate=1e9)

    assert done.problems == 0
    assert time.monotonic() - began < PROMPT


@pytest.mark.parametrize("text", [b"", b"{", b'{"began": "x"}'])
def test_notes_that_can_not_be_read_begin_a_round(repository, tmp_path, text):
    (tmp_path / "notes").write_bytes(text)

    assert scrubbed(repository, tmp_path / "notes", until=lambda each: each.rounds == 1, rate=1e9).rounds == 1
