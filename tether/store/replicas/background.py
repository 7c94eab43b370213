"""One event loop on a thread of its own, so that fetching is written once and used from threads and from any other loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from tether.errors import InternalError

__all__ = ["Background"]

Answer = TypeVar("Answer")


class Background:
    """The loop; its thread starts with the first call. Not to be used across a fork: the child has no such thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run it there and wait for it. An interrupt (Ctrl-C) cancels it."""
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def run_async(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The same from another loop; cancellation passes through."""
        return await asyncio.wrap_future(self._submit(work))

    async def iterate(self, items: AsyncGenerator[Answer, None]) -> AsyncGenerator[Answer, None]:
        """What a generator there yields, here. Closed or cancelled, it closes that one."""
        end = object()

        async def step() -> object:
            return await anext(items, end)

        try:
            while (item := await self.run_async(step())) is not end:
                yield cast("Answer", item)
        finally:
            await self.run_async(_closing(items))

    def _submit(self, work: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._running())
        except BaseException:
            work.close()
            raise

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise InternalError("what fetches blobs is closed: open the store again")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
                self._thread.start()
            return self._loop

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run `last` there, if anything ever ran, then end the loop and its thread; a second call does nothing."""
        with self._lock:
            loop, thread = self._loop, self._thread
            was_closed, self._closed = self._closed, True
        if was_closed or loop is None or thread is None:
            last.close()
            return
        asyncio.run_coroutine_threadsafe(last, loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _closing(items: AsyncGenerator[Any, None]) -> None:
    await items.aclose()
