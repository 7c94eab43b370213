"""A lab elsewhere and the user's own manager in front of it, in one thread: a real store, real access and the real door; only the swarm
between them is streams in memory, and the gateway that runs models is the one of these tests."""

import asyncio
import json
import threading

from blake3 import blake3

from tether.errors import ForbiddenError
from tether.manager.operations import Operations
from tether.manager.peering.door import Door
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.methods import Methods
from tether.security.addresses import Address, Link
from tether.security.identity import Identity
from tether.security.scopes import Scope
from tether.store import Repository
from tether.swarm.rpc.rpc import RpcConnection
from tether.swarm.wire import local
from tether.testing.streams import stream_pair
from tether.types import Digest

LAB, USER = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
SECONDS = 20


class Blobs:
    """What the lab gives of its store; `altered` gives something else."""

    def __init__(self, far):
        self.far, self.asked, self.altered = far, [], False

    async def fetch(self, digest, nbytes):
        self.far.access.check(USER.public, "blobs", None)
        self.asked.append(digest)
        data = await asyncio.to_thread(self.far.repository.read_blob, Digest(digest))
        assert nbytes == 0
        return data[:-1] + bytes([data[-1] ^ 1]) if self.altered else data


class FarLab:
    """Runs until it is closed. `folder` is the data folder of the user; the lab's own is beside it."""

    def __init__(self, folder, gateway, key):
        self.folder, self.gateway, self.key = folder.create(), gateway, key
        self.connects = []
        self.altered_manifest = False
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.run(self._open())

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(SECONDS)

    async def _open(self):
        root = self.folder.root.parent / "far"
        self.repository = Repository.open(root / "store", own=LAB.public)
        self.operations = Operations(self.repository, LAB, root / "publishing")
        self.access = self.operations.access
        there = Gateway(self.gateway.url, self.key)
        self.methods = Methods(LAB.public, self.ask, self.repository, self.access, there)
        self.there = there
        self.source = Blobs(self)
        theirs, ours = stream_pair(USER.public, LAB.public)
        self.service = self.methods.service()
        self.prefix = "" if "ping" in self.service.handlers else "tether/1/"
        self.answering = RpcConnection(ours, LAB.public, self.service)
        self.calling = RpcConnection(theirs, USER.public)
        await self.open_door()

    async def open_door(self):
        """As a manager that starts on the user's folder."""
        self.door = Door(USER.public, {}, self, alone=True)
        self.server = await local.serve(self.folder.door, self.door.admit)

    async def close_door(self):
        """As one that ends."""
        self.server.close()
        await self.door.aclose(0.0)

    async def replace_door(self):
        """As one that ends, in whose place another one listens at once."""
        server, door = self.server, self.door
        await self.open_door()
        server.close()
        await door.aclose(0.0)

    async def begin_to_end(self):
        """As `replace_door`, by a manager that still works on calls: gives what ends when it has."""
        server, door = self.server, self.door
        await self.open_door()
        server.close()
        ending = asyncio.create_task(door.aclose(SECONDS))
        await asyncio.sleep(0)
        return ending

    async def ask(self, operation, **arguments):
        answer = await self.operations.handlers()[operation](**arguments)
        if operation in {"publish", "set_alias"}:
            self.gateway.models[arguments["name"]] = await self.operations.model(arguments["name"])
            self.methods.changed()
        if operation == "signed_manifest" and self.altered_manifest:
            answer["manifest"] = answer["manifest"][:-8] + "AAAAAAAA"
        return answer

    # --- `door.Peers`

    async def connect(self, link):
        self.connects.append(link)
        try:
            if link.secret is None:
                await self.request(LAB.public, "ping", b"", SECONDS)
                return {"publisher": LAB.public, "scopes": None}
            return json.loads(await self.request(LAB.public, "enrol", json.dumps({"secret": link.secret.text}).encode(), SECONDS))
        except ForbiddenError as error:
            raise type(error)(f"the lab does not know this one: {error}") from error

    async def request(self, peer, method, value, timeout):  # noqa: ASYNC109 (the port's)
        assert peer == LAB.public
        return await self.calling.request(self.prefix + method, value, timeout)

    def exchange(self, peer, method, value, timeout):
        assert peer == LAB.public
        return self.calling.exchange(self.prefix + method, value, timeout)

    async def blobs(self, peer):
        assert peer == LAB.public
        return self.source

    # --- what its own people do

    def respond(self, method, answer):
        """As a lab of another version."""
        self.service.respond(self.prefix + method, lambda *_: answer)

    def invite(self, *scopes, uses=1):
        """The url of an invitation."""
        secret = self.operations.admission.registry.invite([Scope.parse(scope) for scope in scopes], uses=uses)
        return Link(Address(LAB.public), secret).url

    def allow(self, *scopes):
        """What an invitation does, without one; the url."""
        self.access.allow(USER.public, [Scope.parse(scope) for scope in scopes])
        return str(Address(LAB.public))

    def publish(self, name, path, **more):
        """As its own people do it."""
        data = path.read_bytes()
        digest = blake3(data).hexdigest()
        draft = {"files": [{"path": path.name, "nbytes": len(data), "segments": [(digest, 0, len(data))]}], "entry": path.name} | more
        self.run(self.ask("put_blob", digest=digest, data=data, **({"encrypt": name} if draft.get("encrypt") else {})))
        return self.run(self.ask("publish", name=name, draft=draft))

    def close(self):
        """End it, with all that it opened."""
        self.run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(SECONDS)
        self.loop.close()

    async def _close(self):
        await self.close_door()
        await asyncio.gather(self.calling.aclose(), self.answering.aclose())
        await self.there.aclose()
        self.operations.close()
        self.repository.close()
        await self.loop.shutdown_default_executor()
