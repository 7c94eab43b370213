"""How a process of a cluster speaks Dask's comms: under the files of its role, and without losing what it opens.

Tornado's client gives a connection back through futures that nobody else holds: a caller that is cancelled in the very turn of the loop in
which TCP or TLS came to be never sees it, and it stays open, at both ends, until a process goes. That turn is rare on a quiet machine and
the rule on a busy one, where the loop comes late to both the connection and the time-out (Dask's own ends an attempt after a fifth of it).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Coroutine, Iterable
from typing import Any

from distributed import Security
from distributed.comm import backends
from distributed.comm.tcp import TLSBackend, TLSConnector, TLSListener
from tornado.iostream import IOStream, SSLIOStream
from tornado.tcpclient import TCPClient

from tether.security.tls import TlsFiles

__all__ = ["dask_security"]

_NEXT = 0.3
"""Seconds before the next address of a host is tried beside those that have not answered: as long as tornado waits."""


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
        openings = (
            _opened(family, address, host, {"ssl_options": ssl_options, **options})
            for family, address in await self.resolver.resolve(host, port, af)
        )
        return await _first(openings)


async def _first(openings: Iterable[Coroutine[Any, Any, SSLIOStream]]) -> SSLIOStream:
    """The stream that is there first. The others go on until then: a slow handshake is no reason to give up.

    Nothing is awaited once it is there: who is cancelled in that turn would lose it.
    """
    tries: list[asyncio.Task[SSLIOStream]] = []
    first: asyncio.Task[SSLIOStream] | None = None
    try:
        for opening in openings:
            tries.append(asyncio.ensure_future(opening))
            if first := await _succeeded(tries, _NEXT):
                return first.result()
        first = await _succeeded(tries, None)
        return (first or tries[-1]).result()
    finally:
        for each in tries:
            if each is not first:
                each.cancel()
                each.add_done_callback(_close)


async def _succeeded(tries: list[asyncio.Task[SSLIOStream]], patience: float | None) -> asyncio.Task[SSLIOStream] | None:
    """None: all failed, or none did within so many seconds."""
    while True:
        if done := next((each for each in tries if each.done() and not each.exception()), None):
            return done
        pending = [each for each in tries if not each.done()]
        if not pending or not (await asyncio.wait(pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED))[0]:
            return None


def _close(opening: asyncio.Task[SSLIOStream]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


async def _opened(family: int, address: Any, host: str, options: dict[str, Any]) -> SSLIOStream:
    stream = SSLIOStream(socket.socket(family), **options)
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
