"""A worker on a host that has not the lab's store: it fetches from the manager, serves, and goes on where it was when it was killed."""

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import dask.config
import numpy as np
import onnx
import psutil
import pytest
from distributed import Scheduler
from onnx import TensorProto, helper, numpy_helper

from tether.config import HOUSEKEEPING, DataFolder
from tether.errors import ChunkMissingError, ServiceUnavailableError, UntrustedCodeError
from tether.events import CatalogChanged, ManagerLeft, ModelWanted
from tether.gateway.transport import UnixTransport
from tether.manager.cluster_server import ClusterServer
from tether.manager.operations import Operations
from tether.orchestrator.plugin import OrchestratorPlugin
from tether.ports import Hop
from tether.runtimes import inspect
from tether.runtimes.weights import boundaries
from tether.security.comms import dask_security
from tether.security.identity import Identity
from tether.security.tls import ensure_tls
from tether.store import Manifest, Repository, encode, signed_message
from tether.store.format.layout import Piece
from tether.store.replicas.fetching import FetchRules
from tether.testing.requirements import needs
from tether.types import ModelInfo, ModelVersion
from tether.worker import runner
from tether.worker.manager_blobs import ManagerBlobs
from tether.worker.model_files import ModelFiles, load_pinned
from tether.worker.runner import RunnerPool

LAB = Identity(bytes(range(32)))
STRANGER = Identity(bytes(range(5, 37)))
PROMPT = 40.0
LAYERS, WIDTH = 12, 256
"""256 KiB a layer: each a blob of its own."""
QUICK = FetchRules(patience=0.1, give_up=0.5, rests=(0.02, 0.1))


