"""One lab on the swarm: its key announced, its peers' calls answered, one connection to each of them, and back soon after a sleep."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self, assert_never

import psutil
import structlog

from tether.errors import (
    DeadlineExceededError,
    EngineClosedError,
    ManagerLeavingError,
    PeerLeavingError,
    PeerNotFoundError,
    PeerUnreachableError,
    ServiceUnavailableError,
    StreamLostError,
    TetherError,
)
from tether.security.addresses import public_key
from tether.swarm.blobs.blobs import PeerBlobs, Shelf
from tether.swarm.engine.engine import Engine, EngineSettings, NodeStatus
from tether.swarm.engine.secure import SecureStream
from tether.swarm.engine.transport import network_interfaces
from tether.swarm.node.connections import Connections, OnHave
from tether.swarm.node.held import Connection
from tether.swarm.node.standing import Admits, ConnectionLimits, OwnSide, Standing
from tether.swarm.node.waking import Deed, Look, Waking
from tether.swarm.node.weight import Scales, Weight
from tether.swarm.relaying.relay import RelayStatus
from tether.swarm.rpc.rpc import Incoming, Outgoing, RpcConnection, Service
from tether.swarm.wire.bandwidth import TokenBucket
from tether.types import Digest

__all__ = ["PREFIX", "Connection", "ConnectionLimits", "Node", "NodeSettings", "Standing"]

log = structlog.get_logger("tether.swarm")
PREFIX = "tether/1/"
"""Before the name of each method that a lab has: who asks leaves it out, `Service` knows the methods with it."""
_READING = frozenset({"envelope", "events", "feed", "have", "manifest", "models", "ping"})
"""Methods that change nothing. An inference may: whoever knows whether its model is pure makes it again."""
_AGAIN = 0.2
"""Seconds between tries to reach a peer that is about to be back."""
_SOMEWHERE = ("192.0.2.1", 9)
"""Of no machine (RFC 5737): no packet goes there, the system only says from which address it would leave."""


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """How a lab takes part."""

    engine: EngineSettings = field(default_factory=EngineSettings)
    uplink: TokenBucket | None = None
    """The cap for all blobs that go out; None: none."""
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    interval: float = 1.0
    """Seconds between looks at the clock, the network and idle connections: of the five in which one is to be back after a sleep."""
    max_weight_nbytes: int = 1 << 30
    """Of memory that the process has for itself. The engine levels out at 145 to 270 MB, a busy store needs some hundreds more."""


class _Asking(NamedTuple):
    """A call of a peer, however often it has to be made."""

    peer: str
    method: str
    timeout: float | None
    end: float | None
    """On the loop's clock, as `again_until`."""
    again_until: float


