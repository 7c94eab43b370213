"""One event loop on a thread of its own: where a lab's asynchronous calls run, whoever makes them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from tether.client.forking import abandon

__all__ = ["each", "each_async", "run", "run_async"]

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0
"""Process that the loop's thread runs in: a fork copies the loop and not its thread, so that the child needs its own."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run it there and wait for it; also from a notebook, whose own loop runs in the calling thread.

    An interrupt (Ctrl-C, the kernel's stop button) cancels it.
    """
    future = _submit(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run it there and wait for it in any other loop; cancellation passes through."""
    return await asyncio.wrap_future(_submit(work))


def each(work: AsyncGenerator[T]) -> Iterator[T]:
    """What it yields, as `run`; a loop that is left ends it."""
    try:
        while True:
            try:
                yield run(_next(work))
            except StopAsyncIteration:
                return
    finally:
        _submit(work.aclose())  # not waited for: whoever drops the iterator may be the end of Python


async def each_async(work: AsyncGenerator[T]) -> AsyncIterator[T]:
    """As `each`, in any other loop."""
    try:
        while True:
            try:
                yield await run_async(_next(work))
            except StopAsyncIteration:
                return
    finally:
        _submit(work.aclose())


async def _next(work: AsyncGenerator[T]) -> T:
    return await anext(work)


def _submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    return asyncio.run_coroutine_threadsafe(work, _running())


def _running() -> asyncio.AbstractEventLoop:
    global _loop, _owner, _lock  # noqa: PLW0603 (one loop a process is the point; its name is private to this module)
    if _loop is not None and _owner == os.getpid():
        return _loop
    if _owner not in {0, os.getpid()}:
        _lock = threading.Lock()  # the fork may have copied it locked
    with _lock:
        if _loop is None or _owner != os.getpid():
            if _loop is not None:
                abandon(_loop)
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="tether-client", daemon=True).start()
            _loop, _owner = loop, os.getpid()
        return _loop
