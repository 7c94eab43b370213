"""What a request survives: workers that are slow, silent, broken; and what it costs the others."""

import asyncio
import itertools
import json
import time

import pytest
from dispatch_rig import PROMPT, VERSION, Doubling, Rig, body, eventually, said, table
from msgspec import structs

from tether.errors import InternalError, ModelFailedError
from tether.gateway.parts import Parts
from tether.ports import Hop
from tether.routing.health import ERRORS
from tether.routing.lab_events import Kind
from tether.routing.table import WorkerEntry
from tether.serving_settings import ServingSettings
from tether.types import WorkerId

SPREAD = ServingSettings(policy="round_robin")


@pytest.fixture
async def rig(tmp_path):
    made = Rig(tmp_path)
    yield made
    await made.aclose()


class Moody(Doubling):
    """Raises what it is told to."""

    error = None

    def run(self, inputs):
        answer = super().run(inputs)
        if self.error is not None:
            raise self.error
        return answer


def pair(rig, serving=SPREAD, **terms):
    models = Moody(**terms), Moody(**terms)
    rig.route(models[0].info, *(rig.serve(model) for model in models), serving=serving)
    return models


def happened(rig):
    return [event.kind for event in rig.dispatch.events.after(0) if event.kind in {Kind.WORKER_EJECTED, Kind.WORKER_BACK}]


async def answers(rig, numbers):
    return [said(await rig.ask(number)) for number in numbers]


async def test_a_worker_that_is_broken_costs_nobody_an_answer_and_gets_no_more_requests_until_it_is_mended(rig):
    broken, sound = pair(rig)
    broken.error = InternalError("it is broken")
    assert await answers(rig, range(1, 21)) == [[2.0 * number] for number in range(1, 21)]
    assert len(broken.batches) <= 5 + 1
    assert happened(rig) == [Kind.WORKER_EJECTED]
    broken.error = None
    begun, before = time.monotonic(), len(broken.batches)
    while len(broken.batches) < before + 3 and time.monotonic() < begun + PROMPT:
        assert said(await rig.ask(1)) == [2.0]
        await asyncio.sleep(0.02)
    assert happened(rig) == [Kind.WORKER_EJECTED, Kind.WORKER_BACK]
    assert sound.batches


async def test_a_copy_that_raises_alone_costs_nobody_an_answer_and_an_input_that_all_fail_costs_no_worker(rig):
    bad, sound = pair(rig)
    bad.error = ModelFailedError("this copy is damaged")
    assert await answers(rig, range(1, 21)) == [[2.0 * number] for number in range(1, 21)]
    assert happened(rig) == [Kind.WORKER_EJECTED]
    bad.error = None
    assert (await answers(rig, [-1] * 10)) == [(422, "model_failed")] * 10
    assert happened(rig).count(Kind.WORKER_EJECTED) == 1
    assert sum(bad.batches) + sum(sound.batches) <= 5 + 1 + 20 + 20


async def test_when_all_are_broken_few_requests_are_sent_again_and_all_are_told_at_once(rig):
    models = pair(rig)
    for model in models:
        model.error = InternalError("it is broken")
    begun = time.monotonic()
    replies = await answers(rig, range(300))
    assert replies == [(500, "internal")] * 300
    sent = sum(sum(model.batches) for model in models)
    assert sent <= 300 + 50 + 1 + (time.monotonic() - begun)


async def test_what_is_not_pure_is_told_that_it_failed_and_no_other_worker_runs_it(rig):
    models = pair(rig, pure=False)
    models[0].error = InternalError("it is broken")
    replies = await answers(rig, range(4))
    assert replies.count((500, "internal")) == 2
    assert sum(sum(model.batches) for model in models) == 4


async def test_what_a_worker_has_that_fell_silent_is_answered_by_another(rig):
    frozen, quick = pair(rig)
    await answers(rig, range(4))
    frozen.gate.clear()
    begun = time.monotonic()
    asked = [rig.ask(number) for number in range(1, 7)]
    assert [said(reply) for reply in await asyncio.gather(*asked)] == [[2.0 * number] for number in range(1, 7)]
    assert time.monotonic() - begun > 0.9
    ran = sum(frozen.batches)
    assert happened(rig) == [Kind.WORKER_EJECTED]
    before = len(quick.batches)
    await answers(rig, range(1, 5))
    assert len(quick.batches) == before + 4
    frozen.gate.set()
    await eventually(lambda: said_once(rig) and happened(rig) == [Kind.WORKER_EJECTED, Kind.WORKER_BACK])
    assert sum(frozen.batches) <= ran + 1, "what was taken back does not run"


def said_once(rig):
    """Another request, for which nobody waits here."""
    rig.ask(1)
    return True


async def test_what_is_on_its_way_to_a_worker_that_the_table_calls_silent_goes_on_at_once(rig):
    frozen, quick = Doubling(), Doubling()
    servers = rig.serve(frozen), rig.serve(quick)
    rig.route(frozen.info, *servers, serving=SPREAD)
    frozen.gate.clear()
    quick.gate.clear()
    asked = rig.ask(1)
    await eventually(lambda: frozen.batches or quick.batches)
    silent, other = (frozen, quick) if frozen.batches else (quick, frozen)
    name, endpoint = ("w0", servers[1].endpoint) if silent is frozen else ("w1", servers[0].endpoint)
    other.gate.set()
    left = table(frozen.info, servers[0].endpoint, servers[1].endpoint)
    entry = left.models["m"].versions[1]
    entry = structs.replace(entry, routes=tuple(route for route in entry.routes if route.endpoint == str(endpoint)))
    worker = WorkerEntry(WorkerId(name), "tls://w", 1, "silent", 0.0)
    models = {"m": structs.replace(left.models["m"], versions={1: entry})}
    rig.dispatch.replace_table(structs.replace(left, seq=2, models=models, workers={worker.id: worker}))
    assert said(await asked) == [2.0]
    assert not silent.gate.is_set()


