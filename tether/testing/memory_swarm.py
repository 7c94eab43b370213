"""A swarm in one process: the real `Node` over a network that is a few dictionaries, with switches for what networks do.

Nodes that one `MemorySwarm` started find each other; `swarm.line(one.key, two.key).latency = 0.02` slows two of them down,
`swarm.separate` parts them, and `node.go_away()` takes one off the network without a word.
"""

# ruff: noqa: SLF001 (all nodes of a swarm are one thing)

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Self, cast

from tether.errors import EngineClosedError, EngineError, PeerNotFoundError, PeerUnreachableError, UnsupportedError
from tether.security.identity import Identity
from tether.swarm.blobs.blobs import Shelf
from tether.swarm.engine.engine import Engine, FoundPeer, MutableRecord, NodeStatus
from tether.swarm.engine.secure import StreamLimits
from tether.swarm.node.held import PeerStream
from tether.swarm.node.node import Node, NodeSettings
from tether.swarm.node.standing import Admits, OwnSide
from tether.swarm.node.waking import Deed
from tether.swarm.rpc.rpc import Service
from tether.testing.memory_dht import MemoryDht, sign_record
from tether.testing.memory_lines import Line, line_pair

__all__ = ["MemoryNode", "MemorySwarm"]

_ADDRESS = ("192.0.2.1", 49737)
"""Of no machine (RFC 5737)."""
_NODES = 5
"""That keep what is announced: as many as a local DHT needs."""
_ROUND_TRIPS = 2
"""Until a stream is open: one to find the peer, one for the handshake."""

Arrived = Callable[[PeerStream], None]
Refuses = Callable[[bytes, tuple[str, int]], bool]


class MemorySwarm:
    """Who is there, what the DHT keeps, and how good the lines are. Belongs to one event loop."""

    def __init__(self, dht: MemoryDht | None = None, latency: float = 0.0, nbytes_per_second: float = float("inf")) -> None:
        """`latency`, `nbytes_per_second`: of each line that nothing else is said of."""
        self.dht = dht or MemoryDht()
        self.networks: dict[str, _MemoryNetwork] = {}
        """Who is there, by key: of several under one key the one that came last, as for those who look it up."""
        self.asked: list[str] = []
        """Keys whose records were asked for, in order, also in vain."""
        self.at_once = self.most_at_once = 0
        """Questions to the DHT that are under way."""
        self._latency, self._rate = latency, nbytes_per_second
        self._lines: dict[frozenset[str], Line] = {}
        self._separate: set[frozenset[str]] = set()
        self._nodes: list[MemoryNode] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all nodes that it started."""
        await asyncio.gather(*(node.aclose() for node in self._nodes))

    async def start(
        self, seed: bytes, service: Service, shelf: Shelf | None, admits: Admits, settings: NodeSettings | None = None
    ) -> MemoryNode:
        """A node on this swarm; as `Node.start`, of whose settings the engine's bootstrap and addresses mean nothing here."""
        settings = settings or NodeSettings()
        network = _MemoryNetwork(self, Identity(seed), settings.engine.limits)
        node = MemoryNode(network, OwnSide(network.key, service, shelf, admits), settings)
        self._nodes.append(node)
        return node

    def line(self, one: str, two: str) -> Line:
        """What lies between two keys."""
        return self._line(frozenset((one, two)))

    def separate(self, one: str, two: str) -> None:
        """These two can't reach each other any more, nor hear that it is so."""
        self._separate.add(frozenset((one, two)))
        self.line(one, two).changed()

    def reunite(self, one: str, two: str) -> None:
        """They can again."""
        self._separate.discard(frozenset((one, two)))
        self.line(one, two).changed()

    def changed(self, key: str) -> None:
        """This key went away, or is back."""
        for pair, line in self._lines.items():
            if key in pair:
                line.changed()

    def is_down(self, pair: frozenset[str]) -> bool:
        """Whether nothing passes between two keys."""
        return pair in self._separate or any(key in self.networks and self.networks[key].is_away for key in pair)

    def _line(self, pair: frozenset[str]) -> Line:
        if pair not in self._lines:
            self._lines[pair] = Line(self._latency, self._rate, lambda: self.is_down(pair))
        return self._lines[pair]


class MemoryNode(Node):
    """A node whose network is memory: `MemorySwarm.start` makes it. All but the switches is `Node`."""

    def __init__(self, network: _MemoryNetwork, own: OwnSide, settings: NodeSettings) -> None:
        super().__init__(cast("Engine", network), own, settings)  # it has all of an engine that a node uses
        self._network = network

    @property
    def engine(self) -> Engine:
        """Raises: UnsupportedError: feeds are Hypercores, which the real engine alone has."""
        raise UnsupportedError("a swarm in memory has no feeds: use tether.testing.testnet, whose nodes are real ones")

    def go_away(self) -> None:
        """Nothing that it sends comes anywhere, nothing comes to it, and nobody is told: as asleep, killed, or without a network."""
        self._network.is_away = True
        self._network.swarm.changed(self.key)

    async def kill(self) -> None:
        """End as a process that is killed: nobody is told."""
        self.go_away()
        self._connections.cut_all()
        await self.aclose()

    async def come_back(self) -> None:
        """As after a sleep: what was open is cut on this side, and who waits for it is told."""
        self._network.is_away = False
        for deed in (Deed.CUT, Deed.WAKE, Deed.TELL):
            await self._do(deed)
        self._network.swarm.changed(self.key)


