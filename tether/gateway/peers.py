"""What the kernel knows of a connection: whose socket is at its other end, how much of an answer is still to go."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import sys
import termios
from typing import Any, Final

from tether.gateway.admission import Peer

__all__ = ["cut_off", "peer_of", "unsent"]

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_SOCKET: Final = struct.Struct("!HH16s16sI8s")
"""`inet_diag_sockid` (linux/inet_diag.h): ports and addresses of source and target, interface, cookie."""
_NO_COOKIE: Final = b"\xff" * 8
_UID_AT: Final = 16 + 4 + _SOCKET.size + 12
"""In the answer: after netlink's header, family and state, the socket, and three counters of 32 bits."""
_ESTABLISHED: Final = 1
"""Sockets in later states are listed with uid 0, which is not root's."""


def peer_of(transport: asyncio.BaseTransport, *, ask_user: bool) -> Peer:
    """The peer of a connection. `ask_user` looks the owner up as well, which asks the kernel: do it once, and only
    where it decides something. Where the system has no such table (macOS) nobody is the same user and a key is needed.
    """
    name, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if transport.get_extra_info("socket") is not None and transport.get_extra_info("socket").family == socket.AF_UNIX:
        return Peer(None, loopback=True, same_user=_is_ours(_unix_uid(transport.get_extra_info("socket"))))
    if not (isinstance(name, tuple) and isinstance(own, tuple)):
        return Peer()
    loopback = _is_loopback(name[0]) and _is_loopback(own[0])
    return Peer(name[0], loopback, ask_user and loopback and _is_ours(_tcp_uid(name, own)))


def _is_ours(uid: int | None) -> bool:
    return uid is not None and uid in {os.getuid(), 0}


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _unix_uid(sock: Any) -> int | None:
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _tcp_uid(theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> int | None:
    """The owner of the socket at the other end, asked of the kernel by its addresses: 20 µs, where reading /proc/net/tcp takes 10 ms."""
    source, target = _address(theirs[0]), _address(ours[0])
    family = socket.AF_INET if source.version == 4 else socket.AF_INET6  # noqa: PLR2004 (IP version)
    wanted = _SOCKET.pack(int(theirs[1]), int(ours[1]), source.packed, target.packed, 0, _NO_COOKIE)
    request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 1 << _ESTABLISHED) + wanted
    header = struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, 1, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
            kernel.send(header + request)
            answer = kernel.recv(4096)
    except (AttributeError, OSError):  # not Linux, or not allowed here
        return None
    if len(answer) < _UID_AT + 4 or struct.unpack_from("=H", answer, 4)[0] != _SOCK_DIAG_BY_FAMILY or answer[17] != _ESTABLISHED:
        return None
    return int(struct.unpack_from("=I", answer, _UID_AT)[0])


def unsent(transport: asyncio.WriteTransport) -> int:
    """Bytes of answers that the client has not taken: ours, and the kernel's, which hold megabytes and hide a slow reader's progress."""
    queued, sock = b"\0" * 4, transport.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):  # not every system counts them
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, queued)
    return transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)


def cut_off(transport: asyncio.WriteTransport) -> None:
    """Reset the connection: closing it would leave the kernel with what the client does not read."""
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
