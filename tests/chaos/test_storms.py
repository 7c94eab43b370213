"""Rows 8, 98, 99, 108, 112 and 113, as far as workers have to do with them: deadlines, what dies or stops, machines without time."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from chaos_lab import HOLDS, PROMPT, Client, Load, pids, together

pytestmark = pytest.mark.chaos
SLACK = 0.1
"""Seconds after its deadline at which every request has ended, on a machine that has time for it: asserted at full scale only."""


@pytest.mark.timeout(1200)
def test_row_08_every_request_ends_at_its_deadline(lab, chaos, measured):
    """Deadlines from 10 ms on, of models that take nothing, or about as long, or far longer."""
    chance, begun = random.Random(f"row 8, {chaos.seed}"), time.monotonic()
    longest, ended = chaos.count(50, 5) / 10, []
    for _ in range(chaos.count(100, 4)):
        deadlines = [chance.uniform(0.01, longest) for _ in range(8)]
        asked = [(Client(lab), "patient", chance.choice((0.0, chance.uniform(0, each), 2 * longest)), each) for each in deadlines]
        ended += [(seconds - each, status, answer) for each, (status, answer, seconds) in zip(deadlines, together(asked), strict=True)]
    over, answered = max(late for late, _, _ in ended), sum(status == 200 for _, status, _ in ended)
    counts = f"{len(ended)} requests with deadlines of 10 ms to {longest:g} s, {answered} answered, "
    counts += f"the last ended {over * 1000:.0f} ms after its deadline"
    measured(f"row 8: {counts}")
    chaos.record(8, counts, time.monotonic() - begun)
    refused = {(503, "queue_full")}  # at once, what would not have been in time: row 7
    assert {(status, answer) for _, status, answer in ended if status != 200} - refused == {(504, "deadline_exceeded")}
    assert over < (SLACK if chaos.scale >= 1 else PROMPT)
    assert together([(Client(lab), "patient", 0.0)])[0][:2] == (200, 0.0)


@pytest.mark.timeout(1200)
def test_row_98_processes_of_models_that_are_killed_cost_nobody_an_answer(lab, chaos, measured):
    chance, begun, kills = random.Random(f"row 98, {chaos.seed}"), time.monotonic(), chaos.count(300, 3)
    with Load(lab, "patient") as load:
        for _ in range(kills):
            worker = psutil.Process(chance.choice(list(pids(lab).values())))
            for child in worker.children():
                child.kill()
            time.sleep(chance.uniform(0.2, 1.0))
    counts = f"all processes of a worker's models killed {kills} times, {load.answered} requests, {len(load.flaws)} failed"
    measured(f"row 98: {counts}")
    chaos.record(98, counts, time.monotonic() - begun)
    assert (load.flaws, load.late) == ([], 0)


@pytest.mark.timeout(1800)
def test_row_99_a_worker_that_stops_and_goes_on_answers_nobody_twice_or_another_one(lab, chaos, measured):
    chance, begun, stops = random.Random(f"row 99, {chaos.seed}"), time.monotonic(), chaos.count(20, 1)
    before = pids(lab)
    with Load(lab, "echo", clients=8, timeout=0.5) as load:
        for _ in range(stops):
            pid = chance.choice(list(pids(lab).values()))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(chance.uniform(0.8, 60.0 if chaos.scale >= 1 else 1.0))
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)
    replaced = sum(before[worker] != pid for worker, pid in pids(lab).items())
    counts = (
        f"{stops} stops, {load.answered} requests, {load.late} past their deadline, {len(load.flaws)} wrong, {replaced} workers replaced"
    )
    measured(f"row 99: {counts}")
    chaos.record(99, counts, time.monotonic() - begun)
    assert load.flaws == []
    assert load.surplus == [b""] * 8
    assert together([(Client(lab), "echo", 7.0)])[0][:2] == (200, 7.0)


@pytest.mark.timeout(600)
def test_row_108_a_machine_without_time_and_a_process_without_python_cost_no_worker_and_no_answer(lab, chaos, measured):
    begun, before, seconds = time.monotonic(), pids(lab), chaos.count(60, 1)
    yields = [] if chaos.scale >= 1 else ["nice", "-n", "19"]
    spinners = [subprocess.Popen([*yields, sys.executable, "-c", "while True: pass"]) for _ in range(chaos.count(8, 2))]
    try:
        with Load(lab, "echo") as load:
            held = together([(Client(lab), "patient", HOLDS - seconds, 2 * PROMPT) for _ in range(2)])
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    counts = f"{len(spinners)} spinners, models that hold the GIL for {seconds} s; {load.answered} other requests, {len(load.flaws)} failed"
    measured(f"row 108: {counts}")
    chaos.record(108, counts, time.monotonic() - begun)
    assert [status for status, _, _ in held] == [200, 200]
    assert (load.flaws, load.late) == ([], 0)
    assert pids(lab) == before


@pytest.mark.timeout(600)
def test_row_113_a_queue_whose_deadlines_all_pass_at_once_leaves_the_model_serving(lab, chaos, measured):
    begun, count, deadline = time.monotonic(), chaos.count(1000, 100), chaos.count(5, 1)
    answers = together([(Client(lab), "patient", 3600.0, deadline) for _ in range(count)])
    again = together([(Client(lab), "patient", 0.0) for _ in range(4)])
    slowest, after = max(seconds for _, _, seconds in answers), max(seconds for _, _, seconds in again)
    counts = (
        f"{count} requests past their deadline of {deadline} s at once, the last ended after {slowest:.2f} s; the next took {after:.2f} s"
    )
    measured(f"row 113: {counts}")
    chaos.record(113, counts, time.monotonic() - begun)
    assert {(status, answer) for status, answer, _ in answers} == {(504, "deadline_exceeded")}
    assert [(status, answer) for status, answer, _ in again] == [(200, 0.0)] * 4


@pytest.mark.timeout(600)
def test_row_112_all_clients_come_back_after_a_restart_of_the_gateway(lab, chaos, measured):
    begun, count = time.monotonic(), chaos.count(1000, 50)
    gateway = next(service for service in lab.status().services if service.name == "gateway")

    async def persistently(client, value):
        pause = 0.05
        while True:
            try:
                status, answer, _ = await client.ask("echo", value)
            except OSError:
                await client.aclose()
                await asyncio.sleep(random.uniform(pause / 2, pause))
                pause = min(2 * pause, 1.0)
            else:
                return status, answer, time.monotonic()

    async def live():
        clients = [Client(lab) for _ in range(count)]
        first = await asyncio.gather(*(client.ask("echo", index) for index, client in enumerate(clients)))
        os.kill(gateway.pid, signal.SIGKILL)
        killed = time.monotonic()
        again = await asyncio.gather(*(persistently(client, index) for index, client in enumerate(clients)))
        for client in clients:
            await client.aclose()
        return first, again, [answered - killed for _, _, answered in again]

    first, again, seconds = asyncio.run(live())
    counts = f"{count} clients, all answered again {max(seconds):.1f} s after the gateway was killed, the first {min(seconds):.1f} s"
    measured(f"row 112: {counts}")
    chaos.record(112, counts, time.monotonic() - begun)
    assert [reply[:2] for reply in first] == [(200, index) for index in range(count)]
    assert [reply[:2] for reply in again] == [(200, index) for index in range(count)]
