"""Labs in one process that pull from each other: real stores, real access, real streams of blobs; only the network is memory."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tether.errors import PeerUnreachableError
from tether.manager.peering.downloading import DownloadRules
from tether.manager.peering.feed_content import content_of
from tether.manager.peering.pulling import Pulling, PullOptions, Rim, Wish
from tether.manager.peering.shelf import RepositoryShelf
from tether.manager.publishing import Publisher
from tether.security.access import Access
from tether.security.access_file import AccessFile
from tether.security.identity import Identity
from tether.security.scopes import Scope, Scopes
from tether.store import Manifest, Repository, digest_of, encode, signed_message
from tether.swarm.blobs.blobs import BlobConnection
from tether.swarm.feeds.entries import Content
from tether.testing.streams import stream_pair
from tether.types import ModelInfo
from tether.wire.npz import to_npz

INFO = ModelInfo("onnx", "onnx", (), (), batched=False, pure=True, code=False)
MIB = 1 << 20
RULES = DownloadRules(poll=0.1, give_up=2.0, lacking=0.3)


def model_bytes(seed=1, rows=64):
    """y = x @ W; 1,600 bytes a row, random."""
    weights = np.random.default_rng(seed).standard_normal((rows, 400)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 400])],
        [numpy_helper.from_array(weights, "W")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def example(rows=64):
    return to_npz({"x": np.ones((2, rows), np.float32)})


@dataclass(eq=False)
class Lab:
    """One of them; `others` is the network."""

    folder: Path
    identity: Identity
    others: dict[str, "Lab"]
    liars: list[tuple[str, str]] = field(default_factory=list)
    connections: dict[str, BlobConnection] = field(default_factory=dict)
    unreachable: set[str] = field(default_factory=set)
    nbytes_per_second: float = float("inf")
    """Of what it sends, on each connection."""
    cuts_after: int | None = None
    """Bytes that a connection gives before it breaks."""
    shelf_of: object = None
    """Gives another shelf, for those who lie."""

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repository = Repository.open(self.folder / "store", own=self.key)
        self.access = Access(AccessFile.open(self.folder / "access.sqlite"))
        self.shelf = RepositoryShelf(self.repository, self.access)
        workspace = self.folder / "publishing"
        workspace.mkdir(exist_ok=True)
        self.publisher = Publisher(self.repository, self.identity, workspace)
        rim = Rim(self.shelf.arriving, self.announce, lambda peer, error: self.liars.append((peer, error.code)))
        self.pulling = Pulling(self.repository, self.connect, self.folder / "pulling", PullOptions(own=self.key, rules=RULES, rim=rim))
        self.others[self.key] = self
        self.givers = []

    @property
    def key(self):
        return self.identity.public

    def close(self):
        for connection in (*self.connections.values(), *self.givers):
            connection.destroy()
        self.pulling.close()
        self.shelf.close()
        self.repository.close()
        self.access.file.close()

    def allow(self, *others, scopes=("replicate",)):
        for other in others:
            self.access.allow(other.key, map(Scope.parse, scopes))

    def disallow(self, *others, scopes):
        for other in others:
            self.access.disallow(other.key, Scopes.parse(scopes))

    async def connect(self, peer):
        await asyncio.sleep(0)
        if peer in self.unreachable or peer not in self.others:
            raise PeerUnreachableError(f"{peer} is not reached", "ECONNREFUSED")
        connection = self.connections.get(peer)
        if connection is None or connection.is_closed:
            other = self.others[peer]
            near, far = stream_pair(self.key, peer)
            far.nbytes_per_second = other.nbytes_per_second
            shelf = other.shelf_of(other.shelf) if other.shelf_of else other.shelf
            other.givers.append(BlobConnection(far, shelf))
            connection = self.connections[peer] = BlobConnection(
                near, self.shelf, on_have=lambda digest, indices: self.pulling.gained(peer, digest, indices)
            )
        return connection.source()

    def announce(self, digest, indices):
        for connection in (*self.connections.values(), *self.givers):
            connection.announce(digest, indices)

    async def publish(self, name, files, **fields):
        """As a client does; gives the answer."""
        body = {"entry": next(iter(files)), "files": [], **fields}
        for path, data in files.items():
            parts = [data[start : start + (4 << 20)] for start in range(0, len(data), 4 << 20)]
            for part in parts:
                if fields.get("encrypt"):
                    self.publisher.sealing.put_blob(name, digest_of(part), part)
                else:
                    self.repository.put_blob(digest_of(part), part)
            body["files"].append({"path": path, "nbytes": len(data), "segments": [[digest_of(part), 0, len(part)] for part in parts]})
        return await self.publisher.publish(name, body)

    def give(self, name, files, info=INFO, by=None, **options):
        """Publish without looking: what a lab that was changed could publish as well."""
        arrays = tuple(self.repository.add_bytes(path, data) for path, data in sorted(files.items()))
        data = encode(Manifest(framework=info.framework, entry=next(iter(files)), info=info, arrays=arrays))
        by = by or self.identity
        return self.repository.publish(name, data, by.public, by.sign(signed_message(data)), **options)

    def wish(self, *names, digests=None):
        """All that this lab has under these names, for others to pull."""
        content = content_of(self.repository.snapshot().models, self.key)
        chosen = Content({name: content.models[name] for name in names or content.models})
        return Wish(self.key, chosen, digests)

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 (nothing says when a peer has got so far)
                await asyncio.sleep(0.001)

    async def pull(self, other, *names, peers=None, **options):
        return await self.pulling.pull(other.wish(*names), [each.key for each in peers or [other]], **options)

    def says(self):
        """What its catalog says, less what differs between labs."""
        return {
            model.name.rpartition("~")[2]: ({each.version: each.digest for each in model.versions}, model.aliases)
            for model in self.repository.models()
        }
