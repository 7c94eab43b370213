"""A stream that a lab has with a peer: known from the moment it exists until it is gone, so that it can be cut, counted and shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tether.errors import StreamLostError
from tether.ports import MessageStream
from tether.swarm.blobs.blobs import BlobConnection
from tether.swarm.engine.secure import Route
from tether.swarm.node.arrivals import Purpose
from tether.swarm.node.forwarding import Forwarding
from tether.swarm.rpc.rpc import RpcConnection

__all__ = ["Connection", "HeldStream", "PeerStream"]


class PeerStream(MessageStream, Protocol):
    """A stream, and how it travels: `SecureStream`."""

    route: Route
    remote_address: tuple[str, int] | None
    max_message_nbytes: int

    @property
    def carrier(self) -> object:
        """Its UDX stream: what is relayed leaves by the same socket."""
        ...

    @property
    def rtt(self) -> float: ...

    @property
    def pulse(self) -> tuple[int, bool]: ...

    def poke(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Connection:
    """What is shown of one."""

    peer: str
    """Its public key, hex."""
    purpose: Purpose | None
    """None: the peer has not said yet."""
    is_initiator: bool
    """Whether this side opened it."""
    route: Route
    round_trip: float
    """Seconds, smoothed; 0.0 before the first one."""
    since: float
    """Unix seconds."""
    address: tuple[str, int] | None


class HeldStream(Forwarding[PeerStream]):
    """In the stream's place: counts what passes. `on_gone` is called once, when it is gone or was destroyed here."""

    __slots__ = (
        "_on_close",
        "_on_gone",
        "_on_message",
        "_passed",
        "_pulse",
        "_seen",
        "began",
        "heard_at",
        "is_gone",
        "is_guest",
        "is_leaving",
        "is_silent",
        "owner",
        "purpose",
        "since",
        "used_at",
        "was_cut",
    )

    def __init__(self, stream: PeerStream, on_gone: Callable[[HeldStream], None], now: float, since: float) -> None:
        """`now`: monotonic; `since`: Unix seconds."""
        super().__init__(stream)
        self._on_gone = on_gone
        self.began = self.used_at = self.heard_at = now
        self.since = since
        self.purpose: Purpose | None = None
        self.owner: RpcConnection | BlobConnection | None = None
        """Who speaks on it, once it is known for what."""
        self.is_guest = False
        """Whether a peer opened it that nobody knows: it may do little, and not for long."""
        self.is_leaving = False
        """Whether it is about to be closed here: nothing new begins on it."""
        self.is_silent = False
        """Whether nothing came back, as of the last look, of what was sent: nothing new begins on it while that is so."""
        self.is_gone = False
        self.was_cut = False
        """Whether one of both sides ended it on purpose, at once: then the peer need not be back soon."""
        self._passed = self._seen = self._pulse = 0
        self._on_message: Callable[[memoryview], None]
        self._on_close: Callable[[Exception | None], None]

    def start(
        self, on_message: Callable[[memoryview], None], on_end: Callable[[], None], on_close: Callable[[Exception | None], None]
    ) -> None:
        """As the port says."""
        self._on_message, self._on_close = on_message, on_close
        self._stream.start(self._message, on_end, self._close)

    def send(self, message: bytes | bytearray | memoryview) -> bool:
        self._passed += 1
        return super().send(message)

    def destroy(self) -> None:
        """Cut it at once, with who speaks on it."""
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.destroy()  # which comes back here
            return
        self.was_cut |= not (self.is_silent or self.is_leaving)
        self._go()
        self._stream.destroy()

    def limit(self, max_message_nbytes: int) -> None:
        """Of messages that come: what is larger cuts the peer."""
        self._stream.max_message_nbytes = max_message_nbytes

    def idle_since(self, now: float) -> float:
        """When it was last used, as far as is known to who asks from time to time; `now` while something is asked."""
        if self._passed != self._seen or _is_busy(self.owner):
            self._seen, self.used_at = self._passed, now
        return self.used_at

    @property
    def carrier(self) -> object:
        """As of the stream."""
        return self._stream.carrier

    @property
    def is_awaited(self) -> bool:
        """Whether somebody here waits for an answer."""
        owner = self.owner
        return owner is not None and bool(owner.waiting if isinstance(owner, BlobConnection) else owner.in_flight)

    @property
    def came(self) -> int:
        """How many packets did, acknowledgements too."""
        return self._stream.pulse[0]

    def listen(self, now: float, patience: float) -> bool:
        """Look whether the peer is silent: nothing at all came for `patience` seconds, or four round trips, though it owes something."""
        came, owes = self._stream.pulse
        if came != self._pulse or not owes:
            self._pulse, self.heard_at = came, now
        self.is_silent = now - self.heard_at >= max(patience, 4 * self._stream.rtt)
        return self.is_silent

    def poke(self) -> None:
        """Ask the peer for a sign of life, which the next `listen` hears."""
        self._stream.poke()

    def shown(self) -> Connection:
        """How it stands now."""
        stream = self._stream
        return Connection(self.peer, self.purpose, self.is_initiator, stream.route, stream.rtt, self.since, stream.remote_address)

    def _message(self, message: memoryview) -> None:
        self._passed += 1
        self._on_message(message)

    def _close(self, error: Exception | None) -> None:
        self.was_cut |= isinstance(error, StreamLostError) and error.args[1:] == ("ECONNRESET",)
        self._go()
        self._on_close(error)

    def _go(self) -> None:
        if not self.is_gone:
            self.is_gone = True
            self._on_gone(self)


def _is_busy(owner: RpcConnection | BlobConnection | None) -> bool:
    """Whether somebody waits for an answer: of blobs one comes, or at least a part of it, in less time than a stream may be idle."""
    return isinstance(owner, RpcConnection) and bool(owner.in_flight or owner.working)
