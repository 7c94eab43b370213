"""Pure: IP addresses as sockets of either family take and give them. Outside of this package one is `(host, port)` with a plain host."""

from __future__ import annotations

import socket
from functools import lru_cache

from tether.errors import RequestError
from tether.swarm.udx.wire import HEADER_NBYTES

__all__ = ["Address", "family_of", "overhead_of", "plain", "reachable"]

Address = tuple[str, int]
_MAPPED = "::ffff:"
_UDP_NBYTES = 8
_IP_NBYTES = {socket.AF_INET: 20, socket.AF_INET6: 40}


@lru_cache(1024)
def family_of(host: str) -> socket.AddressFamily:
    """The family of a numeric address; names are not looked up here, which would block the loop.

    Raises: RequestError: no IP address.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host.partition("%")[0])
        except (OSError, ValueError):
            continue
        return family
    raise RequestError(f"{host!r} is no IP address; look names up before they come here")


def reachable(address: Address, family: socket.AddressFamily) -> Address:
    """The address as a socket of this family takes it: one of both families knows IPv4 hosts as mapped ones.

    Raises: RequestError: no IP address, or one that such a socket can't reach.
    """
    host, port = address
    if not 0 < port < 1 << 16:
        raise RequestError(f"{port} is no port; a peer's is 1 to 65535")
    wanted = family_of(host)
    if wanted is family:
        return address
    if wanted is socket.AF_INET:
        return _MAPPED + host, port
    raise RequestError(f"an IPv4 socket can't reach {host}; bind one to '::'")


def plain(address: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    """The address as we speak of it, from what a socket gave."""
    if len(address) == 2:  # noqa: PLR2004  # IPv6 comes with flow and scope
        return address
    host, port, _, scope = address
    if host.startswith(_MAPPED) and "." in host:
        host = host[len(_MAPPED) :]
    return f"{host}%{scope}" if scope else host, port


def overhead_of(host: str) -> int:
    """Bytes of IP, UDP and UDX headers on the way to a host."""
    return _IP_NBYTES[family_of(host)] + _UDP_NBYTES + HEADER_NBYTES
