"""A stream in the place of another one: what it does not do otherwise goes on to that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from tether.ports import MessageStream

__all__ = ["Forwarding"]

StreamT = TypeVar("StreamT", bound=MessageStream)


class Forwarding(Generic[StreamT]):
    """`ports.MessageStream`."""

    __slots__ = ("_stream",)

    def __init__(self, stream: StreamT) -> None:
        self._stream = stream

    @property
    def peer(self) -> str:
        return self._stream.peer

    @property
    def is_initiator(self) -> bool:
        return self._stream.is_initiator

    def start(
        self, on_message: Callable[[memoryview], None], on_end: Callable[[], None], on_close: Callable[[Exception | None], None]
    ) -> None:
        """As the port says."""
        self._stream.start(on_message, on_end, on_close)

    def send(self, message: bytes | bytearray | memoryview) -> bool:
        return self._stream.send(message)

    async def drained(self) -> None:
        await self._stream.drained()

    def pause(self) -> None:
        self._stream.pause()

    def resume(self) -> None:
        self._stream.resume()

    def end(self) -> None:
        self._stream.end()

    def destroy(self) -> None:
        """As the port says."""
        self._stream.destroy()
