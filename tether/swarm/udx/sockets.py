"""UDX sockets on an asyncio loop: one receive path, which gives known streams their packets and `on_message` all else.

A wake-up takes up to 512 KiB off the kernel, hands them to the streams' machines, and then settles each stream that was touched
once: events, one ack, what may be sent.
"""

from __future__ import annotations

import socket as sockets
from collections.abc import Callable
from typing import TYPE_CHECKING

from tether.errors import PayloadTooLargeError, RequestError
from tether.swarm.udx import wire
from tether.swarm.udx.addresses import Address, family_of, plain, reachable
from tether.swarm.udx.datagrams import DatagramSocket
from tether.swarm.udx.wire import Buffer

if TYPE_CHECKING:
    from tether.swarm.udx.endpoint import Udx
    from tether.swarm.udx.stream import UdxStream

__all__ = ["SocketStatistics", "UdxSocket"]

_RECEIVES_A_WAKE_UP, _NBYTES_A_WAKE_UP = 64, 512 << 10
"""So much is still in the processor's cache when the application gets it, and then the loop's other work has its turn."""
_MAX_DATAGRAM_NBYTES = 65_507
_MAX_TTL = 255


class SocketStatistics:
    """Counted from the socket's beginning."""

    __slots__ = ("batches_received", "batches_sent", "nbytes_received", "nbytes_sent")

    def __init__(self) -> None:
        self.batches_received = self.batches_sent = 0
        self.nbytes_received = self.nbytes_sent = 0


