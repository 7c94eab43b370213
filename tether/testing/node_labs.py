"""What the cases of `nodes.py` are told with: labs that answer a few methods, give a few blobs, and know each other or not."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable

from blake3 import blake3

from tether.errors import ForbiddenError, NotFoundError, TetherError, UnknownModelError
from tether.ports import SignedManifest
from tether.security.identity import Identity
from tether.swarm.blobs.blobs import Kind
from tether.swarm.node.node import PREFIX, ConnectionLimits, Node, NodeSettings, Standing
from tether.swarm.rpc.rpc import Call, Handler, Service
from tether.types import Digest

__all__ = ["ContractLab", "MakeNode", "StartNode", "failure", "making", "until"]

_PATIENCE = 20.0
_INTERVAL = 0.1
"""Seconds between looks at what is idle or unknown: a case waits for some of them."""


class ContractLab:
    """A node, whom it knows, what it answers and gives. Everybody is known unless `standings` says otherwise."""

    node: Node
    """Since it was made."""

    def __init__(self, name: str, limits: ConnectionLimits | None = None) -> None:
        """`name`: of this lab in all cases, since its key is made of it."""
        self.seed = hashlib.sha256(name.encode()).digest()
        self.identity = Identity(self.seed)
        self.key = self.identity.public
        self.settings = NodeSettings(limits=limits or ConnectionLimits(), interval=_INTERVAL)
        self.standings: dict[str, Standing] = {}
        self.asked: list[str] = []
        """Methods that somebody wanted to call."""
        self.started, self.ended, self.hold = asyncio.Event(), asyncio.Event(), asyncio.Event()
        """`held` was begun, was over, may be answered."""
        self.shelf = _Shelf()
        self.service = Service(self._authorise)
        answers: dict[str, Handler] = {
            "echo": _echo,
            "ping": _echo,
            "refuse": _refuse,
            "break": _break,
            "held": self._held,
            "enrol": self._enrol,
        }
        for method, handler in answers.items():
            self.service.respond(PREFIX + method, handler)

    def standing(self, peer: str) -> Standing:
        """What a key is here."""
        return self.standings.get(peer, Standing.KNOWN)

    def _authorise(self, peer: str, method: str) -> None:
        self.asked.append(method.removeprefix(PREFIX))
        if self.standing(peer) is not Standing.KNOWN and method != PREFIX + "enrol":
            raise ForbiddenError("this key is not enrolled: ask for an invitation")

    def _enrol(self, call: Call, value: bytes) -> bytes:
        if value == b"the secret":
            self.standings[call.peer] = Standing.KNOWN
            self.node.welcome(call.peer)
        return value

    async def _held(self, _: Call, value: bytes) -> bytes:
        self.started.set()
        try:
            await self.hold.wait()
        finally:
            self.ended.set()
        return value


class _Shelf:
    """`swarm.blobs.Shelf` over dictionaries."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, SignedManifest] = {}
        self.bitmaps: dict[str, bytes] = {}
        self.secret: set[str] = set()
        """What nobody may have."""

    def put(self, data: bytes) -> Digest:
        """A blob; under which digest."""
        digest = Digest(blake3(data).hexdigest())
        self.blobs[digest] = data
        return digest

    async def authorise(self, peer: str, kind: Kind, digest: Digest) -> None:
        del peer, kind
        if digest in self.secret:
            raise NotFoundError(f"{digest} is not here, or not for you: ask for access")

    async def blob(self, digest: Digest) -> bytes | None:
        return self.blobs.get(digest)

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        return self.manifests.get(digest)

    async def bitmap(self, digest: Digest) -> bytes | None:
        return self.bitmaps.get(digest)


def _echo(_: Call, value: bytes) -> bytes:
    return value


def _refuse(_: Call, value: bytes) -> bytes:
    raise UnknownModelError("there is no such model", value.decode())


def _break(_: Call, value: bytes) -> bytes:
    raise ZeroDivisionError(value)


MakeNode = Callable[..., Awaitable[ContractLab]]
"""`await make(name)`, or `make(name, limits)`: a lab whose node is ready. Made again under a name it has the same key."""
StartNode = Callable[[ContractLab], Awaitable[Node]]
"""Start a node with seed, service, shelf, standing and settings of the lab, the engine's settings excepted."""


@contextlib.asynccontextmanager
async def making(start: StartNode) -> AsyncIterator[MakeNode]:
    """What a case makes its labs with; all of them are closed at its end."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(name: str, limits: ConnectionLimits | None = None) -> ContractLab:
            lab = ContractLab(name, limits)
            lab.node = await start(lab)
            stack.push_async_callback(lab.node.aclose)
            await lab.node.ready()
            return lab

        yield make


async def until(condition: Callable[[], object]) -> None:
    """Wait for what nothing tells of. Raises: TimeoutError."""
    async with asyncio.timeout(_PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def failure(work: Awaitable[object]) -> TetherError:
    """The error that it ends with. Raises: AssertionError: it ends without."""
    try:
        found = await work
    except TetherError as error:
        return error
    raise AssertionError(f"it came about, with {found!r:.80}")
