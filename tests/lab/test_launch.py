"""The parts of a start one by one: one service's keeper, locks, what is found running, a start that is given up."""

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from starvation import Watch

from tether.cli import tether
from tether.config import DataFolder
from tether.errors import ConfigError, LabRunningError, StartFailedError
from tether.lab import launch as launching
from tether.lab import supervisor as supervising
from tether.lab.cards import gpu_count
from tether.lab.launch import Running, UpSettings, launch, running, settled
from tether.lab.nursery import Nursery
from tether.lab.ports import PortPicker, claimed_file
from tether.lab.processes import Process, ServiceSpec
from tether.lab.supervisor import LAB_FILE, LOCK_FILE, Supervisor

ANSWERS = """echo '{}' > /proc/self/fd/$TETHER_READY_FD; exec sleep 60"""
SILENT = "exec sleep 60"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder and a folder for sockets that no other lab of this machine knows."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return DataFolder(tmp_path / "data").create()


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Every service is this shell script instead."""

    def be(script):
        path = tmp_path / "service"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return be


@contextlib.asynccontextmanager
async def kept(log, on_change=lambda: None, role="worker"):
    """A service under its keeper, started as where nothing can be forked; it is stopped at the end."""
    lifeline, hold = os.pipe()
    process = Process(ServiceSpec("one", role, []), log, lifeline, on_change, Nursery(log, log.parent))
    process.start()
    try:
        async with asyncio.timeout(20):
            yield process
    finally:
        await process.stop(5)
        os.close(lifeline)
        os.close(hold)


async def another(process, before):
    """Wait until it runs under another number; the seconds that took."""
    begun = Watch()
    while process.state != "running" or process.pid in {None, before}:  # noqa: ASYNC110 (what it waits for has no event)
        await asyncio.sleep(0.01)
    return begun.seconds()


def descriptors():
    """What is open, less the garbage of earlier tests. Connections of theirs may still close meanwhile: what counts is what comes."""
    gc.collect()
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them, or one that was closed just now
            found.add((path.name, str(path.readlink())))
    return found


@contextlib.contextmanager
def held(path, kind=fcntl.LOCK_EX):
    with path.open("a+") as file:
        fcntl.flock(file, kind)
        yield


async def test_a_service_killed_again_and_again_is_back_each_time_at_once(tmp_path, service):
    service(ANSWERS)
    async with kept(tmp_path / "log") as process:
        await process.ready()
        for number in (*[signal.SIGKILL] * 4, signal.SIGRTMIN + 1):  # one that has no name, too
            pid = process.pid
            os.kill(pid, number)
            assert await another(process, pid) < 3


async def test_a_log_that_cannot_be_written_keeps_no_service_from_running(tmp_path, service):
    service(ANSWERS)
    async with kept(tmp_path / "gone" / "log") as process:
        await process.ready()
        assert process.state == "running"


async def test_what_cannot_be_started_is_tried_again_and_then_said_and_leaks_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    async with kept(tmp_path / "log") as process:
        open_before = descriptors()
        with pytest.raises(StartFailedError, match="one does not start"):
            await process.ready()
        assert not descriptors() - open_before
        assert process.restarts == 2


async def test_a_service_whose_start_fails_once_it_ran_is_started_when_it_can_be(tmp_path, service):
    service(ANSWERS)
    executable = sys.executable
    async with kept(tmp_path / "log") as process:
        await process.ready()
        pid, sys.executable = process.pid, str(tmp_path / "missing")  # `service` puts it back
        os.kill(pid, signal.SIGKILL)
        while process.restarts < 2:  # noqa: ASYNC110 (as above)
            await asyncio.sleep(0.01)
        sys.executable = executable
        await another(process, pid)


async def test_a_stop_in_the_middle_of_a_start_ends_what_was_being_started(tmp_path, service):
    service(SILENT)
    children = set(psutil.Process().children())
    async with kept(tmp_path / "log") as process:
        await asyncio.sleep(0)  # the keeper is inside the start, there is no child yet
        assert process.pid is None
        begun = Watch()
        await process.stop(15)
        assert begun.seconds() < 10
    assert set(psutil.Process().children()) == children


async def test_a_service_that_does_not_listen_is_killed_when_its_time_is_over(tmp_path, service):
    service(f"trap '' TERM; {ANSWERS.replace('exec sleep', 'sleep')}")
    async with kept(tmp_path / "log") as process:
        await process.ready()
        pid = process.pid
        await process.stop(0.2)
        assert process.state == "stopped"
    assert not psutil.pid_exists(pid)


async def test_a_supervisor_stops_every_role_whatever_one_of_them_does(tmp_path, data, service):
    service(ANSWERS)

    class Stubborn(Process):
        async def stop(self, grace):
            await super().stop(grace)
            raise OSError(28, "no space")

    supervisor = Supervisor(UpSettings(data))
    async with contextlib.AsyncExitStack() as stack:
        spec, nursery = ServiceSpec("gateway", "gateway", []), Nursery(tmp_path / "log", tmp_path)
        door = Stubborn(spec, tmp_path / "log", supervisor._lifeline, supervisor._write_state, nursery)
        door.start()
        worker = await stack.enter_async_context(kept(tmp_path / "log"))
        supervisor._processes = [door, worker]
        await asyncio.gather(door.ready(), worker.ready())
        await supervisor.stop()
        assert (door.state, worker.state) == ("stopped", "stopped")
    assert not data.runtime.exists()


async def test_state_that_cannot_be_written_is_no_error_and_a_lost_folder_is_made_again(data):
    supervisor = Supervisor(UpSettings(data))
    data.run.rmdir()
    supervisor._write_state()
    facts = json.loads((data.run / LAB_FILE).read_text())
    assert (facts["ready"], facts["services"]) == (False, [])
    (data.run / LAB_FILE).unlink()
    (data.run / LAB_FILE).mkdir()
    supervisor._write_state()
    assert [path.name for path in data.run.iterdir()] == [LAB_FILE]
    (data.run / LAB_FILE).rmdir()
    await supervisor.stop()


async def test_a_start_that_takes_too_long_names_the_service_and_its_log(data, service, monkeypatch):
    service(SILENT)
    (data.logs / "orchestrator.log").write_text("deep in thought\n")  # what it said: itself it may not come to say it, on a busy machine
    monkeypatch.setattr(supervising, "START_TIMEOUT", 1.0)
    supervisor = Supervisor(UpSettings(data, gateway=False))
    with pytest.raises(StartFailedError, match=r"(?s)orchestrator is not up after 1 s.*deep in thought"):
        await supervising._start_alone(supervisor, data)
    await supervisor.stop()
    assert not data.runtime.exists()


async def test_a_start_behind_another_start_is_given_up_too(data, monkeypatch):
    monkeypatch.setattr(supervising, "START_TIMEOUT", 0.1)
    supervisor = Supervisor(UpSettings(data, gateway=False))
    async with supervising._alone_with_ports(data):
        with pytest.raises(StartFailedError, match="another lab of this user is starting"):
            await supervising._start_alone(supervisor, data)
    await supervisor.stop()


def test_who_only_looks_does_not_keep_a_lab_from_starting(data):
    stop = threading.Event()

    def look():
        while not stop.is_set():
            running(data)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    (data.run / LOCK_FILE).touch()
    for each in lookers:
        each.start()
    try:
        for _ in range(200):
            with supervising._only_lab(data):
                pass
    finally:
        stop.set()
        for each in lookers:
            each.join()


def test_a_lab_that_runs_is_named_to_the_next(data):
    with supervising._only_lab(data), pytest.raises(LabRunningError, match=f"pid {os.getpid()}"), supervising._only_lab(data):
        pass


def test_only_a_lab_that_is_up_counts_as_running(data):
    facts = {"gateway": None, "pid": 1, "version": "1", "notes": [], "ready": False}
    data.api_key.write_text("key")
    (data.run / LAB_FILE).write_text(json.dumps(facts | {"ready": True}))
    assert running(data) is None
    with held(data.run / LOCK_FILE):
        (data.run / LAB_FILE).write_text(json.dumps(facts))
        assert running(data) is None
        assert not settled(data, 0.1)
        (data.run / LAB_FILE).write_text(json.dumps(facts | {"ready": True}))
        assert running(data) == Running(None, data, 1, "key", "1")
        assert settled(data)
    assert settled(data)


def test_the_lock_is_not_opened_through_a_link(tmp_path):
    (tmp_path / "theirs").touch()
    (tmp_path / "ports.lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="remove it"):
        claimed_file(tmp_path / "ports.lock")


def test_where_a_file_is_the_lock_one_has_it_at_a_time(tmp_path):
    first = claimed_file(tmp_path / "ports.lock")
    assert claimed_file(tmp_path / "ports.lock") is None
    os.close(first)
    second = claimed_file(tmp_path / "ports.lock")
    assert second is not None
    os.close(second)


PICKING = """
import sys
from pathlib import Path
from tether.lab.ports import PortPicker
picker = PortPicker("127.0.0.1", Path(sys.argv[1]))
print(picker.free("worker-1", int(sys.argv[2])), flush=True)
sys.stdin.read()
"""


def test_the_port_of_a_service_that_is_started_again_is_given_to_no_other_lab(tmp_path):
    """Also not to one that was told another TMPDIR."""
    (tmp_path / "other").mkdir()
    first = PortPicker("127.0.0.1", tmp_path)
    port = first.free("worker-1", 18_001)
    with subprocess.Popen(
        [sys.executable, "-c", PICKING, tmp_path / "other", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        theirs = int(other.stdout.readline())
        assert theirs > port
        first.close()
        again = PortPicker("127.0.0.1", tmp_path)
        assert again.free("worker-1", port) == port
        assert again.free("worker-2", theirs) > theirs
        other.kill()
    assert again.free("worker-3", theirs) == theirs
    again.close()


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("selected", "error"), [(interrupted, KeyboardInterrupt), (lambda *_: ([], [], []), StartFailedError)])
@pytest.mark.parametrize("bound", [True, False])
def test_a_start_that_is_given_up_leaves_neither_process_nor_descriptor(data, monkeypatch, selected, error, bound):
    open_before, children = descriptors(), set(psutil.Process().children())
    monkeypatch.setattr(select, "select", selected)
    with pytest.raises(error):
        launch(UpSettings(data, gateway=False), bound=bound)
    assert not descriptors() - open_before
    assert set(psutil.Process().children()) == children


def test_auto_is_as_many_gpus_as_there_are_and_anything_else_a_number():
    assert gpu_count("auto") == len(
        [path for path in Path("/dev").iterdir() if path.name.removeprefix("nvidia").isdigit() and path.name[0] == "n"]
    )
    assert gpu_count(3) == 3
    for wrong in (-1, "all", 1.5):
        with pytest.raises(ConfigError, match="auto"):
            gpu_count(wrong)


@pytest.mark.parametrize(("given", "asked"), [("auto", gpu_count("auto")), ("0", 0), ("2", 2)])
def test_the_command_takes_auto_for_gpus(tmp_path, monkeypatch, given, asked):
    got = []
    monkeypatch.setattr(
        launching, "launch", lambda settings, bound: got.append((settings.gpus, bound)) or Running(None, settings.data, 1, "", "")
    )
    done = CliRunner().invoke(tether, ["up", "--detach", "--gpus", given, "--data", str(tmp_path)])
    assert (done.exit_code, got) == (0, [(asked, False)])


@pytest.mark.parametrize("given", ["many", "-1"])
def test_the_command_takes_no_other_word_for_gpus(given):
    assert CliRunner().invoke(tether, ["up", "--gpus", given]).exit_code == 2
