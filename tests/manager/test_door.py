"""The user's own door: a real socket before a real store, what comes in and goes out of it, and when nobody is there any more."""

import asyncio
import contextlib
import json

import msgspec
import numpy as np
import onnx
import pytest
from blake3 import blake3
from onnx import TensorProto, helper, numpy_helper

from tether.errors import (
    BadAddressError,
    ConflictError,
    DeadlineExceededError,
    MalformedRequestError,
    ManagerLeavingError,
    MissingBlobsError,
    NotFoundError,
    NotWriterError,
    PeerNotFoundError,
    ServiceUnavailableError,
    UnknownMethodError,
    UnknownModelError,
)
from tether.manager.asking import asked_alone
from tether.manager.operations import Operations
from tether.manager.peering.door import Door
from tether.security.addresses import Address, Link, Secret
from tether.security.identity import Identity
from tether.store import FILES, Repository
from tether.swarm.rpc.rpc import Incoming, Outgoing, RpcConnection
from tether.swarm.wire import local
from tether.swarm.wire.local import THIS_USER
from tether.wire.heads import joined, parted

LAB, OTHER = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
SECONDS = 20


class Elsewhere:
    """One other lab, as the door sees it: it knows one blob, echoes, and can be held up."""

    def __init__(self):
        self.links, self.calls = [], []
        self.hold, self.held, self.cancelled = asyncio.Event(), 0, 0
        self.blob = b"a blob of another lab"

    async def connect(self, link):
        if link.address.key != OTHER.public:
            raise PeerNotFoundError("nobody announces this key now", "PEER_NOT_FOUND")
        self.links.append(link)
        return {"publisher": link.address.key, "scopes": ["infer"] if link.secret else None}

    @contextlib.asynccontextmanager
    async def exchange(self, peer, method, value, timeout):  # noqa: ASYNC109 (the port's)
        self.calls.append((peer, method, timeout))
        if method == "held":
            self.held += 1
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if isinstance(value, Outgoing):
            value = b"".join([part async for piece in value.pieces() for part in piece])
        yield Incoming.whole(value)

    async def blobs(self, peer):
        assert peer == OTHER.public
        return self

    async def fetch(self, digest, nbytes):
        return self.blob if blake3(self.blob).hexdigest() == digest and nbytes == 0 else None


class Manager:
    """A store, its operations and the door, at a socket."""

    def __init__(self, folder, repository):
        self.folder, self.repository = folder, repository
        self.operations = Operations(repository, LAB, folder / "publishing")
        self.peers = Elsewhere()
        self.door = Door(LAB.public, asked_alone(self.operations), self.peers, alone=True)

    @contextlib.asynccontextmanager
    async def client(self):
        connection = RpcConnection(await local.connect(self.folder / "door"), THIS_USER)

        async def call(method, value=b"", timeout=SECONDS):  # noqa: ASYNC109 (it goes to the door)
            return await connection.request(method, value if isinstance(value, bytes) else json.dumps(value).encode(), timeout)

        call.connection = connection
        yield call
        await connection.aclose()


@pytest.fixture
async def manager(tmp_path):
    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        manager = Manager(tmp_path, repository)
        server = await local.serve(tmp_path / "door", manager.door.admit)
        yield manager
        server.close()
        await manager.door.aclose(0.0)
        manager.operations.close()


@pytest.fixture
async def call(manager):
    async with manager.client() as call:
        yield call


async def until(holds):
    async with asyncio.timeout(SECONDS):
        while not holds():  # noqa: ASYNC110 (nothing says when another side has seen something)
            await asyncio.sleep(0.005)


def write_onnx(path):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.ones((16, 4), np.float32), "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path.read_bytes()


# --- the manager's operations


