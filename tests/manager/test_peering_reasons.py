"""When a lab has a reason to be on the swarm: asked each second, so it must cost nothing while nobody was let in."""

import asyncio
import contextlib

import pytest

from tether.config import DataFolder
from tether.errors import EngineError, MissingDependencyError, NotWriterError, UnsupportedError
from tether.manager.asking import asked_alone
from tether.manager.membership import Signal
from tether.manager.operations import Operations
from tether.manager.peering import peering
from tether.manager.peering.peering import Peering
from tether.manager.settings import ManagerSettings
from tether.security.addresses import Address
from tether.security.identity import Identity
from tether.security.scopes import Scope
from tether.store import Repository
from tether.store.format.encrypted import ModelContext
from tether.swarm.engine import interpreter

LAB, PEER = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
SCOPES = (Scope.parse("infer"),)


class Lab:
    def __init__(self, folder, repository, *, swarm=True):
        self.operations = Operations(repository, LAB, folder.run / "publishing")
        self.access, self.registry = self.operations.access, self.operations.admission.registry
        self.peering = Peering(self.operations, asked_alone(self.operations), ManagerSettings(folder, "", swarm=swarm), Signal())
        self.reads = 0
        self.access.file._db.set_trace_callback(self.read)

    def read(self, _):
        self.reads += 1

    def is_wanted(self):
        return self.peering._is_wanted()


@contextlib.asynccontextmanager
async def opened(root, **options):
    folder = DataFolder(root).create()
    with Repository.open(folder.store, own=LAB.public) as repository:
        lab = Lab(folder, repository, **options)
        await asyncio.sleep(0)
        yield lab
        lab.operations.close()


@pytest.fixture
async def lab(tmp_path):
    async with opened(tmp_path) as lab:
        yield lab


@pytest.fixture
async def island(tmp_path):
    """A lab with --no-swarm."""
    async with opened(tmp_path, swarm=False) as lab:
        yield lab


@contextlib.asynccontextmanager
async def looking_after(lab, may_serve=lambda: True):
    running = asyncio.create_task(lab.peering.run(may_serve))
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_failure_that_nobody_foresaw_is_logged_and_the_next_look_is_made(lab, monkeypatch):
    monkeypatch.setattr("tether.manager.peering.peering._REST", 0.01)
    looks = []

    def look():
        looks.append(1)
        raise KeyError("a bug")

    monkeypatch.setattr(lab.peering, "_is_wanted", look)
    async with looking_after(lab), asyncio.timeout(10):
        while len(looks) < 3:  # noqa: ASYNC110 (it is told to nobody)
            await asyncio.sleep(0.01)


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


# --- leaving


class SlowPresence:
    """Takes its time to leave."""

    def __init__(self):
        self.begun = self.closed = 0
        self.leaves, self.may_go = asyncio.Event(), asyncio.Event()

    async def begin(self, *_):
        self.begun += 1
        return self

    def changed(self):
        pass

    async def aclose(self):
        self.leaves.set()
        await self.may_go.wait()
        self.closed += 1


@pytest.fixture
def slow(lab, monkeypatch):
    presence = SlowPresence()
    monkeypatch.setattr(peering.Presence, "begin", presence.begin)
    monkeypatch.setattr(peering, "_LOOK", 0.01)
    monkeypatch.setattr(Peering, "_weigh", lambda *_: None)
    monkeypatch.setattr(interpreter, "check_installed", lambda: None)
    monkeypatch.setattr(peering, "check_installed", lambda: None)
    lab.registry.invite(SCOPES, uses=1)
    return presence


async def test_a_writer_that_lost_the_lease_and_is_ended_while_it_leaves_the_swarm_leaves_to_the_end(lab, slow):
    serving = [True]
    running = asyncio.create_task(lab.peering.run(lambda: serving[0]))
    async with asyncio.timeout(10):
        while not slow.begun:  # noqa: ASYNC110 (it is told to nobody)
            await asyncio.sleep(0.01)
        serving[0] = False
        await slow.leaves.wait()
        running.cancel()
        await asyncio.sleep(0.05)
        assert not running.done()
        slow.may_go.set()
        await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()
    assert slow.closed == slow.begun == 1


