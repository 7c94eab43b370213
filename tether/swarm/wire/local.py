"""Messages over a Unix socket between processes of one user: how notebooks and programs come to their own manager.

    stream   frame*
    frame    u32 LE nbytes | message
    end      u32 LE 2^32 - 1: this side sends no more; a socket that is closed without it broke

Nothing is encrypted: only the user can open the socket's file (0600), and each side asks the kernel whose process the other one is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import structlog

from tether.errors import ConfigError, ForbiddenError, PayloadTooLargeError, ProtocolError, ServiceUnavailableError, StreamLostError

__all__ = ["MAX_MESSAGE", "THIS_USER", "LocalServer", "LocalStream", "connect", "serve"]

log = structlog.get_logger("tether.swarm")
THIS_USER: Final = "00" * 32
"""What stands for a key on both sides. It is nobody's: a point of small order, which `security.addresses` lets no peer have."""
MAX_MESSAGE: Final = 1 << 24
"""Bytes: as much as a stream to a peer takes, and a little."""
_LENGTH: Final = struct.Struct("<I")
_END: Final = 0xFFFF_FFFF
_QUEUE_NBYTES: Final = 1 << 18
"""Unsent; then `send` says that it is enough. The kernel holds about as much again."""
_CREDENTIALS: Final = struct.Struct("3i")

OnStream = Callable[["LocalStream"], None]


