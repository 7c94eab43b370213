"""When a lab has a reason to be on the swarm: asked each second, so it must cost nothing while nobody was let in."""

import asyncio

import pytest

from tether.config import DataFolder
from tether.manager.asking import asked_alone
from tether.manager.membership import Signal
from tether.manager.operations import Operations
from tether.manager.peering.peering import Peering
from tether.manager.settings import ManagerSettings
from tether.security.identity import Identity
from tether.security.scopes import Scope
from tether.store import Repository

LAB, PEER = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
SCOPES = (Scope.parse("infer"),)


class Lab:
    def __init__(self, folder, repository):
        self.operations = Operations(repository, LAB, folder.run / "publishing")
        self.access, self.registry = self.operations.access, self.operations.admission.registry
        self.peering = Peering(self.operations, asked_alone(self.operations), ManagerSettings(folder, ""), Signal())
        self.reads = 0
        self.access.file._db.set_trace_callback(self.read)

    def read(self, _):
        self.reads += 1

    def is_wanted(self):
        return self.peering._is_wanted()


@pytest.fixture
async def lab(tmp_path):
    folder = DataFolder(tmp_path).create()
    with Repository.open(folder.store, own=LAB.public) as repository:
        lab = Lab(folder, repository)
        await asyncio.sleep(0)
        yield lab
        lab.operations.close()


async def test_a_failure_that_nobody_foresaw_is_logged_and_the_next_look_is_made(lab, monkeypatch):
    monkeypatch.setattr("tether.manager.peering.peering._REST", 0.01)
    looks = []

    def look():
        looks.append(1)
        raise KeyError("a bug")

    monkeypatch.setattr(lab.peering, "_is_wanted", look)
    running = asyncio.create_task(lab.peering.run(lambda: True))
    async with asyncio.timeout(10):
        while len(looks) < 3:  # noqa: ASYNC110 (it is told to nobody)
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_nobody_was_let_in_and_that_is_read_once(lab):
    assert not lab.is_wanted()
    reads = lab.reads
    assert not any(lab.is_wanted() for _ in range(100))
    assert lab.reads == reads


async def test_an_open_invitation_is_a_reason_until_it_is_revoked(lab):
    assert not lab.is_wanted()
    lab.registry.invite(SCOPES, uses=1)
    assert lab.is_wanted()
    (invitation,) = lab.registry.list()
    lab.registry.revoke(invitation.id)
    assert not lab.is_wanted()


async def test_a_key_that_may_do_something_is_a_reason(lab):
    assert not lab.is_wanted()
    lab.access.allow(PEER.public, SCOPES)
    assert lab.is_wanted()
    lab.access.disallow(PEER.public, SCOPES)
    assert not lab.is_wanted()


async def test_what_is_kept_of_others_is_a_reason_and_needs_nothing_read(lab):
    lab.is_wanted()
    reads = lab.reads
    lab.peering._subscriptions.add(PEER.public, "digits")
    assert lab.is_wanted()
    assert lab.reads == reads
