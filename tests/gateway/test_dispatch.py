"""From the gateway to a model's thread and back: real sockets and frames, models that misbehave on purpose."""

import asyncio
import json
import socket
import threading
import time

import pytest
from dispatch_rig import VERSION, Control, Doubling, Fatal, Rig, body, eventually, said, table
from msgspec import structs

from tether.routing.policies import BUSY
from tether.routing.table import ModelEntry, Table, VersionEntry
from tether.wire.frames import FrameWriter


@pytest.fixture
async def rig(tmp_path):
    made = Rig(tmp_path)
    yield made
    await made.aclose()


async def test_what_piles_up_behind_a_batch_is_the_next_batch(rig):
    model = Doubling()
    rig.route(model.info, rig.serve(model))
    model.gate.clear()
    first = rig.ask(1)
    await eventually(lambda: model.batches == [1])
    rest = [rig.ask(number) for number in range(2, 10)]
    await eventually(lambda: next(iter(rig.dispatch._lines.transports.values())).in_flight == 9)
    await asyncio.sleep(0)
    model.gate.set()
    assert [said(reply) for reply in await asyncio.gather(first, *rest)] == [[2.0 * number] for number in range(1, 10)]
    assert len(model.batches) < 9


async def test_a_bad_input_in_a_batch_costs_nobody_else_an_answer(rig):
    model = Doubling()
    rig.route(model.info, rig.serve(model))
    model.gate.clear()
    asked = [rig.ask(number) for number in (1, 2, -3, 4)]
    await eventually(lambda: model.batches)
    model.gate.set()
    assert [said(reply) for reply in await asyncio.gather(*asked)] == [[2.0], [4.0], (422, "model_failed"), [8.0]]


async def test_requests_of_a_worker_that_goes_away_are_answered_by_another(rig):
    slow, quick = Doubling(), Doubling()
    first, second = rig.serve(slow), rig.serve(quick)
    rig.route(slow.info, first)
    slow.gate.clear()
    asked = [rig.ask(number) for number in (1, 2, 3)]
    await eventually(lambda: slow.batches)
    rig.route(slow.info, first, second)
    for transport in rig.dispatch._lines.transports.values():  # what a killed worker looks like from here
        transport._transport.abort()
    assert [said(reply) for reply in await asyncio.gather(*asked)] == [[2.0], [4.0], [6.0]]
    assert quick.batches


async def test_a_model_that_is_not_pure_is_never_asked_twice(rig):
    slow, other = Doubling(pure=False), Doubling(pure=False)
    first, second = rig.serve(slow), rig.serve(other)
    slow.gate.clear()
    rig.route(slow.info, first)
    asked = rig.ask(1)
    await eventually(lambda: slow.batches)
    rig.route(slow.info, first, second)
    next(iter(rig.dispatch._lines.transports.values()))._transport.abort()
    assert said(await asked) == (503, "worker_lost")
    assert other.batches == []


async def test_a_deadline_ends_the_wait_for_a_model_that_hangs(rig):
    model = Doubling()
    rig.route(model.info, rig.serve(model))
    model.gate.clear()
    begun = time.monotonic()
    assert said(await rig.ask(1, timeout=0.2)) == (504, "deadline_exceeded")
    assert time.monotonic() - begun < 5
    model.gate.set()
    assert said(await rig.ask(2)) == [4.0]


async def test_a_cold_model_is_asked_for_once_and_answers_when_it_is_there(rig):
    model = Doubling()
    rig.route(model.info)
    asked = [rig.ask(number) for number in (1, 2, 3)]
    await eventually(lambda: rig.control.wanted)
    rig.route(model.info, rig.serve(model))
    assert [said(reply) for reply in await asyncio.gather(*asked)] == [[2.0], [4.0], [6.0]]
    assert rig.control.wanted == [VERSION]


async def test_a_model_that_cannot_be_loaded_says_why_at_once(tmp_path):
    rig = Rig(tmp_path, Control("failed", "bad_model: the file is cut off"))
    rig.route(Doubling().info)
    reply = await rig.ask(1)
    assert said(reply) == (422, "bad_model")
    assert "the file is cut off" in json.loads(reply.body)["error"]
    rig.close()


async def test_no_worker_within_the_deadline_is_said_so(rig):
    rig.route(Doubling().info)
    assert said(await rig.ask(1, timeout=0.1)) == (503, "no_worker")


async def test_who_waited_for_room_in_memory_in_vain_is_told_so(rig):
    cold = table(Doubling().info)
    entry = VersionEntry(VERSION, Doubling().info, "loading", (), "memory_full: no room within 30 s")
    rig.dispatch.replace_table(Table(2, {"m": ModelEntry("m", 1, {1: entry}, cold.models["m"].aliases)}))
    reply = await rig.ask(1, timeout=0.1)
    assert said(reply) == (503, "memory_full")
    assert "no room within 30 s" in json.loads(reply.body)["error"]


