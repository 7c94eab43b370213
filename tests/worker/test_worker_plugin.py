"""A worker's side of the cluster: what leaves memory is told until it is heard, and monitoring outlives what it stumbles over."""

import asyncio
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from distributed.core import Server, rpc

from tether.errors import ConfigError
from tether.types import Digest, ModelVersion
from tether.worker import plugin as plugins
from tether.worker import service
from tether.worker.engine import Engine
from tether.worker.plugin import EnginePlugin
from tether.worker.service import memory_budget

PATIENCE = 60.0
A = ModelVersion("a", 1, Digest("a" * 64))


@asynccontextmanager
async def worker_of(scheduler, folder):
    """What a plugin needs of a Dask worker."""
    worker = SimpleNamespace(
        contact_address="tcp://127.0.0.1:1",
        scheduler=scheduler,
        handlers={},
        metrics={},
        startup_information={},
        state=SimpleNamespace(total_resources={}),
    )
    plugin = EnginePlugin(Engine(folder, lambda *_: None, lambda _: None), folder / "sockets")
    plugin.setup(worker)
    try:
        yield plugin, worker
    finally:
        await plugin.teardown(worker)


@asynccontextmanager
async def orchestrator(evicting):
    server = Server({"tether_evicting": evicting})
    await server.listen("tcp://127.0.0.1:0")
    connection = rpc(server.address)
    try:
        yield connection
    finally:
        await connection.close_rpc()
        await server.close()


@pytest.mark.parametrize("trouble", ["slow", "broken"])
async def test_what_leaves_is_told_in_the_end_however_the_first_try_went(tmp_path, monkeypatch, trouble):
    monkeypatch.setattr(plugins, "_TOLD", 0.1)
    free, tries, heard = asyncio.Event(), [], asyncio.Event()

    async def evicting(comm, endpoint, **_):
        tries.append(endpoint)
        if trouble == "broken" and len(tries) == 1:
            comm.abort()
        elif trouble == "slow":
            await free.wait()
        heard.set()
        return {}

    async with orchestrator(evicting) as scheduler, worker_of(scheduler, tmp_path) as (plugin, _):
        if trouble == "slow":  # the loop has other things to do at first
            going = threading.Thread(target=plugin._withdraw, args=(A, "here"))
            going.start()
            going.join(PATIENCE)
        else:
            await asyncio.to_thread(plugin._withdraw, A, "here")
        free.set()
        async with asyncio.timeout(PATIENCE):
            await heard.wait()
            while plugin._untold:  # noqa: ASYNC110 (it is about to hear the answer)
                await asyncio.sleep(0.005)
    assert tries == ["here"] * (2 if trouble == "broken" else 1)


async def test_vitals_are_read_on_when_a_look_failed(tmp_path, monkeypatch):
    looks = []

    def look(_with_cards):
        looks.append(1)
        if len(looks) == 1:
            raise RuntimeError("no such file")
        return {"cpu": 1.0}

    monkeypatch.setattr(plugins, "vitals", look)
    monkeypatch.setattr(plugins, "PERIOD", 0.005)
    async with worker_of(None, tmp_path) as (_, worker), asyncio.timeout(PATIENCE):
        while not worker.metrics["tether_vitals"](worker):  # noqa: ASYNC110 (it is a thread that looks)
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("nonsense", ["", "much", "0", "-1", "nan", "1e400", "4 GiB of it"])
def test_a_budget_that_is_no_number_of_bytes_is_refused_with_what_to_write(nonsense):
    with pytest.raises(ConfigError, match="give a number of bytes, as 4GiB"):
        memory_budget(nonsense, 1 << 30)


class Refused:
    """A Dask worker that the orchestrator does not take in."""

    closed = False

    def __await__(self):
        raise RuntimeError("name taken")

    async def close(self):
        self.closed = True


async def test_an_orchestrator_that_refuses_is_not_asked_again_without_a_pause(monkeypatch):
    pauses, worker = [], Refused()

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(service.asyncio, "sleep", sleep)
    assert (await service._next_life(worker), pauses, worker.closed) == ("failure-to-start", [0.1], True)
