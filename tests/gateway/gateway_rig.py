"""A real gateway on a real socket, before a dispatcher that is this test's own: it runs ONNX sessions inline, on the gateway's loop."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from dataclasses import replace
from time import monotonic, sleep
from types import SimpleNamespace

import numpy as np
import onnxruntime
import uvloop
from onnx import TensorProto, helper

from tether.errors import MissingBlobsError, TetherError, UnknownModelError
from tether.gateway.admission import Keys, fingerprint
from tether.gateway.app import serve
from tether.gateway.door import Settings
from tether.gateway.event_log import EventLog
from tether.ports import HopReply
from tether.routing.table import ModelEntry, Table, VersionEntry, WorkerEntry
from tether.types import ModelInfo, ModelVersion, TensorSpec
from tether.wire.oip import decode_request, encode_error, encode_response

KEY = "tk_" + "k" * 43
AUTH = {"Authorization": f"Bearer {KEY}"}


def _session(nodes, inputs, outputs):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def _value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def _identity(kind, shape):
    return _session([helper.make_node("Identity", ["x"], ["y"])], [_value("x", kind, shape)], [_value("y", kind, shape)])


def _sum_and_difference():
    pair = [_value(name, TensorProto.INT32, ["n", 3]) for name in ("a", "b")]
    both = [_value(name, TensorProto.INT32, ["n", 3]) for name in ("sum", "difference")]
    return _session([helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])], pair, both)


def info(inputs, outputs):
    return ModelInfo(
        "onnx", "onnx", tuple(TensorSpec(*spec) for spec in inputs), tuple(TensorSpec(*spec) for spec in outputs), True, True, False
    )


MODELS = {
    "ident": (_identity(TensorProto.FLOAT, ["n", 4]), info([("x", "FP32", (-1, 4))], [("y", "FP32", (-1, 4))])),
    "text": (_identity(TensorProto.STRING, ["n", 1]), info([("x", "BYTES", (-1, 1))], [("y", "BYTES", (-1, 1))])),
    "half": (_identity(TensorProto.FLOAT16, ["n", 2]), info([("x", "FP16", (-1, 2))], [("y", "FP16", (-1, 2))])),
    "simple": (
        _sum_and_difference(),
        info([("a", "INT32", (-1, 3)), ("b", "INT32", (-1, 3))], [("sum", "INT32", (-1, 3)), ("difference", "INT32", (-1, 3))]),
    ),
}
HELD = "held"
"""A model whose requests wait in `TestDispatcher.held`, as behind a busy worker."""
BROKEN = "broken"
"""A model on which the dispatcher itself fails."""
BIG = "big"
"""A model that answers with 8 MiB."""


def _texts(array):
    return np.array([text.decode() for text in array.ravel()], object).reshape(array.shape)


def make_table():
    models = {}
    for name, (_session, described) in MODELS.items():
        version = VersionEntry(ModelVersion(name, 1, "0" * 64), described, "ready")
        models[name] = ModelEntry(name, 1, {1: version}, {"prod": 1})
    ident = MODELS["ident"][1]
    for name in (HELD, BROKEN, BIG):
        models[name] = ModelEntry(name, 2, {2: VersionEntry(ModelVersion(name, 2, "0" * 64), ident, "loading")}, {})
    models["bad"] = ModelEntry("bad", 1, {1: VersionEntry(ModelVersion("bad", 1, "0" * 64), ident, "failed", reason="no space")}, {})
    models["my~model+x"] = models["ident"]
    return Table(1, models, {"worker-1": WorkerEntry("worker-1", "tls://127.0.0.1:8001", 1, "running", 0.0)})


class Manager:
    """Plain dictionaries behind the management endpoints."""

    def __init__(self):
        self.blobs, self.calls = {}, []

    async def put_blob(self, digest, data, encrypt=None):
        self.blobs[digest] = data
        return {"digest": digest} if encrypt is None else {"digest": digest, "encrypt": encrypt}

    async def get_blob(self, digest, version=None):
        return self.blobs[digest] if version is None else version.encode()

    async def publish(self, name, draft):
        if "missing" in draft:
            raise MissingBlobsError("upload the blobs, then send the manifest again", draft["missing"])
        return {"name": name, "version": 1, "created": draft["created"]}

    async def models(self):
        return [{"name": "ident"}]

    async def model(self, name):
        if name != "ident":
            raise UnknownModelError(f"model {name!r} is not found")
        return {"name": name}

    async def trust(self, publisher, scopes):
        return {"publisher": publisher, "scopes": scopes}

    def __getattr__(self, verb):
        async def call(*arguments):
            self.calls.append((verb, *arguments))
            return {"verb": verb, "arguments": arguments}

        return call


class TestDispatcher:
    __test__ = False

    def __init__(self):
        self.table = make_table()
        self.management = Manager()
        self.events = EventLog()
        self.held, self.cancelled, self.hops = [], [], []
        self.told, self.labels = {}, []

    def labelled(self, *labels):
        self.labels.append(labels)

    async def vitals(self):
        return self.told

    async def status(self):
        return {"services": []}

    def infer(self, model, version, hop, done):
        self.hops.append(hop)
        try:
            entry = self.table.resolve(model, version)
            if entry.model.name == BROKEN:
                raise ZeroDivisionError
            if entry.model.name == BIG:
                done(HopReply(200, b"[" + b"1," * (4 << 20) + b"1]"))
            elif entry.model.name == HELD:
                self.held.append((hop, done))
                return lambda: self.cancelled.append(hop)
            else:
                done(HopReply(200, *self._run(entry, hop)))
        except TetherError as error:
            done(HopReply(error.http_status, encode_error(error)))
        return lambda: None

    def _run(self, entry, hop):
        session, described = MODELS[entry.model.name]
        request = decode_request(hop.body, hop.header_nbytes, described)
        names = [spec.name for spec in described.outputs]
        feeds = {name: _texts(array) if array.dtype == object else array for name, array in request.inputs.items()}
        return encode_response(dict(zip(names, session.run(names, feeds), strict=True)), entry.model, request, described)


@contextlib.contextmanager
def running(settings=None, host="127.0.0.1"):
    """The gateway in a thread of its own: `.port`, `.dispatcher`, `.call(function)` on its loop, `.stop`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.create_server((host, 0), family=family)
    rig = SimpleNamespace(port=bound.getsockname()[1], dispatcher=TestDispatcher(), host=host)
    settings = settings or Settings()
    rig.settings = replace(settings, keys=Keys({fingerprint(KEY): "tester"}))
    up = threading.Event()

    async def main():
        rig.loop, rig.stop = asyncio.get_running_loop(), asyncio.Event()
        await serve(rig.dispatcher, [bound], rig.settings, rig.stop, up.set)

    def live():
        try:
            uvloop.run(main())
        finally:
            up.set()

    thread = threading.Thread(target=live, name="gateway")
    thread.start()
    up.wait(60)
    rig.call = rig.loop.call_soon_threadsafe
    rig.thread = thread
    try:
        yield rig
    finally:
        with contextlib.suppress(RuntimeError):
            rig.call(rig.stop.set)
        thread.join(20)


