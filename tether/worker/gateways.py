"""The gateways of one model version: its Unix socket, who is connected to it, what is read of them and written to them."""

from __future__ import annotations

import contextlib
import fcntl
import selectors
import socket
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from tether.errors import WorkerLostError
from tether.types import ModelVersion
from tether.wire.connection import Connection
from tether.wire.frames import LEAVING, Frame

__all__ = ["Arrived", "Gateways"]

log = structlog.get_logger("tether.worker")
Arrived = list[tuple[selectors.SelectorKey, int]]
"""Which sockets have something to read, or take something again."""
_FAREWELL = 0.5
"""Seconds for gateways to read the last word of a model that goes."""
_GLANCE = 0.005
"""Seconds between looks whether they have."""
_WAKES = 4096
"""Bytes that other threads wrote to wake this one; how many of them is nothing."""


class Gateways:
    """Belongs to the model's thread; `rouse` is for others."""

    def __init__(
        self,
        model: ModelVersion,
        endpoint: Path,
        hear: Callable[[Connection, Frame], None],
        lost: Callable[[Connection], None],
        roused: Callable[[], None],
    ) -> None:
        """`hear` takes what a gateway sent, `lost` is told of one that went away.

        Raises: WorkerLostError: the socket's path can't be used.
        """
        self._model, self._endpoint, self._hear, self._lost, self._roused = model, endpoint, hear, lost, roused
        self._connections: dict[int, Connection] = {}
        self._owing: set[Connection] = set()
        """Those that did not take all of what they asked for: they are written to when they do."""
        self._wake, self._waker = socket.socketpair()
        self._listener = _listener(endpoint)
        self._is_leaving = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)

    def __len__(self) -> int:
        return len(self._connections)

    def rouse(self) -> None:
        """Have the model's thread call `roused` soon. From any thread."""
        with contextlib.suppress(OSError):  # its thread has ended by itself
            self._waker.send(b"x")

    def _woken(self, _events: int) -> None:
        self._wake.recv(_WAKES)
        self._roused()

    def wait(self, pause: float | None) -> Arrived:
        """Until something arrives, or that many seconds."""
        return self._selector.select(pause)

    def serve(self, arrived: Arrived) -> None:
        """Read and write."""
        for key, events in arrived:
            key.data(events)

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.warning("gateway connection refused", model=str(self._model), error=str(error))
            return
        connection = self._connections[sock.fileno()] = Connection(sock)
        self._selector.register(sock, selectors.EVENT_READ, lambda events: self._ready(connection, events))
        if self._is_leaving:
            connection.writer.reply(0, LEAVING, b"", 0)
            self.send(connection)

    def _ready(self, connection: Connection, events: int) -> None:
        if connection.socket.fileno() < 0:  # dropped while its batch ran
            return
        if events & selectors.EVENT_READ:
            self._guarded(connection, self._receive)
        if events & selectors.EVENT_WRITE:
            self._guarded(connection, Connection.send)
        self.send(connection)

    def _receive(self, connection: Connection) -> None:
        frame = connection.receive()
        self._hear(connection, frame)
        frame.clear()
        connection.reader.release()

    def send(self, connection: Connection) -> None:
        """What was written for it; what it does not take now goes out when it does."""
        if connection.writer and connection.socket.fileno() >= 0:
            self._guarded(connection, Connection.flush)
        if connection.owes != (connection in self._owing):
            self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        if connection.socket.fileno() < 0:
            return
        self._owing ^= {connection}
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.owes else 0)
        self._selector.modify(connection.socket, events, self._selector.get_key(connection.socket).data)

    def _guarded(self, connection: Connection, talk: Callable[[Connection], Any]) -> None:
        """A gateway that breaks the rules of the frames loses its own connection."""
        try:
            talk(connection)
        except OSError:
            self.drop(connection)
        except Exception:
            log.exception("gateway connection broken", model=str(self._model))
            self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """End the connection; what it asked for is asked elsewhere."""
        if self._connections.pop(connection.socket.fileno(), None) is None:
            return
        self._selector.unregister(connection.socket)
        self._owing.discard(connection)
        self._lost(connection)
        connection.close()

    def drop_all(self) -> None:
        """End all connections."""
        for connection in list(self._connections.values()):
            self.drop(connection)

    def leave(self) -> None:
        """Nobody finds the way here any more; who has found it is told, then and when it is let in."""
        if self._is_leaving:
            return
        with contextlib.suppress(OSError):
            self._endpoint.unlink()
        self._is_leaving = True
        for connection in list(self._connections.values()):
            connection.writer.reply(0, LEAVING, b"", 0)
            self.send(connection)

    @property
    def have_left(self) -> bool:
        """Whether all know that the model leaves, and need it no more."""
        # somebody may have come in before the way was closed
        return self._is_leaving and not self._connections and not self._selector.select(0)

    def part(self) -> None:
        """Say no more, and wait a moment until they have read what was said: who writes to a closed connection loses the rest of it."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _FAREWELL
        while any(map(_is_unread, self._connections.values())) and time.monotonic() < end:
            self.serve(self.wait(_GLANCE))

    def close(self) -> None:
        """Close all sockets."""
        self._listener.close()
        with contextlib.suppress(OSError):
            self._endpoint.unlink()
        for connection in self._connections.values():
            connection.close()
        self._selector.close()
        self._wake.close()
        self._waker.close()


def _is_unread(connection: Connection) -> bool:
    """Whether its gateway has not read all that was sent. Where the system does not count that, it has."""
    unread = bytes(4)
    with contextlib.suppress(OSError, AttributeError):
        unread = fcntl.ioctl(connection.socket.fileno(), termios.TIOCOUTQ, unread)
    return any(unread)


def _listener(endpoint: Path) -> socket.socket:
    """Raises: WorkerLostError."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        endpoint.unlink(missing_ok=True)
        listener.bind(str(endpoint))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise WorkerLostError(f"socket {endpoint}: {error.strerror}; is the folder writable and its path under 108 bytes?") from error
    return listener
