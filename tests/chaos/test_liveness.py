"""Rows 1 to 5: whatever process dies, stops or is cut off, those who ask do not notice, and it is back soon."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import dask.config
import msgspec
import numpy as np
import pytest
from chaos_lab import PROMPT, until, write_echo
from distributed.core import connect
from open_load import PATIENCE, Link, OpenLoad

import tether
from tether.config import HOUSEKEEPING, DataFolder
from tether.routing.table import Table
from tether.security.comms import dask_security
from tether.security.tls import ensure_tls

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
MODEL = "echo:1"
SLACK = 0.2
"""Seconds from a signal to the end of who gets it."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Three workers, two of them with a model that gives back what it gets."""
    folder = tmp_path_factory.mktemp("herd")
    with tether.up(workers=3, data=folder / "data", swarm=False) as lab:
        lab.publish("echo", write_echo(folder / "echo.onnx"))
        lab.infer("echo", np.zeros(1))
        until(lambda: len(serving(lab)) == 2)
        yield lab


def alive(lab):
    """The workers that there are, and their processes."""
    return {worker.id: worker.pid for worker in lab.workers.values() if worker.state != "lost"}


def serving(lab):
    """The workers that have the model and answer."""
    return {worker.id for worker in lab.workers.values() if worker.state == "running" and MODEL in worker.models}


def service(lab, name):
    return next(each for each in lab.status().services if each.name == name)


def seconds_until(condition):
    begun = time.monotonic()
    until(condition)
    return time.monotonic() - begun


def is_in(lab, worker, state):
    return any((each.id, each.state) == (worker, state) for each in lab.workers.values())