async def test_a_new_orchestrator_is_told_of_what_was_in_memory_and_not_of_what_was_put_out(rig):
    model = Doubling()
    rig.route(model.info)
    asked = rig.ask(1)
    await eventually(lambda: rig.control.wanted)
    rig.dispatch.replace_table(structs.replace(table(model.info, rig.serve(model).endpoint), seq=2))
    assert said(await asked) == [2.0]
    assert rig.dispatch.used() == [VERSION]
    rig.dispatch.replace_table(table(model.info))  # of a new one
    assert rig.dispatch.used() == [VERSION]
    rig.dispatch.replace_table(structs.replace(table(model.info), seq=2))
    assert rig.dispatch.used() == []


async def test_another_orchestrator_is_known_by_its_epoch_however_far_it_counts(rig):
    model = Doubling()
    rig.route(model.info)
    asked = rig.ask(1)
    await eventually(lambda: rig.control.wanted)
    rig.route(model.info, rig.serve(model))
    assert said(await asked) == [2.0]
    rig.dispatch.replace_table(structs.replace(table(model.info), seq=9, epoch=7))
    assert rig.dispatch.used() == [VERSION]
    rig.dispatch.replace_table(structs.replace(table(model.info), seq=10, epoch=7))
    assert rig.dispatch.used() == []


async def test_an_input_is_forgiven_though_the_orchestrator_never_heard_that_it_is_poison(rig):
    model = Fatal(pure=False)
    rig.route(model.info, rig.serve(model))
    codes = [said(await rig.ask(1)) for _ in range(3)]
    assert codes == [(503, "model_died"), (422, "poison_input"), (422, "poison_input")]
    await rig.dispatch.forgive("m")
    assert said(await rig.ask(1)) == (503, "model_died")


