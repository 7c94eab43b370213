"""The end of a connection to a peer: in order, by the peer, or by us because it did what is not allowed; and waiting for it to read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from tether.errors import InternalError, ProtocolError, ServiceUnavailableError, TetherError
from tether.ports import MessageStream

__all__ = ["Link"]

_PATIENCE = 2.0
"""Seconds for what is queued to go out, and for the other side to end too, once a connection ends in order."""
_UNREAD_NBYTES = 1 << 20
_FRAME_NBYTES = 64
"""What a frame costs in a queue besides its bytes."""
log = structlog.get_logger("tether.swarm")


class Link:
    """A stream that whole frames are sent on. Belongs to the loop that it was made on."""

    def __init__(self, stream: MessageStream, max_unread_nbytes: int = _UNREAD_NBYTES) -> None:
        """`max_unread_nbytes`: what may be sent, while the peer reads nothing, before it is cut."""
        self.peer = stream.peer
        self.loop = asyncio.get_running_loop()
        self.closed = asyncio.Event()
        """Set when nothing more can be had of the peer."""
        self.gone = asyncio.Event()
        """Set when the stream is."""
        self.error: TetherError | None = None
        """Why the peer was cut, if it was."""
        self._why: TetherError | None = None
        self._stream = stream
        self._draining: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self.max_unread_nbytes = max_unread_nbytes
        self._unread_nbytes = 0
        self._destroying: asyncio.TimerHandle | None = None
        self._on_frame: Callable[[memoryview], None]
        self._on_closed: Callable[[TetherError], None]

    def start(self, on_frame: Callable[[memoryview], None], on_closed: Callable[[TetherError], None]) -> None:
        """Begin. A ProtocolError of `on_frame` cuts the peer; `on_closed` is called once, with why nothing more can be had of it."""
        self._on_frame, self._on_closed = on_frame, on_closed
        self._stream.start(self._received, self._ended, self._gone)

    def send(self, frame: bytes) -> None:
        """Send a frame now; does nothing on a connection that ended."""
        if self.closed.is_set():
            return
        has_room = self._stream.send(frame)
        if self._draining is not None:
            self._unread_nbytes += len(frame) + _FRAME_NBYTES
            if self._unread_nbytes > self.max_unread_nbytes:
                self.cut(ProtocolError(f"it asks and does not read: {self._unread_nbytes} bytes of answers wait"))
        elif not has_room:
            self._room.clear()
            self._draining = self.loop.create_task(self._drain())

    async def clear(self) -> None:
        """Wait until the stream takes more. Raises: TetherError: the connection ended, and why."""
        while not self._room.is_set():
            await self._room.wait()
        if self.closed.is_set():
            raise self.why()

    @property
    def is_clear(self) -> bool:
        """Whether the stream takes more at once."""
        return self._room.is_set()

    def why(self) -> TetherError:
        """Why the connection ended; a new error each time, since each is raised elsewhere."""
        error = self._why or self._lost("")
        return type(error)(*error.args)

    def cut(self, error: TetherError) -> None:
        """End it at once, because of what the peer did."""
        if not self.closed.is_set():
            log.warning("peer cut", peer=self.peer, code=error.code, error=str(error))
            self.error = type(error)(f"peer {self.peer} was cut: {error}", *error.args[1:])
            self._close(self.error)
            self._stream.destroy()

    def finish(self, error: TetherError | None) -> None:
        """End it in order: what is queued goes out. `error`: what those who wait are told, if it was not ended here."""
        if not self.closed.is_set():
            self._before_end()
            self._stream.end()
            self._close(error)
            self._destroying = self.loop.call_later(_PATIENCE, self._stream.destroy)

    def destroy(self) -> None:
        """End it at once."""
        self._close(None)
        self._stream.destroy()

    def _received(self, frame: memoryview) -> None:
        if self.closed.is_set():
            return
        try:
            self._on_frame(frame)
        except ProtocolError as error:
            self.cut(error)
        except Exception:  # a bug of ours ends this connection, not those of others
            log.exception("a message could not be handled", peer=self.peer)
            self.cut(InternalError("a message could not be handled: the log has the traceback"))

    def _before_end(self) -> None:
        """Send what waits to be sent together."""

    async def _drain(self) -> None:
        try:
            await self._stream.drained()
        except TetherError:
            return  # it closed: `_gone` says so
        finally:
            self._draining, self._unread_nbytes = None, 0
            self._room.set()

    def _ended(self) -> None:
        """The peer sends no more, so it answers no more: neither do we, as npm's protomux."""
        self.finish(self._lost(""))

    def _gone(self, error: Exception | None) -> None:
        self.gone.set()
        if self._destroying is not None:
            self._destroying.cancel()
        self._close(self._lost(f" ({error})" if error is not None else ""))

    def _lost(self, why: str) -> TetherError:
        return ServiceUnavailableError(f"the connection to peer {self.peer} was lost{why}: connect again")

    def _close(self, error: TetherError | None) -> None:
        if self.closed.is_set():
            return
        self._why = error or ServiceUnavailableError(f"the connection to peer {self.peer} was closed here: connect again")
        self.closed.set()
        if self._draining is not None:
            self._draining.cancel()
        self._room.set()
        self._on_closed(self._why)
