"""In which order a manager ends: calls that are under way are still answered for when the writer's lease goes back."""

import asyncio

from tether.config import DataFolder
from tether.manager.entrance import Standing, entrance
from tether.manager.operations import Operations
from tether.manager.settings import ManagerSettings
from tether.security.identity import Identity
from tether.store import Repository
from tether.swarm.rpc.rpc import RpcConnection
from tether.swarm.wire import local
from tether.swarm.wire.local import THIS_USER

LAB = Identity(bytes([1]) * 32)
SECONDS = 20


async def test_the_lease_goes_back_when_what_was_asked_is_answered(tmp_path):
    data, happened = DataFolder(tmp_path / "data").create(), []
    asked, go = asyncio.Event(), asyncio.Event()

    async def models():
        asked.set()
        await go.wait()
        happened.append("answered")
        return []

    async def hand_over():
        happened.append("handed over")

    with Repository.open(data.store, own=LAB.public) as repository:
        operations = Operations(repository, LAB, tmp_path / "publishing")
        settings = ManagerSettings(data, "tls://127.0.0.1:1", swarm=False)
        async with entrance(settings, operations, {"models": models}, Standing(hand_over=hand_over)):
            connection = RpcConnection(await local.connect(data.door), THIS_USER)
            calling = asyncio.create_task(connection.request("own/models", b"{}", SECONDS))
            await asked.wait()
            asyncio.get_running_loop().call_later(0.1, go.set)
        assert await calling == b"[]"
        assert happened == ["answered", "handed over"]
        await connection.aclose()
        operations.close()