async def test_who_forgives_is_answered_when_the_next_request_finds_it_so(rig):
    before = table(Doubling().info)
    entry = structs.replace(before.models["m"].versions[1], poison={"0" * 32: time.time() + 60}, is_isolated=True)
    rig.dispatch.replace_table(structs.replace(before, models={"m": structs.replace(before.models["m"], versions={1: entry})}))
    forgiving = asyncio.create_task(rig.dispatch.forgive("m"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not forgiving.done()
    rig.dispatch.replace_table(structs.replace(before, seq=2))
    await forgiving
    await rig.dispatch.forgive("gone")


async def test_a_cancelled_request_is_never_answered_and_the_next_one_is(rig):
    model = Doubling()
    rig.route(model.info, rig.serve(model))
    model.gate.clear()
    gone = rig.ask(1)
    await eventually(lambda: model.batches)
    rig.cancel()
    model.gate.set()
    assert said(await rig.ask(2)) == [4.0]
    assert not gone.done()


async def test_large_bodies_go_through_the_ring_and_their_blocks_come_back(rig):
    model = Doubling()
    rig.route(model.info, rig.serve(model))
    free = list(rig.dispatch._lines.ring._free)
    replies = await asyncio.gather(*(rig.ask(*([float(number)] * 20_000)) for number in range(5)))
    assert [said(reply)[0] for reply in replies] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert rig.dispatch._lines.ring._free == free


async def test_a_run_that_nobody_waits_for_any_more_is_interrupted(rig):
    model = Doubling()
    server = rig.serve(model)
    rig.route(model.info, server)
    model.gate.clear()
    asked = rig.ask(1, timeout=5)
    await eventually(lambda: model.batches)
    server.end_unwanted_run(time.monotonic())
    assert not model.gate.is_set()
    server.end_unwanted_run(time.monotonic() + 60)
    assert model.gate.is_set()
    assert said(await asked)[0] in (2.0, 504)


async def test_a_model_that_is_not_pure_runs_each_request_once_even_beside_a_bad_one(rig):
    model = Doubling(pure=False)
    rig.route(model.info, rig.serve(model))
    model.gate.clear()
    asked = [rig.ask(number) for number in (1, -2, 3)]
    await eventually(lambda: model.batches)
    model.gate.set()
    assert [said(reply) for reply in await asyncio.gather(*asked)] == [[2.0], (422, "model_failed"), [6.0]]
    assert model.batches == [1, 1, 1]


async def test_a_worker_that_is_not_there_yet_costs_no_attempt(rig):
    model = Doubling(pure=False)
    later = rig.folder / "0.sock"
    rig.dispatch.replace_table(table(model.info, later))
    asked = rig.ask(1)
    await asyncio.sleep(0.3)
    assert not asked.done()
    rig.serve(model)
    assert said(await asked) == [2.0]


async def test_a_connection_that_breaks_the_rules_costs_nobody_else_anything(rig):
    model = Doubling()
    server = rig.serve(model)
    rig.route(model.info, server)
    for greeting in (b"-" + b"\xff" * 64, b"", b"R"):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(server.endpoint))
            stranger.sendall(greeting)
            assert said(await rig.ask(1)) == [2.0]
    assert said(await rig.ask(2)) == [4.0]


async def test_a_gateway_that_does_not_read_does_not_hold_up_the_others(rig):
    model = Doubling()
    server = rig.serve(model)
    rig.route(model.info, server)
    writer = FrameWriter()
    for number in range(40):
        writer.request(number, body(*([1.5] * 5_000)), 0, 60_000)
    with socket.socket(socket.AF_UNIX) as sleeper:
        sleeper.connect(str(server.endpoint))
        sleeper.sendall(b"-")
        sender = threading.Thread(target=lambda: [sleeper.sendall(part) for part in writer.take()])
        sender.start()
        await eventually(lambda: server.stats.requests >= 40)
        assert said(await rig.ask(2)) == [4.0]  # and not 504: who sleeps here never reads
        sender.join()


async def test_expired_requests_are_forgotten(rig):
    rig.route(Doubling().info)
    await asyncio.gather(*(rig.ask(1, timeout=0.05) for _ in range(20)))
    another = rig.ask(1, timeout=0.3)
    await eventually(lambda: len(rig.dispatch._waiting) == 1)
    await another


async def test_what_a_dead_worker_leaves_goes_on_at_a_lent_one(rig):
    slow, elsewhere = Doubling(), Doubling()
    own, lent = rig.serve(slow), rig.lend(elsewhere)
    rig.route(slow.info, own, lent)
    slow.gate.clear()
    asked = [rig.ask(number) for number in (1, 2, 3)]
    await eventually(lambda: slow.batches)
    assert elsewhere.batches == []
    rig.dispatch._lines.transports[str(own.endpoint)]._transport.abort()
    assert [said(reply) for reply in await asyncio.gather(*asked)] == [[2.0], [4.0], [6.0]]
    assert elsewhere.batches


async def test_what_a_lent_worker_that_fell_silent_leaves_goes_on_in_the_lab(rig):
    silent, quick = Doubling(), Doubling()
    lent = rig.lend(silent)
    rig.route(silent.info, lent)
    silent.gate.clear()
    asked = [rig.ask(number) for number in (1, 2)]
    await eventually(lambda: silent.batches)
    own = rig.serve(quick)
    rig.route(silent.info, own, lent)
    await lent.hops.aclose()  # as the manager does once it is not answered any more
    assert [said(reply) for reply in await asyncio.gather(*asked)] == [[2.0], [4.0]]
    assert quick.batches


async def test_a_lent_worker_that_is_lost_with_a_model_that_is_not_pure_is_told(rig):
    silent, other = Doubling(pure=False), Doubling(pure=False)
    lent = rig.lend(silent)
    rig.route(silent.info, lent)
    silent.gate.clear()
    asked = rig.ask(1)
    await eventually(lambda: silent.batches)
    rig.route(silent.info, rig.serve(other), lent)
    await lent.hops.aclose()
    assert said(await asked) == (503, "worker_lost")
    assert other.batches == []


async def test_lent_workers_take_what_comes_while_the_lab_is_busy_as_far_as_they_have_slots(rig):
    slow, elsewhere = Doubling(), Doubling()
    own, lent = rig.serve(slow), rig.lend(elsewhere)
    rig.route(slow.info, own, lent)
    slow.gate.clear()
    elsewhere.gate.clear()
    asked = [rig.ask(number) for number in range(BUSY + 6)]
    assert [transport.in_flight for transport in rig.dispatch._lines.transports.values()] == [BUSY + 2, 4]
    await eventually(lambda: slow.batches and elsewhere.batches)
    slow.gate.set()
    elsewhere.gate.set()
    assert [said(reply) for reply in await asyncio.gather(*asked)] == [[2.0 * number] for number in range(BUSY + 6)]
    before = len(slow.batches)
    assert said(await rig.ask(1)) == [2.0]
    assert len(slow.batches) == before + 1


async def test_a_request_that_nobody_waits_for_is_taken_back_at_the_other_lab(rig):
    model = Doubling()
    lent = rig.lend(model)
    rig.route(model.info, lent)
    model.gate.clear()
    running, waiting = rig.ask(1), rig.ask(2)
    await eventually(lambda: model.batches)
    gone = rig.ask(3)
    await eventually(lambda: lent.hops.in_flight == 3)
    rig.cancel()
    assert said(await rig.ask(4, timeout=0.1)) == (504, "deadline_exceeded")
    await eventually(lambda: lent.cancelled == 2)
    model.gate.set()
    assert [said(reply) for reply in await asyncio.gather(running, waiting)] == [[2.0], [4.0]]
    assert (sum(model.batches), gone.done()) == (2, False)


async def test_a_request_that_is_cancelled_before_its_batch_never_runs(rig):
    model = Doubling()
    server = rig.serve(model)
    rig.route(model.info, server)
    free = list(rig.dispatch._lines.ring._free)
    model.gate.clear()
    first = rig.ask(1)
    await eventually(lambda: model.batches)
    gone = rig.ask(*([5.0] * 20_000))
    rig.cancel()
    second = rig.ask(2)
    await asyncio.sleep(0)
    model.gate.set()
    assert [said(await each) for each in (first, second)] == [[2.0], [4.0]]
    assert (sum(model.batches), gone.done()) == (2, False)
    await eventually(lambda: rig.dispatch._lines.ring._free == free)