class Node:
    """`start` makes it. Belongs to the main thread's loop, as the engine does; `weight` and `cut` too."""

    def __init__(self, engine: Engine, own: OwnSide, settings: NodeSettings) -> None:
        """Of an engine that does not listen yet."""
        self.key = own.key
        """This lab's public key, hex."""
        self._engine, self._settings = engine, settings
        self._connections = Connections(own, self._connect, settings.limits, settings.uplink)
        self._loop = asyncio.get_running_loop()
        self._waking = Waking(engine.limits.idle - engine.limits.keepalive, settings.interval)
        self._waking.look(_look())
        self._scales = Scales(settings.max_weight_nbytes)
        self.on_back: list[Callable[[], None]] = []
        """Told when the lab can be found again after a sleep, a change of network, or a time without one. Streams may have been cut."""
        self._listening = self._loop.create_task(self._listen(), name="swarm-listen")
        self._watching = self._loop.create_task(self._watch(), name="swarm-watch")

    @classmethod
    async def start(cls, seed: bytes, service: Service, shelf: Shelf | None, admits: Admits, settings: NodeSettings | None = None) -> Self:
        """Be on the swarm under the key of `seed`; `ready` waits until others can find it. Works without a network, and waits for one.

        Raises: as `Engine.start`.
        """
        settings = settings or NodeSettings()
        engine = await Engine.start(seed, settings.engine)
        return cls(engine, OwnSide(engine.public_key.hex(), service, shelf, admits), settings)

    @property
    def engine(self) -> Engine:
        """What feeds are served and followed by."""
        return self._engine

    async def ready(self) -> None:
        """Wait until neighbours were looked for and told where it is; without a network, until that is clear. Raises: EngineError."""
        await asyncio.wait([self._listening])
        if self._listening.cancelled():
            raise EngineClosedError("this lab left the swarm while it was awaited: start it again")
        self._listening.result()
        await self._engine.ready()

    async def status(self) -> NodeStatus:
        """How the network sees it now."""
        return await self._engine.status()

    # --- peers

    async def request(
        self,
        peer: str,
        method: str,
        value: bytes = b"",
        timeout: float | None = None,  # noqa: ASYNC109 (it also goes to the peer)
        *,
        patient: bool = True,
    ) -> bytes:
        """What the peer's method answers, over the one connection to it, which is made if there is none; `timeout` for both.

        A peer that was here until a moment ago is waited for: its process may be started again. What was lost on the way is asked again
        where that is safe: a peer that was about to end did nothing, and what only reads may be heard twice. `patient`: False where
        others can be asked in place of a peer that is about to end.

        Raises: as `RpcConnection.request`; StreamLostError: the connection was lost, and only the caller knows whether it may be heard
        twice; PeerLeavingError: nothing was done; PeerNotFoundError, PeerUnreachableError; BadKeyError; ForbiddenError: this lab banned it.
        """
        asking = self._asking(peer, method, timeout)
        while True:
            connection, left = await self._reached(asking)
            try:
                return await connection.request(PREFIX + method, value, left)
            except ServiceUnavailableError as error:
                self._bear(error, connection, asking, may_repeat=patient)
            await asyncio.sleep(_AGAIN)

    @contextlib.asynccontextmanager
    async def exchange(
        self,
        peer: str,
        method: str,
        value: bytes | Outgoing,
        timeout: float | None = None,  # noqa: ASYNC109 (as above)
    ) -> AsyncIterator[Incoming]:
        """As `request`, with an answer that is taken as it comes. Nothing is asked again once that has begun, or something was sent of a
        value that comes only once. Raises: as `request`, until the end of the answer.
        """
        asking, has_begun = self._asking(peer, method, timeout), False
        while not has_begun:
            connection, left = await self._reached(asking)
            try:
                async with connection.exchange(PREFIX + method, value, left) as answer:
                    has_begun = True
                    yield answer
            except ServiceUnavailableError as error:
                can_be_sent = isinstance(value, bytes) or value.can_be_sent
                self._bear(error, connection, asking, may_repeat=can_be_sent and not has_begun)
                await asyncio.sleep(_AGAIN)

    def _asking(self, peer: str, method: str, timeout: float | None) -> _Asking:
        now = self._loop.time()
        return _Asking(peer, method, timeout, None if timeout is None else now + timeout, now + self._settings.limits.returning)

    async def _reached(self, asking: _Asking) -> tuple[RpcConnection, float | None]:
        """A connection to the peer, and the seconds that are left."""
        connection = self._connections.open_rpc(asking.peer) or await self._within(asking.end, asking.peer, asking.timeout)
        return connection, None if asking.end is None else max(asking.end - self._loop.time(), 0.0)

    def _bear(self, error: ServiceUnavailableError, connection: RpcConnection, asking: _Asking, *, may_repeat: bool) -> None:
        """A call failed: return if it is to be made again. Raises: as `request`."""
        may_repeat &= self._loop.time() < asking.again_until
        if isinstance(error, ManagerLeavingError):
            self._connections.leave_to_end(connection)
            if not may_repeat:
                raise PeerLeavingError(f"peer {asking.peer} ends, and no other process of it came: try again later") from error
        elif not connection.is_closed:
            raise error  # it is the peer's answer
        elif asking.method not in _READING or not may_repeat:
            raise StreamLostError(
                f"{error}; the peer may have heard {asking.method}: make the call again if that is harmless", "ECONNRESET"
            ) from error

    async def blobs(self, peer: str) -> PeerBlobs:
        """What the peer gives, over one stream for that. Ask for it anew for each work: one that nobody uses is closed after a while.

        Raises: as `request`, connecting.
        """
        return (await self._connections.blobs(public_key(peer))).source()

    @property
    def on_have(self) -> list[OnHave]:
        """Told of blobs that come to peers, of versions whose bitmap they were asked for."""
        return self._connections.on_have

    def have(self, digest: Digest, places: tuple[int, ...]) -> None:
        """Blobs of a version are here since, by their places in its manifest: peers that follow it are told."""
        self._connections.have(digest, places)

    def connections(self) -> list[Connection]:
        """Those that are open, or about to say what they are for."""
        return self._connections.listed()

    @property
    def relaying(self) -> RelayStatus | None:
        """What is relayed for peers; None: this lab relays nothing."""
        return self._connections.relaying

    async def relay_through(self, relays: Sequence[str]) -> None:
        """Labs (keys, hex) of which each stream from now on may use one where no direct way is found. Raises: BadKeyError."""
        await self._engine.relay_through([bytes.fromhex(public_key(relay)) for relay in relays])

    async def probe(self) -> bool:
        """Find out whether packets come in unasked, as at a public address, which a relay needs; some round trips."""
        return await self._engine.probe()

    def welcome(self, peer: str) -> None:
        """The key was admitted: what it has open may do more. To be called before the peer is told so."""
        self._connections.welcome(peer)

    def cut(self, peer: str) -> None:
        """Everything with this peer, at once: to be called when it may do less than before, after that holds."""
        self._connections.cut(peer)

    # --- the DHT

    async def announce(self, topic: bytes) -> int:
        """Say under a topic (32 bytes) that this lab is to be found here; how many nodes keep it, for twenty minutes."""
        return await self._engine.announce(topic)

    async def unannounce(self, topic: bytes) -> None:
        """Take it back."""
        await self._engine.unannounce(topic)

    async def lookup(self, topic: bytes) -> list[str]:
        """Keys of those who announced it; anyone may announce any."""
        return [found.public_key.hex() for found in await self._engine.lookup(topic)]

    async def put_record(self, value: bytes, seq: int) -> int:
        """Store a record under this lab's key; how many nodes were asked to. Raises: PayloadTooLargeError."""
        return await self._engine.mutable_put(value, seq)

    async def get_record(self, peer: str) -> tuple[bytes, int] | None:
        """Value and number of a key's record; None: nobody has one. Raises: BadKeyError."""
        found = await self._engine.mutable_get(bytes.fromhex(public_key(peer)))
        return None if found is None else (found.value, found.seq)

    # --- the process

    def weight(self) -> Weight:
        """How heavy the process is, when JavaScript has given back what it can; to be asked each minute or so."""
        self._engine.collect()
        memory = psutil.Process().memory_info()
        return self._scales.weigh(memory.rss - getattr(memory, "shared", 0))

    async def retire(self, grace: float) -> None:
        """Before `aclose`: take no more connections, and wait until no call of a peer is worked on; `grace` seconds at most.

        New calls on open connections are still made: it is for who answers them to say ManagerLeavingError.
        """
        with contextlib.suppress(TetherError, TimeoutError):
            async with asyncio.timeout(grace):
                await self._engine.unlisten()
                while self._connections.is_working:  # noqa: ASYNC110 (calls end one by one)
                    await asyncio.sleep(_AGAIN / 10)

    async def aclose(self) -> None:
        """Leave: connections are closed in order, its key is announced no more. A second call does nothing.

        Topics that were not taken back, and the record, stay with the nodes that keep them, until these forget them.
        """
        for task in (self._watching, self._listening):
            task.cancel()
        await asyncio.gather(self._watching, self._listening, return_exceptions=True)
        await self._connections.aclose()
        await self._engine.close()

    # --- within

    async def _listen(self) -> None:
        try:
            await self._engine.listen(self._connections.arrived, self._refuses)
        except TetherError as error:
            log.warning("this lab can't be found by others: its server did not start", code=error.code, error=str(error))
            raise

    async def _connect(self, peer: str) -> SecureStream:
        return await self._engine.connect(bytes.fromhex(peer))

    def _refuses(self, key: bytes, _address: tuple[str, int]) -> bool:
        return self._connections.refuses(key.hex())

    async def _within(self, end: float | None, peer: str, seconds: float | None) -> RpcConnection:
        try:
            async with asyncio.timeout_at(end):
                return await self._open(peer)
        except TimeoutError as error:
            raise DeadlineExceededError(f"no connection to peer {peer} came about within {seconds} s") from error

    async def _open(self, peer: str) -> RpcConnection:
        """Again while one who was here may be about to come back, and where one was lost between its making and this turn."""
        key = peer if self._connections.knows(peer) else public_key(peer)
        while True:
            try:
                connection = await self._connections.rpc(key)
                return await self._connections.rpc(key) if connection.is_closed else connection
            except (PeerNotFoundError, PeerUnreachableError) as error:
                if self._loop.time() >= self._connections.expected_until(key) or error.args[1:] == ("ECANCELED",):
                    raise
            await asyncio.sleep(_AGAIN)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.interval)
            try:
                self._connections.sweep(self._loop.time())
                for deed in self._waking.look(_look()):
                    await self._do(deed)
            except EngineClosedError:
                return
            except TetherError as error:
                log.warning("the swarm could not be looked after", code=error.code, error=str(error))

    async def _do(self, deed: Deed) -> None:
        match deed:
            case Deed.CUT:
                log.info("this machine slept, or is in another network: its streams lead nowhere")
                self._connections.cut_all()
            case Deed.WAKE:
                await self._engine.wake()
            case Deed.ASK:
                status = await self._engine.status()
                for following in self._waking.told(_now(), is_announced=status.announced):
                    await self._do(following)
            case Deed.TELL:
                for told in self.on_back:
                    told()
            case _:
                assert_never(deed)


def _now() -> float:
    """Seconds, of a clock that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _look() -> Look:
    return Look(_now(), _outward(), frozenset(str(interface["host"]) for interface in network_interfaces()))


def _outward() -> str | None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(_SOMEWHERE)
        return str(probe.getsockname()[0])
    return None
