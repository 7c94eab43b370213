"""The user's own manager as a process: found or started, one for each folder, gone when nobody needs it, and out of a lab's way."""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

import tether
from tether.client.own_manager import OwnManager, dismiss
from tether.client.starting import start_manager
from tether.config import DataFolder
from tether.errors import ServiceUnavailableError, StartFailedError
from tether.manager.locks import TAKEN, is_locked
from tether.security.addresses import Address
from tether.security.identity import Identity
from tether.store import Repository

SECONDS = 30.0


@pytest.fixture
async def folder(tmp_path, monkeypatch):
    """A data folder; what serves it at the end is asked to go."""
    monkeypatch.setenv("TETHER_BOOTSTRAP", "127.0.0.1:9")  # should one enter the swarm, then no public one
    folder = DataFolder(tmp_path / "mine").create()
    yield folder
    await dismiss(folder, SECONDS)
    assert not is_locked(folder.store / "writer.lock")


async def until(holds):
    deadline = time.monotonic() + SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not true after {SECONDS} s"
        await asyncio.sleep(0.02)
    return found


async def hello(own):
    return json.loads(await own.request("door/hello", timeout=SECONDS))


async def gone(pid):
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def alone(folder, *options, **more):
    command = [sys.executable, "-m", "tether", "manager", "--alone", "--data", str(folder.root), *options]
    return subprocess.Popen(command, **more)


async def ended(process):
    """Its exit code."""
    return await asyncio.to_thread(process.wait, SECONDS)


async def test_the_first_call_starts_one_and_others_find_it(folder):
    first, second = OwnManager(folder), OwnManager(folder)
    assert await first.ask("models") == []
    told = await hello(first)
    assert (told["alone"], told["publisher"]) == (True, Identity.load_or_create(folder.identity).public)
    assert (await hello(second))["pid"] == told["pid"]
    assert (await first.ask("address"))["publisher"] == told["publisher"]
    assert folder.door.stat().st_mode & 0o777 == 0o600
    await first.aclose()
    await second.aclose()


async def test_many_that_begin_at_once_start_one(folder):
    clients = [OwnManager(folder) for _ in range(5)]
    assert len({told["pid"] for told in await asyncio.gather(*map(hello, clients))}) == 1
    started = [line for line in (folder.logs / "manager.log").read_text().splitlines() if "error" in line]
    assert not started, "nobody even tried a second time"
    for client in clients:
        await client.aclose()


async def test_of_two_that_are_started_past_each_other_one_goes_and_says_so(folder):
    racing = [alone(folder, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    loser = await until(lambda: next((process for process in racing if process.poll() is not None), None))
    await dismiss(folder, SECONDS)
    codes = await asyncio.gather(*map(ended, racing))
    assert (sorted(codes), loser.returncode) == ([0, TAKEN], TAKEN)
    assert "lab_running" in loser.stderr.read()
    for process in racing:
        process.stderr.close()


async def test_a_client_whose_start_races_with_another_s_connects_to_the_one_that_won(folder):
    with alone(folder, stderr=subprocess.DEVNULL) as other:
        own = OwnManager(folder)
        pid = (await hello(own))["pid"]
        if pid != other.pid:
            assert await ended(other) == TAKEN
        assert await own.ask("models") == []
        await own.request("door/leave")
        await own.aclose()
    await gone(pid)


async def test_it_ends_by_itself_after_its_last_client(folder):
    with alone(folder, "--idle", "1.5") as process:
        await until(folder.door.exists)
        own = OwnManager(folder)
        await hello(own)
        await asyncio.sleep(2.0)
        assert process.poll() is None, "a client is there"
        await own.aclose()
        assert await ended(process) == 0
    assert not folder.runtime.exists()


async def test_killed_during_a_call_it_is_told_and_the_next_call_starts_another(folder):
    own = OwnManager(folder)
    pid = (await hello(own))["pid"]
    os.kill(pid, signal.SIGSTOP)
    calling = asyncio.create_task(own.ask("models"))
    await until(lambda: own._connection.in_flight)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ServiceUnavailableError, match="call again"):
        await calling
    assert await own.ask("models") == []
    assert (await hello(own))["pid"] != pid
    await own.aclose()


async def test_asked_to_leave_between_two_calls_the_second_is_answered_by_another(folder):
    own, other = OwnManager(folder), OwnManager(folder)
    pid = (await hello(own))["pid"]
    await other.request("door/leave")
    await gone(pid)
    assert (await hello(own))["pid"] != pid
    await own.aclose()
    await other.aclose()


async def test_one_that_can_t_start_says_why(folder):
    folder.identity.write_text("no identity")
    folder.identity.chmod(0o600)
    with pytest.raises(StartFailedError, match="64 hex digits"):
        await OwnManager(folder).ask("models")


async def test_a_program_that_writes_the_store_is_waited_for_and_then_named(folder, monkeypatch):
    own = OwnManager(folder)
    with Repository.open(folder.store):
        asking = asyncio.create_task(own.ask("models"))
        await asyncio.sleep(0.3)
        assert not asking.done()
    assert await asking == []
    await own.request("door/leave")
    await own.aclose()
    await until(lambda: not is_locked(folder.store / "writer.lock"))
    monkeypatch.setattr("tether.client.own_manager._PATIENCE", 0.3)
    with Repository.open(folder.store), pytest.raises(ServiceUnavailableError, match=f"process {os.getpid()} writes the store"):
        await own.ask("models")


async def test_a_lab_whose_manager_does_not_come_is_said_to_have_none(folder, monkeypatch):
    monkeypatch.setattr("tether.client.own_manager._LAB_PATIENCE", 0.3)
    with folder.lab_lock.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ServiceUnavailableError, match="no manager answers"):
            await OwnManager(folder).ask("models")


async def test_where_a_lab_is_about_to_be_none_is_started_and_one_that_began_goes(folder):
    with folder.lab_lock.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert await asyncio.to_thread(start_manager, folder, SECONDS) is False
        assert await ended(alone(folder)) == TAKEN
    assert not folder.door.exists()


async def test_only_one_that_is_alone_is_waited_for(folder):
    await dismiss(folder, SECONDS)
    begun = time.monotonic()
    with Repository.open(folder.store):
        await dismiss(folder, 0.3)
    assert 0.2 < time.monotonic() - begun < SECONDS / 2


async def test_a_lab_takes_its_place_and_it_takes_a_lab_s_for_clients_that_stay(folder):
    own = OwnManager(folder)
    pid = (await hello(own))["pid"]
    async with await asyncio.to_thread(tether.up, 1, data=folder.root, swarm=False) as lab:
        await gone(pid)
        told = await hello(own)
        assert (told["alone"], told["publisher"]) == (False, Identity.load_or_create(folder.identity).public)
        assert (await own.ask("models")) == []
        assert told["pid"] == next(each.pid for each in (await lab.astatus()).services if each.role == "manager")
        with pytest.raises(tether.errors.ConflictError, match="tether down"):
            await own.request("door/leave")
        with pytest.raises(tether.errors.UnsupportedError, match="--no-swarm"):
            await own.request("peer/connect", json.dumps({"url": str(Address(Identity(bytes([7]) * 32).public))}).encode())
    assert (await hello(own))["alone"] is True
    await own.aclose()
