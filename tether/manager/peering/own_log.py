"""The core of the lab's own feed: gone on with only where it is what was signed, and written with nothing that followers would refuse."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import structlog

from tether.errors import EngineClosedError, EngineError, MalformedFeedError, TetherError
from tether.swarm.engine.engine import Engine
from tether.swarm.feeds.entries import Change, Content, applied, changes, entries
from tether.swarm.feeds.heads import Head
from tether.swarm.feeds.hyperbee import Head as LogHead
from tether.swarm.feeds.hyperbee import Hyperbee
from tether.swarm.feeds.log import MAX_BLOCKS, MAX_NBYTES, read_log
from tether.swarm.feeds.tree import FeedTree

__all__ = ["OwnLog"]

log = structlog.get_logger("tether.swarm")
_AT_ONCE = 500
"""Entries of one batch: at 16 KiB each it still crosses to the engine. Followers look at nothing before the head is signed."""
_FULL = 0.75
"""Of what followers take: then it is begun anew, and says only what is there now."""


class OwnLog:
    """One core, open for writing."""

    def __init__(self, engine: Engine, bee: Hyperbee, content: Content) -> None:
        self.engine, self.bee = engine, bee
        self._content = content
        """What it says."""

    @classmethod
    async def begin(cls, engine: Engine, folder: Path, seed: bytes) -> Self:
        """A core that nobody has seen. Raises: EngineError."""
        return cls(engine, await Hyperbee.open(engine, folder, seed=seed), Content())

    @classmethod
    async def resume(cls, engine: Engine, folder: Path, seed: bytes, known: Head | None) -> Self | None:
        """None: it is not what was signed (`known`), or can't be read. It may be longer: the process ended before it had signed that, too.

        Raises: EngineClosedError.
        """
        try:
            bee = await Hyperbee.open(engine, folder, seed=seed)
        except EngineClosedError:
            raise
        except TetherError as error:
            log.warning("the log of the lab's feed can't be opened", error=str(error))
            return None
        try:
            content = await _read(bee, known)
        except BaseException:
            await bee.close()
            raise
        if content is None:
            await bee.close()
            return None
        return cls(engine, bee, content)

    @property
    def core(self) -> str:
        """Its public key, hex."""
        return self.bee.key.hex()

    async def head(self) -> LogHead:
        """How far it goes."""
        return await self.bee.head()

    async def is_full(self) -> bool:
        """Whether followers would soon refuse it for its size."""
        head = await self.bee.head()
        return head.length > _FULL * MAX_BLOCKS or head.nbytes > _FULL * MAX_NBYTES

    async def say(self, content: Content) -> bool:
        """Write the difference; whether there was one. After an error what it says is not known: open it again.

        Raises: MalformedFeedError: followers would refuse it, nothing was written; EngineError.
        """
        update, after = await asyncio.to_thread(_difference, self._content, content)  # of 100,000 versions half a second
        if not update:
            return False
        for batch in _batches(update):
            await self.bee.put([(change.key, None if change.value is None else change.value.decode()) for change in batch])
        self._content = after
        return True

    async def aclose(self) -> None:
        """Give the files back. An engine that is closed has done so."""
        with contextlib.suppress(EngineClosedError):
            await self.bee.close()


async def _read(bee: Hyperbee, known: Head | None) -> Content | None:
    try:
        head = await bee.head()
        if known is not None and (bee.key.hex(), head.fork, head.length >= known.length) != (known.core, known.fork, True):
            return None
        part = await read_log(bee, FeedTree(), head.length, known.length if known else None)
        content, _ = await asyncio.to_thread(applied, Content(), part.sound().changes)
    except EngineClosedError:
        raise
    except (EngineError, MalformedFeedError) as error:
        log.warning("the log of the lab's feed can't be read", error=str(error))
        return None
    is_ours = part.tree.root() == head.digest.hex() and (known is None or part.marked == known.root)
    return content if is_ours else None


def _difference(before: Content, content: Content) -> tuple[Sequence[Change], Content]:
    """Raises: MalformedFeedError."""
    update = changes(entries(before), entries(content))
    return update, applied(before, update)[0]


def _batches(update: Sequence[Change]) -> Iterator[Sequence[Change]]:
    return (update[at : at + _AT_ONCE] for at in range(0, len(update), _AT_ONCE))
