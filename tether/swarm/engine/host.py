"""What the bundle calls in Python, and whom its nodes, servers and streams belong to. One for each process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import structlog

from tether.errors import EngineMisusedError
from tether.swarm.engine.bridge import Bridge, Memory
from tether.swarm.engine.files import Files
from tether.swarm.engine.secure import ROUTES, Keys, SecureStream, StreamLimits
from tether.swarm.engine.sodium import Sodium
from tether.swarm.engine.transport import Transport, network_interfaces

__all__ = ["Evaluate", "Firewall", "Host", "Node", "OnConnection"]

log = structlog.get_logger("tether.swarm")

_INTERFACES = 5.0
"""Seconds between two looks at this machine's addresses: a laptop that moves is back within them."""
_UNCLAIMED = 60.0
"""Seconds that a stream waits for who asked for it: connecting takes less, or was given up."""

OnConnection = Callable[[SecureStream], None]
Firewall = Callable[[bytes, tuple[str, int]], bool]
"""A peer's public key, proved, and its address; True refuses it before a stream exists."""
Functions = dict[str, Callable[..., None]]
Evaluate = Callable[[Functions], tuple[Mapping[str, Callable[[], None]], list[str]]]
"""Runs the bundle over these functions; gives its entries and the names of its methods."""


class Node(Protocol):
    """What is needed of an engine here."""

    @property
    def limits(self) -> StreamLimits: ...
    def opened(self, stream: SecureStream) -> None: ...


class Host:
    """The Python half of the one interpreter."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.bridge = Bridge()
        self.sodium = Sodium()
        self.transport = Transport(self.bridge)
        self._feeds: dict[int, Callable[[int], None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nodes: dict[int, Node] = {}
        self._starting = 0
        self._servers: dict[int, tuple[OnConnection, Firewall]] = {}
        self._unclaimed: dict[int, SecureStream] = {}
        self._watching: asyncio.Task[None] | None = None
        functions: Functions = {
            "memory": self._memory,
            "firewall": self._firewall,
            "connection": self._connection,
            "feedChanged": self._feed_changed,
            "secureStart": self._secure_start,
            "secureRoute": self._secure_route,
        }
        functions |= self.bridge.functions() | self.sodium.functions() | self.transport.functions()
        functions |= Files(self.bridge).functions()
        self.bridge.attach(*evaluate(functions))
        self.transport.attach()

    def use(self, loop: asyncio.AbstractEventLoop) -> None:
        """Everything belongs to this loop; another one may come once all nodes are closed.

        Raises: EngineMisusedError: nodes run on another loop.
        """
        if self._loop is loop:
            return
        if self._nodes and self._loop is not None and not self._loop.is_closed():
            raise EngineMisusedError("The engine runs on another event loop; use that one, or close its nodes first.")
        self._loop = loop
        self._watching = None
        self.bridge.use(loop)
        self.transport.use(loop)

    @contextlib.contextmanager
    def starting(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """While a node begins, until it is added: the loop stays in use, though the last of the others may end meanwhile. As `use`."""
        self.use(loop)
        self._starting += 1
        try:
            yield
        finally:
            self._starting -= 1

    def add(self, number: int, node: Node) -> None:
        """A node began."""
        self._nodes[number] = node
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch_interfaces(), name="swarm-interfaces")

    async def remove(self, number: int) -> None:
        """A node ended; with the last one the loop is free."""
        self._nodes.pop(number, None)
        if self._nodes or self._watching is None:
            return
        watching, self._watching = self._watching, None
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)  # which passes on that who waits here is cancelled
        if not (self._nodes or self._starting):  # else another node began meanwhile
            self.bridge.close()
            self._loop = None

    def listen(self, server: int, on_connection: OnConnection, firewall: Firewall) -> None:
        """Who is told of a server's connections, and who may refuse them."""
        self._servers[server] = on_connection, firewall

    def unlisten(self, server: int) -> None:
        """Nobody any more."""
        self._servers.pop(server, None)

    def watch_feed(self, feed: int, told: Callable[[int], None] | None) -> None:
        """Who is told when it changes; None: nobody any more."""
        if told is None:
            self._feeds.pop(feed, None)
        else:
            self._feeds[feed] = told

    def claim(self, handle: int) -> SecureStream | None:
        """The stream that JavaScript handed over under this number."""
        return self._unclaimed.pop(handle, None)

    async def _watch_interfaces(self) -> None:
        seen = network_interfaces()
        while True:
            await asyncio.sleep(_INTERFACES)
            now = network_interfaces()
            if now != seen:
                seen = now
                self.transport.tell_interfaces()

    # From JavaScript: arguments are read before anything else is called, and no exception crosses.

    def _memory(self, view: Any) -> None:
        memory = Memory(memoryview(view))
        self.bridge.share(memory)
        self.sodium.attach(memory)
        self.transport.memory = memory

    def _secure_start(self) -> None:
        memory = self.bridge.memory
        handle, route, initiator, number, address, port = memory.control[:6]
        keys = _keys(bytes(memory.outbox[:_KEYS_NBYTES]), is_initiator=bool(initiator))
        carrier, node = self.transport.stream(handle), self._nodes.get(number)
        if carrier is None or self._loop is None or node is None:
            return
        stream = SecureStream(carrier, keys, node.limits, self._loop)
        stream.route, stream.remote_address = ROUTES[route], (self.transport.text_of(address), port)
        self._unclaimed[handle] = stream
        self._loop.call_later(_UNCLAIMED, self._give_up, handle)
        self.transport.hand(handle, stream)
        node.opened(stream)

    def _give_up(self, handle: int) -> None:
        stream = self._unclaimed.pop(handle, None)
        if stream is not None:
            stream.destroy()

    def _secure_route(self) -> None:
        handle, route, _, _, address, port = self.bridge.memory.control[:6]
        stream = self.transport.receiver(handle)
        if isinstance(stream, SecureStream):
            stream.route, stream.remote_address = ROUTES[route], (self.transport.text_of(address), port)

    def _feed_changed(self) -> None:
        feed, change = self.bridge.memory.control[:2]
        told = self._feeds.get(feed)
        if told is not None and self._loop is not None:
            self._loop.call_soon(told, change)

    def _firewall(self) -> None:
        memory = self.bridge.memory
        server, address, port = memory.control[:3]
        key = bytes(memory.outbox[:32])
        refused = True
        if server in self._servers:
            try:
                refused = self._servers[server][1](key, (self.transport.text_of(address), port))
            except Exception:
                log.exception("swarm.firewall.failed", peer=key.hex())
        memory.control[0] = 1 if refused else 0

    def _connection(self) -> None:
        server, handle = self.bridge.memory.control[:2]
        told, stream = self._servers.get(server), self.claim(handle)
        if stream is None:
            return
        if told is None:
            stream.destroy()
            return
        try:
            told[0](stream)
        except Exception:
            log.exception("swarm.connection.failed", peer=stream.peer)
            stream.destroy()


_KEYS_NBYTES = 224


def _keys(parts: bytes, *, is_initiator: bool) -> Keys:
    """As `js/handed.js` laid them."""
    return Keys(
        send=parts[:32],
        receive=parts[32:64],
        peer=parts[64:96],
        handshake=parts[96:160],
        own_id=parts[160:192],
        peer_id=parts[192:224],
        is_initiator=is_initiator,
    )
