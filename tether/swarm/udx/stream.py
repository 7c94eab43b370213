"""A UDX stream on an asyncio loop: callbacks from its machine's events, its datagrams to sockets, its deadline on a timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

from tether.errors import PayloadTooLargeError, QueueFullError, RequestError
from tether.swarm.udx import wire
from tether.swarm.udx.addresses import Address, overhead_of
from tether.swarm.udx.machine import CloseCode, Data, Drained, Ended, Event, Machine, Message, Moved
from tether.swarm.udx.mtu import MAX_NBYTES
from tether.swarm.udx.wire import Buffer

if TYPE_CHECKING:
    from tether.swarm.udx.endpoint import Udx
    from tether.swarm.udx.sockets import UdxSocket

__all__ = ["Meter", "UdxStream"]

_MAX_QUEUED_NBYTES = 64 << 20
"""Written and not acknowledged: an application that does not wait for the drain is stopped before memory is."""
_MAX_ID = (1 << 32) - 1
_TIMER_SLACK = 0.0005


Meter = Callable[[int], float | None]
"""Asked before so many bytes are forwarded: seconds that they wait; None loses them."""
_FAR = 1 << 20
"""Packets that a number may be ahead of the last one that was forwarded: more than are ever under way."""


class Path(NamedTuple):
    """Where packets go, and through which socket."""

    socket: UdxSocket
    address: Address


class UdxStream:
    """A reliable stream each way, and messages beside it, to a peer whose address and stream id were agreed elsewhere.

    `on_close` gets None when both sides ended or `destroy` was called here, else udx-native's code: `ETIMEDOUT` the peer did not
    answer, `ECONNRESET` it destroyed the stream, `ECANCELED` our socket was closed. No callback comes after it. An exception of a
    callback goes to the loop's exception handler. `on_firewall(socket, host, port)` is asked for packets that come through another
    socket than the stream's, before `connect` thus for all, and says True to refuse them; it may connect. Without one they are
    refused. What was not refused before `connect` is delivered after it.
    """

    def __init__(  # noqa: PLR0913  # callbacks by name
        self,
        udx: Udx,
        id: int,  # noqa: A002  # UDX' word
        *,
        on_data: Callable[[bytes], object] | None = None,
        on_end: Callable[[], object] | None = None,
        on_drain: Callable[[], object] | None = None,
        on_close: Callable[[CloseCode | None], object] | None = None,
        on_message: Callable[[bytes], object] | None = None,
        on_firewall: Callable[[UdxSocket, str, int], bool] | None = None,
        on_remote_changed: Callable[[], object] | None = None,
    ) -> None:
        self.id = int(id)
        self.udx = udx
        self.on_data, self.on_end, self.on_drain, self.on_close = on_data, on_end, on_drain, on_close
        self.on_message, self.on_firewall, self.on_remote_changed = on_message, on_firewall, on_remote_changed
        self.socket: UdxSocket | None = None
        self.remote: Address | None = None
        self.relay: UdxStream | None = None
        """Where packets of this stream are forwarded to, if they are."""
        self.machine = Machine(udx.clock())
        self._relayed: set[UdxStream] = set()
        self._meter: Meter | None = None
        self._passed = b""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._is_scheduled = False
        self._is_closed = False
        udx.add_stream(self)

    # -- what it is

    @property
    def is_connected(self) -> bool:
        """Whether it has a remote and is not closed."""
        return self.machine.is_connected

    @property
    def is_closed(self) -> bool:
        """Whether `on_close` was called."""
        return self._is_closed

    @property
    def remote_id(self) -> int:
        """The peer's id of the stream."""
        return self.machine.sender.remote_id

    @property
    def rtt(self) -> float:
        """Smoothed round trip in seconds; 0 before the first."""
        return self.machine.sender.trip.smoothed

    @property
    def mtu(self) -> int:
        """Bytes of the largest packet, IP header included, that is known to pass."""
        return self.machine.sender.mtu.size

    @property
    def pulse(self) -> tuple[int, bool]:
        """How many packets came so far, and whether the peer owes one: something that was sent is not acknowledged."""
        sender = self.machine.sender
        return sender.statistics.packets_received, not sender.flight.is_empty

    @property
    def stats(self) -> dict[str, float]:
        """What was counted and is known of the path: `nbytes_sent`, `resent`, `timeouts`, `window` (packets), `bandwidth` (bytes/s) …"""
        sender = self.machine.sender
        return {
            **sender.statistics.as_dict(),
            "rtt": sender.trip.smoothed,
            "mtu": sender.mtu.size,
            "window": sender.congestion.window,
            "bandwidth": sender.congestion.bandwidth * sender.mtu.payload_nbytes,
            "in_flight": sender.flight.count,
            "unacknowledged_nbytes": sender.unacknowledged_nbytes,
            "unread_nbytes": self.machine.receiver.nbytes,
        }

    # -- what the application does

    def connect(self, socket: UdxSocket, remote_id: int, port: int, host: str) -> None:
        """Send to this peer from now on; an unbound socket is bound.

        Raises: RequestError: connected already, no address and port, or one that the socket can't reach.
        """
        if self.machine.is_over:
            return
        if self.machine.is_connected:
            raise RequestError("the stream is connected; change_remote() leads it to another peer address")
        path = self._attach(socket, remote_id, port, host)
        self.machine.connect(path, remote_id, overhead_of(host), self.udx.clock())
        self._schedule()

    def change_remote(self, socket: UdxSocket, remote_id: int, port: int, host: str) -> None:
        """Send to another address of the peer, through any socket of the same `Udx`.

        `on_remote_changed` follows when all that was sent to the former one is acknowledged.

        Raises: RequestError: not connected, no address and port, or one that the socket can't reach.
        """
        if self.machine.is_over:
            return
        if not self.machine.is_connected:
            raise RequestError("the stream is not connected; connect() it")
        former = self.socket
        path = self._attach(socket, remote_id, port, host)
        if former is not None and former is not socket:
            former.streams.discard(self)
        self.machine.change_remote(path, remote_id, overhead_of(host), self.udx.clock())
        self._schedule()

    def write(self, data: Buffer, *, owned: bool = False) -> bool:
        """Queue bytes; False: wait for `on_drain`. Dropped on a stream that is closed or ended.

        Copied unless `bytes`, or `owned`: the caller will not change them any more.

        Raises: QueueFullError: 64 MiB wait already.
        """
        if self.machine.sender.unacknowledged_nbytes > _MAX_QUEUED_NBYTES:
            raise QueueFullError(f"{_MAX_QUEUED_NBYTES >> 20} MiB wait to be sent; after write() gave False wait for on_drain")
        self._schedule()
        return self.machine.write(data if owned or type(data) is bytes else bytes(data))

    def write_end(self) -> None:
        """Nothing more is written: the peer gets its end behind what was. The other direction stays open."""
        self.machine.end()
        self._schedule()

    def send_message(self, data: Buffer) -> None:
        """Send a datagram to the peer's `on_message`: it may be lost, doubled or early. Dropped where the stream is not connected.

        Raises: PayloadTooLargeError: it has more bytes than a packet.
        """
        room = MAX_NBYTES - self.machine.sender.mtu.overhead
        if len(data) > room:
            raise PayloadTooLargeError(f"a message has room for {room} bytes, these are {len(data)}; write them to the stream")
        self.machine.send_message(data)
        self._transmit()

    def poke(self) -> None:
        """Ask the peer for a sign of life now, whatever else waits to be sent: it is seen in `pulse`."""
        self.machine.poke()
        self._transmit()

    def set_keepalive(self, ms: float) -> None:
        """Ask for a sign of life after so many milliseconds of silence; 0: don't. Seven in a row without an answer, and 15 s, close it."""
        self.machine.set_keepalive(ms / 1000, self.udx.clock())
        self._arm()

    def pause(self) -> None:
        """No `on_data` until `resume`, but for what is being delivered; the peer may send what the window holds, 4 MiB, and then waits."""
        self.machine.pause()

    def resume(self) -> None:
        """Deliver again what came and what comes."""
        self.machine.resume()
        self._schedule()

    def destroy(self) -> None:
        """Close at once: what waits is not sent, the peer's stream closes with ECONNRESET. A relayed one closes without a word."""
        if self.relay is not None:
            self.abort(None)
        elif not self._is_closed:
            self.machine.destroy(self.udx.clock())
            self._finish()

    def relay_to(self, stream: UdxStream, meter: Meter | None = None) -> None:
        """Forward each packet that comes for this stream to the peer of the other one.

        Done both ways, two peers speak through here and keep their encryption to themselves. Where one closes the other does.
        `meter` bounds it.

        Raises: RequestError: it is forwarded already, or the other one is closed.
        """
        if self.relay is not None or stream.is_closed:
            raise RequestError("a stream is relayed once, and to one that is open; make two new ones")
        self.relay, self._meter = stream, meter
        stream._relayed.add(self)

    def dismiss(self) -> None:
        """End a relayed stream and the one it is forwarded to, and tell both peers, who else would find out after many seconds.

        Not where they may go on without the relay: it would end that too.
        """
        for stream in (self, self.relay):
            if stream is not None:
                stream.tell_end()
        self.abort(None)

    # -- what sockets and the endpoint do

    def is_refused(self, socket: UdxSocket, address: Address) -> bool:
        """Whether a packet that came through another socket is none of ours."""
        if self.machine.is_over:
            return False
        return self.on_firewall is None or bool(self.udx.call(self.on_firewall, socket, *address, otherwise=True)) or self.machine.is_over

    def forward(self, datagram: memoryview, header: wire.Header) -> None:
        """Send a packet on to the peer of `relay`."""
        if header[2] & wire.DESTROY:
            self._meter = None  # what ends it does not wait
        self.forward_batch(datagram, len(datagram))
        if header[2] & wire.DESTROY:
            self.abort("ECONNRESET")

    def forward_batch(self, packets: memoryview, nbytes: int) -> bool:
        """Send a batch on; False if it is not all this stream's, or something must be looked at packet by packet."""
        target = self.relay
        data = bytearray(packets)
        count = len(data) // nbytes
        mine = all(data[4 + at :: nbytes].count(byte) == count for at, byte in enumerate(self.id.to_bytes(4, "little")))
        if target is None or (count > 1 and (not mine or any(flags & wire.DESTROY for flags in data[2::nbytes]))):
            return False
        wait = None if not target.is_connected else 0.0 if self._meter is None else self._meter(len(data))
        if wait is not None:
            wire.readdress(data, nbytes, target.remote_id)
            if wait:
                self.udx.loop.call_later(wait, target.pass_on, data, nbytes)
            else:
                target.pass_on(data, nbytes)
        return True

    def pass_on(self, data: bytearray, nbytes: int) -> None:
        """Send the peer what another stream forwards to it."""
        path = self.machine.sender.path
        if not self._is_closed and isinstance(path, Path):
            self._passed = bytes(data[12:16])
            path.socket.transmit(data, nbytes, path.address)

    def tell_end(self) -> None:
        """Tell the peer that the stream is over, as the one whose packets are forwarded to it would."""
        seq = int.from_bytes(self._passed, "little") + _FAR
        self.pass_on(bytearray(wire.build_packet(wire.DESTROY, self.remote_id, 0, seq, 0)), wire.HEADER_NBYTES)

    def abort(self, code: CloseCode | None) -> None:
        """Close without a word to the peer."""
        if not self._is_closed:
            self.machine.abort(code)
            self._finish()

    def settle(self, now: float) -> None:
        """Tell the application what came, send what is to be sent, set the timer."""
        for event in self.machine.turn(now):
            self._tell(event)
        while self.machine.flush(now):
            self._transmit()
        self._transmit()
        if self.machine.is_done:
            self._finish()
        else:
            self._arm()

    def forget(self) -> None:
        """Do not answer the peer any more: its id is free."""
        self.udx.remove_stream(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _attach(self, socket: UdxSocket, remote_id: int, port: int, host: str) -> Path:
        if not 0 <= remote_id <= _MAX_ID:
            raise RequestError(f"{remote_id} is no stream id; it has 32 bits")
        if not socket.is_bound:
            socket.bind()
        path = Path(socket, socket.reachable((host, int(port))))
        self.socket, self.remote = socket, (host, int(port))
        socket.streams.add(self)
        return path

    def _tell(self, event: Event) -> None:
        match event:
            case Data(data):
                self._call(self.on_data, data)
            case Message(data):
                self._call(self.on_message, data)
            case Ended():
                self._call(self.on_end)
            case Drained():
                self._call(self.on_drain)
            case Moved():
                self._call(self.on_remote_changed)
            case _:
                assert_never(event)

    def _call(self, callback: Callable[..., object] | None, *args: Any) -> None:
        if callback is not None:
            self.udx.call(callback, *args)

    def _schedule(self) -> None:
        """Settle once this turn of the loop is over: a hundred small writes become one batch."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self.udx.loop.call_soon(self._on_scheduled)

    def _on_scheduled(self) -> None:
        self._is_scheduled = False
        self.settle(self.udx.clock())

    def _transmit(self) -> None:
        outgoing = self.machine.outgoing
        for data, nbytes, path, may_fragment in outgoing:
            if isinstance(path, Path):
                socket = self.socket if path.socket.is_closed and self.socket is not None else path.socket
                socket.transmit(data, nbytes, path.address, may_fragment=may_fragment)
        outgoing.clear()

    def _arm(self) -> None:
        """An earlier timer stays and looks again when it fires: most deadlines move on before they come."""
        deadline = self.machine.deadline
        if not deadline or (self._timer is not None and self._timer_at <= deadline + _TIMER_SLACK):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self.udx.loop.call_later(max(0.0, deadline - self.udx.clock()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self.udx.clock()
        deadline = self.machine.deadline
        if deadline and now >= deadline - _TIMER_SLACK:
            self.machine.expire(max(now, deadline))
        if self.machine.is_gone:
            self._finish()
        else:
            self.settle(now)

    def _finish(self) -> None:
        """The stream is closed: say so once, and stay only to answer the peer."""
        self._transmit()
        if not self._is_closed:
            self._is_closed = True
            self._detach()
            self.udx.keep_answering(self)
        if self.machine.is_gone:
            self.forget()
        else:
            self._arm()

    def _detach(self) -> None:
        if self.socket is not None:
            self.socket.streams.discard(self)
        if self.relay is not None:
            self.relay._relayed.discard(self)  # noqa: SLF001
        for stream in list(self._relayed):
            stream.destroy()
        callback, code = self.on_close, self.machine.code
        self.on_data = self.on_end = self.on_drain = self.on_close = self.on_message = self.on_firewall = self.on_remote_changed = None
        self._call(callback, code)
