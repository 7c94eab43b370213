"""Answers in parts that peers read: the gateway's body of each, read on only when its peer asks for more.

A peer that does not ask any more is gone, or has forgotten: after half a minute its stream ends, and with it the model's generator. What is
here of a stream is what its socket holds.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING, Final

from tether.errors import MalformedRequestError, QueueFullError, StreamLostError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["OpenStream", "OpenStreams"]

_MOST_OPEN: Final = 16
"""Streams of one peer: notebooks of its user that read at a time."""
_PATIENCE: Final = 30.0
"""Seconds between two questions."""
_LOOK: Final = 1.0
"""Seconds between looks for streams that nobody reads."""


class OpenStream:
    """One of them, from the gateway's answer to its end."""

    def __init__(self, peer: str, model: str, content: aiohttp.StreamReader, stack: AsyncExitStack) -> None:
        """`model`: its resolved name; `stack` ends the gateway's request."""
        self.peer, self.model = peer, model
        self._content, self._stack = content, stack
        self._reading = asyncio.Lock()
        self.is_over = False
        self.read_at = asyncio.get_running_loop().time()
        """When it was asked for the last time; while a question is open, that is now."""

    @property
    def is_read(self) -> bool:
        """Whether a question is open."""
        return self._reading.locked()

    async def read(self, wait: float) -> bytes:
        """What came since, up to what a socket holds; empty, if nothing does within `wait` seconds.

        Raises: StreamLostError: it is over, or its gateway went away; MalformedRequestError: another question for it is open.
        """
        import aiohttp  # 0.1 s that a lab without peers need not pay; whoever has a stream has paid it

        if self.is_read:
            raise MalformedRequestError("another question for this stream is open: parts are asked for one after the other")
        async with self._reading:
            try:
                async with asyncio.timeout(wait):
                    data = await self._content.readany()
            except TimeoutError:
                return b""
            except aiohttp.ClientError as error:
                await self.aclose()
                raise StreamLostError("the stream broke off: the lab's gateway went away, or nobody wanted it any more") from error
            finally:
                self.read_at = asyncio.get_running_loop().time()
        if not data:
            await self.aclose()
            raise StreamLostError("the stream is over: nothing follows")
        return data

    async def aclose(self) -> None:
        """Leave the gateway's answer, which stops the model; a second call does nothing."""
        self.is_over = True
        await self._stack.aclose()


class OpenStreams:
    """Of all peers."""

    def __init__(self) -> None:
        self._open: dict[str, OpenStream] = {}
        self._opening: Counter[str] = Counter()
        """How many of each peer the gateway has not answered yet."""
        self._watching: asyncio.Task[None] | None = None

    async def open(self, peer: str, model: str, answer: AbstractAsyncContextManager[aiohttp.StreamReader]) -> str:
        """Begin one; the result names it. Raises: QueueFullError: the peer reads too many; what the gateway answers."""
        if self._opening[peer] + sum(stream.peer == peer for stream in self._open.values()) >= _MOST_OPEN:
            raise QueueFullError(f"{_MOST_OPEN} of your streams are open: read them, or leave them")
        self._opening[peer] += 1
        try:
            async with AsyncExitStack() as stack:
                content = await stack.enter_async_context(answer)
                name = secrets.token_hex(8)
                self._open[name] = OpenStream(peer, model, content, stack.pop_all())
        finally:
            self._opening -= Counter([peer])  # which forgets whom nothing is left of
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        return name

    def find(self, peer: str, name: str) -> OpenStream:
        """Raises: StreamLostError: it is over, or another's."""
        found = self._open.get(name)
        if found is None or found.peer != peer or found.is_over:
            raise StreamLostError("there is no such stream any more: it ended, or nobody asked for its parts in time")
        return found

    async def less(self, peer: str, may: Callable[[str], bool]) -> None:
        """End those of a peer whose model it may run no more."""
        for stream in [stream for stream in self._open.values() if stream.peer == peer and not may(stream.model)]:
            await stream.aclose()

    async def _watch(self) -> None:
        """As long as there are some."""
        while self._open:
            await asyncio.sleep(_LOOK)
            now = asyncio.get_running_loop().time()
            for name, stream in list(self._open.items()):
                if not stream.is_read and now > stream.read_at + _PATIENCE:
                    await stream.aclose()
                if stream.is_over:
                    del self._open[name]

    async def aclose(self) -> None:
        """End all; a second call does nothing."""
        if self._watching is not None:
            self._watching.cancel()
        while self._open:
            await self._open.popitem()[1].aclose()