def write_model(path):
    """y = x @ W0 @ W1 …: every W is the identity shifted by one column."""
    shifted = [np.roll(np.eye(WIDTH, dtype=np.float32), 1, axis=1) + np.float32(layer * 1e-9) for layer in range(LAYERS)]
    nodes = [helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"]) for layer in range(LAYERS)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x0", f"x{LAYERS}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(shifted)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    data = path.read_bytes()
    return [Piece(data.index(w.tobytes()), w.nbytes) for w in shifted]


def publish(repository, files, pieces, info, entry, by=LAB):
    arrays = tuple(repository.add_files(files, pieces))
    data = encode(Manifest(framework=info.framework, entry=entry, info=info, arrays=arrays))
    published = repository.publish("net", data, by.public, by.sign(signed_message(data)))
    name = repository.models()[0].name
    return ModelVersion(name, published.version, published.digest), info


@pytest.fixture
def origin(tmp_path):
    with Repository.open(tmp_path / "lab" / "store", own=LAB.public) as repository:
        yield repository


@pytest.fixture
def model(origin, tmp_path):
    path = tmp_path / "net.onnx"
    pieces = write_model(path)
    return publish(origin, path, {"net.onnx": pieces}, inspect(path), "net.onnx")[0]


class Gated(Operations):
    """Operations that note which blobs they gave, and give no more than `most`."""

    def __init__(self, repository, workspace):
        super().__init__(repository, LAB, workspace)
        self.given, self.most, self.reached, self.calls = [], None, asyncio.Event(), 0

    async def get_blob(self, digest):
        self.calls += 1
        if self.most is not None and len(self.given) >= self.most:
            self.reached.set()
            await asyncio.get_running_loop().create_future()
        self.given.append(digest)
        return await super().get_blob(digest)


# --- a worker's process in a real cluster


class Lab:
    """Scheduler and manager in this process."""

    def __init__(self, scheduler, plugin, operations, tls, repository):
        self.scheduler, self.plugin, self.operations, self.tls, self.repository = scheduler, plugin, operations, tls, repository
        self.streams = 0

    async def start_manager(self):
        self.manager = ClusterServer(self.operations, self.scheduler.address, self.scheduler.security)
        await self.manager.listen("tls://127.0.0.1:0", **self.scheduler.security.get_listen_args("worker"))
        self.streams += 1
        self.plugin._handle(CatalogChanged(self.manager.address, self.streams, self.operations.catalog(), self.streams))

    async def kill_manager(self):
        await self.manager.close()
        for comm in list(self.manager._comms):
            comm.abort()
        self.plugin._handle(ManagerLeft(self.streams))

    async def start_worker(self, folder):
        if not (folder / "tls").exists():
            shutil.copytree(self.tls, folder / "tls")
        command = ["-m", "tether", "worker", self.scheduler.address, "--data", str(folder), "--name", "far", "--port", "0"]
        process = await asyncio.create_subprocess_exec(sys.executable, *command)
        await self.until(lambda: any(str(worker.name) == "far" for worker in self.scheduler.workers.values()))
        return process

    async def until(self, condition):
        deadline = time.monotonic() + PROMPT
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not true after {PROMPT} s"
            await asyncio.sleep(0.01)
        return found

    def entry(self, model):
        return self.plugin._state.table.models[model.name].versions[model.version]

    async def loaded(self, model):
        self.plugin._handle(ModelWanted(model))
        entry = await self.until(lambda: (found := self.entry(model)).state in {"ready", "failed"} and found)
        assert entry.state == "ready", entry.reason
        return entry.routes[0].endpoint


@pytest.fixture
async def lab(origin, tmp_path):
    (tmp_path / "lab" / "tls").mkdir()
    with dask.config.set(HOUSEKEEPING):
        security = dask_security(ensure_tls(tmp_path / "lab" / "tls", "manager"))
        options = {"host": "127.0.0.1", "port": 0, "protocol": "tls", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
        async with Scheduler(security=security, **options) as scheduler:
            plugin = OrchestratorPlugin()
            await plugin.start(scheduler)
            scheduler.add_plugin(plugin)
            started = Lab(scheduler, plugin, Gated(origin, tmp_path / "publishing"), tmp_path / "lab" / "tls", origin)
            yield started
            await started.kill_manager()


async def answer(endpoint):
    """What the model says to the first unit vector: the position of its 1."""
    row = np.zeros((1, WIDTH), np.float32)
    row[0, 0] = 1
    body = json.dumps({"inputs": [{"name": "x0", "shape": [1, WIDTH], "datatype": "FP32", "data": row.ravel().tolist()}]}).encode()
    transport, done = UnixTransport(endpoint, None), asyncio.get_running_loop().create_future()
    transport.send(Hop(body, 0, PROMPT), done.set_result)
    reply = await asyncio.wait_for(done, PROMPT)
    transport.close()
    assert reply.status == 200, reply.body
    return int(np.argmax(json.loads(reply.body)["outputs"][0]["data"]))


async def ended(process):
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.wait(), PROMPT)


async def test_a_worker_without_the_labs_store_serves_and_killed_in_the_middle_fetches_only_the_rest(lab, origin, model, tmp_path):
    blobs = origin.manifest(model.digest).blobs()
    await lab.start_manager()
    lab.operations.most = len(blobs) // 2
    worker = await lab.start_worker(tmp_path / "far")
    lab.plugin._handle(ModelWanted(model))
    await asyncio.wait_for(lab.operations.reached.wait(), PROMPT)
    staging = tmp_path / "far" / "replicas" / "far" / "staging"
    await lab.until(lambda: sum(path.stat().st_blocks * 512 for path in staging.glob("*.pending")) > 4 * WIDTH * WIDTH)
    worker.kill()
    await worker.wait()
    await lab.until(lambda: not lab.scheduler.workers)
    before, lab.operations.most = len(lab.operations.given), None
    worker = await lab.start_worker(tmp_path / "far")
    try:
        endpoint = await lab.loaded(model)
        assert await answer(endpoint) == LAYERS % WIDTH
        assert len(lab.operations.given) - before < len(blobs)
        assert set(lab.operations.given) == set(blobs)
        assert not (tmp_path / "far" / "store").exists()
    finally:
        await ended(worker)
    with Repository.open(tmp_path / "far" / "replicas" / "far") as replica:
        assert not replica.verify().problems
        assert [record.digest for record in replica.models()[0].versions] == [model.digest]


async def test_a_manager_that_dies_while_a_worker_fetches_is_asked_again_when_it_is_back(lab, model, tmp_path):
    await lab.start_manager()
    lab.operations.most = 5
    worker = await lab.start_worker(tmp_path / "far")
    try:
        lab.plugin._handle(ModelWanted(model))
        await asyncio.wait_for(lab.operations.reached.wait(), PROMPT)
        await lab.kill_manager()
        lab.operations.most = None
        await lab.start_manager()
        assert await answer(await lab.loaded(model)) == LAYERS % WIDTH
    finally:
        await ended(worker)


# --- the same without a cluster


class Link:
    """The manager's operations, called directly."""

    def __init__(self, operations):
        self.operations, self.away = operations, False

    async def ask(self, operation, **arguments):
        if self.away:
            raise ServiceUnavailableError("the manager does not answer")
        return await getattr(self.operations, operation)(**arguments)

    async def close(self):
        pass


@pytest.fixture
async def link(origin, tmp_path):
    return Link(Gated(origin, tmp_path / "publishing"))


@pytest.fixture
def files(link, tmp_path):
    found = ModelFiles(tmp_path / "nowhere", tmp_path / "replica", ManagerBlobs(link.ask, link.close), 10**9, QUICK)
    yield found
    found.close()


async def in_thread(work, *arguments):
    return await asyncio.to_thread(work, *arguments)


async def test_what_was_fetched_loads_again_without_the_manager(files, link, model):
    (await in_thread(files.fetch, model)).pin.release()
    link.away = True
    source = await in_thread(files.fetch, model)
    assert source.path.name == "net.onnx"
    loaded = await in_thread(load_pinned, 1, source)
    assert loaded.run({"x0": np.ones((1, WIDTH), np.float32)})
    loaded.close()


async def test_a_manager_that_stays_away_is_a_clear_error_in_time(files, link, origin, model):
    link.operations.most = 3
    calls = asyncio.create_task(in_thread(files.fetch, model))
    await asyncio.wait_for(link.operations.reached.wait(), PROMPT)
    link.away = True
    begun = time.monotonic()
    with pytest.raises(ServiceUnavailableError, match="manager did not give it within"):
        await calls
    assert time.monotonic() - begun < 20 * QUICK.give_up
    link.away, link.operations.most = False, None
    given = len(link.operations.given)
    (await in_thread(files.fetch, model)).pin.release()
    assert sorted(link.operations.given) == sorted(origin.manifest(model.digest).blobs())
    assert given == 3


async def test_code_is_loaded_only_while_its_publisher_is_trusted(files, link, origin, tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.py").write_text("class Net:\n    def predict(self, x):\n        return x\n")
    info = ModelInfo("custom", "custom", (), (), batched=False, pure=False, code=True)
    model, _ = publish(origin, tmp_path / "net", {}, info, "", by=STRANGER)
    with pytest.raises(UntrustedCodeError, match=STRANGER.public):
        await in_thread(files.fetch, model)
    origin.trust(STRANGER.public, ["code"])
    (await in_thread(files.fetch, model)).pin.release()
    link.away = True
    with pytest.raises(ServiceUnavailableError):
        await in_thread(files.fetch, model)


async def test_a_version_that_nobody_has_is_a_clear_error(files):
    with pytest.raises(ChunkMissingError, match="publish it again"):
        await in_thread(files.fetch, ModelVersion("net", 2, "0" * 64))


async def test_many_loads_of_one_version_fetch_it_once(files, link, model, origin):
    with ThreadPoolExecutor(4) as threads:
        loop = asyncio.get_running_loop()
        sources = await asyncio.gather(*(loop.run_in_executor(threads, files.fetch, model) for _ in range(4)))
    for source in sources:
        source.pin.release()
    assert sorted(link.operations.given) == sorted(origin.manifest(model.digest).blobs())


async def test_the_labs_own_store_is_used_where_it_is_and_what_is_damaged_there_comes_from_the_manager(link, origin, model, tmp_path):
    files = ModelFiles(origin.root, tmp_path / "replica", ManagerBlobs(link.ask, link.close), 10**9, QUICK)
    source = await in_thread(files.fetch, model)
    assert source.path == origin.root / "cache" / model.digest / "net.onnx"
    source.pin.release()
    assert not link.operations.given
    origin.discard(model.digest)
    blobs = origin.manifest(model.digest).blobs()
    whole = {blob: origin.read_blob(blob) for blob in blobs}
    pack = next((origin.root / "packs").glob("*.pack"))
    location = origin._catalog.locate(blobs[3])
    with pack.open("r+b") as file:
        file.seek(location.offset + 100)
        file.write(b"damaged")

    async def from_a_healthy_copy(digest):
        link.operations.given.append(digest)
        return whole[digest]

    link.operations.get_blob = from_a_healthy_copy
    source = await in_thread(files.fetch, model)
    assert source.path == tmp_path / "replica" / "cache" / model.digest / "net.onnx"
    assert source.path.read_bytes() == (tmp_path / "net.onnx").read_bytes()
    assert link.operations.given == [blobs[3]]
    source.pin.release()
    await in_thread(files.close)


async def test_a_loaded_model_keeps_its_files_until_it_is_closed(link, origin, model, tmp_path):
    files = ModelFiles(tmp_path / "nowhere", tmp_path / "replica", ManagerBlobs(link.ask, link.close), 0, QUICK)
    loaded = await in_thread(load_pinned, 1, await in_thread(files.fetch, model))
    path = tmp_path / "other.onnx"
    pieces = write_model(path)
    info = origin.manifest(model.digest).info
    other, _ = publish(origin, path, {"other.onnx": pieces[:3]}, info, "other.onnx")
    (await in_thread(files.fetch, other)).pin.release()
    assert (tmp_path / "replica" / "cache" / model.digest).is_dir()
    loaded.close()
    (await in_thread(files.fetch, other)).pin.release()
    os.utime(tmp_path / "replica" / "cache" / "uses" / other.digest, None)
    third, _ = publish(origin, path, {"other.onnx": pieces[:2]}, info, "other.onnx")
    (await in_thread(files.fetch, third)).pin.release()
    assert not (tmp_path / "replica" / "cache" / model.digest).exists()
    await in_thread(files.close)


# --- code, whose process starts while its files come


CODE = ModelInfo("custom", "custom", (), (), batched=False, pure=False, code=True)


async def test_a_models_process_starts_while_its_files_come(link, origin, tmp_path, monkeypatch):
    pool = RunnerPool(patience=PROMPT)  # without spares
    monkeypatch.setattr(runner, "default_pool", lambda: pool)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.py").write_text("class Net:\n    def predict(self, x):\n        return {'y': x + 1}\n")
    (tmp_path / "net" / "weights").write_bytes(os.urandom(3 * WIDTH))
    model, _ = publish(origin, tmp_path / "net", {"weights": [Piece(index * WIDTH, WIDTH) for index in range(3)]}, CODE, "")
    may_come, give = threading.Event(), link.operations.get_blob

    async def late(digest):
        await asyncio.to_thread(may_come.wait)
        return await give(digest)

    link.operations.get_blob = late
    before = set(psutil.Process().children())
    files = ModelFiles(tmp_path / "nowhere", tmp_path / "replica", ManagerBlobs(link.ask, link.close), 10**9)
    source = await in_thread(files.fetch, model)
    loading = asyncio.create_task(in_thread(load_pinned, 1, source))
    try:
        deadline = time.monotonic() + PROMPT
        while not set(psutil.Process().children()) - before:
            assert time.monotonic() < deadline, "no process"
            await asyncio.sleep(0.01)
        assert not loading.done()
        assert not link.operations.given
    finally:
        may_come.set()
    loaded = await asyncio.wait_for(loading, PROMPT)
    assert loaded.run({"x": np.zeros(2, np.int64)})["y"].tolist() == [1, 1]
    loaded.close()
    await in_thread(files.close)


async def test_files_of_code_that_do_not_come_are_a_clear_error_and_are_not_kept(files, link, origin, tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.py").write_text("class Net:\n    def predict(self, x):\n        return x\n")
    model, _ = publish(origin, tmp_path / "net", {}, CODE, "")
    source = await in_thread(files.fetch, model)
    released, release = [], source.pin.release
    source = dataclasses.replace(source, pin=SimpleNamespace(release=lambda: (release(), released.append(True))))
    link.away = True
    with pytest.raises(ServiceUnavailableError, match="manager did not give it within"):
        await in_thread(load_pinned, 1, source)
    assert released


@needs("tensorflow")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
async def test_a_saved_model_answers_as_it_did_where_it_was_published(files, origin, tmp_path):
    import tensorflow as tf

    module = tf.Module()
    module.held = [tf.Variable(np.eye(512, dtype=np.float32) * layer) for layer in range(1, 5)]

    def serve(x):
        for weight in module.held:
            x = x @ weight
        return {"y": x}

    module.serve = tf.function(serve, input_signature=[tf.TensorSpec([None, 512], tf.float32, name="x")], autograph=False)
    tf.saved_model.save(module, str(tmp_path / "net"), signatures={"serving_default": module.serve})
    pieces = {name: [Piece(*each) for each in found] for name, found in boundaries(tmp_path / "net", "savedmodel").items()}
    model, _ = publish(origin, tmp_path / "net", pieces, inspect(tmp_path / "net"), "")
    source = await in_thread(files.fetch, model)
    assert not source.path.exists()
    loaded = await in_thread(load_pinned, 1, source)
    try:
        assert loaded.run({"x": np.ones((1, 512), np.float32)})["y"].tolist() == [[24.0] * 512]
    finally:
        loaded.close()


def test_the_folder_of_replicas_lies_in_the_data_folder(tmp_path):
    assert DataFolder(tmp_path).replicas == tmp_path / "replicas"
