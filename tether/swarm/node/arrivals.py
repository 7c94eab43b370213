"""What a peer that connects wants, by its first message: calls (protomux), relaying (too), or blobs. Who says nothing is not waited for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Literal

import structlog

from tether.errors import ProtocolError, ServiceUnavailableError
from tether.ports import MessageStream
from tether.swarm.blobs.frames import is_hello
from tether.swarm.node.forwarding import Forwarding
from tether.swarm.relaying.relay import is_relaying

__all__ = ["Purpose", "purpose_of"]

Purpose = Literal["rpc", "blobs", "relay"]
log = structlog.get_logger("tether.swarm")
_PATIENCE = 10.0
"""Seconds: who connects speaks at once, and a round trip is a fraction of one."""
_PROTOMUX = (b"\x00\x00", b"\x00\x01")
"""It begins with an opening, or with several messages, of which the first is one."""


async def purpose_of(stream: MessageStream, patience: float = _PATIENCE) -> tuple[Purpose, MessageStream]:
    """What it is for, and the stream to use in its place, from its first message on. Call it on streams that others opened.

    Raises: ServiceUnavailableError: it ended, or said nothing for `patience` seconds; ProtocolError: it is for nothing we know.
    Either way the stream is destroyed and the peer named in the log.
    """
    rewound = _Rewound(stream)
    try:
        async with asyncio.timeout(patience):
            first = await rewound.first
    except BaseException as error:
        stream.destroy()
        if not isinstance(error, TimeoutError):
            raise
        log.warning("peer cut", peer=stream.peer, code=ServiceUnavailableError.code, error=f"it said nothing for {patience:g} s")
        raise ServiceUnavailableError(f"peer {stream.peer} connected and said nothing for {patience:g} s") from error
    if is_hello(first):
        return "blobs", rewound
    if first[:2] in _PROTOMUX:
        return "relay" if is_relaying(first) else "rpc", rewound
    stream.destroy()
    log.warning("peer cut", peer=stream.peer, code=ProtocolError.code, error="its first message is of no protocol of ours")
    raise ProtocolError(f"peer {stream.peer} speaks no protocol of ours: is it a newer Tether?")


class _Rewound(Forwarding[MessageStream]):
    """A stream that was started already: what came since is delivered when it is started again."""

    def __init__(self, stream: MessageStream) -> None:
        super().__init__(stream)
        self.first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._held = deque[bytes]()
        self._on_message: Callable[[memoryview], None] | None = None
        self._on_end: Callable[[], None]
        self._on_close: Callable[[Exception | None], None]
        self._is_ended = False
        self._closed_with: tuple[Exception | None] | None = None
        stream.start(self._message, self._end, self._close)

    def start(
        self, on_message: Callable[[memoryview], None], on_end: Callable[[], None], on_close: Callable[[Exception | None], None]
    ) -> None:
        """As the port says."""
        self._on_end, self._on_close = on_end, on_close
        asyncio.get_running_loop().call_soon(self._begin, on_message)

    def _begin(self, on_message: Callable[[memoryview], None]) -> None:
        while self._held:
            on_message(memoryview(self._held.popleft()))
        self._on_message = on_message
        if self._is_ended:
            self._on_end()
        if self._closed_with is not None:
            self._on_close(self._closed_with[0])
        else:
            self._stream.resume()

    def _message(self, message: memoryview) -> None:
        if self._on_message is not None:
            self._on_message(message)
            return
        self._held.append(bytes(message))
        if not self.first.done():
            self.first.set_result(self._held[0])
            self._stream.pause()

    def _end(self) -> None:
        self._is_ended = True
        if self._on_message is not None:
            self._on_end()

    def _close(self, error: Exception | None) -> None:
        self._closed_with = (error,)
        if not self.first.done():
            self.first.set_exception(ServiceUnavailableError(f"peer {self.peer} connected and left without a word"))
        if self._on_message is not None:
            self._on_close(error)
