"""Who waits for a change, and is ended meanwhile."""

import asyncio
import contextlib

from tether.manager.membership import Signal


async def test_nothing_of_it_stays_behind():
    signal = Signal()
    waiting = asyncio.create_task(signal.within(signal.event, 60))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    before = asyncio.all_tasks()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0)
    assert before - {task for task in before if task.done()} == {asyncio.current_task()}


async def test_it_ends_by_the_change_or_by_the_time():
    signal = Signal()
    event = signal.event
    await signal.within(event, 0.001)
    signal.fire()
    async with asyncio.timeout(10):
        await signal.within(event, 60)
