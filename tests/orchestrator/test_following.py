"""Who follows another process goes on, or ends for all to see: in-process Dask servers under mutual TLS."""

import asyncio
import time
from pathlib import Path

import dask.config
import msgspec
import pytest
from distributed import Scheduler
from distributed.core import CommClosedError, Server, Status, rpc

from tether.client.cluster import ManagerClient, OrchestratorClient
from tether.config import HOUSEKEEPING
from tether.errors import StoreError, UntrustedCodeError
from tether.events import CatalogChanged, CatalogModel, LentWorker, ModelWanted, WorkerJoined
from tether.manager.cluster_server import ClusterServer
from tether.manager.clustered import until
from tether.manager.operations import Operations
from tether.orchestrator.plugin import OrchestratorPlugin
from tether.routing.table import Table
from tether.security.comms import dask_security
from tether.security.identity import Identity
from tether.security.tls import ensure_tls
from tether.store import Repository
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId

LAB = Identity(bytes(range(32)))
PROMPT = 20.0


@pytest.fixture
def tls(tmp_path):
    (tmp_path / "tls").mkdir()
    with dask.config.set(HOUSEKEEPING):
        yield ensure_tls(tmp_path / "tls", "gateway")


async def eventually(condition):
    deadline = time.monotonic() + PROMPT
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not true after {PROMPT} s"
        await asyncio.sleep(0.01)
    return found


async def listening(server, tls):
    await server.listen("tls://127.0.0.1:0", **dask_security(tls).get_listen_args("worker"))
    return server


@pytest.fixture
async def orchestrator(tls):
    """A scheduler with the plugin, and the plugin."""
    security = dask_security(tls)
    async with Scheduler(
        host="127.0.0.1", port=0, protocol="tls", security=security, dashboard=False, dashboard_address="127.0.0.1:0"
    ) as scheduler:
        plugin = OrchestratorPlugin()
        await plugin.start(scheduler)
        scheduler.add_plugin(plugin)
        yield scheduler, plugin


async def test_a_manager_whose_catalog_cannot_be_read_ends_instead_of_staying_detached(orchestrator, tls, tmp_path):
    scheduler, plugin = orchestrator
    repository = Repository.open(tmp_path / "store", own=LAB.public)
    operations = Operations(repository, LAB, tmp_path / "publishing")
    manager = await listening(ClusterServer(operations, scheduler.address, dask_security(tls)), tls)
    following = asyncio.create_task(manager.follow())
    await eventually(lambda: plugin._state.table.manager == manager.address)
    repository.close()
    with pytest.raises(StoreError):
        await asyncio.wait_for(until(asyncio.Event().wait(), following), PROMPT)
    await manager.close()
    operations.close()
    await eventually(lambda: plugin._state.table.manager is None)


SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
DIGITS = ModelVersion("digits", 1, Digest(f"{1:064x}"))


@pytest.mark.parametrize(("ends", "state", "reason"), [("raises", "failed", "internal: "), ("breaks off", "unloaded", "")])
async def test_a_load_that_ends_oddly_is_tried_again_without_another_event(orchestrator, tls, monkeypatch, ends, state, reason):
    monkeypatch.setattr("tether.orchestrator.plugin._TICK", 0.05)
    monkeypatch.setattr("tether.orchestrator.registry.RETRY_AFTER", 0.2)
    ways = iter([ends, "answers"])

    async def load(comm, model):
        assert msgspec.msgpack.decode(model, type=ModelVersion) == DIGITS
        match next(ways):
            case "raises":
                raise RuntimeError("odd")
            case "breaks off":
                comm.abort()
                return Status.dont_reply
            case _:
                return {"endpoint": "/s/1"}

    _, plugin = orchestrator
    worker = await listening(Server({"tether_load": load}), tls)
    catalog = {"digits": CatalogModel("digits", 1, {"latest": 1}, {1: (DIGITS, INFO)})}
    for event in (CatalogChanged("tls://m", 1, catalog, 1), WorkerJoined(WorkerId("w"), worker.address, 7, 0), ModelWanted(DIGITS)):
        plugin._handle(event)
    await eventually(lambda: plugin._state.table.resolve("digits").state == state)
    assert plugin._state.table.resolve("digits").reason.startswith(reason)
    await eventually(lambda: plugin._state.table.resolve("digits").state == "ready")
    await eventually(lambda: not plugin._ticking)
    await worker.close()