class LocalStream(asyncio.Protocol):
    """A connection between two processes of this user: `ports.MessageStream`. Belongs to one event loop."""

    def __init__(self, *, is_initiator: bool, on_open: OnStream | None = None) -> None:
        """Use `connect` and `serve`. `on_open` gets it once the other side is known to be this user's."""
        self._is_initiator, self._on_open = is_initiator, on_open
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self.refused: ForbiddenError | None = None
        """Why the other side is not spoken with."""
        self._parts: list[bytes] = []
        self._nbytes = 0
        self._needed = _LENGTH.size
        self._wanted = True
        self._taking = False  # from the turn after somebody takes messages on
        self._ended = self._peer_ended = False
        self._closed = False
        self._failed: Exception | None = None
        self._full = False
        self._drained: asyncio.Future[None] | None = None
        self._on_message: Callable[[memoryview], None] | None = None
        self._on_end: Callable[[], None] = _nothing
        self._on_close: Callable[[Exception | None], None] | None = None

    def __repr__(self) -> str:
        return f"<LocalStream {'closed' if self._closed else 'open'}>"

    @property
    def peer(self) -> str:
        """`THIS_USER`: one user's processes are not told apart."""
        return THIS_USER

    @property
    def is_initiator(self) -> bool:
        """Whether this side opened it."""
        return self._is_initiator

    @property
    def closed(self) -> bool:
        """Whether both directions are gone."""
        return self._closed

    def start(
        self, on_message: Callable[[memoryview], None], on_end: Callable[[], None], on_close: Callable[[Exception | None], None]
    ) -> None:
        """Deliver what comes, from the loop's next turn on; see `ports.MessageStream`."""
        self._on_message, self._on_end, self._on_close = on_message, on_end, on_close
        self._loop.call_soon(self._catch_up)

    def send(self, message: bytes | bytearray | memoryview) -> bool:
        """Queue a message; False: the queue is long, wait for `drained`. Nothing happens on a stream that closed or ended.

        Raises: PayloadTooLargeError: over 16 MiB.
        """
        nbytes = len(message)
        if nbytes > MAX_MESSAGE:
            raise PayloadTooLargeError(f"a message of {nbytes} bytes is over {MAX_MESSAGE}: send it in pieces")
        if self._closed or self._ended:
            return True
        self._transport.write(b"".join((_LENGTH.pack(nbytes), message)))
        return not self._full

    async def drained(self) -> None:
        """Wait until more may be queued. Raises: StreamLostError (a ServiceUnavailableError): the stream closed."""
        while self._full and not self._closed:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)
        if self._closed:
            raise StreamLostError("the local stream closed before the queue was empty: connect again", "") from self._failed

    def pause(self) -> None:
        """Deliver nothing for now: the kernel's buffers fill, and the other side has to wait."""
        self._wanted = self._taking = False
        self._hold()

    def resume(self) -> None:
        """Deliver again, from the loop's next turn on."""
        if not self._wanted:
            self._wanted = True
            self._loop.call_soon(self._catch_up)

    def end(self) -> None:
        """Send no more; what is queued goes out first."""
        if self._closed or self._ended:
            return
        self._ended = True
        self._transport.write(_LENGTH.pack(_END))
        if self._peer_ended:
            self._transport.close()

    def destroy(self) -> None:
        """Cut the connection at once, in both directions; a second call does nothing."""
        self._cut(StreamLostError("the local stream was cut on this side", "ECANCELED"))

    # --- what the event loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_QUEUE_NBYTES)
        self._hold()  # until somebody takes what comes
        uid = _owner(transport)
        if uid not in {None, os.getuid()}:
            self.refused = ForbiddenError(f"the process at the other end belongs to user {uid}, not to this one: it was not spoken with")
            log.warning("local stream refused", uid=uid)
            self._cut(self.refused)
        elif self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self._parts.append(data)
        self._nbytes += len(data)
        if self._taking:
            self._deliver()

    def eof_received(self) -> None:
        """The other process closed the socket, or died: `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Both directions are gone."""
        if self._ended and self._peer_ended:
            self._close(None)
        else:
            why = f" ({exc})" if exc else ""
            self._close(StreamLostError(f"the process at the other end of the local stream is gone{why}: connect again", "ECONNRESET"))

    def pause_writing(self) -> None:
        """The queue is long."""
        self._full = True

    def resume_writing(self) -> None:
        """The queue is short again."""
        self._full = False
        self._wake()

    # --- messages

    def _hold(self) -> None:
        if not self._closed and self._transport.is_reading():
            self._transport.pause_reading()

    def _catch_up(self) -> None:
        if self._closed:
            self._tell_close()
            return
        self._taking = self._wanted and self._on_message is not None
        if not self._taking:
            return
        try:
            self._deliver()
        except BaseException:  # of who takes it: what is behind it can't be told any more
            self.destroy()
            raise
        if self._taking and not self._closed:
            self._transport.resume_reading()

    def _deliver(self) -> None:
        """Hand over each whole message, as long as somebody takes them."""
        if self._nbytes < self._needed:
            return
        data, at = b"".join(self._parts), 0
        with memoryview(data) as view:
            while self._taking and len(data) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(data, at)
                if length > MAX_MESSAGE or self._peer_ended:
                    self._control(length)
                    at += _LENGTH.size
                    continue
                end = at + _LENGTH.size + length
                if end > len(data):
                    break
                with view[at + _LENGTH.size : end] as message:
                    at = end
                    self._tell(message)
        self._keep(data[at:])

    def _tell(self, message: memoryview) -> None:
        if self._on_message is not None:
            self._on_message(message)

    def _control(self, length: int) -> None:
        if length != _END or self._peer_ended:
            what = "something after its end" if self._peer_ended else f"a message of {length} bytes"
            self._cut(ProtocolError(f"the other side of a local stream was cut: it sent {what}"))
            return
        self._peer_ended = True
        self._on_end()
        if self._ended:
            self._transport.close()

    def _keep(self, rest: bytes) -> None:
        self._parts, self._nbytes = [rest] if rest and not self._closed else [], len(rest)
        length = _LENGTH.unpack_from(rest)[0] if len(rest) >= _LENGTH.size else 0
        self._needed = _LENGTH.size + (length if length <= MAX_MESSAGE else 0)

    # --- the end

    def _cut(self, error: Exception) -> None:
        if not self._closed:
            self._close(error)
            self._transport.abort()

    def _close(self, error: Exception | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._taking = False
        self._failed, self._parts = error, []
        self._wake()
        self._loop.call_soon(self._tell_close)  # never inside a call of the one who is told

    def _tell_close(self) -> None:
        told, self._on_close = self._on_close, None
        if told is not None:
            told(self._failed)

    def _wake(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None


def _owner(transport: asyncio.BaseTransport) -> int | None:
    """The user of the process at the other end; None: this system doesn't tell, and the file's mode alone decides."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    sock = transport.get_extra_info("socket")
    _pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


def _nothing() -> None:
    """Until somebody listens."""


class LocalServer:
    """Listens at a path, until it is closed."""

    def __init__(self, server: asyncio.Server, path: Path) -> None:
        """Use `serve`."""
        self._server, self.path = server, path
        self._file = _identity(path)

    def close(self) -> None:
        """Take no more connections; those that are open stay. The socket's file goes, unless it is another one's by now."""
        if self._server.is_serving():
            self._server.close()
            if _identity(self.path) == self._file:
                self.path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def serve(path: Path, on_stream: OnStream) -> LocalServer:
    """Listen at `path`, mode 0600, in place of what a process that died left there. `on_stream` gets each stream, on the loop.

    Raises: ConfigError: the socket can't be made.
    """
    loop = asyncio.get_running_loop()
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        draft.unlink(missing_ok=True)
        sock.bind(str(draft))
        draft.chmod(0o600)  # before anybody can find it: a socket's mode can't be chosen when it is made
        server = await loop.create_unix_server(lambda: LocalStream(is_initiator=False, on_open=on_stream), sock=sock)
        draft.rename(path)
    except OSError as error:
        sock.close()
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise ConfigError(f"the socket {path} can't be made ({error.strerror or error}): set TMPDIR to a folder of your own") from error
    return LocalServer(server, path)


async def connect(path: Path) -> LocalStream:
    """Open a stream to whoever serves at `path`.

    Raises: ServiceUnavailableError: nobody does; ForbiddenError: it is a process of another user.
    """
    loop = asyncio.get_running_loop()
    try:
        _, stream = await loop.create_unix_connection(lambda: LocalStream(is_initiator=True), str(path))
    except OSError as error:
        raise ServiceUnavailableError(f"nobody listens at {path} ({error.strerror or error})") from error
    if stream.refused is not None:
        raise stream.refused
    return stream