def until(condition, seconds=30.0):
    """Poll `condition` until it holds."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not become true"
        sleep(0.005)


def ask(rig, method, path, body=None, headers=None):
    """One exchange: status, headers, parsed body (bytes where it is not JSON)."""
    connection = http.client.HTTPConnection(rig.host, rig.port, timeout=30)
    try:
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        data = answer.read()
        kind = answer.getheader("content-type", "")
        return answer.status, answer.headers, json.loads(data) if kind == "application/json" and data else data
    finally:
        connection.close()


class Wire:
    """A raw connection, and a reader of its answers."""

    def __init__(self, rig):
        self.socket = socket.create_connection((rig.host, rig.port), timeout=30)
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def head(self):
        """Status and headers of the next answer."""
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:])

    def answer(self):
        """Status, headers, body of the next answer."""
        status, headers = self.head()
        length = int(headers["content-length"])
        while len(self.buffer) < length:
            self._more()
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return status, headers, body

    def closed(self):
        """Whether the gateway ended the connection and sent nothing more."""
        return self.buffer == b"" and self.socket.recv(1) == b""

    def _more(self):
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError(self.buffer[:200])
        self.buffer += data


def infer_body(rows=1, name="x", **more):
    data = np.arange(4 * rows, dtype="f4").reshape(rows, 4).tolist()
    return json.dumps({"inputs": [{"name": name, "datatype": "FP32", "shape": [rows, 4], "data": data}], **more}).encode()


def post(path="/v2/models/ident/infer", body=None, extra="", version="1.1"):
    body = infer_body() if body is None else body
    return f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body