async def test_a_model_is_published_listed_and_read_with_blobs_as_they_are(call, tmp_path):
    data = write_onnx(tmp_path / "model.onnx")
    digest = blake3(data).hexdigest()
    segments = [(digest, 0, len(data))]
    draft = {"files": [{"path": "model.onnx", "nbytes": len(data), "segments": segments}], "entry": "model.onnx"}
    with pytest.raises(MissingBlobsError) as raised:
        await call("own/publish", {"name": "tiny", "draft": draft})
    assert raised.value.args[1] == [digest]
    assert json.loads(await call("own/put_blob", joined({"digest": digest}, data))) == {
        "digest": digest,
        "nbytes": len(data),
    }
    published = json.loads(await call("own/publish", {"name": "tiny", "draft": draft}))
    assert (published["version"], published["info"]["inputs"][0]["shape"]) == (1, [-1, 16])
    assert [model["name"] for model in json.loads(await call("own/models"))] == ["tiny"]
    assert await call("own/get_blob", {"digest": digest}) == data
    head, part = parted(await call("own/read_zarr", {"ref": "tiny:1", "path": f"{FILES}/model.onnx/c/0", "start": 1, "nbytes": 5}))
    assert part == data[1:6]
    assert json.loads(head)["nbytes"] == len(data)
    assert json.loads(await call("own/set_alias", {"name": "tiny", "alias": "prod", "version": 1})) == {
        "alias": "prod",
        "from": None,
        "to": 1,
    }


async def test_errors_of_the_tree_come_as_they_are_and_wrong_arguments_are_said(call):
    with pytest.raises(UnknownModelError):
        await call("own/model", {"name": "nope"})
    for arguments in ({"nme": "x"}, {}, {"name": "x", "more": 1}):
        with pytest.raises(MalformedRequestError, match="model: "):
            await call("own/model", arguments)
    for value in (b"[1]", b"{", b"\xff"):
        with pytest.raises(MalformedRequestError):
            await call("own/model", value)
    with pytest.raises(UnknownMethodError):
        await call("own/become")
    for value in (b"", b"\x01", (99).to_bytes(4, "little") + b"{}"):
        with pytest.raises(MalformedRequestError):
            await call("own/put_blob", value)


async def test_a_store_that_follows_another_is_read_and_not_changed(tmp_path):
    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        with repository._catalog.writing() as db:
            footing = {"member": "00", "term": 3, "wrote": 1, "position": [3, 5], "writes": False}
            db.execute("INSERT INTO meta VALUES ('footing', ?)", (json.dumps(footing),))
        operations = Operations(repository, LAB, tmp_path / "publishing")
        asked = asked_alone(operations)
        assert await asked["models"]() == []
        with pytest.raises(NotWriterError, match="follows another manager"):
            await asked["set_alias"](name="tiny", alias="prod", version=1)
        operations.close()


# --- other labs


async def test_another_lab_is_found_enrolled_at_and_called(manager, call):
    secret = Secret.new()
    url = f"{Address(OTHER.public)}#{secret.text}"
    assert json.loads(await call("peer/connect", {"url": url})) == {"publisher": OTHER.public, "scopes": ["infer"]}
    assert manager.peers.links == [Link(Address(OTHER.public), secret)]
    head = {"peer": OTHER.public, "method": "models", "timeout": 3.5}
    assert await call("peer/call", joined(head, b"\0\1 any bytes")) == b"\0\1 any bytes"
    assert manager.peers.calls == [(OTHER.public, "models", 3.5)]
    with pytest.raises(PeerNotFoundError) as raised:
        await call("peer/connect", {"url": str(Address(LAB.public))})
    assert raised.value.args[1] == "PEER_NOT_FOUND"
    with pytest.raises(BadAddressError):
        await call("peer/connect", {"url": "tether://mistyped"})


async def test_a_request_of_gateway_size_passes_and_small_calls_pass_it(call):
    large = bytes(range(256)) * (48 << 12)
    head = {"peer": OTHER.public, "method": "infer", "timeout": None}
    order = []

    async def note(name, work):
        await work
        order.append(name)

    await asyncio.gather(note("large", call("peer/call", joined(head, large))), note("small", call("own/models")))
    assert order == ["small", "large"]