async def test_a_call_that_comes_while_the_process_leaves_the_swarm_does_not_bring_it_back(lab, slow):
    running = asyncio.create_task(lab.peering.run(lambda: True))
    async with asyncio.timeout(10):
        await asyncio.sleep(0)
        await lab.peering._present()
        running.cancel()
        await slow.leaves.wait()
        joining = asyncio.create_task(lab.peering.join(str(Address(PEER.public))))
        await asyncio.sleep(0)
        slow.may_go.set()
        await asyncio.gather(running, return_exceptions=True)
        with pytest.raises(NotWriterError):
            await joining
    assert slow.closed == slow.begun == 1


# --- what people are told


async def test_nobody_is_invited_to_a_lab_that_nobody_can_reach(island):
    admission = island.operations.admission
    with pytest.raises(UnsupportedError, match=r"--no-swarm.*start it without"):
        await admission.invite(["infer:digits"])
    assert await admission.invitations() == []
    allowed = await admission.allow(PEER.public, ["infer:digits"])
    assert allowed["scopes"] == ["infer:digits"]
    assert "--no-swarm" in allowed["note"]
    assert (await admission.disallow(PEER.public, None))["scopes"] == []
    async with looking_after(island):
        await asyncio.sleep(0)
        for operation, *arguments in (("join", str(Address(PEER.public))), ("replicate", PEER.public, "digits"), ("hold", PEER.public)):
            with pytest.raises(UnsupportedError, match="--no-swarm"):
                await island.peering.handlers()[operation](*arguments)


async def test_who_is_allowed_to_decrypt_only_needs_no_swarm(island):
    island.operations.repository.keys.current(ModelContext(LAB.public, "net"))
    allowed = await island.operations.admission.allow(PEER.public, ["decrypt:net"])
    assert (list(allowed["envelopes"]), allowed["note"]) == (["net"], None)


async def test_where_the_engine_is_missing_an_invitation_says_what_to_install(lab, monkeypatch):
    monkeypatch.setattr(interpreter, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tether\[swarm\]'"):
        await lab.operations.admission.invite(["infer:digits"])
    told = await lab.peering.swarm()
    assert (told["state"], told["since"]) == ("failed", None)
    assert "pip install" in told["detail"]


async def test_a_lab_says_why_it_is_not_on_the_swarm(lab, monkeypatch):
    monkeypatch.setattr(interpreter, "check_installed", lambda: None)
    async with looking_after(lab):
        await asyncio.sleep(0)
        told = await lab.peering.swarm()
        assert (told["state"], told["peers"], told["reachable"]) == ("off", 0, None)
        assert told["address"] == str(Address(LAB.public))
        assert told["detail"].startswith("not needed yet")
    async with looking_after(lab, lambda: False):
        await asyncio.sleep(0)
        assert "another manager" in (await lab.peering.swarm())["detail"]


async def test_a_lab_that_could_not_get_on_the_swarm_says_the_last_error(lab, monkeypatch):
    async def begin(*_):
        raise EngineError("a socket can't be bound")

    monkeypatch.setattr(peering.Presence, "begin", begin)
    lab.access.allow(PEER.public, SCOPES)
    async with looking_after(lab), asyncio.timeout(10):
        while (told := await lab.peering.swarm())["state"] != "failed":  # noqa: ASYNC110 (it is told to nobody)
            await asyncio.sleep(0.01)
    assert told["detail"] == "a socket can't be bound"


async def test_a_lab_without_the_swarm_says_so(island):
    told = await island.peering.swarm()
    assert told["state"] == "off"
    assert "--no-swarm" in told["detail"]