class Lines:
    """Labs that lend their workers; what they are asked for, in order."""

    def __init__(self, **refusals):
        self.asked, self.refusals = [], refusals

    async def load(self, worker, number, model):
        self.asked.append(("load", worker, number, model))
        if worker in self.refusals:
            raise self.refusals[worker]
        return Path(f"/s/{worker}-{number}")

    async def unload(self, worker, number, model):
        self.asked.append(("unload", worker, number, model))


@pytest.fixture
async def borrowing(orchestrator, tls, tmp_path, monkeypatch):
    """A manager that writes and has lines to other labs: the manager, its lines, and the plugin."""
    scheduler, plugin = orchestrator
    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        operations = Operations(repository, LAB, tmp_path / "publishing")
        monkeypatch.setattr(operations, "catalog", lambda: {"digits": CatalogModel("digits", 1, {"latest": 1}, {1: (DIGITS, INFO)})})
        manager = await listening(ClusterServer(operations, scheduler.address, dask_security(tls)), tls)
        lines = Lines(refuses=UntrustedCodeError("not this publisher's code"))
        manager.offer_borrowing(lines)
        connect, manager.comms = manager._connect, []
        manager._connect = lambda address: remembered(connect(address), manager.comms)
        manager.following = asyncio.create_task(manager.follow())
        await eventually(lambda: plugin._state.table.manager == manager.address)
        yield manager, lines, plugin
        manager.following.cancel()
        await asyncio.gather(manager.following, return_exceptions=True)
        await manager.close()
        operations.close()


async def remembered(connecting, comms):
    comms.append(await connecting)
    return comms[-1]


def lent(name, number=1, slots=4):
    return LentWorker(WorkerId(name), "ab" * 32, number, 0, slots)


async def test_a_lent_worker_is_loaded_and_unloaded_through_the_manager_that_has_the_line_to_it(borrowing):
    manager, lines, plugin = borrowing
    manager.tell_lent((lent("b"),))
    await eventually(lambda: "b" in plugin._state.table.workers)
    plugin._handle(ModelWanted(DIGITS))
    (route,) = await eventually(lambda: plugin._state.table.resolve("digits").routes)
    assert (route.worker, route.endpoint, route.slots) == ("b", "/s/b-1", 4)
    manager.tell_lent((lent("b", number=2),))
    await eventually(lambda: [each.endpoint for each in plugin._state.table.resolve("digits").routes] == ["/s/b-2"])
    table = plugin._state.table
    plugin._handle(CatalogChanged(table.manager, 99, {}, plugin._told[2], plugin._told[1]))
    await eventually(lambda: len(lines.asked) == 3)
    assert [(verb, number) for verb, _, number, _ in lines.asked] == [("load", 1), ("load", 2), ("unload", 2)]


async def test_why_a_lent_worker_does_not_load_a_version_is_told(borrowing):
    manager, _, plugin = borrowing
    manager.tell_lent((lent("refuses"),))
    await eventually(lambda: plugin._state.table.workers)
    plugin._handle(ModelWanted(DIGITS))
    await eventually(lambda: plugin._state.table.resolve("digits").state == "failed")
    assert plugin._state.table.resolve("digits").reason == "untrusted_code: not this publisher's code"


async def test_lent_workers_go_with_the_managers_connection_and_come_back_with_it(borrowing):
    manager, _, plugin = borrowing
    manager.tell_lent((lent("b"), lent("c")))
    await eventually(lambda: len(plugin._state.table.workers) == 2)
    manager.tell_lent((lent("c"),))
    await eventually(lambda: list(plugin._state.table.workers) == ["c"])
    connection, sizes = plugin._told[0], []
    plugin._notify = lambda: note(sizes, plugin)
    manager.comms[-1].abort()
    await eventually(lambda: plugin._told[0] != connection and list(plugin._state.table.workers) == ["c"])
    assert 0 in sizes
    manager.following.cancel()
    await eventually(lambda: plugin._state.table.workers == {})


