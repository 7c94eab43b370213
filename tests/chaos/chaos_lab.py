"""Models that do what they are told, for a lab that is to bear it, and clients that count what they are answered."""

import asyncio
import json
import threading
import time
from urllib.parse import urlsplit

import onnx
from onnx import TensorProto, helper

PROMPT = 60.0
"""Seconds that any of this may take on a busy machine before the test fails."""
MEMORY = "512MiB"
"""What a model's process may take."""
SEGFAULTS, ABORTS, EXITS, EATS, SPINS, HOLDS = -1.0, -2.0, -3.0, -4.0, -5.0, -100.0
"""What `Patient` does, said by the least number of its input. HOLDS - x: for x seconds no other thread of the process runs Python."""
PATIENT = """
import ctypes, mmap, os, time

def eat(nbytes):
    held = mmap.mmap(-1, nbytes)
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(3600)

class Patient:
    inputs = outputs = [("x", "FP64", (-1,))]
    pure = True

    def predict(self, x):
        match float(x.min()):
            case -1.0: ctypes.string_at(0)
            case -2.0: os.abort()
            case -3.0: os._exit(3)
            case -4.0: eat(1 << 30)
            case -5.0:
                while True: pass
            case least if least <= -100.0: ctypes.PyDLL(None).usleep(int(-1e6 * (least + 100)))
            case _: time.sleep(float(x.max()))
        return {"x": x}
"""


def write_echo(path):
    """y = x."""
    values = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["batch"]) for name in "xy"]
    return _write(path, helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "echo", values[:1], values[1:]))


def write_ratio(path):
    """y = x // d of integers, 64 bits each."""
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch"]) for name in "xdy"]
    return _write(path, helper.make_graph([helper.make_node("Div", ["x", "d"], ["y"])], "ratio", values[:2], values[2:]))


def _write(path, graph):
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def until(condition):
    """What `condition` gives once it is true."""
    deadline = time.monotonic() + PROMPT
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.02)
    return found


def pids(lab):
    """Of its workers."""
    return {worker.id: worker.pid for worker in lab.workers.values()}


class Client:
    """One connection of HTTP/1.1 that is kept."""

    def __init__(self, lab):
        self.address = urlsplit(lab.status().gateway)
        self.reader = self.writer = None
        self.told = ""
        """Status line and headers of the last answer."""

    async def ask(self, model, value, timeout=PROMPT):  # noqa: ASYNC109 (it is the lab's)
        """Status, what was answered (a number, or a code), seconds. Raises: OSError: the connection, if there is one, ended."""
        begun = time.monotonic()
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.address.hostname, self.address.port)
        body = json.dumps({"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [value]}]}).encode()
        head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        self.writer.write(f"{head}x-request-timeout: {timeout}\r\n\r\n".encode() + body)
        try:
            told = self.told = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(told.partition("content-length: ")[2].partition("\r\n")[0])
            answer = json.loads(await self.reader.readexactly(length))
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError from error
        if "\r\nconnection: close" in told:
            await self.aclose()
        status = int(told.split()[1])
        return status, answer["outputs"][0]["data"][0] if status == 200 else answer["code"], time.monotonic() - begun

    async def aclose(self):
        """What came that was not asked for."""
        reader, writer, self.reader, self.writer = self.reader, self.writer, None, None
        if writer is None:
            return b""
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        return bytes(reader._buffer)


def together(asked):
    """(client, model, value, timeout?) → their answers, asked at once."""

    async def live():
        answers = await asyncio.gather(*(client.ask(*arguments) for client, *arguments in asked))
        surplus = [await client.aclose() for client, *_ in asked]
        assert surplus == [b""] * len(asked)
        return answers

    return asyncio.run(live())


class Load(threading.Thread):
    """Asks a model that gives back what it gets all the while, each time for another small number, on connections that are kept."""

    def __init__(self, lab, model, clients=4, timeout=PROMPT):
        super().__init__(daemon=True)
        self.lab, self.model, self.clients, self.timeout = lab, model, clients, timeout
        self.answered, self.flaws, self.late, self.surplus = 0, [], 0, []
        self.done = threading.Event()

    def run(self):
        asyncio.run(self._all())

    async def _all(self):
        await asyncio.gather(*(self._one(index) for index in range(self.clients)))

    async def _one(self, index):
        client, number = Client(self.lab), index * 1_000_000
        while not self.done.is_set():
            number += 1
            status, answer, _ = await client.ask(self.model, number / 1e12, self.timeout)
            self.answered += 1
            if (status, answer) == (504, "deadline_exceeded"):
                self.late += 1
            elif (status, answer) != (200, number / 1e12):
                self.flaws.append((self.model, status, answer))
            await asyncio.sleep(0.03)
        self.surplus.append(await client.aclose())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join(2 * PROMPT)
