"""Starting services by forking (`zygote.py`) where the system lets us watch processes that are not our children: Linux."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Birth", "Child", "Nursery"]

_PID_NBYTES = 32
_PADDING = "-" * 1024
"""An argument that nobody reads: it makes room for those of a service, so that `ps` shows what it is."""
_PATIENCE = 20.0
"""Seconds for a service to be forked; the first one waits until all is imported. Longer takes only what is stopped or hangs."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Birth:
    """A service that is to be."""

    arguments: Sequence[str]
    """After `python -m tether`."""
    environ: Mapping[str, str]
    """Besides this process' own."""
    descriptors: Mapping[int, int]
    """Its number → ours."""


class Child:
    """A process that somebody else forked, as asyncio has its own: what of that is needed here."""

    def __init__(self, pid: int) -> None:
        """Raises: OSError: it is gone already, or can't be watched."""
        self.pid = pid
        self.returncode: int | None = None
        """None while it runs; then 0, whatever it was: its parent alone could know."""
        self._ended = asyncio.Event()
        self._descriptor = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._descriptor, self._end)

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self.returncode = 0
        self._ended.set()

    async def wait(self) -> int:
        """Until it has ended."""
        await self._ended.wait()
        return 0

    def send_signal(self, number: int) -> None:
        """Raises: ProcessLookupError."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._descriptor, number)


class Nursery:
    """Where services come from; belongs to one event loop. Once it failed it gives none any more, and they are started otherwise."""

    def __init__(self, log: Path, data: Path) -> None:
        """`data`: of the lab, so that the process can be told from other labs'."""
        self._log, self._data = log, data
        self._socket: socket.socket | None = None
        self._zygote: subprocess.Popen[bytes] | None = None
        self._turn = asyncio.Lock()
        self._is_asked = False

    def open(self) -> None:
        """Begin to import; returns at once. Nothing happens where the system is not made for it."""
        if not hasattr(os, "pidfd_open"):
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        command = [sys.executable, "-m", "tether.lab.zygote", str(theirs.fileno()), str(self._data), _PADDING]
        try:
            with theirs, self._log.open("ab") as log:
                self._zygote = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(theirs.fileno(),), start_new_session=True,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
        except OSError as error:
            _log.warning("services can't be forked, they are started one by one (%s)", error)
            ours.close()
            return
        self._socket = ours

    async def born(self, birth: Birth) -> Child | None:
        """The service, or nothing: it has to be started otherwise."""
        async with self._turn:
            try:
                return await self._asked(birth)
            except asyncio.CancelledError:  # whose answer comes now would be taken for the next one's; the service ends with our lifeline
                self.close()
                raise
            except (OSError, ValueError) as error:
                _log.warning("services can't be forked any more, they are started anew (%s)", error or type(error).__name__)
                self.close()
                return None

    async def _asked(self, birth: Birth) -> Child | None:
        sock = self._socket
        if sock is None:
            return None
        request = {"arguments": list(birth.arguments), "environ": dict(birth.environ), "descriptors": list(birth.descriptors)}
        self._is_asked = True
        try:
            socket.send_fds(sock, [json.dumps(request).encode()], list(birth.descriptors.values()))
            async with asyncio.timeout(_PATIENCE):
                return _watched(int(await asyncio.get_running_loop().sock_recv(sock, _PID_NBYTES)))
        finally:
            self._is_asked = False
            if self._socket is None:
                sock.close()

    def close(self) -> None:
        """End the process from which they come; they live on. A second call does nothing."""
        sock, self._socket = self._socket, None
        if sock is not None and self._is_asked:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # tells who waits for an answer, and then closes it, that none comes
        elif sock is not None:
            sock.close()
        if self._zygote is not None:
            with suppress(subprocess.TimeoutExpired):
                self._zygote.kill()
                self._zygote.wait(1.0)
            self._zygote = None


def _watched(pid: int) -> Child:
    """Raises: OSError: it can't be watched, and does not run on unwatched."""
    try:
        return Child(pid)
    except OSError:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise
