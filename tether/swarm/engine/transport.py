"""UDX for the bundle: its sockets and streams by number. `js/udx.js` is the other half.

A stream's bytes go to JavaScript, or, once its handshake is done and it was handed over, to a `SecureStream`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import Callable
from typing import Protocol

import psutil
import structlog

from tether.errors import PortBusyError, TetherError
from tether.swarm.engine.bridge import FAILED, MAX_NBYTES, OK, Bridge, Memory
from tether.swarm.udx import Udx, UdxSocket, UdxStream

__all__ = ["Receiver", "Transport", "network_interfaces"]

log = structlog.get_logger("tether.swarm")

_MAX_TEXTS = 4096
"""Addresses whose two forms are remembered: a flood from many must not fill memory."""


class Receiver(Protocol):
    """Who gets what comes on a stream."""

    def data_arrived(self, data: bytes, /) -> None: ...
    def ended(self) -> None: ...
    def drain(self) -> None: ...
    def carrier_closed(self, code: str | None, /) -> None: ...


class Transport:
    """What JavaScript reaches of UDX, and what UDX tells it."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self.memory = bridge.memory
        """The bundle's, once it has allocated it."""
        self._udx: Udx | None = None
        self._handles = 0
        self._sockets: dict[int, UdxSocket] = {}
        self._numbers: dict[UdxSocket, int] = {}
        self._streams: dict[int, _Stream] = {}
        self._resolving: set[asyncio.Task[None]] = set()
        self._texts: dict[int, str] = {}
        self._addresses: dict[str, int] = {}

    def attach(self) -> None:
        """The bundle is loaded."""
        self._datagram = self._bridge.entry("datagram")
        self._resolved = self._bridge.entry("resolved")
        self.tell_interfaces = self._bridge.entry("interfacesChanged")
        self.entries = _StreamEntries(self._bridge)

    def use(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sockets and streams belong to this loop from now on."""
        self._udx = Udx(loop)

    def functions(self) -> dict[str, Callable[[], None]]:
        """By the names that `js/udx.js` uses."""
        return {
            "interfaces": self._interfaces,
            "resolve": self._resolve,
            "socketBind": self._socket_bind,
            "socketClose": self._socket_close,
            "socketSend": self._socket_send,
            "streamNew": self._stream_new,
            "streamConnect": self._stream_connect,
            "streamChange": self._stream_change,
            "streamWrite": self._stream_write,
            "streamEnd": self._stream_end,
            "streamDestroy": self._stream_destroy,
            "streamMessage": self._stream_message,
            "streamKeepalive": self._stream_keepalive,
            "streamPause": self._stream_pause,
            "streamRelay": self._stream_relay,
            "streamFigures": self._stream_figures,
        }

    def stream(self, handle: int) -> UdxStream | None:
        """The stream with this number, while it is there."""
        stream = self._streams.get(handle)
        return None if stream is None else stream.udx

    def hand(self, handle: int, receiver: Receiver) -> None:
        """From now on the stream's bytes are the receiver's."""
        self._streams[handle].receiver = receiver

    def receiver(self, handle: int) -> Receiver | None:
        """Who gets what comes on it."""
        stream = self._streams.get(handle)
        return None if stream is None else stream.receiver

    def text_of(self, address: int) -> str:
        """`2130706433` → `127.0.0.1`."""
        text = self._texts.get(address)
        if text is None:
            text = str(ipaddress.IPv4Address(address))
            if len(self._texts) == _MAX_TEXTS:
                self._texts.clear()
            self._texts[address] = text
        return text

    def number_of(self, host: str) -> int:
        """`127.0.0.1` → `2130706433`."""
        number = self._addresses.get(host)
        if number is None:
            number = int.from_bytes(socket.inet_aton(host))
            if len(self._addresses) == _MAX_TEXTS:
                self._addresses.clear()
            self._addresses[host] = number
        return number

    # Sockets.

    def _interfaces(self) -> None:
        self.memory.control[0] = self.memory.put_text(json.dumps(network_interfaces()))

    def _resolve(self) -> None:
        number, nbytes = self.memory.control[:2]
        name = bytes(self.memory.outbox[:nbytes]).decode()
        task = asyncio.create_task(self._look_up(number, name), name=f"swarm-resolve-{name}")
        self._resolving.add(task)
        task.add_done_callback(self._resolving.discard)

    async def _look_up(self, number: int, name: str) -> None:
        status, address = OK, 0
        try:
            found = await asyncio.get_running_loop().getaddrinfo(name, None, family=socket.AF_INET, type=socket.SOCK_DGRAM)
            address = self.number_of(str(found[0][4][0]))
        except (OSError, UnicodeError):  # nobody has this name, or nobody can: a label of it is empty, or too long
            status = FAILED
        control = self.memory.control
        control[0], control[1], control[2] = number, status, address
        self._resolved()

    def _socket_bind(self) -> None:
        port, address = self.memory.control[:2]
        control = self.memory.control
        if self._udx is None:
            control[0], control[1] = FAILED, self.memory.put_text("ENOTCONN\nThe engine has no event loop")
            return
        udp = self._udx.socket()
        try:
            bound = udp.bind(port, self.text_of(address))
        except PortBusyError as error:
            control[0], control[1] = FAILED, self.memory.put_text(f"EADDRINUSE\n{error}")
            return
        except TetherError as error:
            control[0], control[1] = FAILED, self.memory.put_text(f"EADDRNOTAVAIL\n{error}")
            return
        self._handles += 1
        self._sockets[self._handles] = udp
        self._numbers[udp] = self._handles
        udp.on_message = _Datagrams(self, self._handles).arrived
        control[0], control[1], control[2] = OK, self._handles, bound

    def _socket_close(self) -> None:
        udp = self._sockets.pop(self.memory.control[0], None)
        if udp is not None:
            del self._numbers[udp]
            udp.close()

    def _socket_send(self) -> None:
        handle, nbytes, address, port, ttl = self.memory.control[:5]
        udp = self._sockets.get(handle)
        if udp is not None:
            udp.send(bytes(self.memory.outbox[:nbytes]), (self.text_of(address), port), ttl or None)

    def arrived(self, handle: int, data: bytes, remote: tuple[str, int]) -> None:
        """A datagram of the DHT."""
        memory = self.memory
        nbytes = len(data)
        memory.inbox[:nbytes] = data
        control = memory.control
        control[0], control[1], control[2], control[3] = handle, nbytes, self.number_of(remote[0]), remote[1]
        self._datagram()

    # Streams.

    def _stream_new(self) -> None:
        self._handles += 1
        handle = self._handles
        if self._udx is None:
            return
        self._streams[handle] = _Stream(self, handle, self._udx, self.memory.control[0])
        self.memory.control[0] = handle

    def forget(self, handle: int) -> None:
        """It is closed."""
        self._streams.pop(handle, None)

    def ask_firewall(self, handle: int, udp: UdxSocket, host: str, port: int) -> bool:
        """Whether JavaScript refuses a packet that came for this stream on another socket than its own."""
        control = self.memory.control
        control[0], control[1], control[2], control[3] = handle, self._numbers.get(udp, 0), port, self.number_of(host)
        self.entries.firewall()
        return control[0] != 0

    def _stream_connect(self) -> None:
        handle, number, remote_id, port, address = self.memory.control[:5]
        stream, udp = self._streams.get(handle), self._sockets.get(number)
        if stream is not None and udp is not None:
            stream.udx.connect(udp, remote_id, port, self.text_of(address))

    def _stream_change(self) -> None:
        handle, number, remote_id, port, address = self.memory.control[:5]
        stream, udp = self._streams.get(handle), self._sockets.get(number)
        if stream is not None and udp is not None:
            stream.udx.change_remote(udp, remote_id, port, self.text_of(address))

    def _stream_write(self) -> None:
        handle, nbytes = self.memory.control[:2]
        stream = self._streams.get(handle)
        go_on = stream is None or stream.udx.write(bytes(self.memory.outbox[:nbytes]))
        self.memory.control[0] = 1 if go_on else 0

    def _stream_end(self) -> None:
        stream = self._streams.get(self.memory.control[0])
        if stream is not None:
            stream.udx.write_end()

    def _stream_destroy(self) -> None:
        stream = self._streams.get(self.memory.control[0])
        if stream is not None:
            stream.udx.destroy()

    def _stream_message(self) -> None:
        handle, nbytes = self.memory.control[:2]
        stream = self._streams.get(handle)
        if stream is not None:
            stream.udx.send_message(bytes(self.memory.outbox[:nbytes]))

    def _stream_keepalive(self) -> None:
        handle, milliseconds = self.memory.control[:2]
        stream = self._streams.get(handle)
        if stream is not None:
            stream.udx.set_keepalive(milliseconds)

    def _stream_pause(self) -> None:
        handle, paused = self.memory.control[:2]
        stream = self._streams.get(handle)
        if stream is not None:
            (stream.udx.pause if paused else stream.udx.resume)()

    def _stream_relay(self) -> None:
        source, target = (self._streams.get(handle) for handle in self.memory.control[:2])
        if source is not None and target is not None:
            source.udx.relay_to(target.udx)

    def _stream_figures(self) -> None:
        stream = self._streams.get(self.memory.control[0])
        rtt, mtu = (0.0, 1200) if stream is None else (stream.udx.rtt, stream.udx.mtu)
        self.memory.control[0], self.memory.control[1] = round(rtt * 1e3), mtu


class _Datagrams:
    """Where a socket's datagrams go; a method of its own, so that the socket's number need not cross."""

    __slots__ = ("_handle", "_transport")

    def __init__(self, transport: Transport, handle: int) -> None:
        self._transport, self._handle = transport, handle

    def arrived(self, data: bytes, remote: tuple[str, int]) -> None:
        self._transport.arrived(self._handle, data, remote)


class _StreamEntries:
    """What a stream calls in the bundle."""

    def __init__(self, bridge: Bridge) -> None:
        self.memory: Memory = bridge.memory
        self.data = bridge.entry("streamData")
        self.message = bridge.entry("streamMessage")
        self.end = bridge.entry("streamEnd")
        self.drain = bridge.entry("streamDrain")
        self.changed = bridge.entry("streamChanged")
        self.alive = bridge.entry("streamAlive")
        self.closed = bridge.entry("streamClosed")
        self.firewall = bridge.entry("streamFirewall")


class _Stream:
    """One stream of UDX and who gets what comes on it: JavaScript, until it is handed over."""

    def __init__(self, transport: Transport, handle: int, udx: Udx, stream_id: int) -> None:
        self._transport, self._handle = transport, handle
        self._entries = transport.entries
        self._moved = False
        self.receiver: Receiver = self
        self.udx = UdxStream(
            udx,
            stream_id,
            on_data=self._data,
            on_end=self._end,
            on_drain=self._drain,
            on_close=self._closed,
            on_message=self._message,
            on_firewall=self._firewall,
            on_remote_changed=self._changed,
        )

    # From UDX.

    def _data(self, data: bytes) -> None:
        if self._moved:
            self._moved = False
            self._tell(self._entries.alive)
        try:
            self.receiver.data_arrived(data)
        except Exception:
            log.exception("swarm.stream.failed", stream=self._handle)
            self.udx.destroy()

    def _end(self) -> None:
        self.receiver.ended()

    def _drain(self) -> None:
        self.receiver.drain()

    def _closed(self, code: str | None) -> None:
        receiver = self.receiver
        if receiver is not self:
            receiver.carrier_closed(code)
        self.carrier_closed(code)

    def _message(self, data: bytes) -> None:
        self._put(self._entries.message, data)

    def _firewall(self, udp: UdxSocket, host: str, port: int) -> bool:
        return self._transport.ask_firewall(self._handle, udp, host, port)

    def _changed(self) -> None:
        self._moved = self.receiver is not self
        self._tell(self._entries.changed)

    # To JavaScript.

    def data_arrived(self, data: bytes) -> None:
        for at in range(0, len(data), MAX_NBYTES):
            self._put(self._entries.data, data[at : at + MAX_NBYTES])

    def ended(self) -> None:
        self._tell(self._entries.end)

    def drain(self) -> None:
        self._tell(self._entries.drain)

    def carrier_closed(self, code: str | None) -> None:
        self._transport.forget(self._handle)
        self._put(self._entries.closed, (code or "").encode())

    def _tell(self, entry: Callable[[], None]) -> None:
        self._entries.memory.control[0] = self._handle
        entry()

    def _put(self, entry: Callable[[], None], data: bytes) -> None:
        memory = self._entries.memory
        nbytes = len(data)
        memory.inbox[:nbytes] = data
        memory.control[0], memory.control[1] = self._handle, nbytes
        entry()


def network_interfaces() -> list[dict[str, object]]:
    """This machine's IPv4 addresses, as udx-native lists them."""
    return [
        {"name": name, "host": address.address, "family": 4, "internal": address.address.startswith("127.")}
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    ]
