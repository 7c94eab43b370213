"""Which ports a lab gets: the seed ports, else the next free ones."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from pathlib import Path

import psutil

from tether.errors import ConfigError, PortBusyError

__all__ = ["CHOOSING", "PortPicker", "bind_exactly", "claimed", "claimed_file", "holder_of"]

_STEP = 10
"""A second lab on one machine gets 8010, 8011, 8012 …: the same last digits."""
_TRIES = 200
CHOOSING = "ports"
"""What is claimed by a lab while it chooses its ports."""


def claimed(name: str, folder: Path) -> int | None:
    """A descriptor that keeps `name` from this user's other processes, until it is closed or this process ends; None: another one has it.

    On Linux an abstract socket: all see the same ones that see the same ports, whatever TMPDIR says to each of them, and nobody clears
    them away. Elsewhere a file in `folder`. Raises: ConfigError: that can't be opened.
    """
    return _claimed_socket(name) if sys.platform == "linux" else claimed_file(folder / f"{name}.lock")


def _claimed_socket(name: str) -> int | None:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(f"\0tether-{os.getuid()}-{name}")
    except OSError:
        sock.close()
        return None
    return sock.detach()


def claimed_file(path: Path) -> int | None:
    """As `claimed`, among those that know the path; not through a link, which would open a file of another's choice."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"{path} can't be opened ({error.strerror}); remove it") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


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
    meanwhile. For each it claims a name that stands for it, and that ends with its process, however that ends.
    (A socket of the supervisor's own that keeps a port for a service would keep it from the service, too.)
    """

    def __init__(self, host: str, folder: Path) -> None:
        """`folder`: as of `claimed`."""
        self._host, self._folder = host, folder
        self._given: set[int] = set()
        self._claims: list[int] = []
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
        for claim in self._claims:
            os.close(claim)
        self._claims.clear()

    def _bound_as_ours(self, port: int) -> socket.socket | None:
        if port in self._given:
            return None
        claim = claimed(f"port-{port}", self._folder)
        if claim is None:
            return None
        sock = _bound(self._host, port)
        if sock is None:
            os.close(claim)
        else:
            self._claims.append(claim)
        return sock
