"""A UDP socket as the kernel has it: batches where it knows them (UDP_SEGMENT, UDP_GRO), else one by one; TTL and fragmenting per send.

Linux only: batches, and setting "don't fragment", without which a search for the MTU finds what routers put together again.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections import deque
from typing import NamedTuple

from tether.errors import PortBusyError, RequestError
from tether.swarm.udx.addresses import Address, plain
from tether.swarm.udx.wire import Buffer

__all__ = ["RECEIVED_NBYTES", "DatagramSocket", "Queued"]

_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_MTU_DISCOVER = {socket.AF_INET: (socket.IPPROTO_IP, 10), socket.AF_INET6: (socket.IPPROTO_IPV6, 23)}
_DONT, _PROBE = 0, 3
"""Let the kernel fragment; never fragment, and ignore what the kernel believes of the path."""
_HOPS = {socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TTL), socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)}
_BUFFER_NBYTES = 4 << 20
"""Of the kernel, each way; it gives what its limits allow."""
RECEIVED_NBYTES = 1 << 16
"""The largest datagram, and the largest batch of them."""
_MAX_QUEUED = 1024
"""Sends that wait for the kernel's buffer. Beyond it they are lost, as in any full queue on the way."""
_BATCH_REFUSED = {errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT}
_IS_LINUX = sys.platform == "linux"
_SEGMENT = struct.Struct("=H")
_SEGMENT_RECEIVED = struct.Struct("=i")


class Queued(NamedTuple):
    """A send that waits. `nbytes`: where to cut; `ttl`: 0 for the usual one."""

    data: Buffer
    nbytes: int
    address: Address
    ttl: int
    may_fragment: bool


class DatagramSocket:
    """Non-blocking. What the network refuses is lost without a word, as on the way."""

    def __init__(self, host: str, port: int, *, batches_out: bool, batches_in: bool) -> None:
        """Bind.

        Raises: PortBusyError: another socket has the port; RequestError: the address is none of this machine's, or not allowed.
        """
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._batches_out = batches_out and _IS_LINUX
        self._queue: deque[Queued] = deque()
        self._socket = socket.socket(self.family, socket.SOCK_DGRAM)
        try:
            self._set_up(batches_in=batches_in and _IS_LINUX)
            self._socket.bind((host, port))
        except OverflowError as error:
            self._socket.close()
            raise RequestError(f"{port} is no port; name one of 1 to 65535, or 0 for any") from error
        except OSError as error:
            self._socket.close()
            if error.errno == errno.EADDRINUSE:
                raise PortBusyError(f"UDP port {port} of {host} is taken; name another, or 0 for any") from error
            raise RequestError(f"can't listen on {host} port {port}: {error.strerror}; name an address of this machine") from error
        self.address = plain(self._socket.getsockname())
        self._buffer = bytearray(RECEIVED_NBYTES)
        self._buffers = [self._buffer]

    @property
    def is_waiting(self) -> bool:
        """Whether sends wait for `on_writable`."""
        return bool(self._queue)

    def fileno(self) -> int:
        """For the event loop."""
        return self._socket.fileno()

    def receive(self) -> tuple[int, int, Address] | None:
        """Fill `buffer`: bytes, the size at which they are to be cut, where they are from; None: nothing is there."""
        try:
            nbytes, ancillary, _, address = self._socket.recvmsg_into(self._buffers, 64)
        except OSError:  # nothing there, or what the network said of an earlier send
            return None
        for level, kind, value in ancillary:
            if level == _SOL_UDP and kind == _UDP_GRO:
                return nbytes, _SEGMENT_RECEIVED.unpack_from(value)[0] or nbytes, address
        return nbytes, nbytes, address

    @property
    def buffer(self) -> bytearray:
        """What `receive` fills, each time anew."""
        return self._buffer

    def send(self, data: Buffer, nbytes: int, address: Address, ttl: int = 0, *, may_fragment: bool = False) -> None:
        """Send datagrams of `nbytes` each, of which the last may be shorter, behind those that wait. A buffer must not change meanwhile."""
        rest = data if self._queue else self._try(data, nbytes, address, ttl, may_fragment)
        if rest is not None and len(self._queue) < _MAX_QUEUED:
            self._queue.append(Queued(rest, nbytes, address, ttl, may_fragment))

    def on_writable(self) -> None:
        """Send what waits."""
        while self._queue:
            rest = self._try(*self._queue[0])
            if rest is not None:
                self._queue[0] = self._queue[0]._replace(data=rest)
                return
            self._queue.popleft()

    def close(self) -> None:
        """Give the port back; what waits is lost."""
        self._queue.clear()
        self._socket.close()

    def _set_up(self, *, batches_in: bool) -> None:
        self._socket.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self._try_option(socket.SOL_SOCKET, option, _BUFFER_NBYTES)
        if self.family == socket.AF_INET6:
            self._try_option(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._fragment(_PROBE)
        if batches_in:
            self._try_option(_SOL_UDP, _UDP_GRO, 1)

    def _try_option(self, level: int, option: int, value: int) -> None:
        try:
            self._socket.setsockopt(level, option, value)
        except OSError:  # the platform lacks it and all works without
            return

    def _fragment(self, how: int) -> None:
        if not _IS_LINUX:
            return
        self._try_option(*_MTU_DISCOVER[socket.AF_INET], how)
        if self.family == socket.AF_INET6:
            self._try_option(*_MTU_DISCOVER[socket.AF_INET6], how)

    def _try(self, data: Buffer, nbytes: int, address: Address, ttl: int, may_fragment: bool) -> Buffer | None:
        """What found no room; None: all was sent, or refused for good."""
        try:
            if ttl or may_fragment:
                self._send_specially(data, address, ttl, may_fragment=may_fragment)
            elif len(data) <= nbytes:
                self._socket.sendto(data, address)
            elif not self._batches_out:
                return self._send_one_by_one(data, nbytes, address)
            else:
                self._socket.sendmsg([data], [(_SOL_UDP, _UDP_SEGMENT, _SEGMENT.pack(nbytes))], 0, address)
        except (BlockingIOError, InterruptedError):
            return data
        except OSError as error:  # no route, too large, refused by a firewall: lost on the way
            if self._batches_out and len(data) > nbytes and error.errno in _BATCH_REFUSED:
                return self._try_without_batches(data, nbytes, address)
        return None

    def _try_without_batches(self, data: Buffer, nbytes: int, address: Address) -> Buffer | None:
        """Either this kernel or way knows no batches, or the packets are too large for it, which single ones are then too."""
        try:
            rest = self._send_one_by_one(data, nbytes, address)
        except OSError:
            return None
        self._batches_out = False
        return rest

    def _send_one_by_one(self, data: Buffer, nbytes: int, address: Address) -> Buffer | None:
        view = memoryview(data)
        for at in range(0, len(view), nbytes):
            try:
                self._socket.sendto(view[at : at + nbytes], address)
            except BlockingIOError:
                return view[at:]
        return None

    def _send_specially(self, data: Buffer, address: Address, ttl: int, *, may_fragment: bool) -> None:
        level, option = _HOPS[socket.AF_INET if "." in address[0] else self.family]
        usual = self._socket.getsockopt(level, option)
        if ttl:
            self._socket.setsockopt(level, option, ttl)
        if may_fragment:
            self._fragment(_DONT)
        try:
            self._socket.sendto(data, address)
        finally:
            if ttl:
                self._socket.setsockopt(level, option, usual)
            if may_fragment:
                self._fragment(_PROBE)
