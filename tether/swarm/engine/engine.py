"""HyperDHT in this process: the real hyperdht in PythonMonkey, UDX and encryption in Python. No JavaScript is visible above this file.

It runs in the model manager's own process and nowhere else: it leaks a little, however little crosses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Self

import structlog

from tether.errors import EngineClosedError, PeerNotFoundError, PeerUnreachableError
from tether.swarm.engine import interpreter
from tether.swarm.engine.host import Firewall, Host, OnConnection
from tether.swarm.engine.interpreter import check_owner, the_host
from tether.swarm.engine.secure import SecureStream, StreamLimits
from tether.swarm.engine.values import EngineSettings, FoundPeer, MutableRecord, NodeStatus, check_record, hex_key, hex_keys, node_status

__all__ = ["Engine", "EngineSettings", "FoundPeer", "MutableRecord", "NodeStatus"]

log = structlog.get_logger("tether.swarm")
_RELAY = "relay's key"
_CONNECT = 20.0
"""Seconds for finding a peer and punching a hole: hyperdht gives up a round of punching after ten."""
_GOODBYE = 5.0
"""Seconds for taking back announcements; then the sockets are closed without it, which has as long."""


class Engine:
    """One node of the DHT, under one key. `start` makes it; several may live in one process, on one event loop."""

    def __init__(self, host: Host, number: int, public_key: bytes, settings: EngineSettings) -> None:
        self._host, self._number, self._settings = host, number, settings
        self.public_key = public_key
        """What peers know it by; 32 bytes."""
        self._servers: list[int] = []
        self._streams: set[SecureStream] = set()
        self._closed = False

    @classmethod
    async def start(cls, seed: bytes, settings: EngineSettings | None = None) -> Self:
        """Bind the sockets and begin to know other nodes; `ready` waits for that. The identity is Ed25519's of `seed` (32 bytes).

        Raises: MissingDependencyError: PythonMonkey or the bundle is not there; EngineMisusedError: not on the main thread, on a
        second event loop, or after a fork; BadKeyError: the seed; EngineError: a socket can't be bound.
        """
        settings = settings or EngineSettings()
        host = the_host()
        bootstrap = None if settings.bootstrap is None else [{"host": name, "port": port} for name, port in settings.bootstrap]
        with host.starting(asyncio.get_running_loop()):
            made = await host.bridge.call(
                "create",
                bootstrap=bootstrap,
                seed=hex_key(seed, "seed"),
                host=settings.host,
                port=settings.port,
                ephemeral=settings.ephemeral,
                firewalled=settings.firewalled,
                relays=hex_keys(settings.relays, _RELAY),
            )
            engine = cls(host, made["node"], bytes.fromhex(made["publicKey"]), settings)
            host.add(made["node"], engine)
        try:
            await engine.call("bound")
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def limits(self) -> StreamLimits:
        """Of its streams."""
        return self._settings.limits

    @property
    def streams(self) -> frozenset[SecureStream]:
        """Those that are open."""
        self._streams = {stream for stream in self._streams if not stream.closed}
        return frozenset(self._streams)

    def opened(self, stream: SecureStream) -> None:
        """The host has a new one."""
        self._streams = {*self.streams, stream}

    async def ready(self) -> None:
        """Wait until the node has asked the network for its neighbours; at once where there is no network."""
        await self.call("ready")

    async def probe(self) -> bool:
        """Find out, by other nodes, whether packets come in unasked, as at a public address; some round trips. `status` tells it then too.

        Who is, takes part as such from now on. It may be found out by itself only after twenty minutes.
        """
        await self.call("probe")
        return not (await self.status()).firewalled

    async def status(self) -> NodeStatus:
        """How the network sees it now."""
        return node_status(await self.call("status"))

    async def listen(self, on_connection: OnConnection, firewall: Firewall | None = None) -> None:
        """Take connections under this node's key, and announce where it can be found.

        `on_connection` gets each stream in the turn in which it exists; `firewall` may refuse a key before.
        """
        made = await self.call("listen")
        self._servers.append(made["server"])
        self._host.listen(made["server"], on_connection, firewall or _admit)
        await self.call("announced", server=made["server"])

    async def unlisten(self) -> None:
        """Take no more connections; those that are open stay."""
        servers, self._servers = self._servers, []
        for server in servers:
            await self.call("unlisten", server=server)
            self._host.unlisten(server)

    async def connect(self, public_key: bytes, timeout: float = _CONNECT) -> SecureStream:  # noqa: ASYNC109 (the peer's search is given up too)
        """A stream to who has this key: found through the DHT, direct, punched or relayed, the key proved.

        Raises: PeerNotFoundError: nobody announces it; PeerUnreachableError: no stream came about, or not in `timeout` seconds, or there
        is no network; BadKeyError; EngineClosedError.
        """
        key = hex_key(public_key, "public key")
        self._check()
        bridge = self._host.bridge
        call, answer = bridge.start("connect", {"node": self._number, "publicKey": key})
        try:
            async with asyncio.timeout(timeout):
                found = await self._or_destroyed(answer)
        except PeerNotFoundError:
            await self._check_network()
            raise
        except TimeoutError:
            await self._check_network()
            raise PeerUnreachableError(
                f"No stream to {key[:12]}… came about in {timeout:g} s; try again, or use a relay.", "ETIMEDOUT"
            ) from None
        finally:
            bridge.end(call)
            if not answer.done() or answer.cancelled():
                bridge.send("cancel", {"call": call})
        stream = self._host.claim(int(found["stream"]))
        if stream is None:
            raise PeerUnreachableError(f"The stream to {key[:12]}… was closed as it opened; try again.", "ECONNRESET")
        return stream

    async def relay_through(self, relays: Sequence[bytes]) -> None:
        """Of these blind relays (public keys) each stream from now on may use one, until a direct way is found, whichever side opens it.

        The relay has to admit both ends. One that is the peer itself is left out. Raises: BadKeyError.
        """
        await self.call("relayThrough", relays=hex_keys(relays, _RELAY))

    async def _check_network(self) -> None:
        """Raises: PeerUnreachableError: there is none, so that nothing is known of any peer."""
        if self._settings.bootstrap is not None and not self._settings.bootstrap:
            return  # others begin with this node
        status = await self.status()
        if not status.known and status.address is None:
            raise PeerUnreachableError(
                "No node of the DHT answers here, so no peer can be found: is there a network with IPv4, and does it let UDP through? "
                "What is local works without.",
                "NO_NODES",
            ) from None

    async def _or_destroyed(self, answer: asyncio.Future[Any]) -> Any:
        """Who is cancelled in the very turn in which the stream came about never sees it: it is not left open."""
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                stream = self._host.claim(int(answer.result()["stream"]))
                if stream is not None:
                    stream.destroy()
            raise

    async def announce(self, topic: bytes) -> int:
        """Say under a topic (32 bytes) that this key is to be found here; how many nodes keep it.

        They forget it after twenty minutes: say it again before.
        """
        return int((await self.call("announce", topic=hex_key(topic, "topic")))["nodes"])

    async def unannounce(self, topic: bytes) -> None:
        """Take it back."""
        await self.call("unannounce", topic=hex_key(topic, "topic"))

    async def lookup(self, topic: bytes) -> list[FoundPeer]:
        """Who announced this topic, 1,000 at most.

        Anyone may announce anything: a key proves itself when one connects to it.
        """
        found = await self.call("lookup", topic=hex_key(topic, "topic"))
        return [
            FoundPeer(bytes.fromhex(peer["publicKey"]), tuple((str(host), int(port)) for host, port in peer["relays"])) for peer in found
        ]

    async def mutable_put(self, value: bytes, seq: int, seed: bytes | None = None) -> int:
        """Store a record under this node's key, or that of `seed`; how many nodes were asked to. Nodes keep the highest `seq`.

        Raises: PayloadTooLargeError: over 1,000 bytes.
        """
        check_record(value)
        signer = None if seed is None else hex_key(seed, "seed")
        return int((await self.call("mutablePut", value=value.hex(), seq=seq, seed=signer))["nodes"])

    async def mutable_get(self, public_key: bytes, seq: int = 0, *, latest: bool = True) -> MutableRecord | None:
        """The record of a key, from `seq` on; None: nobody has one. `latest` False takes the first answer that will do."""
        found = await self.call("mutableGet", publicKey=hex_key(public_key, "public key"), seq=seq, latest=latest)
        if found is None:
            return None
        return MutableRecord(bytes.fromhex(found["value"]), int(found["seq"]), bytes.fromhex(found["signature"]))

    async def immutable_put(self, value: bytes) -> bytes:
        """Store a value under its own hash (BLAKE2b-256), which is returned.

        Raises: PayloadTooLargeError: over 1,000 bytes.
        """
        check_record(value)
        return bytes.fromhex((await self.call("immutablePut", value=value.hex()))["hash"])

    async def immutable_get(self, digest: bytes) -> bytes | None:
        """The value with this hash, verified; None: nobody has it."""
        found = await self.call("immutableGet", hash=hex_key(digest, "hash"))
        return None if found is None else bytes.fromhex(found["value"])

    async def suspend(self) -> None:
        """Before a sleep: streams are cut, sockets closed, announcements taken back."""
        await self.call("suspend")

    async def resume(self) -> None:
        """After a sleep: everything that was announced is announced again."""
        await self.call("resume")

    async def wake(self) -> None:
        """After a sleep that nothing foresaw, or in another network: announce anew and look for neighbours, now. Streams stay as they are.

        `suspend` and `resume` do that too, but cut every stream, and without a network wait for four seconds.
        """
        await self.call("wake")

    def collect(self) -> None:
        """Give back what JavaScript holds no more; some milliseconds."""
        self._check()
        interpreter.collect()

    def on_feed_change(self, feed: int, told: Callable[[int], None] | None) -> None:
        """Who is told when a feed changes; None: nobody any more."""
        self._host.watch_feed(feed, told)

    def on_feed_peer(self, server: int, firewall: Firewall | None) -> None:
        """Who may refuse the peers of a server of feeds; None: it is closed."""
        if firewall is None:
            self._host.unlisten(server)
        else:
            self._servers.append(server)
            self._host.listen(server, _unused, firewall)

    async def close(self) -> None:
        """Cut its streams, take back that it listens, close its sockets. A second call does nothing.

        Topics that it announced stay with the nodes that keep them, for twenty minutes.
        """
        if self._closed:
            return
        self._closed = True
        for stream in self.streams:
            stream.destroy()
        try:
            if not (await self._destroy(force=False) or await self._destroy(force=True)):
                log.warning("a node of the swarm did not end, and is left as it is", node=self._number)
        finally:
            for server in self._servers:
                self._host.unlisten(server)
            await self._host.remove(self._number)

    async def _destroy(self, *, force: bool) -> bool:
        """Whether it is done in time."""
        try:
            async with asyncio.timeout(_GOODBYE):
                await self._host.bridge.call("destroy", node=self._number, force=force)
        except TimeoutError:
            return False
        return True

    async def call(self, method: str, **values: Any) -> Any:
        """Ask the bundle; for the modules of this folder.

        Raises: EngineError and what `Bridge.call` raises; EngineClosedError.
        """
        self._check()
        return await self._host.bridge.call(method, node=self._number, **values)

    def _check(self) -> None:
        if self._closed:
            raise EngineClosedError("This node is closed; start another one.")
        check_owner()


def _unused(_: SecureStream) -> None:
    """Streams of feeds stay in JavaScript."""


def _admit(_key: bytes, _address: tuple[str, int]) -> bool:
    return False
