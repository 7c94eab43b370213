"""One gateway's connection to whoever answers its hops: frames in, replies out, its ring. Nothing here waits long for a gateway."""

from __future__ import annotations

import os
import select
import socket
from collections import deque

from tether.wire.frames import Frame, FrameReader, FrameWriter
from tether.wire.ring import RingView

__all__ = ["Connection"]

_PATIENCE_MS = 50
"""Milliseconds that a send may wait for a gateway that reads slower than it asks. One that was found asleep (stopped, overloaded) is not
waited for again until it has taken what it owes: the model's other gateways are waiting too."""
_OWED_NBYTES = 256 << 20
"""Replies kept for a gateway that does not read; past this it is dropped, and asks another worker when it wakes."""
_MOST_OWED_NBYTES = 2 << 30
"""For one that reads: a single reply may have as much as a frame, and several models' answers may come at once."""


class Connection:
    """`socket` is non-blocking. Every method may raise OSError when the gateway is gone."""

    __slots__ = ("_greeted", "_owed", "_owed_nbytes", "reader", "ring", "socket", "writer")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket, self.reader, self.writer = sock, FrameReader(), FrameWriter()
        self.ring: RingView | None = None
        self._greeted = False
        self._owed: deque[bytes | memoryview] = deque()
        self._owed_nbytes = 0

    @property
    def owes(self) -> bool:
        """Whether replies wait for the gateway to read."""
        return bool(self._owed)

    def receive(self) -> Frame:
        """What arrived, until `reader.release`. Raises: OSError: the gateway went away."""
        if not self._greeted:
            self._greet()
            return []
        got = self.socket.recv_into(self.reader.space())
        if not got:
            raise ConnectionResetError
        return self.reader.received(got)

    def _greet(self) -> None:
        """The first byte of a connection says whether a ring's descriptor comes with it."""
        data, fds, _, _ = socket.recv_fds(self.socket, 1, 1)
        if not data:
            raise ConnectionResetError
        self._greeted = True
        if fds:
            try:
                self.ring = RingView(fds[0])
            finally:
                os.close(fds[0])

    def flush(self, patience_ms: int = _PATIENCE_MS) -> None:
        """Send the replies that were written; what the gateway does not take now is owed. Raises: OSError: it is gone, or takes nothing."""
        if self.writer:
            awake = not self._owed
            for part in self.writer.take():
                self._owed.append(part)
                self._owed_nbytes += len(part)
            self.send(patience_ms if awake else 0)

    def send(self, patience_ms: int = 0) -> None:
        """Send what is owed, as far as the gateway takes it."""
        before = self._owed_nbytes
        while self._owed:
            try:
                sent = self.socket.send(self._owed[0])
            except BlockingIOError:
                if patience_ms and self._writable(patience_ms):
                    continue
                break
            self._owed_nbytes -= sent
            part = self._owed.popleft()
            if sent < len(part):
                self._owed.appendleft(memoryview(part)[sent:])
        if self._owed_nbytes > (_OWED_NBYTES if self._owed_nbytes == before else _MOST_OWED_NBYTES):
            raise ConnectionResetError

    def _writable(self, patience_ms: int) -> bool:
        poll = select.poll()
        poll.register(self.socket, select.POLLOUT)
        return bool(poll.poll(patience_ms))

    def close(self) -> None:
        """Close the socket; the ring's mapping stays as long as an array looks into it."""
        self.socket.close()
        self._owed.clear()
        if self.ring is not None:
            self.ring.close()
