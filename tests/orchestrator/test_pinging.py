"""Workers that answer pings, or not: Dask's servers and connections, the limits as they are."""

import asyncio
import time
from contextlib import asynccontextmanager

from distributed.comm import CommClosedError
from distributed.core import Server, Status, connect

from tether.orchestrator.health import LIMIT, PERIOD
from tether.orchestrator.pinging import Pinger

PROMPT = 30.0


class Worker:
    """Answers while it is not `stopped`, on connections that it may drop."""

    def __init__(self):
        self.going, self.lines, self.pings = asyncio.Event(), [], 0
        self.going.set()

    async def answer(self, comm):
        self.lines.append(comm)
        try:
            while True:
                await comm.read()
                self.pings += 1
                await self.going.wait()
                await comm.write({})
        except CommClosedError:
            return Status.dont_reply


@asynccontextmanager
async def pinged(*workers):
    """Their addresses, and what is told of them."""
    told, servers = [], [Server({"tether_pings": worker.answer}) for worker in workers]
    for server in servers:
        await server.listen("tcp://127.0.0.1:0")
    addresses = [server.address for server in servers]
    pinger = Pinger(
        lambda address: connect(address, timeout=LIMIT),
        lambda address: told.append((addresses.index(address), "silent")),
        lambda address: told.append((addresses.index(address), "back")),
    )
    for address in addresses:
        pinger.add(address)
    try:
        yield pinger, addresses, told
    finally:
        await pinger.aclose()
        for server in servers:
            await server.close()


async def eventually(condition):
    deadline = time.monotonic() + PROMPT
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        await asyncio.sleep(0.01)


async def test_a_worker_that_stops_answering_is_silent_and_one_that_goes_on_is_back_and_no_other_is():
    stops, goes_on = Worker(), Worker()
    async with pinged(stops, goes_on) as (_, _, told):
        await eventually(lambda: stops.pings)
        stops.going.clear()
        await eventually(lambda: told)
        stops.going.set()
        await eventually(lambda: len(told) > 1)
        assert told == [(0, "silent"), (0, "back")]


async def test_a_connection_that_ends_is_made_anew_before_anybody_is_silent():
    worker = Worker()
    async with pinged(worker) as (_, _, told):
        for number in range(1, 4):
            await eventually(lambda number=number: len(worker.lines) == number and worker.pings >= 1)
            worker.lines[-1].abort()
        await asyncio.sleep(LIMIT)
        assert told == []


async def test_who_went_is_pinged_no_more_and_nothing_is_told_of_it():
    worker = Worker()
    async with pinged(worker) as (pinger, addresses, told):
        await eventually(lambda: worker.pings)
        pinger.remove(addresses[0])
        await eventually(worker.lines[0].closed)
        seen = worker.pings
        await asyncio.sleep(LIMIT + PERIOD)
        assert (told, worker.pings, len(worker.lines)) == ([], seen, 1)
