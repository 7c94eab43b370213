"""Which streams a lab has with whom: who may open how many, one connection to a peer for all who call it, and everything cut at once.

Knows no network: streams come to `arrived`, and from the `connect` that it is given.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog

from tether.errors import ForbiddenError, PeerUnreachableError, QueueFullError, ServiceUnavailableError, TetherError
from tether.ports import MessageStream
from tether.swarm.blobs.blobs import BlobConnection
from tether.swarm.engine.secure import MAX_MESSAGE
from tether.swarm.node.arrivals import purpose_of
from tether.swarm.node.doubts import Doubts
from tether.swarm.node.flights import Flights
from tether.swarm.node.held import Connection, HeldStream, PeerStream
from tether.swarm.node.standing import ConnectionLimits, OwnSide, Standing
from tether.swarm.relaying.relay import Relay, RelayStatus
from tether.swarm.rpc.rpc import RpcConnection, RpcLimits
from tether.swarm.wire.bandwidth import TokenBucket
from tether.types import Digest

__all__ = ["Connect", "Connections", "OnHave"]

log = structlog.get_logger("tether.swarm")
Owner = TypeVar("Owner", RpcConnection, BlobConnection)
_NONE: dict[HeldStream, None] = {}


Connect = Callable[[str], Awaitable[PeerStream]]
OnHave = Callable[[str, Digest, tuple[int, ...]], None]
"""A peer, a version, and the places in its manifest of blobs that the peer has since."""


class Connections:
    """Of one lab. Belongs to the loop that it is made on."""

    def __init__(self, own: OwnSide, connect: Connect, limits: ConnectionLimits | None = None, uplink: TokenBucket | None = None) -> None:
        """`connect` makes a stream to a key, or raises. `uplink`: the cap for all blobs that go out; None: none."""
        self._own, self._connect = own, connect
        self._limits, self._uplink = limits or ConnectionLimits(), uplink or TokenBucket()
        self._loop = asyncio.get_running_loop()
        self._held: dict[str, dict[HeldStream, None]] = {}
        self._guests: dict[HeldStream, None] = {}
        self._rpc, self._blobs = Flights[RpcConnection](), Flights[BlobConnection]()
        self._doubts = Doubts(self._limits, self._of, self._beside)
        relaying = self._limits.relaying
        self._relay = None if relaying is None else Relay(lambda peer: self._admits(peer) is Standing.KNOWN, relaying)
        self._tasks = set[asyncio.Task[None]]()
        self._is_closed = False
        self.on_have: list[OnHave] = []
        """Told of what peers say that they have, of versions whose bitmap they were asked for."""

    # --- who comes

    def refuses(self, peer: str) -> bool:
        """Whether a stream of this key is refused before it exists."""
        standing = self._admits(peer)
        return standing is Standing.BANNED or not self._has_room(peer, standing)

    def arrived(self, stream: PeerStream) -> None:
        """A peer opened it. Known to `cut` before anything is asked about the peer."""
        held = self._hold(stream)
        standing = self._admits(held.peer)
        if standing is Standing.BANNED or not self._has_room(held.peer, standing, held):
            log.info("a stream was refused", peer=held.peer, standing=standing.name)
            held.destroy()
            return
        if standing is Standing.UNKNOWN:
            self._take_in(held)
        self._do(self._receive(held))

    def welcome(self, peer: str) -> None:
        """The key is known since: what it has open may do more. To be called before the peer hears that it was admitted."""
        for held in self._of(peer):
            self._guests.pop(held, None)
            held.is_guest = False
            held.limit(MAX_MESSAGE)
            if isinstance(held.owner, RpcConnection):
                held.owner.allow(self._limits.rpc)

    # --- whom one wants

    def knows(self, peer: str) -> bool:
        """Whether there is anything with this key, which then is one."""
        return peer in self._held

    def open_rpc(self, peer: str) -> RpcConnection | None:
        """The connection for calls to a peer, if there is one."""
        return self._live(peer, RpcConnection)

    async def rpc(self, peer: str) -> RpcConnection:
        """The connection for calls to a peer: the one that there is, whoever opened it, or a new one for all who wait.

        Raises: ForbiddenError: the key is banned; QueueFullError: too many are open; what connecting raises.
        """
        return self._live(peer, RpcConnection) or await self._rpc.get(peer, self._reach_rpc)

    async def blobs(self, peer: str) -> BlobConnection:
        """As `rpc`, for blobs."""
        return self._live(peer, BlobConnection) or await self._blobs.get(peer, self._reach_blobs)

    def expected_until(self, peer: str) -> float:
        """Until when, on the loop's clock, one should wait for a peer that can't be reached, since it was here a moment ago; 0: don't."""
        return self._doubts.expected_until(peer)

    def leave_to_end(self, connection: RpcConnection) -> None:
        """The peer said that it is about to end: nothing new begins on it, what runs goes on, and another one is waited for."""
        self._doubts.miss(connection.peer)
        for held in self._of(connection.peer):
            held.is_leaving |= held.owner is connection

    def have(self, digest: Digest, places: tuple[int, ...]) -> None:
        """Blobs of a version are here since, by their places in its manifest: peers that follow the version are told."""
        for held in self._all():
            if isinstance(held.owner, BlobConnection):
                held.owner.announce(digest, places)

    # --- what becomes of them

    def cut(self, peer: str) -> None:
        """Everything with this peer, at once: streams, calls of both sides, and what is being connected."""
        error = PeerUnreachableError(f"peer {peer} was cut here while it was being connected: it may do less than before", "ECANCELED")
        self._rpc.abort(peer, error)
        self._blobs.abort(peer, error)
        if self._relay is not None:
            self._relay.cut(peer)  # before its streams go: whom it was joined with is told
        for held in self._of(peer):
            held.destroy()
        self._doubts.dismiss(peer)

    def cut_all(self) -> None:
        """Everything with everybody."""
        error = PeerUnreachableError("this machine slept, or moved to another network, while it was connecting: try again", "ECANCELED")
        self._rpc.abort_all(error)
        self._blobs.abort_all(error)
        self._end_relaying()
        for held in self._all():
            held.destroy()

    def sweep(self, now: float) -> None:
        """To be called each second: unknown keys whose time is over are cut, what nobody uses is closed, who is silent is asked anew.

        `now`: the loop's time.
        """
        for held in self._doubts.look(self._all(), now):
            self._land(held)
        for held in list(self._guests):
            self._look_at_guest(held, now)
        for held in self._all():
            if held.is_leaving or not held.is_initiator or held.owner is None:
                continue
            if now - held.idle_since(now) >= self._limits.idle:
                held.is_leaving = True
                self._do(held.owner.aclose())

    @property
    def is_working(self) -> bool:
        """Whether a call of a peer is being worked on."""
        return any(isinstance(held.owner, RpcConnection) and held.owner.working for held in self._all())

    @property
    def relaying(self) -> RelayStatus | None:
        """What is relayed for peers; None: this lab relays nothing."""
        return None if self._relay is None else self._relay.status

    def listed(self) -> list[Connection]:
        """Those that there are."""
        return [held.shown() for held in self._all()]

    async def aclose(self) -> None:
        """Close all in order: what was sent goes out, for two seconds at most."""
        self._is_closed = True
        error = ServiceUnavailableError("this lab leaves the swarm: start it again")
        self._rpc.abort_all(error)
        self._blobs.abort_all(error)
        self._end_relaying()
        await self._doubts.aclose()
        for held in self._all():
            if held.owner is None:
                held.destroy()
            else:
                self._do(held.owner.aclose())
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- within

    def _hold(self, stream: PeerStream) -> HeldStream:
        held = HeldStream(stream, self._gone, self._loop.time(), time.time())
        self._held.setdefault(held.peer, {})[held] = None
        return held

    def _gone(self, held: HeldStream) -> None:
        self._guests.pop(held, None)
        of_peer = self._held.get(held.peer, {})
        of_peer.pop(held, None)
        if not of_peer:
            self._held.pop(held.peer, None)
        if held.purpose != "relay":
            self._doubts.lost(held)

    def _admits(self, peer: str) -> Standing:
        try:
            return self._own.admits(peer)
        except Exception:  # of whoever knows: a bug there lets nobody in
            log.exception("it could not be told what a key is to this lab", peer=peer)
            return Standing.BANNED

    def _has_room(self, peer: str, standing: Standing, without: HeldStream | None = None) -> bool:
        if self._is_closed:
            return False
        if standing is Standing.UNKNOWN:
            return True
        opened = sum(not (held.is_initiator or held.purpose == "relay") for held in self._of(peer) if held is not without)
        return opened < self._limits.max_streams

    def _take_in(self, held: HeldStream) -> None:
        """The oldest makes room: who refuses the newest lets a flood of invented keys keep everybody out."""
        if len(self._guests) >= self._limits.max_unknown:
            next(iter(self._guests)).destroy()
        held.is_guest = True
        held.limit(self._limits.unknown_message_nbytes)
        self._guests[held] = None

    async def _receive(self, held: HeldStream) -> None:
        try:
            purpose, stream = await purpose_of(held)
        except TetherError:
            return  # it was destroyed, and named in the log
        if held.is_gone:
            return  # cut meanwhile: what it said is not heard
        if purpose == "rpc":
            self._speak(held, stream)
            self._land(held)
        elif held.is_guest:
            log.warning("peer cut", peer=held.peer, code=ForbiddenError.code, error=f"an unknown key asks for {purpose}")
            held.destroy()
        elif purpose == "blobs":
            self._trade(held, stream)
            self._land(held)
        else:
            self._help(held, stream)

    def _land(self, held: HeldStream) -> None:
        """Whoever looks for this peer has found it."""
        if held.is_guest or held.is_leaving:
            return
        if isinstance(held.owner, RpcConnection):
            self._rpc.land(held.peer, held.owner)
        elif held.owner is not None:
            self._blobs.land(held.peer, held.owner)

    def _speak(self, held: HeldStream, stream: MessageStream) -> RpcConnection:
        held.purpose = "rpc"
        connection = held.owner = RpcConnection(stream, self._own.key, self._own.service, self._rpc_limits(held))
        return connection

    def _trade(self, held: HeldStream, stream: MessageStream) -> BlobConnection:
        held.purpose = "blobs"
        connection = held.owner = BlobConnection(
            stream,
            self._own.shelf,
            uplink=self._uplink,
            asking=self._limits.asking,
            giving=self._limits.giving,
            on_have=lambda digest, places: self._heard(held.peer, digest, places),
        )
        return connection

    def _help(self, held: HeldStream, stream: MessageStream) -> None:
        """The relay has bounds of its own for these, and cuts who is not admitted."""
        held.purpose = "relay"
        if self._relay is None:
            log.info("a peer asks for a relay, which this lab is not", peer=held.peer)
            held.destroy()
        else:
            self._relay.accept(stream, held.carrier)

    def _end_relaying(self) -> None:
        if self._relay is not None:
            self._relay.close()

    def _rpc_limits(self, held: HeldStream) -> RpcLimits:
        if held.is_guest:
            return self._limits.unknown_rpc
        if self._admits(held.peer) is Standing.KNOWN:
            return self._limits.rpc
        # We asked for it, so what we send may wait; what the peer asks for is as of any unknown key.
        return dataclasses.replace(self._limits.unknown_rpc, max_unread_nbytes=self._limits.rpc.max_unread_nbytes)

    async def _reach_rpc(self, peer: str) -> RpcConnection:
        held = await self._reach(peer)
        return self._speak(held, held)

    async def _reach_blobs(self, peer: str) -> BlobConnection:
        held = await self._reach(peer)
        return self._trade(held, held)

    async def _beside(self, held: HeldStream) -> object:
        """Connect to its peer as if there were no connection, or wait with those who do."""
        if isinstance(held.owner, BlobConnection):
            return await self._blobs.get(held.peer, self._reach_blobs)
        return await self._rpc.get(held.peer, self._reach_rpc)

    async def _reach(self, peer: str) -> HeldStream:
        if self._is_closed:
            raise ServiceUnavailableError("this lab leaves the swarm: start it again")
        if self._admits(peer) is Standing.BANNED:
            raise ForbiddenError(f"peer {peer} is banned by this lab: lift that first")
        open_or_soon = sum(held.is_initiator for held in self._all()) + len(self._rpc) + len(self._blobs)
        if open_or_soon > self._limits.max_outgoing:
            raise QueueFullError(f"{self._limits.max_outgoing} connections to peers are open: wait until some are idle, and try again")
        return self._hold(await self._connect(peer))

    def _live(self, peer: str, kind: type[Owner]) -> Owner | None:
        """The newest: a peer that changed its network leaves older ones behind."""
        for held in reversed(self._held.get(peer, _NONE)):
            is_apart = held.is_leaving or held.is_guest or held.is_silent
            if isinstance(held.owner, kind) and not (held.owner.is_closed or is_apart):
                return held.owner
        return None

    def _look_at_guest(self, held: HeldStream, now: float) -> None:
        standing = self._admits(held.peer)
        if standing is Standing.KNOWN:
            self.welcome(held.peer)
        elif standing is Standing.BANNED or now - held.began >= self._limits.unknown_patience:
            log.info("an unknown key was cut", peer=held.peer, standing=standing.name)
            held.destroy()

    def _heard(self, peer: str, digest: Digest, places: tuple[int, ...]) -> None:
        for told in self.on_have:
            told(peer, digest, places)

    def _of(self, peer: str) -> list[HeldStream]:
        return list(self._held.get(peer, ()))

    def _all(self) -> list[HeldStream]:
        return [held for of_peer in self._held.values() for held in of_peer]

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
