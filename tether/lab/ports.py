"""Which ports a lab gets: the seed ports, else the next free ones."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tether.errors import ConfigError, PortBusyError

__all__ = ["PortPicker", "bind_exactly", "holder_of", "ports_lock"]

_STEP = 10
"""A second lab on one machine gets 8010, 8011, 8012 …: the same last digits."""
_TRIES = 200


@contextmanager
def ports_lock(folder: Path) -> Iterator[int]:
    """The open file that labs of one user lock while they choose ports; not through a link, which would open a file of another's choice.

    Raises: ConfigError: it can't be opened.
    """
    descriptor = _opened(folder / "ports.lock")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"{path} can't be opened ({error.strerror}); remove it") from error


def holder_of(port: int) -> str:
    """Who listens on a port, for people: `python (pid 123)`, as far as this user may see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return "another program"


def _bound(host: str, port: int) -> socket.socket | None:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(1024)  # bind alone succeeds beside a listener that set SO_REUSEADDR on another address
    except OSError:
        sock.close()
        return None
    return sock


def bind_exactly(host: str, port: int) -> socket.socket:
    """A listening socket on the port that was asked for.

    Raises: PortBusyError: it is taken; the message names the holder.
    """
    sock = _bound(host, port)
    if sock is None:
        raise PortBusyError(f"port {port} is taken by {holder_of(port)}; stop it, or choose another with --port")
    return sock


class PortPicker:
    """Gives out free ports near the ones that were wished for, none twice.

    They are this lab's until `close`: a service that died and is started again finds its port free, whatever lab of this user starts
    meanwhile. Of a file that all these labs share it locks one byte for each; such a lock ends with its process, however that ends.
    (A socket of the supervisor's own that keeps a port for a service would keep it from the service, too.)
    """

    def __init__(self, host: str, folder: Path) -> None:
        """`folder`: where the labs of this user meet."""
        self._host, self._folder = host, folder
        self._given: set[int] = set()
        self._locks: int | None = None
        self.notes: list[str] = []
        """One line for each port that was not the one wished for."""

    def bind(self, name: str, wished: int) -> socket.socket:
        """A listening socket on `wished` or the next free port."""
        for port in range(wished, wished + _TRIES * _STEP, _STEP):
            sock = self._bound_as_ours(port)
            if sock is not None:
                self._given.add(port)
                if port != wished:
                    self.notes.append(f"port {wished} is taken by {holder_of(wished)}; {name} uses {port}")
                return sock
        raise PortBusyError(f"no free port for {name} from {wished} on in steps of {_STEP}; stop what listens there, or use --port")

    def free(self, name: str, wished: int) -> int:
        """The number of a free port, for a process that binds it itself."""
        sock = self.bind(name, wished)
        try:
            return int(sock.getsockname()[1])
        finally:
            sock.close()

    def close(self) -> None:
        """Leave them to others."""
        if self._locks is not None:
            os.close(self._locks)
            self._locks = None

    def _bound_as_ours(self, port: int) -> socket.socket | None:
        if port in self._given:
            return None
        if self._locks is None:  # opened once: to close any descriptor of a file ends all locks that a process has on it
            self._locks = _opened(self._folder / "ports.held")
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return None
        sock = _bound(self._host, port)
        if sock is None:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, port)
        return sock