async def test_a_request_that_takes_longer_than_most_is_sent_to_a_second_worker_and_the_first_answer_wins(rig):
    models = pair(rig, ServingSettings(policy="round_robin", hedge=0.9))
    await answers(rig, range(30))
    models[0].gate.clear()
    asked = [rig.ask(number) for number in (1, 2)]
    begun = time.monotonic()
    assert [said(reply) for reply in await asyncio.gather(*asked)] == [[2.0], [4.0]]
    assert time.monotonic() - begun < PROMPT / 2
    assert not models[0].gate.is_set()


async def test_what_is_not_pure_is_never_sent_twice_at_once(rig):
    models = pair(rig, ServingSettings(policy="round_robin", hedge=0.9), pure=False)
    await answers(rig, range(30))
    for model in models:
        model.gate.clear()
    asked = [rig.ask(number, timeout=1.5) for number in (1, 2)]
    await asyncio.gather(*asked)
    assert sum(sum(model.batches) for model in models) == 32


def sequence(number, value):
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [[value, value]]}
    return json.dumps({"parameters": {"sequence_id": number}, "inputs": [tensor]}).encode()


async def test_a_session_stays_at_its_worker_whichever_way_it_is_named(rig):
    models = [Doubling() for _ in range(4)]
    rig.route(models[0].info, *(rig.serve(model) for model in models), serving=ServingSettings(policy="sticky"))
    served = []
    for session, value in itertools.product([f"s{number}".encode() for number in range(12)], range(3)):
        assert said(await rig.ask(value, session=session)) == [2.0 * value]
        served.append(tuple(len(model.batches) for model in models))
    for before, after in itertools.pairwise([(0, 0, 0, 0), *served[2::3]]):
        assert sorted(now - then for then, now in zip(before, after, strict=True)) == [0, 0, 0, 3]
    assert sum(count > 0 for count in served[-1]) >= 2
    before = [len(model.batches) for model in models]
    for value in range(3):
        future = asyncio.get_running_loop().create_future()
        rig.dispatch.infer("m", None, Hop(sequence(77, value), 0, PROMPT), future.set_result)
        assert said(await future) == [2.0 * value]
    assert sorted(len(model.batches) - then for model, then in zip(models, before, strict=True)) == [0, 0, 0, 3]


async def test_the_orchestrator_is_told_each_second_what_became_of_requests_and_nothing_when_there_are_none(rig):
    models = pair(rig)
    replies = await answers(rig, [1, 2, 3, -1])
    cancelled = rig.ask(1)
    rig.cancel()
    await eventually(lambda: rig.control.loads)
    (load,) = rig.control.loads
    seen = load.versions[VERSION]
    assert [reply[0] for reply in replies] == [2.0, 4.0, 6.0, 422]
    assert (seen.answered, seen.failed, seen.refused, seen.open) == (3, 1, 0, 0)
    assert 0 < seen.slowest <= seen.seconds
    models[0].gate.clear()
    asked = rig.ask(1), rig.ask(2)
    await eventually(lambda: rig.control.loads[-1].versions[VERSION].open)
    models[0].gate.set()
    await asyncio.gather(*asked)
    await eventually(lambda: rig.dispatch._traffic._telling is None)
    assert sum(load.versions[VERSION].answered for load in rig.control.loads) == 5
    assert not cancelled.done()


async def test_a_stream_that_its_reader_leaves_is_no_verdict_on_its_worker(rig):
    for model in pair(rig):
        await answers(rig, [1])
        model.gate.clear()
    steering = rig.dispatch._traffic._versions[VERSION].steering
    track, long_ago = steering.health.own[0], time.monotonic() - 3600.0
    for _ in range(ERRORS):
        steering.health.failed(track, long_ago)
    cancel = rig.dispatch.stream("m", None, Hop(body(1), 0, PROMPT), Parts(None), print)
    assert (track.is_out, track.is_probed) == (True, True)
    (call,) = rig.dispatch._open
    call.live[0].sent = long_ago
    cancel()
    assert (track.is_out, track.is_probed) == (True, False), "another request can be its probe"
    assert track.latency < PROMPT


async def test_the_orchestrator_is_told_of_requests_that_the_gateway_had_no_room_for(rig):
    pair(rig)
    assert await answers(rig, [1]) == [[2.0]]
    backlog = rig.dispatch._shedding._backlogs[VERSION]
    backlog.open, backlog.rate, backlog.longest = 10_000, 10.0, PROMPT
    assert await answers(rig, [1, 2, 3]) == [(503, "queue_full")] * 3
    await eventually(lambda: sum(load.versions[VERSION].refused for load in rig.control.loads) == 3)
    assert sum(load.versions[VERSION].answered for load in rig.control.loads) == 1
