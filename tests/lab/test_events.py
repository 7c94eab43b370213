"""What happens in a lab, as its own people, other programs and another lab hear of it: real processes, a real DHT of this machine."""

import asyncio
import contextlib
import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import write_model

import tether
from tether.testing.requirements import needs

ROWS = np.ones((2, 16), np.float32)
PATIENCE = 30.0


@pytest.fixture(scope="module")
def hers(on_the_net, tmp_path_factory):  # noqa: ARG001 (a fixture takes no mark)
    with tether.up(workers=1, data=tmp_path_factory.mktemp("hers")) as lab:
        yield lab


class Listener:
    """Hears a lab in a thread of its own, until it heard what begins with `last`."""

    def __init__(self, events, last):
        self.heard, self.last, self.listening = queue.SimpleQueue(), last, threading.Event()
        self.thread = threading.Thread(target=self._listen, args=(events,))
        self.thread.start()

    def _listen(self, events):
        for event in events:
            self.heard.put(event)
            if str(event).startswith(self.last):
                break

    def texts(self):
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "it did not hear what it waits for"
        return [str(self.heard.get()) for _ in range(self.heard.qsize())]


def now(lab):
    """The number of now, to listen from: a thread that begins to listen may be late."""
    return tether.lab.loop.run(lab.operations.client.events(None, 0.0))["seq"]


def test_a_publish_and_what_follows_is_heard_in_order_and_breaking_out_ends_it(hers, tmp_path):
    listener = Listener(hers.events(now(hers)), "alias-moved heard@prod is 1")
    hers.publish("heard", write_model(tmp_path / "m.onnx"))
    hers.infer("heard", ROWS)
    hers.alias("heard", "prod", 1)
    story = [
        "version-published heard:1",
        "alias-moved heard@latest is 1",
        "version-loading heard:1",
        "version-loaded heard:1",
        "alias-moved heard@prod is 1",
    ]
    assert listener.texts() == story
    assert [str(event) for event in hers.recent_events() if event.model == "heard"] == story
    assert [event.kind for event in hers.recent_events() if event.model == "heard" and event.seconds] == ["version-loaded"]
    first = hers.recent_events()[0]
    assert (type(first.seq), abs(first.at - time.time()) < 600) == (int, True)


async def test_they_are_heard_in_any_event_loop(hers, tmp_path):
    seq = await asyncio.to_thread(now, hers)
    await hers.apublish("awaited", write_model(tmp_path / "m.onnx"))
    async with asyncio.timeout(PATIENCE), contextlib.aclosing(hers.aevents(seq)) as events:
        async for event in events:
            if (event.kind, event.model) == ("version-published", "awaited"):
                break


def stream(lab, folder, **headers):
    """As any program would: a line at a time."""
    connection = http.client.HTTPConnection(lab.gateway.removeprefix("http://"), timeout=PATIENCE)
    key = (folder / "keys" / "api-key").read_text().strip()
    connection.request("GET", "/tether/v1/events", headers={"Authorization": f"Bearer {key}", **headers})
    return connection, connection.getresponse()


def test_other_programs_read_server_sent_events_and_resume_where_they_were(hers, tmp_path):
    folder = hers._running.data.root
    connection, answer = stream(hers, folder)
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.readline() == b"retry: 1000\n"
    number = answer.readline().removeprefix(b"id: ").strip().decode()
    hers.publish("streamed", write_model(tmp_path / "m.onnx"))
    sent = []
    while not sent or sent[-1]["kind"] != "alias-moved":
        line = answer.readline()
        if line.startswith(b"data: "):
            sent.append(json.loads(line[6:]))
    assert sent[0] == {"seq": int(number) + 1, "at": sent[0]["at"], "kind": "version-published", "model": "streamed", "version": 1}
    connection.close()
    connection, answer = stream(hers, folder, **{"Last-Event-ID": number})
    while not (line := answer.readline()).startswith(b"data: "):
        pass
    assert json.loads(line[6:]) == sent[0]
    connection.close()


def test_listening_outlives_the_gateway_and_says_what_it_may_have_missed(hers, tmp_path):
    listener = Listener(hers.events(now(hers)), "version-published after:1")
    (gateway,) = [service for service in hers.status().services if service.role == "gateway"]
    os.kill(gateway.pid, signal.SIGKILL)
    hers.publish("after", write_model(tmp_path / "m.onnx"))
    heard = listener.texts()
    assert heard[0] == "missed"
    assert heard[-1] == "version-published after:1"


def test_a_worker_that_is_lost_is_told_and_the_command_line_shows_it(hers):
    seq = now(hers)
    (worker,) = [service for service in hers.status().services if service.role == "worker"]
    listener = Listener(hers.events(seq), "worker-joined worker-1")
    os.kill(worker.pid, signal.SIGKILL)
    assert "worker-lost worker-1" in listener.texts()
    command = [sys.executable, "-m", "tether", "events", "--data", str(hers._running.data.root)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=60)
    assert "worker-lost" in [json.loads(line)["kind"] for line in done.stdout.splitlines()]
    following = subprocess.Popen([*command, "--follow"], stdout=subprocess.PIPE, text=True)
    try:
        while "worker-joined worker-1" not in following.stdout.readline():
            assert following.poll() is None
        following.send_signal(signal.SIGINT)
        assert following.wait(PATIENCE) == 0
    finally:
        following.kill()
        following.communicate()


@pytest.mark.swarm
@needs("pythonmonkey")
def test_another_lab_hears_of_the_models_that_its_scope_shows_and_of_nothing_else(hers, tmp_path):
    own = Listener(hers.events(now(hers)), "peer-connected")
    with tether.connect(str(hers.invite(scope="events:shown*")), data=tmp_path / "colleague") as lab:
        (key,) = [peer.peer for peer in hers.peers.values() if peer.scopes == ("events:shown*",)]
        assert own.texts()[-2:] == [f"peer-admitted {key}", f"peer-connected {key}"]
        seq = now(lab)
        listener = Listener(lab.events(seq), "alias-moved shown@prod is 1")
        hers.publish("hidden", write_model(tmp_path / "m.onnx"))
        hers.publish("shown", write_model(tmp_path / "m.onnx", 2.0))
        hers.infer("hidden", ROWS)
        hers.alias("shown", "prod", 1)
        assert listener.texts() == ["version-published shown:1", "alias-moved shown@latest is 1", "alias-moved shown@prod is 1"]
        assert {event.model for event in lab.recent_events()} == {"shown"}
        assert all(event.worker is None for event in lab.recent_events())
