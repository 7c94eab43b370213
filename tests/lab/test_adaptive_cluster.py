"""A lab whose workers are a Dask cluster's: they come with the requests, and go when nobody asks any more."""

import asyncio
import json
import signal
import sys
import time

import numpy as np
import pytest
from conftest import until, write_model
from distributed import SpecCluster
from distributed.deploy.spec import ProcessInterface

import tether
from tether.config import DataFolder
from tether.orchestrator.adaptive import Adaptive
from tether.security.comms import dask_security
from tether.security.tls import ensure_tls


class Orchestrator(ProcessInterface):
    """The lab's: it runs already."""

    def __init__(self, address, **_options):
        super().__init__()
        self.address = address


class WorkerProcess(ProcessInterface):
    """`tether worker`, as a job of a batch system would start it."""

    def __init__(self, scheduler, name, data, **_options):
        super().__init__(name=name)
        self._arguments = [
            "-m",
            "tether",
            "worker",
            scheduler,
            "--data",
            str(data),
            "--name",
            str(name),
            "--port",
            "0",
            "--label",
            "by=cluster",
        ]
        self._child = None

    async def start(self):
        self._child = await asyncio.create_subprocess_exec(sys.executable, *self._arguments, stderr=asyncio.subprocess.DEVNULL)
        await super().start()

    async def close(self):
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(signal.SIGTERM)
            await self._child.wait()
        await super().close()


@pytest.fixture(scope="module")
def empty_lab(tmp_path_factory):
    """Without workers."""
    data = tmp_path_factory.mktemp("adaptive") / "data"
    with tether.up(workers=0, data=data, swarm=False) as lab:
        lab.publish("tiny", write_model(data.parent / "tiny.onnx"), framework="onnx")
        yield lab, DataFolder(data)


def cluster_of(data):
    services = json.loads((data.run / "lab.json").read_text())["services"]
    (address,) = (each["address"] for each in services if each["role"] == "orchestrator")
    return SpecCluster(
        scheduler={"cls": Orchestrator, "options": {"address": address}},
        worker={"cls": WorkerProcess, "options": {"data": data.root}},
        security=dask_security(ensure_tls(data.tls, "worker")),
        asynchronous=True,
        silence_logs=False,
    )


def test_a_lab_on_one_machine_starts_workers_with_the_first_request_and_ends_them_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DASK_TETHER__SCALING__IDLE", "1")
    monkeypatch.setenv("DASK_TETHER__SCALING__KEEP", "1")
    with tether.up(workers=(0, 2), data=tmp_path / "data", swarm=False) as lab:
        lab.publish("tiny", write_model(tmp_path / "tiny.onnx"), framework="onnx")
        assert not lab.workers
        assert lab.infer("tiny", np.ones((1, 16), np.float32), timeout=60).shape == (1, 4)
        assert len(lab.workers) == 1
        until(lambda: not lab.workers)
        until(lambda: "worker-1" not in {service.name for service in lab.status().services})


def test_workers_come_with_the_first_request_and_go_when_nobody_asks(empty_lab):
    lab, data = empty_lab
    asyncio.run(scaled(lab, data))


async def scaled(lab, data):
    async with cluster_of(data) as cluster:
        cluster.adapt(Adaptive=Adaptive, minimum=0, maximum=2, interval="100ms", keep=1.0, idle=1.0, forecast=False)
        await asyncio.sleep(0)
        assert not lab.workers
        asked = time.monotonic()
        answer = await lab.ainfer("tiny", np.ones((2, 16), np.float32), timeout=60)
        assert answer.shape == (2, 4)
        assert time.monotonic() - asked < 60
        held = [worker for worker in (await lab.astatus()).workers if worker.state == "running"]
        assert len(held) == 1
        await asyncio.to_thread(until, lambda: not lab.workers)
        assert cluster.plan == set()
