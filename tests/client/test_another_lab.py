"""What a newcomer types for another lab: the nodes by which the swarm is entered, and what a refusal tells of what to ask for."""

import asyncio
import re

import psutil
import pytest
from fake_gateway import KEY
from far_lab import LAB, FarLab

import tether
from tether.client.own_manager import OwnManager, dismiss
from tether.config import DataFolder
from tether.errors import ConfigError, ForbiddenError
from tether.security.addresses import Address
from tether.wire.heads import joined

SECONDS = 30.0
NOWHERE = "127.0.0.1:9"


@pytest.fixture
def folder(tmp_path):
    return DataFolder(tmp_path / "mine")


@pytest.fixture
def far(gateway, folder):
    far = FarLab(folder, gateway, KEY)
    yield far
    far.close()


def test_nodes_that_are_none_are_told_before_anything_is_started(folder):
    with pytest.raises(ConfigError, match="host:port"):
        tether.connect(str(Address(LAB.public)), data=folder.root, bootstrap="garbage")
    assert not folder.root.exists()


async def test_a_manager_that_is_started_for_a_call_enters_the_swarm_by_the_nodes_that_were_named(folder):
    own = OwnManager(folder, NOWHERE)
    try:
        (pid,) = re.findall(rb'"pid":\s*(\d+)', await own.request("door/hello", timeout=SECONDS))
        command = psutil.Process(int(pid)).cmdline()
        assert command[command.index("--bootstrap") + 1] == NOWHERE
    finally:
        await own.aclose()
        await dismiss(folder, SECONDS)


async def test_a_call_to_a_manager_that_is_about_to_end_leaves_those_that_it_still_works_on(far, folder):
    far.allow("infer")
    answer = far.loop.create_future()
    far.respond("ping", answer)
    own = OwnManager(folder)
    long = asyncio.create_task(own.request("peer/call", joined({"peer": LAB.public, "method": "ping"}), SECONDS))
    async with asyncio.timeout(SECONDS):
        while not far.answering.working:  # noqa: ASYNC110 (another loop's)
            await asyncio.sleep(0.01)
    before = far.door
    ending = far.run(far.begin_to_end())
    assert b"pid" in await own.request("door/hello", timeout=SECONDS)
    assert (before.clients, far.door.clients) == (1, 1)
    far.loop.call_soon_threadsafe(answer.set_result, b"done")
    assert await long == b"done"
    await own.aclose()
    far.run(asyncio.wait_for(ending, SECONDS))
    assert before.clients == 0


def test_a_refusal_names_the_scope_to_ask_for(far, folder):
    with tether.connect(far.invite("infer:digits"), data=folder.root) as lab, pytest.raises(ForbiddenError, match=r"scope publish$"):
        lab.alias("digits", "prod", 1)
