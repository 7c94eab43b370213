"""Services that are forked from a process which has imported what they share."""

import asyncio
import json
import os
import signal

import psutil
import pytest
from conftest import until

from tether._version import __version__
from tether.config import DataFolder
from tether.lab import nursery as nursery_module
from tether.lab.launch import running
from tether.lab.nursery import Birth, Nursery
from tether.telemetry.service import READY_ENV

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="services are forked on Linux only")


@pytest.fixture
def nursery(tmp_path):
    opened = Nursery(tmp_path / "log", tmp_path)
    opened.open()
    yield opened
    opened.close()


async def told(nursery, path, *arguments):
    """What it writes to the descriptor that it gets as its output."""
    with path.open("wb") as file:
        child = await nursery.born(Birth(arguments, {}, {1: file.fileno(), 2: file.fileno()}))
        await asyncio.wait_for(child.wait(), 60)
    assert child.returncode == 0
    return path.read_text()


async def test_they_run_their_command_and_write_where_they_are_told(nursery, tmp_path):
    assert await told(nursery, tmp_path / "a", "--version") == f"tether {__version__}\n"
    first, second = await asyncio.gather(*(told(nursery, tmp_path / name, "worker", "--help") for name in "bc"))
    assert first == second
    assert "Run a worker" in first


async def test_where_none_can_be_forked_any_more_nothing_comes(nursery, tmp_path):
    await told(nursery, tmp_path / "a", "--version")
    os.kill(nursery._zygote.pid, signal.SIGKILL)
    birth = Birth(["--version"], {}, {1: 1, 2: 2})
    assert await nursery.born(birth) is None
    assert await nursery.born(birth) is None


async def test_a_stop_in_the_middle_leaves_no_answer_for_the_next_one(nursery):
    birth = Birth(["--version"], {}, {1: 1, 2: 2})
    waiting = asyncio.ensure_future(nursery.born(birth))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await nursery.born(birth) is None


async def test_where_it_can_not_be_opened_nothing_comes(tmp_path):
    nursery = Nursery(tmp_path / "no such folder" / "log", tmp_path)
    nursery.open()
    assert await nursery.born(Birth(["--version"], {}, {1: 1, 2: 2})) is None
    nursery.close()


async def test_who_waits_when_it_closes_hears_of_it(nursery):
    waiting = [asyncio.ensure_future(nursery.born(Birth(["--version"], {}, {1: 1, 2: 2}))) for _ in range(2)]
    await asyncio.sleep(0)
    nursery.close()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 30) == [None, None]


async def test_who_gives_up_before_it_was_asked_takes_it_from_nobody(nursery, tmp_path):
    asked = asyncio.ensure_future(told(nursery, tmp_path / "a", "--version"))
    await asyncio.sleep(0)
    behind = asyncio.ensure_future(nursery.born(Birth(["--version"], {}, {1: 1, 2: 2})))
    await asyncio.sleep(0)
    behind.cancel()
    assert await asked == await told(nursery, tmp_path / "b", "--version")


async def test_one_that_hangs_is_waited_for_only_so_long(nursery, tmp_path, monkeypatch):
    await told(nursery, tmp_path / "a", "--version")
    os.kill(nursery._zygote.pid, signal.SIGSTOP)
    monkeypatch.setattr(nursery_module, "_PATIENCE", 0.1)
    assert await asyncio.wait_for(nursery.born(Birth(["--version"], {}, {1: 1, 2: 2})), 30) is None


async def test_a_descriptor_may_have_any_number(nursery, tmp_path):
    number = int(nursery._zygote.args[3])
    read, write = os.pipe()
    with os.fdopen(read) as ready, (tmp_path / "out").open("wb") as out:
        arguments = ["manager", "--alone", "--no-swarm", "--idle", "0", "--data", str(tmp_path / "data")]
        child = await nursery.born(Birth(arguments, {READY_ENV: str(number)}, {1: out.fileno(), 2: out.fileno(), number: write}))
        os.close(write)
        line = await asyncio.to_thread(ready.readline)
        assert json.loads(line or "{}") == {"pid": child.pid}, (tmp_path / "out").read_text()
        await asyncio.wait_for(child.wait(), 60)


def test_each_service_of_a_lab_is_called_by_its_name(lab):
    commands = {service.role: psutil.Process(service.pid).cmdline() for service in lab.status().services}
    assert {role: command[1:4] for role, command in commands.items()} == {role: ["-m", "tether", role] for role in commands}
    assert all(str(lab.status().data) in command for command in commands.values())


def test_a_lab_whose_nursery_is_gone_starts_its_services_anew(own_lab):
    supervisor = psutil.Process(running(DataFolder.locate(own_lab.status().data)).pid)
    zygote = next(child for child in supervisor.children() if "tether.lab.zygote" in child.cmdline())
    zygote.kill()
    before = {worker.id: worker.pid for worker in own_lab.workers.values()}
    psutil.Process(before["worker-1"]).kill()
    until(lambda: {worker.id: worker.pid for worker in own_lab.workers.values()}.get("worker-1", before["worker-1"]) != before["worker-1"])
    assert psutil.Process(own_lab.workers["worker-1"].pid).ppid() == supervisor.pid