class UdxSocket:
    """A UDP socket that streams and plain messages share. Made by `Udx.socket`."""

    def __init__(self, udx: Udx, family: sockets.AddressFamily) -> None:
        self.udx = udx
        self.on_message: Callable[[bytes, Address], object] | None = None
        """Gets every datagram that is no packet of a stream, with the address it came from."""
        self.streams: set[UdxStream] = set()
        """Those that send through it."""
        self.statistics = SocketStatistics()
        self.is_closed = False
        self._family = family
        self._datagrams: DatagramSocket | None = None
        self._is_writing = False

    @property
    def address(self) -> Address | None:
        """Where it is bound; None before that and after `close`."""
        return None if self._datagrams is None else self._datagrams.address

    @property
    def is_bound(self) -> bool:
        """Whether it has a port."""
        return self._datagrams is not None

    def bind(self, port: int = 0, host: str | None = None) -> int:
        """Take a port, 0: any free one; gives the port. `host`: '0.0.0.0' if not told, '::' serves IPv4 and IPv6.

        Raises: PortBusyError: the port is taken; RequestError: no address of this machine, or bound already.
        """
        if self._datagrams is not None or self.is_closed:
            raise RequestError("the socket is bound or closed already; make another with Udx.socket()")
        if host is None:
            host = "::" if self._family is sockets.AF_INET6 else "0.0.0.0"  # noqa: S104  # peers are to reach it
        self._family = family_of(host)
        self._datagrams = DatagramSocket(host, port, batches_out=self.udx.gso, batches_in=self.udx.gro)
        self.udx.loop.add_reader(self._datagrams.fileno(), self._on_readable)
        return self._datagrams.address[1]

    def send(self, data: Buffer, address: Address, ttl: int | None = None) -> None:
        """Send one datagram. `ttl`: hops it may take, few of which open a way through one's own NAT without reaching the peer's.

        Raises: RequestError: no IP address and port, or one of another family; PayloadTooLargeError: more than a datagram holds.
        """
        if len(data) > _MAX_DATAGRAM_NBYTES:
            raise PayloadTooLargeError(f"a datagram holds {_MAX_DATAGRAM_NBYTES} bytes, these are {len(data)}; write them to a stream")
        if ttl is not None and not 0 < ttl <= _MAX_TTL:
            raise RequestError(f"a TTL is 1 to {_MAX_TTL}, not {ttl}")
        if self.is_closed:
            return
        if self._datagrams is None:
            self.bind()
        self.transmit(bytes(data), len(data), self.reachable(address), ttl or 0)

    def close(self) -> None:
        """Give the port back; streams on it close with ECANCELED."""
        if self.is_closed:
            return
        self.is_closed = True
        self.udx.forget_socket(self)
        for stream in list(self.streams):
            stream.abort("ECANCELED")
        if self._datagrams is not None:
            self.udx.loop.remove_reader(self._datagrams.fileno())
            self.udx.loop.remove_writer(self._datagrams.fileno())
            self._datagrams.close()
            self._datagrams = None

    def reachable(self, address: Address) -> Address:
        """The address as this socket's family has it. Raises: RequestError: it can't be reached from here."""
        return reachable(address, self._family)

    def transmit(self, data: Buffer, nbytes: int, address: Address, ttl: int = 0, *, may_fragment: bool = False) -> None:
        """Send datagrams of `nbytes` each to what `reachable` gave; the data must not change any more."""
        datagrams = self._datagrams
        if datagrams is None:
            return
        self.statistics.batches_sent += 1
        self.statistics.nbytes_sent += len(data)
        datagrams.send(data, nbytes, address, ttl, may_fragment=may_fragment)
        if datagrams.is_waiting and not self._is_writing:
            self._is_writing = True
            self.udx.loop.add_writer(datagrams.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        datagrams = self._datagrams
        if datagrams is None:
            return
        datagrams.on_writable()
        if not datagrams.is_waiting:
            self._is_writing = False
            self.udx.loop.remove_writer(datagrams.fileno())

    def _on_readable(self) -> None:
        statistics = self.statistics
        enough = statistics.nbytes_received + _NBYTES_A_WAKE_UP
        for _ in range(_RECEIVES_A_WAKE_UP):
            found = self._datagrams.receive() if self._datagrams is not None else None
            if found is None:
                break
            nbytes, each, address = found
            statistics.batches_received += 1
            statistics.nbytes_received += nbytes
            self._take(self._datagrams.buffer, nbytes, each, address)  # type: ignore[union-attr]
            if statistics.nbytes_received >= enough:
                break
        self.udx.settle()

    def _take(self, buffer: bytearray, nbytes: int, each: int, address: Address) -> None:
        view = memoryview(buffer)
        if each == nbytes:
            self._take_one(view[:nbytes], address)
            return
        count = nbytes // each
        start = count * each if count > 1 and self._take_batch(buffer, count, each) else 0
        for at in range(start, nbytes, each):
            self._take_one(view[at : min(at + each, nbytes)], address)
            if self.is_closed:
                return

    def _take_batch(self, buffer: bytearray, count: int, each: int) -> bool:
        """Hand a whole batch to its stream, if it is of one and such that this is the same as packet by packet."""
        stream = self.udx.streams.get(wire.stream_of(buffer))
        if stream is None or stream.socket is not self or each < wire.HEADER_NBYTES:
            return False
        if stream.relay is not None:
            return stream.forward_batch(memoryview(buffer)[: count * each], each)
        if each == wire.HEADER_NBYTES:
            header = wire.parse_last_ack(buffer, count)
            if header is None:
                return False
            stream.machine.receive(buffer[:each], header)
        else:
            run = wire.parse_run(buffer, each, count)
            if run is None:
                return False
            stream.machine.receive_run(run, count * each)
        self.udx.touched.add(stream)
        return True

    def _take_one(self, datagram: memoryview, address: Address) -> None:
        header = wire.parse_header(datagram)
        stream = None if header is None else self.udx.streams.get(header[4])
        if header is None or stream is None:
            if self.on_message is not None:
                self.udx.call(self.on_message, bytes(datagram), plain(address))
        elif stream.socket is not self and stream.is_refused(self, plain(address)):
            return
        elif stream.relay is not None:
            stream.forward(datagram, header)
        else:
            stream.machine.receive(datagram, header)
            self.udx.touched.add(stream)
