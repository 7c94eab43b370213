"""The two sequences of remote workers, message by message: a Node program of Holepunch's packages plays the lab that lends.

What is recorded: what the Node program says and hears, and the tables that the orchestrator pushes to a member of its cluster.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from operator import itemgetter
from pathlib import Path
from queue import Empty, Queue

import numpy as np
import pytest
from conftest import write_model
from starvation import Watch

import tether
from tether.client.cluster import OrchestratorClient
from tether.config import DataFolder
from tether.security.addresses import Link
from tether.security.tls import ensure_tls
from tether.testing.requirements import needs

sys.path.append(str(Path(__file__).parent.parent / "swarm"))
from node_packages import node_folder

pytestmark = [pytest.mark.swarm, needs("pythonmonkey"), needs("node"), needs("npm")]
ROWS = np.ones((2, 16), np.float32)
PATIENCE = 30.0


class Record:
    """What was seen, as (time, what), by whomever."""

    def __init__(self):
        self.seen, self._lock = [], threading.Lock()

    def note(self, what, at=None):
        with self._lock:
            self.seen.append((time.time() if at is None else at, what))

    def all(self):
        with self._lock:
            return sorted(self.seen, key=itemgetter(0))  # what one of them saw in the same instant stays in its order

    def names(self):
        return [what for _, what in self.all()]

    def until(self, what, count=1, patience=PATIENCE):
        """When it was seen so often."""
        end = time.monotonic() + patience
        while len(found := [at for at, each in self.all() if each == what]) < count:
            assert time.monotonic() < end, (what, self.all())
            time.sleep(0.01)
        return found[count - 1]


class Node:
    """The lab that lends."""

    def __init__(self, record):
        self.record, self.values, self._answers, self._calls = record, {}, Queue(), 0
        self._process = subprocess.Popen(["node", "lender.js"], cwd=node_folder(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._process.stdout:
            said = json.loads(line)
            if "message" in said:
                self.values.setdefault(said["message"], []).append(said["value"])
                self.record.note(f"node {said['message']}", said["at"])
            else:
                self._answers.put(said)

    def call(self, op, **values):
        self._calls += 1
        self._process.stdin.write(json.dumps({"id": self._calls, "op": op, **values}) + "\n")
        self._process.stdin.flush()
        try:
            answer = self._answers.get(timeout=PATIENCE)
        except Empty:
            raise AssertionError(f"no answer to {op}: {self.record.all()}") from None
        assert "error" not in answer, answer
        return answer["ok"]

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE)
        self._process.stdout.close()


class Watcher:
    """Takes the orchestrator's tables, as a gateway does, in a thread of its own."""

    def __init__(self, lab, record):
        self._record, self._said, self._lent, self._stop = record, set(), set(), asyncio.Event()
        data = DataFolder(Path(lab.status().data))
        (address,) = [service.address for service in lab.status().services if service.role == "orchestrator"]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._watch(address, ensure_tls(data.tls, "gateway")),))
        self._thread.start()

    async def _watch(self, address, tls):
        client = OrchestratorClient(address, tls, self._take, list)
        await client.start(PATIENCE)
        await self._stop.wait()
        await client.close()

    def _take(self, table, _change):
        lent = {worker.id for worker in table.workers.values() if worker.transport == "swarm"}
        self._tell(*(f"table: {worker} is there" for worker in lent), *(f"table: {worker} is gone" for worker in self._lent - lent))
        self._lent |= lent
        for model in table.models.values():
            self._tell(*(f"table: {version.model} {version.state}" for version in model.versions.values()))

    def _tell(self, *what):
        for each in what:
            if each not in self._said:
                self._said.add(each)
                self._record.note(each)

    def close(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        self._loop.close()


@pytest.fixture(scope="module")
def lab(net, tmp_path_factory):
    """Without workers of its own: what runs, runs at Node."""
    with tether.up(workers=0, data=tmp_path_factory.mktemp("borrower"), bootstrap=net.bootstrap) as lab:
        yield lab


@pytest.fixture
def scene(net, lab, request):
    record = Record()
    with contextlib.ExitStack() as stack:
        node = Node(record)
        stack.callback(node.close)
        watcher = Watcher(lab, record)
        stack.callback(watcher.close)
        invitation = str(lab.invite(scope=["register"]))
        link = Link.parse(invitation)
        key = node.call("start", bootstrap=net.nodes, key=link.address.key, secret=link.secret.text, name=request.node.name)
        node.worker = f"lab-{key[:16]}"
        yield record, node


def in_order(record, *wanted):
    """These were seen, each after the one before; others may be between them."""
    names, at = record.names(), 0
    for what in wanted:
        assert what in names[at:], (what, "behind", wanted[: wanted.index(what)], record.all())
        at = names.index(what, at) + 1


def test_inference_client_gateway_orchestrator_worker_manager_and_back(lab, scene, tmp_path):
    record, node = scene
    version = lab.publish("digits", write_model(tmp_path / "m.onnx"))
    node.call("register", offer={"workers": 1, "gpus": 1, "slots": 4, "models": "digits*"})
    record.until(f"table: {node.worker} is there")
    record.note("client sends a request")
    answer = lab.infer("digits", ROWS)
    record.note("client has the answer")
    record.until("table: digits:1 ready")
    np.testing.assert_array_equal(answer, np.full((2, 4), 7, np.float32))
    in_order(
        record,
        "table: digits:1 unloaded",
        "client sends a request",  # over HTTP, to the gateway
        "table: digits:1 loading",  # findAvailableWorker: the gateway asked the orchestrator, which chose this one
        "table: digits:1 ready",
    )
    in_order(  # in Node's words; when a table reaches who watches says nothing of when it reached the gateway
        record,
        "client sends a request",
        "node hears capacity",  # checkCapacity
        "node says manifest",  # getModel, which is not cached
        "node is answered manifest",
        "node hears infer",
        "client has the answer",
    )
    (asked,) = node.values["hears capacity"]
    assert (asked["model"], asked["version"], asked["digest"], asked["load"]) == ("digits", 1, version.digest, True)
    (run,) = node.values["hears infer"]
    assert run["model"].endswith(f"~digits:sha-{version.digest}")
    assert node.values["is answered manifest"][0]["name"] == "digits"


def test_registration_announced_asked_back_confirmed_pinged_and_dropped(lab, scene, measured):
    record, node = scene
    assert f"table: {node.worker} is there" not in record.names()
    watch = Watch()
    answer = node.call("register", offer={"workers": 2, "gpus": 1, "slots": 4, "models": "*"})
    assert answer == {"worker": node.worker, "interval": 1.0}
    record.until(f"table: {node.worker} is there")
    record.until("node hears ping", 4)
    in_order(
        record,
        "node says register",  # capability; the public key is the stream's own
        "node hears ping",  # asked back, before it is believed
        "node is answered register",  # confirmed
        "node hears ping",
        "node hears ping",
        "node hears ping",
    )
    (worker,) = [each for each in lab.workers.values() if each.id == answer["worker"]]
    assert (worker.gpus, worker.state) == (1, "running")
    pings = [at for at, what in record.all() if what == "node hears ping"]
    assert pings[3] - pings[1] + watch.waited() > 1.5
    watch = Watch()
    node.call("silence")
    silent = record.until("node falls silent")
    lost = record.until(f"table: {node.worker} is gone")
    measured(f"a lab that lends fell silent: its worker was out of the table after {lost - silent:.1f} s")
    assert lost - silent - watch.waited() < 15  # two seconds without a pong, the last of which came up to a second before