async def test_blobs_come_from_another_lab_or_are_said_to_be_gone(manager, call):
    digest = blake3(manager.peers.blob).hexdigest()
    assert await call("peer/blob", {"peer": OTHER.public, "digest": digest}) == manager.peers.blob
    with pytest.raises(NotFoundError):
        await call("peer/blob", {"peer": OTHER.public, "digest": "0" * 64})


async def test_a_call_that_is_taken_back_is_taken_back_from_the_other_lab_too(manager, call):
    held = joined({"peer": OTHER.public, "method": "held"})
    with pytest.raises(DeadlineExceededError):
        await call("peer/call", held, timeout=0.5)  # within which it has to arrive
    await until(lambda: manager.peers.cancelled == 1)
    calling = asyncio.create_task(call("peer/call", held))
    await until(lambda: manager.peers.held == 2)
    call.connection.destroy()
    with pytest.raises(ServiceUnavailableError):
        await calling
    await until(lambda: manager.peers.cancelled == 2)


# --- who is there


async def test_it_says_who_it_is(call):
    hello = json.loads(await call("door/hello"))
    assert (hello["publisher"], hello["alone"]) == (LAB.public, True)
    assert set(hello) == {"pid", "version", "publisher", "alone"}


async def test_clients_are_counted_and_their_absence_is_timed(manager):
    door, loop = manager.door, asyncio.get_running_loop()
    begun = door.idle_since
    assert begun is not None
    async with manager.client() as first:
        await first("door/hello")
        async with manager.client() as second:
            await second("door/hello")
            assert (door.clients, door.idle_since) == (2, None)
        await until(lambda: door.clients == 1)
        assert door.idle_since is None
    await until(lambda: door.clients == 0)
    assert begun < door.idle_since <= loop.time()


async def test_deserted_is_told_once_nobody_was_there_for_long_enough(manager):
    async with manager.client() as call:
        await call("door/hello")
        deserted = asyncio.create_task(manager.door.deserted(0.15))
        await asyncio.sleep(0.3)
        assert not deserted.done()
    left = asyncio.get_running_loop().time()
    await asyncio.wait_for(deserted, SECONDS)
    assert asyncio.get_running_loop().time() - left > 0.1


async def test_asked_to_leave_it_finishes_what_was_asked_and_begins_nothing_more(manager):
    async with manager.client() as working, manager.client() as asking:
        calling = asyncio.create_task(working("peer/call", joined({"peer": OTHER.public, "method": "held"}, b"kept")))
        await until(lambda: manager.peers.held)
        assert set(json.loads(await asking("door/leave"))) == {"pid"}
        await asyncio.wait_for(manager.door.deserted(3600), SECONDS)
        with pytest.raises(ManagerLeavingError):
            await asking("own/models")
        closing = asyncio.create_task(manager.door.aclose(SECONDS))
        await asyncio.sleep(0.05)
        assert not closing.done()
        manager.peers.hold.set()
        assert await calling == b"kept"
        await asyncio.wait_for(closing, SECONDS)
        assert manager.door.clients == 0
        await asyncio.wait_for(asking.connection.wait_closed(), SECONDS)


async def test_a_call_that_takes_too_long_is_cut_when_the_door_closes(manager):
    async with manager.client() as call:
        calling = asyncio.create_task(call("peer/call", joined({"peer": OTHER.public, "method": "held"})))
        await until(lambda: manager.peers.held)
        await asyncio.wait_for(manager.door.aclose(0.05), SECONDS)
        with pytest.raises(ServiceUnavailableError):
            await calling
    assert manager.peers.cancelled == 1


async def test_the_manager_of_a_lab_does_not_leave(manager):
    door = Door(LAB.public, {}, manager.peers, alone=False)
    server = await local.serve(manager.folder / "lab", door.admit)
    connection = RpcConnection(await local.connect(manager.folder / "lab"), THIS_USER)
    with pytest.raises(ConflictError, match="tether down"):
        await connection.request("door/leave")
    await connection.aclose()
    await door.aclose(0.0)
    server.close()


def test_heads_part_what_they_joined():
    assert parted(joined({"a": [1]}, memoryview(b"rest"))) == (msgspec.json.encode({"a": [1]}), b"rest")
