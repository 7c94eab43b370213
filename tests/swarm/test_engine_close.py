"""A node that JavaScript does not end."""

import asyncio
import contextlib

import structlog

from tether.swarm.engine import engine as engines
from tether.swarm.engine.engine import Engine, EngineSettings


class Stuck:
    """The host of an interpreter that answers nothing."""

    def __init__(self):
        self.bridge, self.asked, self.removed = self, [], []

    async def call(self, method, *, node, force):
        self.asked.append((method, node, force))
        await asyncio.Event().wait()

    async def remove(self, number):
        self.removed.append(number)


async def test_its_end_is_waited_for_no_longer_than_told(monkeypatch):
    monkeypatch.setattr(engines, "_GOODBYE", 0.01)
    host = Stuck()
    engine = Engine(host, 7, bytes(32), EngineSettings())
    with structlog.testing.capture_logs() as logs:
        async with asyncio.timeout(10):
            await engine.close()
    assert host.asked == [("destroy", 7, False), ("destroy", 7, True)]
    assert host.removed == [7]
    assert [entry["node"] for entry in logs] == [7]


async def test_who_is_cancelled_meanwhile_leaves_nothing_either():
    host = Stuck()
    engine = Engine(host, 7, bytes(32), EngineSettings())
    closing = asyncio.create_task(engine.close())
    while not host.asked:  # noqa: ASYNC110 (nothing says that it has begun)
        await asyncio.sleep(0)
    closing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    assert closing.cancelled()
    assert host.removed == [7]
