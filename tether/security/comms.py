"""How a process of a cluster speaks Dask's comms: under the files of its role, and without losing what it opens.

Tornado's client gives a connection back through futures that nobody else holds: a caller that is cancelled in the very turn of the loop in
which TCP or TLS came to be never sees it, and it stays open, at both ends, until a process goes. That turn is rare on a quiet machine and
the rule on a busy one, where the loop comes late to both the connection and the time-out (Dask's own ends an attempt after a fifth of it).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Any

from distributed import Security
from distributed.comm import backends
from distributed.comm.tcp import TLSBackend, TLSConnector, TLSListener
from tornado.iostream import IOStream, SSLIOStream
from tornado.tcpclient import TCPClient

from tether.security.tls import TlsFiles

__all__ = ["dask_security"]

_NEXT = 0.3
"""Seconds for an address of a host that has more of them: as long as tornado waits before it tries the next one."""


def dask_security(files: TlsFiles) -> Security:
    """Dask's settings for a role's files. From the first call on, this process loses no TLS connection that it opens."""
    if not isinstance(backends["tls"], _Backend):
        backends["tls"] = _Backend()
    return Security(**files.security())


class _Client(TCPClient):  # type: ignore[misc]  # tornado is untyped here
    """Tornado's, but for TLS, where it holds the stream from its first moment."""

    async def connect(
        self, host: str, port: int, af: socket.AddressFamily = socket.AF_UNSPEC, ssl_options: ssl.SSLContext | None = None, **options: Any
    ) -> IOStream:
        """Raises: OSError: no address of the host answered, or none has a certificate of the cluster."""
        if ssl_options is None:
            return await super().connect(host, port, af, **options)
        *others, last = await self.resolver.resolve(host, port, af)
        for family, address in others:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_NEXT):
                    return await _opened(SSLIOStream(socket.socket(family), ssl_options=ssl_options, **options), address, host)
        family, address = last
        return await _opened(SSLIOStream(socket.socket(family), ssl_options=ssl_options, **options), address, host)


async def _opened(stream: SSLIOStream, address: Any, host: str) -> SSLIOStream:
    try:
        return await stream.connect(address, server_hostname=host)
    except BaseException:
        stream.close()
        raise


class _Connector(TLSConnector):  # type: ignore[misc]  # distributed is untyped
    client = _Client(resolver=TLSConnector.client.resolver)


class _Listener(TLSListener):  # type: ignore[misc]
    def _handle_stream(self, stream: IOStream, address: Any) -> asyncio.Future[None]:
        """As Dask's; a stream whose TLS handshake is under way when the loop ends is closed, too."""
        handling: asyncio.Future[None] = asyncio.ensure_future(super()._handle_stream(stream, address))
        handling.add_done_callback(lambda _: stream.close() if handling.cancelled() else None)
        return handling


class _Backend(TLSBackend):  # type: ignore[misc]
    _connector_class = _Connector
    _listener_class = _Listener
