"""The control plane: what listens, who is let in, what a dead worker leaves behind, and Dask's own commands with Tether's preloads."""

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import psutil
import pytest
from distributed.core import connect

import tether
from tether.config import DataFolder
from tether.routing.table import Table
from tether.security.comms import dask_security
from tether.security.tls import ensure_tls
from tether.store import Repository

PROMPT = 60.0
"""Seconds that any of this may take on a busy machine before the test fails."""
DASK = Path(sys.executable).with_name("dask")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A lab of one worker."""
    with tether.up(workers=1, data=tmp_path_factory.mktemp("control") / "data") as started:
        yield started


def eventually(condition):
    deadline = time.monotonic() + PROMPT
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not true after {PROMPT} s"
        time.sleep(0.05)
    return found


def listeners(data):
    """Host and port of every TCP socket that a process of the lab listens on: those that name its data folder, and all their children."""
    named = [each for each in psutil.process_iter(["cmdline"]) if any(str(data) in part for part in each.info["cmdline"] or ())]
    found, pids = set(), set()
    for process in [*named, *(child for each in named for child in children(each))]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that was there for a moment
            if process.pid != os.getpid():
                found |= {tuple(each.laddr) for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
                pids.add(process.pid)
    return found, pids


def children(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def tls_addresses(lab):
    return [urlsplit(each.address) for each in lab.status().services if each.address.startswith("tls://")]


def test_a_lab_listens_on_the_gateways_port_and_on_tls_ports_and_nowhere_else(small):
    status = small.status()
    found, pids = listeners(status.data)
    gateway = urlsplit(small.gateway)
    assert pids >= {each.pid for each in status.services}
    assert len(tls_addresses(small)) == 3
    assert found == {(each.hostname, each.port) for each in [gateway, *tls_addresses(small)]}


class Marker:
    """Makes a file where somebody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled_frame(path):
    """As Dask's TCP comms frame a message: number of parts, their lengths, the parts."""
    parts = [b"", pickle.dumps({"op": "identity", "task": Marker(path)})]
    return struct.pack(f"<{1 + len(parts)}Q", len(parts), *map(len, parts)) + b"".join(parts)


def answer(connection, data):
    """All that comes back; None where the other side breaks the connection off."""
    try:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(4096), b""))
    except (ConnectionError, ssl.SSLError):
        return None


TLS_ALERT = 0x15
"""First byte of the record in which TLS says why it refuses (RFC 8446 §5.1)."""


def test_a_peer_without_tls_gets_no_answer_and_nothing_is_unpickled(small, tmp_path):
    for address in tls_addresses(small):
        with socket.create_connection((address.hostname, address.port), PROMPT) as connection:
            said = answer(connection, pickled_frame(tmp_path / "marker"))
            assert not said or (said[0] == TLS_ALERT and len(said) == 7)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("certificate", ["none", "of another authority"])
def test_a_tls_peer_without_a_certificate_of_the_cluster_is_refused(small, tmp_path, certificate):
    context = ssl.create_default_context(cafile=DataFolder(Path(small.status().data)).tls / "ca.pem")
    if certificate != "none":
        other = ensure_tls(tmp_path, "worker")
        context.load_cert_chain(other.certificate, other.key)
    for address in tls_addresses(small):
        with (
            socket.create_connection((address.hostname, address.port), PROMPT) as plain,
            contextlib.suppress(ssl.SSLError, ConnectionError),
            context.wrap_socket(plain, server_hostname=address.hostname) as connection,
        ):
            assert not answer(connection, pickled_frame(tmp_path / "marker"))
    assert not (tmp_path / "marker").exists()


def test_a_killed_worker_leaves_no_sockets_behind_and_a_closed_lab_none(tmp_path):
    with tether.up(workers=1, gateway=False, data=tmp_path / "data") as lab:
        runtime = DataFolder(tmp_path / "data").runtime
        (folder,) = runtime.glob("worker-1-*")
        os.kill(int(folder.name.removeprefix("worker-1-")), signal.SIGKILL)
        eventually(lambda: not folder.exists() and list(runtime.glob("worker-1-*")))
        lab.close()
    assert list(runtime.glob("worker-*")) == []


def dask(*arguments, home):
    return subprocess.run(
        [DASK, *arguments], capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"TETHER_HOME": str(home)}
    )


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"), "`tether orchestrator`"),
        (("worker", "tcp://127.0.0.1:9", "--no-nanny", "--death-timeout", "30"), "`tether worker tls://HOST:8002`"),
    ],
)
def test_dasks_commands_with_our_preload_refuse_to_run_without_tls(arguments, advice, tmp_path):
    role = "orchestrator" if arguments[0] == "scheduler" else "worker"
    ended = dask(*arguments, "--preload", f"tether.{role}.preload", home=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert advice in ended.stderr


def told_address(path):
    """What a scheduler wrote of itself; None: it is not there yet."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads(path.read_text())["address"]


def test_dasks_scheduler_and_worker_with_tls_and_our_preloads_are_an_orchestrator_and_its_worker(tmp_path):
    files, told, home = ensure_tls(tmp_path, "orchestrator"), tmp_path / "scheduler.json", tmp_path / "home"
    Repository.open(DataFolder.locate(home).create().store).close()
    flags = ["--tls-ca-file", files.ca, "--tls-cert", files.certificate, "--tls-key", files.key, "--dashboard-address", "127.0.0.1:0"]
    scheduler = ["scheduler", "--protocol", "tls", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", told]
    environment = os.environ | {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True", "TETHER_HOME": str(home)}
    with contextlib.ExitStack() as running:

        def start(*command):
            process = subprocess.Popen([DASK, *command, *flags], env=environment, stderr=subprocess.DEVNULL, cwd=tmp_path)
            running.callback(process.wait, PROMPT)
            running.callback(process.terminate)
            return process

        start(*scheduler, "--preload", "tether.orchestrator.preload")
        address = eventually(lambda: told_address(told))
        process = start("worker", address, "--no-nanny", "--nthreads", "1", "--preload", "tether.worker.preload")
        tables = eventually(lambda: asyncio.run(table_of(address, dask_security(files))).workers)
    (entry,) = tables.values()
    assert (entry.state, entry.pid) == ("running", process.pid)


async def table_of(address, security):
    comm = await connect(address, timeout=PROMPT, **security.get_connection_args("client"))
    await comm.write({"op": "tether_table"})
    answered = await comm.read()
    await comm.close()
    return msgspec.msgpack.decode(answered["table"], type=Table)
