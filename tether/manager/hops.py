"""The socket at which gateways of this host reach one model of a lent worker: their hops in, what the other lab answers out."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from tether.errors import ConfigError, DeadlineExceededError, InternalError, TetherError
from tether.ports import Hop, HopReply, Undelivered
from tether.wire.connection import Connection
from tether.wire.frames import INLINE, LEAVING, WITHDRAWN, Head
from tether.wire.oip import encode_error

__all__ = ["HopLimits", "HopServer", "Infer", "sweep"]

log = structlog.get_logger("tether.manager")
Infer = Callable[[Hop], Awaitable[HopReply | Undelivered]]
"""Cancelled when nobody waits for the answer any more. What it raises of the tree is answered."""
_Answering = asyncio.Task[HopReply | Undelivered]
_BACKLOG: Final = 64
_LOOK: Final = 0.02
"""Seconds between looks at what is under way yet."""


@dataclass(frozen=True, slots=True)
class HopLimits:
    """Of one socket. What is beyond them was not sent: the gateway asks elsewhere, or again soon."""

    most_open: int = 256
    most_nbytes: int = 64 << 20
    """Of bodies that are under way, but for one that is larger by itself: the gateway's own limit for one."""


class HopServer:
    """One model of one lent worker. Belongs to one event loop."""

    def __init__(self, folder: Path, infer: Infer, limits: HopLimits | None = None) -> None:
        """`folder`: of this user alone, with a short path. The socket's name is used once, so no gateway takes it for another one."""
        self.endpoint: Final = folder / _name(secrets.token_hex(6))
        self._work = _Work(infer, limits or HopLimits())
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._lines: set[_Line] = set()

    @property
    def in_flight(self) -> int:
        """Hops that are not answered yet."""
        return len(self._work.running)

    def start(self) -> Path:
        """Listen; the endpoint, mode 0600. Raises: ConfigError: the socket can't be made."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.setblocking(False)
            listener.bind(str(self.endpoint))
            self.endpoint.chmod(0o600)  # nobody can connect before `listen`
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            self.endpoint.unlink(missing_ok=True)
            raise ConfigError(
                f"the socket {self.endpoint} can't be made ({error.strerror or error}): set TMPDIR to a short path"
            ) from error
        self._listener = listener
        self._loop.add_reader(listener, self._accept, listener)
        return self.endpoint

    async def retire(self, grace: float) -> None:
        """Take no more hops: they were not sent. End when the gateways have the answers of those under way, or after `grace` seconds.

        They end the connections, so that none of what they sent meanwhile passes for lost.
        """
        self._work.is_open = False
        self._unlisten()
        for line in list(self._lines):
            line.take_leave()
        try:
            async with asyncio.timeout(grace):
                while self._work.running or self._lines:  # noqa: ASYNC110 (they end one by one)
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            pass
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End the gateways' connections: their open hops are lost. A second call does nothing."""
        self._unlisten()
        running = list(self._work.running)
        for line in list(self._lines):
            line.close()
        await asyncio.gather(*running, return_exceptions=True)

    def _unlisten(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.remove_reader(listener)
            listener.close()
            self.endpoint.unlink(missing_ok=True)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:  # it went away again, or there are too many files
            log.warning("a gateway's connection was refused", endpoint=str(self.endpoint), error=str(error))
            return
        self._lines.add(_Line(Connection(sock), self._work, self._lines.discard))


def sweep(folder: Path) -> None:
    """Remove what a killed manager left there; only who has its store's lock may."""
    for path in folder.glob(_name("*")):
        path.unlink(missing_ok=True)


def _name(mark: str) -> str:
    return f"hops-{mark}.sock"


class _Work:
    """The hops that are under way, of all connections."""

    def __init__(self, infer: Infer, limits: HopLimits) -> None:
        self._infer, self._limits = infer, limits
        self._nbytes = 0
        self.is_open = True
        self.running: set[_Answering] = set()

    def has_room(self, nbytes: int) -> bool:
        """Whether one more may begin, with a body of so many bytes."""
        has_bytes = not self._nbytes or self._nbytes + nbytes <= self._limits.most_nbytes
        return self.is_open and has_bytes and len(self.running) < self._limits.most_open

    def begin(self, hop: Hop) -> _Answering:
        """Ask; the result is what the gateway is answered."""
        task = asyncio.get_running_loop().create_task(self._answer(hop))
        self.running.add(task)
        self._nbytes += len(hop.body)
        task.add_done_callback(partial(self._done, len(hop.body)))
        return task

    async def _answer(self, hop: Hop) -> HopReply | Undelivered:
        try:
            async with asyncio.timeout(hop.timeout) as scope:
                return await self._infer(hop)
        except TetherError as error:
            return _refusal(error)
        except Exception as error:  # a bug: the gateway gets its answer, whatever happens here
            if isinstance(error, TimeoutError) and scope.expired():
                return _refusal(DeadlineExceededError(f"the lab that lends this worker did not answer within {hop.timeout:g} s"))
            log.exception("a hop failed")
            return _refusal(InternalError(f"{type(error).__name__} in the manager; its log has the traceback"))

    def _done(self, nbytes: int, task: _Answering) -> None:
        self.running.discard(task)
        self._nbytes -= nbytes


class _Line:
    """One gateway's connection."""

    def __init__(self, connection: Connection, work: _Work, on_close: Callable[[_Line], None]) -> None:
        self._connection, self._work, self._on_close = connection, work, on_close
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, _Answering] = {}
        self._due = self._closed = False
        self._loop.add_reader(connection.socket, self._guarded, self._receive)

    def take_leave(self) -> None:
        """The gateway is to end it when it has its answers."""
        self._reply(0, HopReply(LEAVING, b""))

    def close(self) -> None:
        """End it; nobody waits for what is open."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._connection.socket)
        self._loop.remove_writer(self._connection.socket)
        for task in self._open.values():
            task.cancel()
        self._connection.close()
        self._on_close(self)

    def _guarded(self, act: Callable[[], None]) -> None:
        """A gateway that is gone, or breaks the rules of the frames, loses its own connection."""
        try:
            with contextlib.suppress(BlockingIOError):
                act()
        except OSError:
            self.close()
        except Exception:  # whatever it was: the loop would call this again at once, for ever, and the other gateways wait
            log.exception("a gateway's connection broke")
            self.close()

    def _receive(self) -> None:
        frame = self._connection.receive()
        for head, payload in frame:
            self._take(head, payload)
        frame.clear()
        self._connection.reader.release()

    def _take(self, head: Head, payload: memoryview) -> None:
        if head.status == WITHDRAWN:
            if task := self._open.get(head.id):
                task.cancel()
            return
        if not self._work.has_room(head.nbytes):
            self._reply(head.id, Undelivered.NOT_SENT)
            return
        task = self._open[head.id] = self._work.begin(Hop(self._body(head, payload), head.header_nbytes, head.timeout_ms / 1000))
        task.add_done_callback(partial(self._answered, head.id))

    def _body(self, head: Head, payload: memoryview) -> bytes:
        """A copy: what goes over the network outlives the frame. Raises: InternalError: the gateway has no ring."""
        if head.offset == INLINE:
            return bytes(payload)
        if self._connection.ring is None:
            raise InternalError("a request names a ring block and its connection has no ring")
        return bytes(self._connection.ring.block(head.offset, head.nbytes))

    def _answered(self, request_id: int, task: _Answering) -> None:
        self._open.pop(request_id, None)
        if not self._closed:
            self._reply(request_id, HopReply(WITHDRAWN, b"") if task.cancelled() else task.result())

    def _reply(self, request_id: int, reply: HopReply | Undelivered) -> None:
        writer = self._connection.writer
        if isinstance(reply, HopReply):
            writer.reply(request_id, reply.status, reply.body, reply.header_nbytes)
        else:
            writer.undelivered(request_id, reply)
        if writer.is_full:
            self._guarded(self._flush)
        elif not self._due:
            self._due = True
            self._loop.call_soon(self._guarded, self._flush)

    def _flush(self) -> None:
        self._due = False
        if self._closed:
            return
        self._connection.flush(patience_ms=0)
        if self._connection.owes:
            self._loop.add_writer(self._connection.socket, self._guarded, self._send)

    def _send(self) -> None:
        self._connection.send()
        if not self._connection.owes:
            self._loop.remove_writer(self._connection.socket)


def _refusal(error: TetherError) -> HopReply:
    return HopReply(error.http_status, encode_error(error))
