"""What another lab is told of what happens here: what its scope shows, and nothing of this lab's machines."""

import asyncio
import json

import pytest

from tether.errors import ForbiddenError, MalformedRequestError, QueueFullError, ServiceUnavailableError
from tether.manager.peering import telling
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.telling import Telling
from tether.routing.lab_events import Kind
from tether.security.access import Access
from tether.security.access_file import AccessFile
from tether.security.identity import Identity
from tether.security.scopes import Scope
from tether.swarm.rpc.rpc import Call

PEER, OTHER = (Identity(bytes([number]) * 32).public for number in (2, 3))
PATIENCE = 20.0


class Log:
    """A gateway's, in the place of HTTP: what happened, and who asks."""

    def __init__(self):
        self.events_, self.asked, self.open, self.moved = [], [], 0, asyncio.Event()

    def happens(self, kind, **fields):
        self.events_.append({"seq": len(self.events_) + 1, "at": 5.0, "kind": kind, **fields})
        self.moved.set()
        self.moved = asyncio.Event()

    async def events(self, after, wait):
        self.asked.append((after, wait))
        if after is None:
            return {"events": [], "seq": len(self.events_)}
        self.open += 1
        try:
            async with asyncio.timeout(wait):
                while len(self.events_) <= after:
                    await self.moved.wait()
        except TimeoutError:
            pass
        finally:
            self.open -= 1
        return {"events": self.events_[after:], "seq": len(self.events_)}


@pytest.fixture
def access(tmp_path):
    access = Access(AccessFile.open(tmp_path / "access.sqlite"))
    access.allow(PEER, [Scope.parse("events:digits*")])
    yield access
    access.file.close()


async def asked(telling, peer=PEER, **value):
    return json.loads(await telling.events(Call(peer, "tether/1/events", None), json.dumps(value).encode()))


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (nothing says when it has got so far)
            await asyncio.sleep(0)


async def test_one_hears_of_the_models_that_one_may_hear_of_and_of_gaps(access):
    log = Log()
    log.happens(Kind.MISSED)
    log.happens(Kind.PUBLISHED, model="digits-2", version=1)
    log.happens(Kind.PUBLISHED, model="faces", version=1)
    log.happens(Kind.FAILED, model="digits-2", version=1, reason="/home/her/secret: no such file")
    log.happens(Kind.WORKER_LOST, worker="worker-1")
    log.happens(Kind.PEER_ADMITTED, peer=OTHER)
    log.happens(Kind.ALIAS, model="digits-2", alias="prod", version=1)
    answer = await asked(Telling(log, access), after=0)
    assert answer == {
        "events": [
            {"seq": 1, "at": 5.0, "kind": "missed"},
            {"seq": 2, "at": 5.0, "kind": "version-published", "model": "digits-2", "version": 1},
            {"seq": 4, "at": 5.0, "kind": "version-failed", "model": "digits-2", "version": 1},
            {"seq": 7, "at": 5.0, "kind": "alias-moved", "model": "digits-2", "version": 1, "alias": "prod"},
        ],
        "seq": 7,
    }
    assert await asked(Telling(log, access), OTHER, after=0) == {"events": answer["events"][:1], "seq": 7}


async def test_a_question_stays_open_past_what_it_may_not_hear_of(access):
    log = Log()
    telling = Telling(log, access)
    assert await asked(telling) == {"events": [], "seq": 0}
    waiting = asyncio.create_task(asked(telling, after=0, wait=20))
    for number in range(3):
        await until(lambda: log.open)
        log.happens(Kind.PUBLISHED, model="faces", version=number + 1)
        await until(lambda number=number: log.asked[-1][0] == number + 1)
    assert not waiting.done()
    log.happens(Kind.PUBLISHED, model="digits", version=1)
    assert [event["model"] for event in (await waiting)["events"]] == ["digits"]
    assert await asked(telling, after=4, wait=0.01) == {"events": [], "seq": 4}


async def test_a_manager_that_leaves_answers_soon(access, monkeypatch):
    monkeypatch.setattr(telling, "_LISTEN", 0.05)
    told = Telling(Log(), access)
    waiting = asyncio.create_task(asked(told, after=0, wait=30))
    await asyncio.sleep(0)
    told.is_leaving = True
    async with asyncio.timeout(PATIENCE):
        assert await waiting == {"events": [], "seq": 0}


async def test_a_peer_can_not_hold_any_number_of_questions_open(access):
    log = Log()
    telling = Telling(log, access)
    waiting = [asyncio.create_task(asked(telling, after=0, wait=30)) for _ in range(16)]
    await until(lambda: log.open == 16)
    with pytest.raises(QueueFullError):
        await asked(telling, after=0)
    assert await asked(telling, OTHER, after=0) == {"events": [], "seq": 0}
    for task in waiting[:8]:
        task.cancel()
    await until(lambda: log.open == 8)
    assert (await asked(telling, after=0))["seq"] == 0
    log.happens(Kind.PUBLISHED, model="digits", version=1)
    await asyncio.gather(*waiting, return_exceptions=True)
    assert not telling._open


async def test_bad_questions_and_labs_without_a_gateway(access):
    with pytest.raises(MalformedRequestError):
        await asked(Telling(Log(), access), after="x")
    with pytest.raises(ServiceUnavailableError, match="without a gateway"):
        await asked(Telling(Gateway(None), access), after=0)


def test_the_scope_opens_it(access):
    access.check(PEER, "events")
    with pytest.raises(ForbiddenError):
        access.check(OTHER, "events")
