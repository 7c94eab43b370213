"""What dies comes back, what ends leaves nothing behind, and nobody who was promised an answer goes without one."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import WEIGHTS, write_model

import tether
from tether import errors
from tether.config import DataFolder
from tether.lab.launch import running
from tether.lab.ports import CHOOSING, claimed
from tether.security.keys import ensure_api_key

X = np.random.default_rng(5).random((3, 16), dtype=np.float32)
PROMPT = 60.0
"""Seconds that any of this may take on a busy machine before the test fails."""


def eventually(condition, timeout=PROMPT):
    """Poll until `condition()` is true and return what it gave; the last exception or False ends the test."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            if found := condition():
                return found
        except errors.TetherError:
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, f"not true after {timeout} s: {condition}"
        time.sleep(0.05)


@pytest.fixture
def started():
    """`tether up` in a terminal; none outlives its test."""
    with contextlib.ExitStack() as stack:

        def start(data, environment=()):
            command = [sys.executable, "-m", "tether", "up", "--workers", "1", "--data", str(data)]
            environment = os.environ | dict(environment)
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
            )
            stack.callback(process.terminate)
            return process

        yield start


def services(lab, name):
    """The one of this name, as long as the lab knows of it."""
    return [each for each in lab.status().services if each.name == name]


def service(lab, name):
    return services(lab, name)[0]


def processes_of(data):
    """Every process that has the data folder on its command line: supervisor and services."""
    alive = psutil.process_iter(["cmdline", "status"])
    named = [process for process in alive if any(str(data) in part for part in process.info["cmdline"] or ())]
    return [process for process in named if process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid()]


def catches(pid, number):
    """Whether a process would end by this signal in its own way: it is started so far."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(caught, 16) >> (number - 1) & 1


@pytest.fixture(scope="module")
def mortal(tmp_path_factory):
    """A lab whose services are killed one after the other, by one test after the other."""
    with tether.up(workers=2, data=tmp_path_factory.mktemp("mortal"), swarm=False) as started:
        yield started


@pytest.mark.parametrize("name", ["worker-1", "manager", "gateway", "orchestrator"])
def test_every_service_that_is_killed_comes_back_and_answers(mortal, tmp_path, name):
    mortal.publish(f"before-{name}", write_model(tmp_path / "model.onnx"))
    mortal.infer(f"before-{name}", X)
    before = service(mortal, name)
    os.kill(before.pid, signal.SIGKILL)
    eventually(lambda: (now := service(mortal, name)).state == "running" and now.pid != before.pid)
    answer = eventually(lambda: mortal.infer(f"before-{name}", X) is not None)
    assert answer
    assert eventually(lambda: mortal.publish(f"after-{name}", write_model(tmp_path / "again.onnx", scale=3))).version == 1


def test_close_leaves_no_process_and_a_new_lab_finds_the_models(tmp_path):
    with tether.up(workers=1, data=tmp_path / "data") as lab:
        lab.publish("tiny", write_model(tmp_path / "model.onnx"))
        lab.infer("tiny", X)
        assert len(processes_of(tmp_path / "data")) >= 4
        assert any(name.endswith(".sock") for _, _, names in os.walk(DataFolder(tmp_path / "data").runtime) for name in names)
    assert processes_of(tmp_path / "data") == []
    assert not DataFolder(tmp_path / "data").runtime.exists()
    with tether.up(workers=1, data=tmp_path / "data") as lab:
        np.testing.assert_allclose(lab.infer("tiny", X), X @ WEIGHTS, rtol=1e-5)


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(0)"])
def test_a_lab_ends_with_the_kernel_that_started_it(tmp_path, end):
    script = f"""
        import os, signal, sys, tether
        lab = tether.up(workers=1, data={str(tmp_path / "data")!r})
        print("up", flush=True)
        {end}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert "up" in done.stdout
    eventually(lambda: processes_of(tmp_path / "data") == [])


def test_a_killed_supervisor_leaves_no_orphan(tmp_path):
    lab = tether.up(workers=1, data=tmp_path / "data")
    found = processes_of(tmp_path / "data")
    supervisor = next(process for process in found if "tether.lab.launch" in process.cmdline())
    supervisor.kill()
    eventually(lambda: processes_of(tmp_path / "data") == [])
    lab.close()