async def note(sizes, plugin):
    sizes.append(len(plugin._state.table.workers))


async def test_a_gateway_goes_on_following_after_a_table_that_it_cannot_read(tls):
    sent = iter([b"\xc1", msgspec.msgpack.encode(Table(3))])

    async def watch(comm, **_):
        await comm.write({"table": next(sent)})
        try:
            await comm.read()
        except CommClosedError:
            return Status.dont_reply

    server, tables = await listening(Server({"tether_watch": watch}), tls), []
    client = OrchestratorClient(server.address, tls, lambda table, _: tables.append(table), list)
    await client.start(PROMPT)
    assert tables == [Table(3)]
    await client.close()
    await server.close()


async def test_two_callers_at_a_change_of_address_share_one_new_connection_and_the_old_one_is_closed(tls, monkeypatch):
    async def models():
        return {"answer": [], "change": 1}

    async def reflects(_count):
        pass

    servers = [await listening(Server({"tether_models": models}), tls) for _ in range(2)]
    made, addresses = [], [servers[0].address]
    monkeypatch.setattr("tether.client.cluster.rpc", lambda *args, **options: made.append(rpc(*args, **options)) or made[-1])
    client = ManagerClient(lambda: addresses[-1], reflects, tls)
    await client.models()
    addresses.append(servers[1].address)
    assert await asyncio.gather(client.models(), client.models()) == [[], []]
    assert [each.status for each in made] == [Status.closed, Status.running]
    await client.close()
    assert made[-1].status == Status.closed
    for server in servers:
        await server.close()


class Gateway:
    """As one follows the orchestrator: what it was told, and by how much of the table."""

    def __init__(self, orchestrator, tls):
        self.tables, self.changes = [], []
        self.client = OrchestratorClient(orchestrator.address, tls, self.take, list)

    def take(self, table, change):
        self.tables.append(table)
        self.changes.append(change)


async def test_gateways_are_sent_the_table_once_and_then_what_changes_a_frozen_one_too(orchestrator, tls, monkeypatch):
    scheduler, plugin = orchestrator
    plugin._handle(CatalogChanged("tls://m", 1, {}, 1))
    gateway, frozen = Gateway(scheduler, tls), Gateway(scheduler, tls)
    for each in (gateway, frozen):
        await each.client.start(PROMPT)
    thawed, take = asyncio.Event(), frozen.client._take

    async def when_thawed(comm, table):
        await thawed.wait()
        return await take(comm, table)

    monkeypatch.setattr(frozen.client, "_take", when_thawed)
    plugin._handle(WorkerJoined(WorkerId("w0"), "tls://w0", 1, 0))  # the one message that may be on its way to the frozen one
    for number in range(1, 40):
        plugin._handle(WorkerJoined(WorkerId(f"w{number}"), f"tls://w{number}", 1, 0))
        await eventually(lambda: gateway.tables[-1] == plugin._state.table)
    thawed.set()
    await eventually(lambda: frozen.tables[-1] == plugin._state.table)
    for each in (gateway, frozen):
        assert each.changes[0] is None
        assert None not in each.changes[1:]
        assert [table.seq for table in each.tables] == list(range(each.tables[0].seq, plugin._state.table.seq + 1))
        await each.client.close()


async def test_a_gateway_that_missed_a_change_gets_the_whole_table_again(orchestrator, tls):
    scheduler, plugin = orchestrator
    plugin._handle(CatalogChanged("tls://m", 1, {}, 1))
    gateway = Gateway(scheduler, tls)
    await gateway.client.start(PROMPT)
    plugin._news._changes.append(b"")  # numbers and changes do not fit any more
    plugin._news._changes.clear()
    plugin._handle(WorkerJoined(WorkerId("w1"), "tls://w1", 1, 0))
    plugin._handle(WorkerJoined(WorkerId("w2"), "tls://w2", 1, 0))
    await eventually(lambda: gateway.tables[-1] == plugin._state.table)
    await gateway.client.close()
