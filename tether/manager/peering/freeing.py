"""Gives back the bytes of copies that were dropped: those and no others, beside all else, since it may move much on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from tether.errors import TetherError
from tether.store import Repository
from tether.types import Digest

__all__ = ["Freeing"]

log = structlog.get_logger("tether.swarm")


class Freeing:
    """Of one lab's store, which has one collection at a time. Belongs to one event loop."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._dropped: set[Digest] = set()
        self._task: asyncio.Task[None] | None = None

    def free(self, manifests: Iterable[Digest]) -> None:
        """These are no version's any more, for good."""
        self._dropped.update(manifests)
        if self._dropped and self._task is None:
            self._task = asyncio.create_task(self._run(), name="freeing")

    async def aclose(self) -> None:
        """End after the collection that goes on; what is left goes with the next `gc`."""
        self._dropped.clear()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while self._dropped:
                manifests, self._dropped = self._dropped, set()
                for digest in manifests:  # what was written out of them, too
                    await asyncio.to_thread(self._repository.discard, digest)
                report = await asyncio.to_thread(self._repository.collect_dropped, manifests)
                log.info("the bytes of dropped copies are given back", nbytes=report.freed_nbytes, skipped=report.skipped)
        except TetherError as error:
            log.warning("the bytes of dropped copies stay until the next `tether gc`", error=str(error))
        finally:
            self._task = None