def test_what_a_killed_supervisor_wrote_is_not_taken_for_the_lab_that_starts_after_it(tmp_path, started):
    folder = DataFolder(tmp_path / "data").create()
    ensure_api_key(folder.api_key)
    facts = {"gateway": "http://127.0.0.1:1", "pid": 1, "version": tether.__version__, "notes": [], "ready": True}
    (folder.run / "lab.json").write_text(json.dumps(facts))
    process = started(folder.root)
    seen = eventually(lambda: running(folder))
    assert seen.pid == process.pid
    assert {each["state"] for each in json.loads((folder.run / "lab.json").read_text())["services"]} == {"running"}


def test_supervision_goes_on_where_its_own_folders_are_deleted(own_lab, tmp_path):
    folder = DataFolder(tmp_path / "data")
    before = service(own_lab, "worker-1")
    shutil.rmtree(folder.run)
    shutil.rmtree(folder.logs)
    for _ in range(2):
        os.kill(before.pid, signal.SIGKILL)
        before = eventually(
            lambda old=before: next((each for each in services(own_lab, "worker-1") if each.pid not in {None, old.pid}), None)
        )
        eventually(lambda: service(own_lab, "worker-1").state == "running")
    own_lab.close()
    assert processes_of(tmp_path / "data") == []


def test_two_that_start_a_lab_on_one_folder_at_once_share_it(tmp_path, capsys):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: tether.up(workers=1, data=tmp_path / "data"), range(2))
    assert first.gateway == second.gateway
    assert capsys.readouterr().out.count("attached to it") == 1
    for lab in (first, second):
        lab.close()
    assert processes_of(tmp_path / "data") == []


def test_a_lab_that_waits_for_another_to_choose_its_ports_ends_when_it_is_told_to(tmp_path, started):
    claim = eventually(lambda: claimed(CHOOSING, tmp_path))  # other tests start labs, too
    try:
        process = started(tmp_path / "data", {"TMPDIR": str(tmp_path)})
        eventually(lambda: catches(process.pid, signal.SIGTERM))
        process.terminate()
        output, _ = process.communicate(timeout=PROMPT)
    finally:
        os.close(claim)
    assert process.returncode == 0, output
    assert list((tmp_path / f"tether-{os.getuid()}").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_tether_up_in_a_terminal_ends_cleanly(tmp_path, started, number):
    process = started(tmp_path / "data")
    eventually(lambda: tether.connect(data=tmp_path / "data").close() is None)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PROMPT)
    assert process.returncode == 0, output
    assert processes_of(tmp_path / "data") == []


def test_a_second_tether_up_on_the_folder_is_refused_with_what_to_do(lab):
    command = [sys.executable, "-m", "tether", "up", "--data", lab.status().data]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROMPT, check=False)
    assert done.returncode == 1
    assert "[lab_running]" in done.stderr
    assert "tether down" in done.stderr


def test_a_port_asked_for_by_number_that_is_busy_names_its_holder(lab, tmp_path):
    port = int(lab.gateway.rsplit(":", 1)[1])
    with pytest.raises(errors.PortBusyError, match=rf"port {port} is taken by .*pid"):
        tether.up(workers=1, data=tmp_path / "data", port=port)
    assert processes_of(tmp_path / "data") == []


def test_pretended_gpus_give_workers_the_tag(tmp_path):
    with tether.up(workers=2, gpus=1, pretend_gpus=True, data=tmp_path / "data") as lab:
        assert {name: worker.gpus for name, worker in lab.workers.items()} == {"worker-1": 1, "worker-2": 0}


def test_gpus_that_are_not_there_are_refused(tmp_path):
    if os.path.exists("/dev/nvidiactl"):  # noqa: PTH110
        pytest.skip("this machine has a GPU")
    with pytest.raises(errors.ConfigError, match="--pretend-gpus"):
        tether.up(workers=1, gpus=1, data=tmp_path / "data")


def test_a_manager_whose_port_somebody_took_meanwhile_comes_back_on_another_one(mortal, tmp_path):
    mortal.publish("moved", write_model(tmp_path / "tiny.onnx"))

    def manager():
        return next(service for service in mortal.status().services if service.role == "manager")

    before = manager()
    host, port = before.address.removeprefix("tls://").rsplit(":", 1)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        os.kill(before.pid, signal.SIGKILL)
        eventually(lambda: bound(taken, (host, int(port))))
        taken.listen()
        after = eventually(lambda: (found := manager()).state == "running" and found.pid != before.pid and found)
        assert after.address != before.address
        assert eventually(lambda: mortal.publish("moved", write_model(tmp_path / "tiny2.onnx", 2.0)).version == 2)


def bound(taken, address):
    try:
        taken.bind(address)
    except OSError:
        return False
    return True
