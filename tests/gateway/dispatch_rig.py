"""A dispatcher and model servers in one process: real sockets and frames, models that misbehave on purpose."""

import asyncio
import json
import threading

import numpy as np

from tether.errors import ModelDiedError, ModelFailedError, ServiceUnavailableError
from tether.gateway.dispatch import Dispatch
from tether.gateway.transport import UnixTransport
from tether.manager.hops import HopServer
from tether.ports import Hop
from tether.routing.table import ModelEntry, Route, Table, VersionEntry
from tether.serving_settings import DEFAULTS
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId
from tether.worker.serving import ModelServer

VERSION = ModelVersion("m", 1, Digest("0" * 64))
SPEC = TensorSpec("x", "FP32", (-1, 2))
PROMPT = 60.0
"""Seconds that any of this may take on a busy machine before the test fails."""


class Doubling:
    """y = 2x. Fails on a batch with a negative number; waits for `gate` before it answers."""

    def __init__(self, *, pure=True):
        self.info = ModelInfo("custom", "custom", (SPEC,), (TensorSpec("y", "FP32", (-1, 2)),), batched=True, pure=pure, code=True)
        self.gate = threading.Event()
        self.gate.set()
        self.batches = []

    def run(self, inputs):
        self.batches.append(len(inputs["x"]))
        self.gate.wait(2 * PROMPT)
        if (inputs["x"] < 0).any():
            raise ModelFailedError("negative numbers are not for this model")
        return {"y": 2 * inputs["x"]}

    def interrupt(self):
        self.gate.set()

    def close(self):
        self.gate.set()


class Control:
    """An orchestrator that places nothing and remembers what it was asked."""

    def __init__(self, state="loading", reason=""):
        self.answer, self.wanted, self.loads = (state, reason), [], []

    async def want(self, model):
        self.wanted.append(model)
        return self.answer

    async def status(self):
        return {}

    async def vitals(self):
        return {}

    async def quarantine(self, *_):
        raise ServiceUnavailableError("the orchestrator does not answer")

    async def forgive(self, _):
        """It was told of nothing, so there is no other table."""

    async def load(self, load):
        self.loads.append(load)


class Fatal(Doubling):
    """Each input ends its process."""

    def run(self, _):
        raise ModelDiedError("the model's process died", True)


def table(info, *endpoints, lent=(), serving=DEFAULTS):
    routes = tuple(Route(WorkerId(f"w{index}"), str(endpoint)) for index, endpoint in enumerate(endpoints))
    routes += tuple(Route(WorkerId(f"lent-{index}"), str(endpoint), slots=4) for index, endpoint in enumerate(lent))
    entry = VersionEntry(VERSION, info, "ready" if routes else "unloaded", routes)
    return Table(1, {"m": ModelEntry("m", 1, {1: entry}, {"latest": 1}, serving)})


def body(*values):
    tensor = {"name": "x", "shape": [len(values), 2], "datatype": "FP32", "data": [[value, value] for value in values]}
    return json.dumps({"inputs": [tensor]}).encode()


class Rig:
    """A dispatcher and model servers in one process."""

    def __init__(self, folder, control=None):
        self.folder, self.control = folder, control or Control()
        self.dispatch, self.servers, self.lenders = Dispatch(self.control, None), [], []

    def serve(self, model):
        server = ModelServer(VERSION, model, self.folder / f"{len(self.servers)}.sock")
        server.start()
        self.servers.append(server)
        return server

    def lend(self, model):
        self.lenders.append(Lender(self, model))
        return self.lenders[-1]

    def route(self, info, *servers, serving=DEFAULTS):
        own = [server.endpoint for server in servers if isinstance(server, ModelServer)]
        lent = [server.endpoint for server in servers if isinstance(server, Lender)]
        self.dispatch.replace_table(table(info, *own, lent=lent, serving=serving))

    def ask(self, *values, timeout=PROMPT, session=b""):
        future = asyncio.get_running_loop().create_future()
        self.cancel = self.dispatch.infer("m", None, Hop(body(*values), 0, timeout, session=session), future.set_result)
        return future

    async def aclose(self):
        for lender in self.lenders:
            await lender.aclose()
        self.close()

    def close(self):
        self.dispatch.close()
        for server in self.servers:
            server.loaded.close()  # one that still waits at its gate
            server.stop()


class Lender:
    """Another lab behind the manager's socket: a worker that is asked by that lab's own gateway."""

    def __init__(self, rig, model):
        self.transport = UnixTransport(str(rig.serve(model).endpoint), None)
        self.hops, self.cancelled = HopServer(rig.folder, self.infer), 0
        self.endpoint = self.hops.start()

    async def infer(self, hop):
        future = asyncio.get_running_loop().create_future()
        abandon = self.transport.send(hop, future.set_result)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancelled += 1
            abandon()
            raise

    async def aclose(self):
        self.transport.close()
        await self.hops.aclose()


def said(reply):
    answer = json.loads(reply.body)
    return np.array(answer["outputs"][0]["data"]).reshape(-1, 2)[:, 0].tolist() if reply.status == 200 else (reply.status, answer["code"])


async def eventually(condition):
    async with asyncio.timeout(PROMPT):
        while not condition():  # noqa: ASYNC110 (other threads make it true)
            await asyncio.sleep(0.005)
