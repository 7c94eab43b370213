"""Row 7: more requests than can be answered, sent whether or not others were answered."""

import asyncio
import random
import time
from dataclasses import dataclass

import pytest
from chaos_lab import PROMPT, Client

pytestmark = pytest.mark.chaos
TAKES = 0.04
"""Seconds that a request takes of the model, which runs them one by one on each of two workers."""
CAPACITY = 2 / TAKES
DEADLINE = 1.0
SETTLED = 5.0
"""Seconds after an overload from which on nothing is to be seen of it."""


@dataclass
class Told:
    """What one request was told."""

    load: float
    sent: float
    """Seconds after its load began."""
    status: int
    answer: object
    seconds: float
    head: str


class OpenLoop:
    """Sends at a rate, on connections that are free, or new ones."""

    def __init__(self, lab, chance):
        self.lab, self.chance, self.free, self.told = lab, chance, [], []

    async def run(self, load, seconds):
        begun = moment = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while (moment := moment + self.chance.expovariate(load * CAPACITY)) < begun + seconds:
                await asyncio.sleep(max(moment - time.monotonic(), 0))
                group.create_task(self._ask(load, begun))

    async def _ask(self, load, begun):
        client = self.free.pop() if self.free else Client(self.lab)
        sent = time.monotonic() - begun
        status, answer, seconds = await client.ask("patient", TAKES, DEADLINE)
        self.told.append(Told(load, sent, status, answer, seconds, client.told))
        self.free.append(client)

    async def aclose(self):
        assert [await client.aclose() for client in self.free] == [b""] * len(self.free)

    def of(self, load, *statuses):
        return [each for each in self.told if each.load == load and each.status in statuses]


def p99(told):
    seconds = sorted(each.seconds for each in told)
    return seconds[len(seconds) * 99 // 100] if seconds else 0.0


@pytest.fixture
def one_by_one(lab):
    lab.serve("patient", max_batch_size=1)
    yield lab
    lab.serve("patient", max_batch_size=None)


@pytest.mark.timeout(1200)
def test_row_07_an_overload_is_turned_away_at_once_and_what_is_taken_is_answered(one_by_one, chaos, measured):
    begun, seconds = time.monotonic(), chaos.count(600, 30) / 10
    loads = (1.0, 2.0, 3.0, 4.0, 5.0, 0.5) if chaos.scale >= 1 else (1.0, 5.0, 0.5)
    loop = OpenLoop(one_by_one, random.Random(f"row 7, {chaos.seed}"))

    async def live():
        for load in loads:
            await loop.run(load, seconds)
        await loop.aclose()

    asyncio.run(live())
    goodput = {load: len(loop.of(load, 200)) / seconds for load in loads}
    turned, late = loop.of(5.0, 503), [each for each in loop.told if each.status == 504]
    calm = [each for each in loop.of(0.5, 200, 503, 504) if each.sent > min(SETTLED, seconds / 2)]
    counts = f"{len(loop.told)} requests in loads of {seconds:g} s, good answers a second: "
    counts += ", ".join(f"{load:g} x {rate:.1f}" for load, rate in goodput.items())
    counts += f"; at 5 x {len(turned)} turned away, p99 {1000 * p99(turned):.0f} ms, taken p99 {1000 * p99(loop.of(5.0, 200)):.0f} ms"
    counts += f"; {len(late)} late; afterwards p99 {1000 * p99(calm):.0f} ms, {sum(each.status != 200 for each in calm)} not answered"
    measured(f"row 7: {counts}")
    chaos.record(7, counts, time.monotonic() - begun)
    assert {each.answer for each in turned} == {"queue_full"}
    assert all(int(each.head.partition("retry-after: ")[2].partition("\r\n")[0]) >= 1 for each in turned)
    assert {each.status for each in loop.told} <= {200, 503, 504}
    is_full = chaos.scale >= 1
    assert goodput[5.0] >= (0.9 if is_full else 0.3) * max(goodput.values())
    assert p99(turned) <= (0.05 if is_full else PROMPT)
    assert p99(loop.of(5.0, 200)) <= (DEADLINE if is_full else PROMPT)
    assert sum(each.status == 200 for each in calm) >= (1.0 if is_full else 0.5) * len(calm)
