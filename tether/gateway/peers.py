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
from pathlib import Path
from typing import Any, Final

from tether.gateway.admission import Peer

__all__ = ["cut_off", "peer_of", "unsent"]

_TABLES: Final = ("/proc/net/tcp", "/proc/net/tcp6")
_ESTABLISHED: Final = b"01"
"""Sockets in later states are listed with uid 0, which is not root's."""


def peer_of(transport: asyncio.BaseTransport, *, ask_user: bool) -> Peer:
    """The peer of a connection. `ask_user` looks the owner up as well, which reads the kernel's table of sockets: do it once, and only
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
    """Columns of the table: sl, local, remote, state, queues, timer, retransmits, uid, timeout, inode."""
    wanted = {(mine, other) for mine in _forms(theirs) for other in _forms(ours)}
    for table in _TABLES:
        try:
            rows = Path(table).read_bytes().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            columns = row.split(None, 10)
            if (columns[1], columns[2]) in wanted and columns[3] == _ESTABLISHED:
                return int(columns[7])
    return None


def _forms(name: tuple[Any, ...]) -> tuple[bytes, ...]:
    """How the tables may write an address: IPv4 also as IPv6."""
    address, port = _address(name[0]), int(name[1])
    if address.version == 4:  # noqa: PLR2004 (IP version)
        mapped = ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + address.packed)
        return _form(address.packed, port), _form(mapped.packed, port)
    return (_form(address.packed, port),)


def _form(packed: bytes, port: int) -> bytes:
    """Words of 32 bits in the host's order, as the kernel prints them."""
    words = (int.from_bytes(packed[i : i + 4], sys.byteorder) for i in range(0, len(packed), 4))
    return b"".join(b"%08X" % word for word in words) + b":%04X" % port


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
