"""The streams and sockets of one event loop."""

from __future__ import annotations

import asyncio
import socket as sockets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tether.errors import ConflictError
from tether.swarm.udx.sockets import UdxSocket

if TYPE_CHECKING:
    from tether.swarm.udx.stream import UdxStream

__all__ = ["Udx"]

_MAX_LINGERING = 4096
"""Closed streams that still answer. Beyond it the oldest is forgotten: many short streams must not fill memory."""
_FAMILIES = {4: sockets.AF_INET, 6: sockets.AF_INET6}
_KEPT_NBYTES = 8 << 20
"""Two windows."""


class Udx:
    """Streams are known by id over all sockets of one `Udx`: a peer may go on through another of them. Not thread-safe: the loop's own."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        gso: bool = True,
        gro: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of the running loop if none is given.

        `gso`, `gro`: use the kernel's batches where it has them. `clock`: monotonic; not the loop's own, which under uvloop stands still
        within a turn and has milliseconds only.
        """
        _keep_freed_memory()
        self.loop = loop or asyncio.get_running_loop()
        self.gso = gso
        self.gro = gro
        self.clock = clock
        self.streams: dict[int, UdxStream] = {}
        """Open ones, and closed ones for the seconds in which they still answer."""
        self.sockets: set[UdxSocket] = set()
        self._lingering: dict[UdxStream, None] = {}
        self.touched: set[UdxStream] = set()
        """Streams that got packets in this wake-up."""

    def socket(self, family: int = 4) -> UdxSocket:
        """A socket, not bound yet. `family`: 4 or 6, for the address that it is bound to if none is named."""
        socket = UdxSocket(self, _FAMILIES[family])
        self.sockets.add(socket)
        return socket

    def close(self) -> None:
        """Destroy all streams, close all sockets."""
        for stream in list(self.streams.values()):
            stream.destroy()
        for socket in list(self.sockets):
            socket.close()
        for stream in list(self.streams.values()):
            stream.forget()

    # -- what sockets and streams do

    def add_stream(self, stream: UdxStream) -> None:
        """Packets with its id are its own from now on.

        Raises: ConflictError: an open stream has the id.
        """
        former = self.streams.get(stream.id)
        if former is not None and not former.is_closed:
            raise ConflictError(f"stream id {stream.id} is in use; take another")
        if former is not None:
            former.forget()
        self.streams[stream.id] = stream

    def remove_stream(self, stream: UdxStream) -> None:
        """It is gone; another may have taken its id meanwhile."""
        self._lingering.pop(stream, None)
        if self.streams.get(stream.id) is stream:
            del self.streams[stream.id]

    def keep_answering(self, stream: UdxStream) -> None:
        """It is closed; what comes for it is answered until it is gone."""
        self._lingering[stream] = None
        if len(self._lingering) > _MAX_LINGERING:
            next(iter(self._lingering)).forget()

    def forget_socket(self, socket: UdxSocket) -> None:
        """It is closed."""
        self.sockets.discard(socket)

    def settle(self) -> None:
        """The end of a wake-up: each stream that got packets tells, acknowledges and sends."""
        touched, self.touched = self.touched, set()
        now = self.clock()
        for stream in touched:
            stream.settle(now)

    def call(self, callback: Callable[..., Any], *args: Any, otherwise: Any = None) -> Any:
        """Call the application; what it raises is the loop's to report, and must not keep other streams from being served."""
        try:
            return callback(*args)
        except Exception as error:
            self.loop.call_exception_handler({"message": "a callback of a UDX stream or socket failed", "exception": error})
            return otherwise


def _keep_freed_memory() -> None:
    """Let glibc's malloc hold on to what batches leave when they are acknowledged.

    At first it gives back whatever over 128 KiB is free at the heap's end, and the next batch takes the pages anew: 9 faults each, a third
    of what sending cost. It moves both of its thresholds when a block that it had mapped is freed; this one is never touched.
    """
    bytes(_KEPT_NBYTES)
