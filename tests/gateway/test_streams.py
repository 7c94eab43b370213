"""Answers in parts, from a model's thread over the gateway to a client: real sockets, models that misbehave on purpose."""

import asyncio
import json
import socket
import threading
import time
import zlib

import aiohttp
import numpy as np
import pytest

from tether.client import http
from tether.client.http import HttpClient
from tether.config import Limits
from tether.errors import BadInputError, DeadlineExceededError, ModelFailedError, ServiceUnavailableError, WorkerLostError
from tether.gateway.admission import Keys, fingerprint
from tether.gateway.app import serve
from tether.gateway.dispatch import Dispatch
from tether.gateway.door import Settings
from tether.gateway.transport import UnixTransport
from tether.manager.hops import HopServer
from tether.routing.table import ModelEntry, Route, Table, VersionEntry, WorkerEntry
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId
from tether.wire.frames import PART, PARTS, FrameReader, FrameWriter
from tether.wire.oip import encode_request
from tether.worker.serving import ModelServer

VERSION = ModelVersion("m", 1, Digest("0" * 64))
KEY = "tk_" + "k" * 43
PATIENCE = 60.0
SPEC = TensorSpec("n", "INT64", (1,))


class Counting:
    """Parts 0 … n-1; of -1 ones for ever, of -2 one and then an error. Waits for `gate` before each part."""

    def __init__(self, *, pure=True, streams=True, width=1):
        outputs = (TensorSpec("number", "INT64", (-1,)), TensorSpec("word", "BYTES", (-1,)))
        self.info = ModelInfo("custom", "custom", (SPEC,), outputs, batched=False, pure=pure, code=True, streams=streams)
        self.width, self.gate, self.begun, self.ended, self.parts = width, threading.Event(), 0, 0, 0
        self.gate.set()

    def run(self, inputs):
        return self._part(int(inputs["n"][0]))

    def _part(self, number):
        self.parts += 1
        return {"number": np.full(self.width, number), "word": np.array([b"w%d" % number], object)}

    def stream(self, inputs):
        self.begun += 1
        try:
            number = 0
            while number != inputs["n"][0]:
                if inputs["n"][0] == -2 and number == 1:
                    raise ModelFailedError("not two")
                self.gate.wait(PATIENCE)
                yield self._part(number)
                number += 1
        finally:
            self.ended += 1

    def interrupt(self):
        self.gate.set()

    def close(self):
        self.gate.set()


class Control:
    async def want(self, model):
        del model
        return "loading", ""

    async def vitals(self):
        return {}

    async def load(self, load):
        """Nobody here wants to know."""


class Rig:
    """Models, a dispatcher and its gateway."""

    def __init__(self, folder):
        self.folder, self.dispatch, self.servers, self.stop = folder, Dispatch(Control(), None), [], asyncio.Event()

    async def start(self, seconds):
        bound, up = socket.create_server(("127.0.0.1", 0)), asyncio.Event()
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        settings = Settings(keys=Keys({fingerprint(KEY): "tester"}), limits=Limits(timeout=seconds))
        self.gateway = asyncio.create_task(serve(self.dispatch, [bound], settings, self.stop, up.set))
        await up.wait()
        self.client = HttpClient(self.url, KEY)

    def serve(self, *models):
        for model in models:
            self.servers.append(ModelServer(VERSION, model, self.folder / f"{len(self.servers)}.sock"))
            self.servers[-1].start()
        routes = tuple(Route(WorkerId(f"w{index}"), str(server.endpoint)) for index, server in enumerate(self.servers))
        entry = VersionEntry(VERSION, models[-1].info, "ready", routes)
        workers = {"w0": WorkerEntry("w0", "tls://127.0.0.1:8001", 1, "running", 0.0)}
        self.dispatch.replace_table(Table(1, {"m": ModelEntry("m", 1, {1: entry}, {})}, workers))
        return models[-1]

    def ask(self, number, **more):
        return self.client.stream("m", {"n": np.array([number])}, **more)

    async def post(self, path, body, data=None, **headers):
        """Status, kind and body of the answer."""
        async with aiohttp.ClientSession() as session:
            headers |= {"Authorization": f"Bearer {KEY}"}
            async with session.post(f"{self.url}/v2/models/m/{path}", json=body, data=data, headers=headers) as response:
                return response.status, response.content_type, await response.read()

    def lose_workers(self):
        for transport in self.dispatch._lines.transports.values():  # what a killed worker looks like from here
            transport._transport.abort()

    async def aclose(self):
        await self.client.aclose()
        self.stop.set()
        await self.gateway
        self.dispatch.close()
        for server in self.servers:
            server.loaded.close()
            await asyncio.to_thread(server.stop, 1.0)


@pytest.fixture
async def rig(tmp_path, request):
    made = Rig(tmp_path)
    await made.start(getattr(request, "param", PATIENCE))
    yield made
    await made.aclose()


async def eventually(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (other threads make it true)
            await asyncio.sleep(0.005)


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


async def numbers(parts):
    return [int(part.outputs["number"][0]) async for part in parts]


def events(body):
    return [json.loads(event.removeprefix(b"data: ")) for event in body.split(b"\n\n") if event]


async def test_parts_come_while_the_model_makes_them(rig):
    model = rig.serve(Counting())
    parts = rig.ask(3)
    assert (await anext(parts)).outputs["word"].tolist() == [b"w0"]
    await eventually(lambda: model.parts == 3)
    assert await numbers(parts) == [1, 2]
    assert await numbers(rig.ask(0)) == []
    await eventually(lambda: model.ended == 2)


async def test_a_first_part_is_there_before_the_second_is_made(rig):
    model = rig.serve(Counting())
    model.gate.clear()
    parts = rig.ask(2)
    first = asyncio.ensure_future(anext(parts))
    await eventually(lambda: model.begun)
    model.gate.set()
    assert (await first).outputs["number"].tolist() == [0]
    assert await numbers(parts) == [1]


async def test_a_model_that_answers_at_once_gives_one_part(rig):
    rig.serve(Counting(streams=False))
    assert await numbers(rig.ask(7)) == [7]


async def test_a_reader_that_stops_reading_stops_the_model_and_who_leaves_ends_it(rig):
    model = rig.serve(Counting(width=1 << 17))  # a megabyte each: sockets hold few of them
    parts = rig.ask(-1)
    await anext(parts)
    seen = 0
    while seen != model.parts:
        seen = model.parts
        await asyncio.sleep(0.5)
    assert seen < 64
    assert [int((await anext(parts)).outputs["number"][0]) for _ in range(3)] == [1, 2, 3]
    assert not model.ended
    await parts.aclose()
    await eventually(lambda: model.ended)
    assert len(rig.servers[0]._streams) == 0


async def test_streams_and_requests_take_turns(rig):
    model = rig.serve(Counting())
    endless = [rig.ask(-1) for _ in range(3)]
    for parts in endless:
        await anext(parts)
    assert (await rig.client.infer("m", {"n": np.array([5])})).outputs["number"].tolist() == [5]
    for parts in endless:
        assert [int((await anext(parts)).outputs["number"][0]) for _ in range(20)] == list(range(1, 21))
        await parts.aclose()
    await eventually(lambda: model.ended == 3)


async def test_more_streams_than_may_be_open_wait_for_their_turn(rig):
    model = rig.serve(Counting())
    endless = [rig.ask(-1) for _ in range(8)]
    for parts in endless:
        await anext(parts)
    later = asyncio.ensure_future(numbers(rig.ask(2)))
    await eventually(lambda: len(rig.servers[0]._streams) == 9)
    assert model.begun == 8
    await endless[0].aclose()
    assert await later == [0, 1]
    for parts in endless[1:]:
        await parts.aclose()


async def test_what_fails_before_the_first_part_has_a_status_of_its_own(rig):
    rig.serve(Counting())
    with pytest.raises(BadInputError):
        await numbers(rig.client.stream("m", {"x": np.array([1])}))
    assert (await rig.post("infer_stream", {"inputs": []}))[0] == 400


async def test_what_fails_later_is_told_in_the_stream(rig):
    model = rig.serve(Counting())
    parts = rig.ask(-2)
    assert (await anext(parts)).outputs["number"].tolist() == [0]
    with pytest.raises(ModelFailedError, match="not two"):
        await anext(parts)
    status, kind, body = await rig.post("generate_stream", {"n": -2})
    assert (status, kind) == (200, "text/event-stream")
    assert [event.get("code") for event in events(body)] == [None, "model_failed"]
    assert model.ended == 2


async def test_a_deadline_ends_a_stream_and_its_generator(rig):
    model = rig.serve(Counting())
    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        await numbers(rig.ask(-1, timeout=2))
    assert time.monotonic() - begun < PATIENCE
    await eventually(lambda: model.ended)


@pytest.mark.parametrize("rig", [1.5], indirect=True)
async def test_without_a_deadline_each_part_has_one_and_a_slow_reader_none(rig):
    model = rig.serve(Counting())
    parts = rig.ask(-1)
    await anext(parts)
    await asyncio.sleep(2)  # the reader's time
    assert (await anext(parts)).outputs["number"].tolist() == [1]
    model.gate.clear()
    with pytest.raises(DeadlineExceededError, match=r"within 1\.5 s"):
        await numbers(parts)


async def test_who_set_a_deadline_waits_as_long_for_any_part(rig, monkeypatch):
    monkeypatch.setattr(http, "_TIMEOUT", 0.3)
    model = rig.serve(Counting())
    model.gate.clear()
    asked = asyncio.ensure_future(numbers(rig.ask(2, timeout=PATIENCE)))
    await asyncio.wait({asked}, timeout=1)
    model.gate.set()
    assert await asked == [0, 1]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_gateway_that_says_nothing_for_too_long_is_late_and_not_gone(rig, monkeypatch, begun):
    model = rig.serve(Counting())
    monkeypatch.setattr(http, "_TIMEOUT", 0.3)

    async def read():
        parts = rig.ask(-1)
        if begun:
            await anext(parts)
        model.gate.clear()
        await numbers(parts)

    with pytest.raises(DeadlineExceededError, match="no answer from"):
        await read()
    model.gate.set()
    await eventually(lambda: model.ended == model.begun)


async def test_a_stream_that_was_not_begun_begins_at_another_worker(rig):
    slow = rig.serve(Counting())
    slow.gate.clear()
    asked = asyncio.ensure_future(numbers(rig.ask(2)))
    await eventually(lambda: slow.begun)
    rig.serve(Counting())
    rig.lose_workers()
    assert await asked == [0, 1]
    slow.gate.set()
    await eventually(lambda: slow.ended)


async def test_a_stream_that_was_begun_is_lost_with_its_worker(rig):
    model = rig.serve(Counting())
    parts = rig.ask(-1)
    await anext(parts)
    rig.serve(Counting())
    rig.lose_workers()
    with pytest.raises(WorkerLostError, match="in the middle"):
        await numbers(parts)
    await eventually(lambda: model.ended)


async def test_a_model_that_leaves_memory_says_so_in_its_streams(rig):
    rig.serve(Counting())
    parts = rig.ask(-1)
    await anext(parts)
    stopped = asyncio.create_task(asyncio.to_thread(rig.servers[0].stop, 5.0))
    with pytest.raises(ServiceUnavailableError, match="left memory"):
        await numbers(parts)
    await stopped


def test_the_last_word_of_a_model_that_goes_is_not_lost_to_who_says_meanwhile_that_it_read(tmp_path):
    model = Counting()
    server, writer, reader = ModelServer(VERSION, model, tmp_path / "m.sock"), FrameWriter(), FrameReader()
    server.start()
    stopping = threading.Thread(target=server.stop)
    with socket.socket(socket.AF_UNIX) as gateway:
        gateway.settimeout(PATIENCE)
        gateway.connect(str(server.endpoint))
        gateway.send(b"-")

        def send():
            gateway.sendall(b"".join(writer.take()))

        def statuses(last):
            found = []
            while last not in found[-1:]:
                got = gateway.recv_into(reader.space())
                found += [head.status for head, _ in reader.received(got)]
                reader.release()
            return found

        body, header_nbytes = encode_request({"n": np.array([-1])}, binary=True)
        writer.request(1, body, header_nbytes, 60_000, flags=PARTS)
        model.gate.clear()
        send()
        until(lambda: model.begun)
        stopping.start()
        until(lambda: server._stopping)
        writer.taken(1)
        send()  # not read before the end
        model.gate.set()
        assert statuses(503) == [PART, 503]
        assert gateway.recv(1) == b""
    stopping.join()


async def test_a_lent_worker_gives_all_parts_as_one(rig):
    rig.serve(Counting(streams=False))
    own = UnixTransport(str(rig.servers[0].endpoint), None)

    async def infer(hop):
        answered = asyncio.get_running_loop().create_future()
        own.send(hop, answered.set_result)
        return await answered

    lender = HopServer(rig.folder, infer)
    lent = Route(WorkerId("lent"), str(lender.start()), slots=4)
    entry = VersionEntry(VERSION, Counting().info, "ready", (lent,))
    rig.dispatch.replace_table(Table(2, {"m": ModelEntry("m", 1, {1: entry}, {})}))
    assert await numbers(rig.ask(7)) == [7]
    await lender.aclose()
    own.close()


async def test_generate_takes_plain_keys_and_gives_plain_keys(rig):
    rig.serve(Counting(streams=False))
    status, _, body = await rig.post("generate", {"id": "a", "n": 3, "temperature": 0.5, "parameters": {"top_k": 2}})
    assert (status, json.loads(body)) == (200, {"id": "a", "model_name": "m", "model_version": "1", "number": 3, "word": "w3"})
    packed = zlib.compress(json.dumps({"n": 3}).encode())
    assert (await rig.post("generate", None, packed, **{"Content-Encoding": "deflate"}))[0] == 200
    assert (await rig.post("generate", {"n": [[1, 2]]}))[0] == 400
    assert (await rig.post("generate", {"n": 1, "temperature": {}}))[0] == 400
    assert (await rig.post("generate", []))[0] == 400


async def test_generate_stream_gives_an_event_for_each_part(rig):
    rig.serve(Counting())
    status, kind, body = await rig.post("generate_stream", {"n": [2]})
    assert (status, kind) == (200, "text/event-stream")
    assert [(event["number"], event["word"]) for event in events(body)] == [(0, "w0"), (1, "w1")]


async def test_events_of_infer_stream_are_answers_of_the_protocol(rig):
    rig.serve(Counting())
    asked = {"id": "a", "inputs": [{"name": "n", "shape": [1], "datatype": "INT64", "data": [2]}], "outputs": [{"name": "word"}]}
    status, _, body = await rig.post("infer_stream", asked)
    assert status == 200
    assert [(event["id"], event["outputs"][0]["data"]) for event in events(body)] == [("a", ["w0"]), ("a", ["w1"])]
    assert (await rig.post("infer_stream", asked | {"parameters": {"binary_data_output": True}, "outputs": []}))[0] == 501
