"""Works on many blobs in a few threads, over buffers that are used again: constant memory, answers in order."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import TypeVar

from tether.store.format.layout import BLOB_NBYTES

__all__ = ["buffer", "in_batches", "in_order", "new_memory", "threads_for"]

Job = TypeVar("Job")
Answer = TypeVar("Answer")

_THREADS = max(1, min(4, os.cpu_count() or 1))
"""Reading and hashing let go of the interpreter; above four threads the memory's bandwidth is what one waits for."""
_AHEAD = 2
"""Jobs a thread that may be done and not yet asked for: a slow consumer finds the next bytes still in the processor's cache."""
_SMALL = BLOB_NBYTES
"""Bytes that one thread has read before others would have started."""
_BATCH = 1 << 20
"""Bytes that are worth handing to a thread, which costs 30 µs: as long as 100 KiB take."""
_MOST = 16
"""Jobs in a batch: each may hold an open file."""
_KEPT = 4
"""Buffers that wait for their next use, 16 MiB: new memory costs more to touch than a file in the disk cache to read."""
_spare: list[memoryview] = []


@contextmanager
def buffer() -> Iterator[memoryview]:
    """Room for one blob. What is read into it is gone when the next one uses it."""
    try:
        view = _spare.pop()
    except IndexError:
        view = new_memory(BLOB_NBYTES)
    try:
        yield view
    finally:
        if len(_spare) < _KEPT:
            _spare.append(view)


def new_memory(nbytes: int, large: int | None = None) -> memoryview:
    """Fresh memory from the system, which no file backs and no core dump shows: what was encrypted lies in it.

    `large`: how many bytes of it in large pages, None: all; the end of a large page that nobody needs would be memory all the same.
    """
    # Python's default is to share it with forked children: two processes would then read different blobs into one buffer.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large != 0 and hasattr(mmap, "MADV_HUGEPAGE"):  # two page faults in place of a thousand
        with suppress(OSError):  # a kernel that was built without them refuses to be asked
            memory.madvise(mmap.MADV_HUGEPAGE, 0, nbytes if large is None else large)
    if hasattr(mmap, "MADV_DONTDUMP"):
        memory.madvise(mmap.MADV_DONTDUMP)
    return memoryview(memory)


def threads_for(nbytes: int) -> int:
    """How many threads are worth starting for so many bytes."""
    return _THREADS if nbytes > _SMALL else 1


def in_order(work: Callable[[Job], Answer], jobs: Iterable[Job], threads: int) -> Generator[Answer]:
    """`work` of each job, answered in the order of the jobs. The first error ends it; jobs that run are waited for, the others not begun.

    Jobs are drawn as they are needed, in the caller's thread, and begun in their order.
    """
    if threads <= 1:
        yield from map(work, jobs)
        return
    waiting: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(threads, "store") as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) > threads * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def in_batches(work: Callable[[Job], Answer], jobs: Iterable[Job], nbytes: Callable[[Job], int], threads: int) -> Generator[Answer]:
    """As `in_order`, for jobs of which many are small: a thread gets several at a time. The answers of a batch come together."""
    batches = _batches(jobs, nbytes) if threads > 1 else ([job] for job in jobs)
    with closing(in_order(lambda batch: [work(job) for job in batch], batches, threads)) as answered:
        for answers in answered:
            yield from answers


def _batches(jobs: Iterable[Job], nbytes: Callable[[Job], int]) -> Iterator[list[Job]]:
    batch: list[Job] = []
    size = 0
    for job in jobs:
        batch.append(job)
        size += nbytes(job)
        if size >= _BATCH or len(batch) >= _MOST:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