def command(*arguments):
    return subprocess.Popen([sys.executable, "-m", "tether", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PROMPT)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def judged(load, row, what, chaos, measured, begun):
    counts = (
        f"{what}; {len(load.asked)} requests, {len(load.failed)} failed, {len(load.wrong)} wrong, {load.again} asked again, "
        f"p99 {load.quantile(0.99) * 1000:.0f} ms, slowest {load.slowest:.1f} s"
    )
    measured(f"row {row}: {counts}")
    chaos.record(row, counts, time.monotonic() - begun)
    assert load.wrong == []
    assert set(load.surplus) <= {b""}


def test_row_01_workers_that_are_killed_cost_nobody_an_answer(lab, chaos, measured):
    chance, begun, back = random.Random(f"row 1, {chaos.seed}"), time.monotonic(), []
    with OpenLoad(lab.gateway) as load:
        for _ in range(chaos.count(200, 2)):
            again = time.monotonic() + chance.uniform(2.0, 4.0)
            back.append(killed(lab, chance.choice(sorted(alive(lab)))))
            time.sleep(max(0.0, again - time.monotonic()))
    judged(load, 1, f"{len(back)} kills of one of 3 workers, back in {max(back):.1f} s at most", chaos, measured, begun)
    assert load.failed == []


def killed(lab, worker):
    """Seconds until it is back."""
    pid = alive(lab)[worker]
    os.kill(pid, signal.SIGKILL)
    return seconds_until(lambda: alive(lab).get(worker) not in {None, pid} and is_in(lab, worker, "running"))


def test_row_02_a_worker_that_stops_is_routed_around_and_comes_back(lab, chaos, measured):
    chance, begun, noticed, back = random.Random(f"row 2, {chaos.seed}"), time.monotonic(), [], []
    before = alive(lab)
    with OpenLoad(lab.gateway) as load:
        for _ in range(chaos.count(40, 1)):
            until(lambda: len(serving(lab)) > 1)
            seconds = chance.uniform(5.0, 20.0) if chaos.scale >= 1 else 3.0
            for took, ended in zip((noticed, back), stopped(lab, chance.choice(sorted(serving(lab))), seconds), strict=True):
                took.append(ended)
    what = f"{len(back)} stops of a worker, out of the table in {max(noticed):.2f} s at most, in it again in {max(back):.2f} s"
    judged(load, 2, what, chaos, measured, begun)
    assert load.failed == []
    assert alive(lab) == before
    if chaos.scale >= 1:
        assert (max(noticed) < 2.2, max(back) < 5.0, load.slowest < 3.0) == (True, True, True)


def stopped(lab, worker, seconds):
    """How long it took until the lab knew of it, and once it went on."""
    pid, goes_on = alive(lab)[worker], time.monotonic() + seconds
    os.kill(pid, signal.SIGSTOP)
    try:
        noticed = seconds_until(lambda: is_in(lab, worker, "silent"))
        assert service(lab, worker).state == "silent"
        time.sleep(max(0.0, goes_on - time.monotonic()))
    finally:
        os.kill(pid, signal.SIGCONT)
    return noticed, seconds_until(lambda: worker in serving(lab))


def flap(links, seconds):
    """One second cut, one second not."""
    end, cut = time.monotonic() + seconds, False
    while time.monotonic() < end:
        cut = not cut
        for link in links:
            link.cut() if cut else link.heal()
        time.sleep(1.0)


@contextlib.contextmanager
def far_worker(lab):
    """One that the orchestrator has a link to, and that has a link to it, as if on another host: the links."""
    port = free_port()
    orchestrator = int(service(lab, "orchestrator").address.rpartition(":")[2])
    with Link(orchestrator) as there, Link(port) as here:
        options = ["--data", str(lab.status().data), "--name", "far", "--port", str(port)]
        contact = f"tls://127.0.0.1:{here.port}"
        with ended(command("worker", f"tls://127.0.0.1:{there.port}", *options, "--contact-address", contact)) as process:
            lab.serve("echo", min_copies=4)
            until(lambda: len(serving(lab)) == 4)
            yield there, here, process
            lab.serve("echo", min_copies=None)


def test_row_03_a_worker_that_is_cut_off_is_routed_around_and_comes_back_as_it_was(lab, chaos, measured):
    """Both ways, one way, the other way; for seconds; with every connection ended; and a link that comes and goes."""
    chance, begun, noticed, back = random.Random(f"row 3, {chaos.seed}"), time.monotonic(), [], []
    with far_worker(lab) as (there, here, process):
        with OpenLoad(lab.gateway) as load:
            for number in range(chaos.count(40, 2)):
                # the worker's own connections go there and come back; those that are made to it go the other way
                ways = ((True, True), (False, True), (True, False))[number % 3]
                there.cut(there=ways[0], back=ways[1])
                here.cut(there=ways[1], back=ways[0])
                if number % 2:
                    there.reset()
                    here.reset()
                noticed.append(seconds_until(lambda: not is_in(lab, "far", "running")))
                time.sleep(chance.uniform(1.0, 20.0) if chaos.scale >= 1 else 0.5)
                there.heal()
                here.heal()
                back.append(seconds_until(lambda: "far" in serving(lab)))
            flap((there, here), chaos.count(60, 3))
            there.heal()
            here.heal()
            back.append(seconds_until(lambda: "far" in serving(lab)))
        assert alive(lab)["far"] == process.pid
    what = f"{len(noticed)} partitions, noticed in {max(noticed):.2f} s at most, in the table again in {max(back):.2f} s"
    judged(load, 3, what, chaos, measured, begun)
    assert load.failed == []
    if chaos.scale >= 1:
        assert (max(noticed) < 2.2, max(back) < 5.0) == (True, True)


def test_row_04_an_orchestrator_that_is_killed_costs_no_answer_and_finds_the_models_where_they_were(lab, chaos, measured):
    chance, begun, back = random.Random(f"row 4, {chaos.seed}"), time.monotonic(), []
    before, holders = alive(lab), serving(lab)
    with OpenLoad(lab.gateway) as load:
        for _ in range(chaos.count(50, 1)):
            pid = service(lab, "orchestrator").pid
            os.kill(pid, signal.SIGKILL)
            back.append(
                seconds_until(
                    lambda pid=pid: (
                        (now := service(lab, "orchestrator")).state == "running"
                        and now.pid != pid
                        and orchestrated(lab) == dict.fromkeys(before, "running")
                    )
                )
            )
            assert serving(lab) >= holders
            time.sleep(chance.uniform(1.0, 3.0))
    judged(load, 4, f"{len(back)} kills of the orchestrator, all as it was in {max(back):.1f} s at most", chaos, measured, begun)
    assert alive(lab) == before
    assert service(lab, "orchestrator").restarts == len(back)
    assert service(lab, "orchestrator").error.startswith("ended")
    assert load.slowest < PATIENCE + 1.0
    assert len(load.failed) <= 0.01 * len(load.asked)


def orchestrated(lab):
    """The workers as the orchestrator has them now, which gateways need not have heard of; None: it does not answer."""

    async def asked():
        comm = await connect(service(lab, "orchestrator").address, timeout=1.0, **security.get_connection_args("client"))
        try:
            await comm.write({"op": "tether_table", "reply": True})
            return msgspec.msgpack.decode((await comm.read())["table"], type=Table).workers
        finally:
            comm.abort()

    with dask.config.set(HOUSEKEEPING), contextlib.suppress(OSError):
        security = dask_security(ensure_tls(DataFolder(Path(lab.status().data)).tls, "gateway"))
        return {worker.id: worker.state for worker in asyncio.run(asked()).values()}
    return None


def test_row_05_a_gateway_that_ends_costs_no_answer_and_one_that_is_killed_only_those_that_it_owes(lab, chaos, measured):
    begun, ends, kills = time.monotonic(), chaos.count(25, 1), chaos.count(25, 1)
    with OpenLoad(lab.gateway, f"http://127.0.0.1:{(port := free_port())}") as load:
        for _ in range(ends):
            gateways_get(lab, port, signal.SIGTERM)
        failed_by_ends = load.failed
        at = [when for _ in range(kills) for when in gateways_get(lab, port, signal.SIGKILL)]
    what = f"{2 * ends} ends and {2 * kills} kills of one of two gateways, {len(failed_by_ends)} failed by the ends"
    judged(load, 5, what, chaos, measured, begun)
    assert failed_by_ends == []
    assert [each for each in load.failed if not any(each.at <= when + SLACK and each.at + each.seconds >= when for when in at)] == []
    assert lab.infer("echo", np.ones(1)) == 1.0


def gateways_get(lab, port, number):
    """A signal: a second one that comes for it, and the lab's own, which is started again. When each got it."""
    options = ["--data", str(lab.status().data), "--port", str(port)]
    with ended(command("gateway", service(lab, "orchestrator").address, *options)) as process:
        until(lambda: is_open(port))
        time.sleep(0.5)  # it is asked, too
        first = time.monotonic()
        process.send_signal(number)
        process.wait(PROMPT)
    own, second = service(lab, "gateway"), time.monotonic()
    os.kill(own.pid, number)
    until(lambda: (now := service(lab, "gateway")).state == "running" and now.pid != own.pid)
    return first, second


def is_open(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def test_a_manager_that_stops_takes_nothing_from_those_who_ask_models(lab):
    manager = service(lab, "manager")
    os.kill(manager.pid, signal.SIGSTOP)
    try:
        assert service(lab, "manager").state == "silent"
        assert lab.infer("echo", np.ones(1)) == 1.0
    finally:
        os.kill(manager.pid, signal.SIGCONT)
    until(lambda: service(lab, "manager").state == "running")
    assert service(lab, "manager").pid == manager.pid
    lab.alias("echo", "prod", 1)
