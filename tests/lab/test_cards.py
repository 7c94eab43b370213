"""Graphics cards are dealt to workers, one to each, and nobody gets one that this process may not use."""

import asyncio
from pathlib import Path

import pytest
from click.testing import CliRunner

from tether.cli import tether as command
from tether.config import DataFolder
from tether.errors import ConfigError
from tether.lab import cards
from tether.lab.supervisor import Supervisor, UpSettings


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Has so many cards."""

    def has(count, visible=None):
        for index in range(count):
            (tmp_path / f"nvidia{index}").touch()
        (tmp_path / "nvidiactl").touch()
        monkeypatch.setattr(cards, "Path", lambda _dev: Path(tmp_path))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return has


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, ["0", "1", "2"]), ("2,0", ["2", "0"]), ("", []), ("-1", []), ("GPU-8932, GPU-1", ["GPU-8932", "GPU-1"])],
)
def test_the_cards_are_those_that_this_process_may_use(machine, visible, found):
    machine(3, visible)
    assert cards.machine_cards() == found
    assert cards.gpu_count("auto") == len(found)


def test_a_machine_without_cards_has_none_whatever_the_environment_says(machine):
    machine(0, "0,1")
    assert cards.machine_cards() == []


def test_more_cards_than_there_are_and_cards_that_no_worker_would_use_are_refused(machine):
    machine(2)
    cards.check_cards(2, 2)
    with pytest.raises(ConfigError, match="3 GPUs were asked for, this machine has 2"):
        cards.check_cards(3, 4)
    with pytest.raises(ConfigError, match="--workers 2"):
        cards.check_cards(2, 1)
    assert [cards.worker_counts(None, 0), cards.worker_counts(None, 4), cards.worker_counts(1, 4)] == [(2, None), (4, None), (1, None)]


def workers_of(tmp_path, **wished):
    supervisor = Supervisor(UpSettings(DataFolder(tmp_path / "data").create(), gateway=False, **wished))
    specs = supervisor._specs()
    asyncio.run(supervisor.stop())
    return {spec.name: spec for spec in specs if spec.role == "worker"}


def option(spec, name):
    return spec.arguments[spec.arguments.index(name) + 1]


def test_each_worker_sees_its_own_cards_and_a_share_of_the_cores(machine, tmp_path):
    machine(2, "3,1")
    workers = workers_of(tmp_path, workers=3, gpus=2)
    assert [spec.environ["CUDA_VISIBLE_DEVICES"] for spec in workers.values()] == ["3", "1", ""]
    assert [option(spec, "--gpus") for spec in workers.values()] == ["1", "1", "0"]
    assert {option(spec, "--workers-here") for spec in workers.values()} == {"3"}


def test_workers_that_may_come_have_their_share_from_the_start(machine, tmp_path):
    machine(0)
    workers = workers_of(tmp_path, workers=1, most_workers=4, labels=["disk=fast"], region="eu-west")
    assert list(workers) == [f"worker-{number}" for number in (1, 2, 3, 4)]
    assert {option(spec, "--workers-here") for spec in workers.values()} == {"4"}
    assert {(option(spec, "--label"), option(spec, "--region")) for spec in workers.values()} == {("disk=fast", "eu-west")}


@pytest.mark.parametrize(("said", "reason"), [("4..1", "give the fewest first"), ("1..x", "not a valid integer")])
def test_numbers_of_workers_that_make_no_sense_are_refused(tmp_path, said, reason):
    called = CliRunner().invoke(command, ["up", "--workers", said, "--data", str(tmp_path)], prog_name="tether")
    assert called.exit_code != 0
    assert reason in (called.output + str(called.exception))


def test_pretended_cards_are_a_tag_and_hide_real_ones(machine, tmp_path):
    machine(2)
    (worker,) = workers_of(tmp_path, workers=1, gpus=2, pretend_gpus=True).values()
    assert (option(worker, "--gpus"), worker.environ["CUDA_VISIBLE_DEVICES"]) == ("2", "")
