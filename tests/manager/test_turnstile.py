"""Slots that are lent to a lab."""

import asyncio

import pytest

from tether.errors import ManagerLeavingError, QueueFullError
from tether.manager.peering.turnstile import Turnstile


class Crowd:
    def __init__(self, turnstile):
        self.turnstile, self.inside, self.go = turnstile, 0, asyncio.Event()

    async def one(self):
        async with self.turnstile.turn():
            self.inside += 1
            try:
                await self.go.wait()
            finally:
                self.inside -= 1


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_so_many_run_and_the_others_wait_in_turn():
    turnstile = Turnstile(2)
    crowd = Crowd(turnstile)
    tasks = [asyncio.create_task(crowd.one()) for _ in range(5)]
    await settle()
    assert (crowd.inside, turnstile.free, turnstile.queue) == (2, 0, 0.0)
    turnstile.resize(3)
    await settle()
    assert crowd.inside == 3
    crowd.go.set()
    await asyncio.gather(*tasks)
    assert (crowd.inside, turnstile.free) == (0, 3)


async def test_too_many_that_wait_are_sent_away_and_who_leaves_makes_room():
    turnstile = Turnstile(1)
    crowd = Crowd(turnstile)
    tasks = [asyncio.create_task(crowd.one()) for _ in range(5)]
    await settle()
    with pytest.raises(QueueFullError):
        await crowd.one()
    tasks[4].cancel()
    await settle()
    last = asyncio.create_task(crowd.one())
    tasks[0].cancel()
    await settle()
    assert crowd.inside == 1
    crowd.go.set()
    await asyncio.gather(*tasks, last, return_exceptions=True)
    assert turnstile.free == 1


async def test_one_that_is_cancelled_at_its_turn_passes_it_on():
    turnstile = Turnstile(1)
    crowd = Crowd(turnstile)
    first, second, third = (asyncio.create_task(crowd.one()) for _ in range(3))
    await settle()
    crowd.go.set()
    await first
    second.cancel()
    await asyncio.gather(second, third, return_exceptions=True)
    assert turnstile.free == 1


async def test_nobody_runs_without_a_slot():
    with pytest.raises(QueueFullError):
        await Crowd(Turnstile(0)).one()


async def test_who_leaves_lets_end_what_runs_and_turns_away_who_waits():
    turnstile = Turnstile(1)
    crowd = Crowd(turnstile)
    inside, waits, gives_up = [asyncio.create_task(crowd.one()) for _ in range(3)]
    await settle()
    turnstile.leave()
    gives_up.cancel()
    with pytest.raises(ManagerLeavingError):
        await waits
    with pytest.raises(ManagerLeavingError):
        await crowd.one()
    await settle()
    assert (crowd.inside, turnstile.free) == (1, 0)
    crowd.go.set()
    await inside
    assert (gives_up.cancelled(), turnstile.free) == (True, 1)