class _MemoryNetwork:
    """In the place of `Engine`, as far as a `Node` uses it."""

    def __init__(self, swarm: MemorySwarm, identity: Identity, limits: StreamLimits) -> None:
        self.swarm, self._identity, self.limits = swarm, identity, limits
        self.key = identity.public
        self.is_away = self._is_closed = False
        self.relays: tuple[str, ...] = ()
        self._arrived: Arrived | None = None
        self._refuses: Refuses = _nobody
        swarm.networks[self.key] = self

    async def ready(self) -> None:
        self._check_open()

    async def status(self) -> NodeStatus:
        self._check_open()
        is_here, known = not self.is_away, len(self.swarm.networks)
        return NodeStatus(
            address=_ADDRESS if is_here else None,
            local=_ADDRESS,
            firewalled=False,
            randomized=False,
            ephemeral=False,
            bootstrapped=True,
            online=is_here,
            degraded=False,
            announced=is_here and self._arrived is not None,
            known=known,
            punches={},
            relaying={},
        )

    async def listen(self, on_connection: Arrived, firewall: Refuses) -> None:
        self._check_open()
        self._arrived, self._refuses = on_connection, firewall

    async def unlisten(self) -> None:
        self._check_open()
        self._arrived = None

    async def wake(self) -> None:
        self._check_open()

    async def probe(self) -> bool:
        self._check_open()
        return True

    async def relay_through(self, relays: Sequence[bytes]) -> None:
        """Remembered: everybody is reached directly."""
        self.relays = tuple(relay.hex() for relay in relays)
        self._check_open()

    def collect(self) -> None:
        """Nothing: there is no JavaScript."""

    async def close(self) -> None:
        """Nobody gets here under this key any more; topics stay announced until they are forgotten, as in hyperdht."""
        self._is_closed = True
        if self.swarm.networks.get(self.key) is self:
            del self.swarm.networks[self.key]

    # --- streams

    async def connect(self, public_key: bytes) -> PeerStream:
        self._check_open()
        peer = public_key.hex()
        line = self.swarm.line(self.key, peer)
        await asyncio.sleep(_ROUND_TRIPS * 2 * line.latency)
        self._check_open()
        there = self._found(peer)
        near, far = line_pair(self.key, peer, line, (self.limits.idle, there.limits.idle))
        near.remote_address = far.remote_address = _ADDRESS
        there.take(far)
        return near

    def take(self, stream: PeerStream) -> None:
        """A stream that came about."""
        if self._arrived is not None:
            self._arrived(stream)

    def _found(self, peer: str) -> _MemoryNetwork:
        if self.is_away:
            raise PeerUnreachableError("No node of the DHT answers here, so no peer can be found: plug this node in again.", "NO_NODES")
        there = self.swarm.networks.get(peer)
        if there is None or there._arrived is None:
            raise PeerNotFoundError("Nobody announces this key now: is the other side running, and on the same swarm?", "PEER_NOT_FOUND")
        is_refused = there._refuses(bytes.fromhex(self.key), _ADDRESS)
        if is_refused or self.swarm.is_down(frozenset((self.key, peer))):
            code = "PEER_CONNECTION_FAILED"
            raise PeerUnreachableError(f"The peer is known, but no stream to it came about ({code}); try again.", code)
        return there

    # --- the DHT

    async def announce(self, topic: bytes) -> int:
        await self._travel()
        self.swarm.dht.announce(topic, self.key)
        return _NODES

    async def unannounce(self, topic: bytes) -> None:
        await self._travel()
        self.swarm.dht.unannounce(topic, self.key)

    async def lookup(self, topic: bytes) -> list[FoundPeer]:
        await self._travel()
        return [FoundPeer(bytes.fromhex(key), ()) for key in self.swarm.dht.lookup(topic)]

    async def mutable_put(self, value: bytes, seq: int) -> int:
        record = sign_record(self._identity, value, seq)
        await self._travel()
        self.swarm.dht.put(self.key, record)
        return _NODES

    async def mutable_get(self, public_key: bytes) -> MutableRecord | None:
        self.swarm.asked.append(public_key.hex())
        await self._travel()
        found = self.swarm.dht.get(public_key.hex())
        return None if found is None else MutableRecord(found.value, found.seq, found.signature)

    async def _travel(self) -> None:
        """To the nodes of the DHT and back."""
        self._check_open()
        swarm = self.swarm
        swarm.at_once += 1
        swarm.most_at_once = max(swarm.most_at_once, swarm.at_once)
        try:
            await asyncio.sleep(0)
        finally:
            swarm.at_once -= 1
        if self.is_away:
            raise EngineError("no node of the network answers: plug this node in again")

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosedError("this node left the swarm: start it again")


def _nobody(_key: bytes, _address: tuple[str, int]) -> bool:
    return False
