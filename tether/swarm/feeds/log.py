"""A feed's log as values: what anybody may have written in it, within what a lab is willing to fetch and keep of another's."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tether.errors import EngineError, MalformedFeedError, PeerUnreachableError
from tether.swarm.engine.engine import Engine
from tether.swarm.feeds import hyperbee
from tether.swarm.feeds.entries import MAX_VALUE_NBYTES, Change
from tether.swarm.feeds.hyperbee import Hyperbee
from tether.swarm.feeds.tree import FeedTree, Growth, Subtree, parse_block, spans

__all__ = ["MAX_BLOCKS", "MAX_NBYTES", "FeedCopy", "LogPart", "read_log"]

MAX_BLOCKS = 1_000_000
"""Of one core: a hundred thousand versions, and aliases that moved for years. The publisher begins a new core before that."""
MAX_NBYTES = 256 << 20
_REACH = 10.0
"""Seconds in which a publisher shows that its core is as long as it says, or anything of it at all."""


@dataclass(frozen=True, slots=True)
class LogPart:
    """A part of a log."""

    changes: Sequence[Change]
    """Each key once: the difference between two lengths of the log."""
    tree: FeedTree
    """Over all blocks up to its end."""
    marked: str | None
    """Root at the length that was asked for, where that is in the part, hex."""
    problem: MalformedFeedError | None
    """Why some of it can't be read: of no interest where the tree is not the right one."""

    def sound(self) -> Self:
        """Raises: MalformedFeedError: some of it can't be read."""
        if self.problem is not None:
            raise self.problem
        return self


async def read_log(bee: Hyperbee, before: FeedTree, behind: int, mark: int | None = None) -> LogPart:
    """What is behind the blocks of the tree `before`, up to `behind`.

    Read from the log, not by Hyperbee's own comparison of two trees: a publisher can make a tree that has no end.

    Raises: MalformedFeedError: it is larger than any feed's; PeerUnreachableError: a block is not here and does not come; EngineError.
    """
    tree, found = FeedTree(before), dict[str, bytes | None]()
    marked, problem = tree.root() if mark == tree.length else None, None
    async for block in bee.blocks(tree.length, behind):
        try:
            if tree.length:  # the first one is Hyperbee's own
                key, value = _entry(block)
                found[key] = value
        except MalformedFeedError as error:
            problem = problem or error
        tree.append(block)
        if tree.length == mark:
            marked = tree.root()
    return LogPart([Change(key, value) for key, value in found.items()], tree, marked, problem)


def _entry(block: bytes) -> tuple[str, bytes | None]:
    """Raises: MalformedFeedError."""
    key, value = parse_block(block)
    if value is not None and len(value) > MAX_VALUE_NBYTES:
        raise MalformedFeedError(f"a value of the feed has {len(value)} bytes, at most {MAX_VALUE_NBYTES} are taken")
    try:
        return key.decode(), value
    except UnicodeDecodeError:
        raise MalformedFeedError(f"a key of the feed is no UTF-8 ({key[:40]!r})") from None


class FeedCopy:
    """Another lab's core in a folder here. What is believed of it is decided elsewhere: a copy that is lost or stuck is fetched again."""

    def __init__(self, folder: Path, core: str, told: Callable[[], None]) -> None:
        self.core = core
        """Its key, hex."""
        self.folder = folder
        self.is_live = False
        """Whether the publisher tells what is new."""
        self._told = told
        self._is_broken = False
        self._news = asyncio.Event()
        self._bee: Hyperbee | None = None

    @classmethod
    async def open(cls, engine: Engine, folder: Path, core: str, told: Callable[[], None]) -> Self:
        """`told` is called when it grew, or nobody tells any more. Raises: EngineError: the folder can't be used."""
        copy = cls(folder, core, told)
        copy._bee = await Hyperbee.open(engine, folder, key=bytes.fromhex(core), whole=False, on_change=copy._changed)
        return copy

    @property
    def _log(self) -> Hyperbee:
        if self._bee is None:
            raise EngineError("the copy of the feed is closed")
        return self._bee

    def _changed(self, change: hyperbee.Change) -> None:
        if change != "append":
            self.is_live = False
        self._is_broken = self._is_broken or change in ("conflict", "truncate")  # Hypercore has closed it
        self._news.set()
        self._told()

    async def length(self) -> int:
        """Blocks that its core's key signed; they need not be here."""
        return (await self._log.head()).length

    async def connect(self, server: bytes) -> None:
        """Follow what is served under this key, unless it is followed already. Raises: PeerNotFoundError, PeerUnreachableError."""
        if self.is_live:
            return
        self.is_live = True  # now: that it ended may be told before `follow` returns
        try:
            async with asyncio.timeout(_REACH):
                await self._log.follow(server)
        except TimeoutError:
            self.is_live = False
            raise PeerUnreachableError("the lab's feed is announced, and shows nothing; it is asked again") from None
        except BaseException:
            self.is_live = False
            raise

    async def reach(self, length: int) -> None:
        """Wait until it has so many blocks, and not more bytes than are taken of anybody.

        Raises: TimeoutError: what is connected does not go on from what is here; MalformedFeedError: it is too large; EngineError.
        """
        if length > MAX_BLOCKS:
            raise MalformedFeedError(f"the feed has {length} blocks, at most {MAX_BLOCKS} are followed: its lab has to begin it anew")
        async with asyncio.timeout(_REACH):
            while True:
                self._news.clear()
                if self._is_broken:
                    raise EngineError("its publisher signed two things for one place")
                head = await self._log.head()
                if head.length >= length:
                    break
                await self._news.wait()
        if head.nbytes > MAX_NBYTES:
            raise MalformedFeedError(f"the feed has {head.nbytes} bytes, at most {MAX_NBYTES} are followed: its lab has to begin it anew")

    async def read(self, before: FeedTree, behind: int, mark: int | None = None) -> LogPart:
        """As `read_log`; what is not here is fetched."""
        return await read_log(self._log, before, behind, mark)

    async def growth(self, shorter: int, longer: int) -> Growth:
        """What shows others how it became so long. Raises: as `read`."""
        before, behind, at = (await self.read(FeedTree(), shorter)).tree, list[Subtree](), shorter
        for blocks in spans(shorter, longer):
            behind += (await self.read(FeedTree.behind(at), at + blocks)).tree.subtrees()
            at += blocks
        return Growth(before.subtrees(), tuple(behind))

    async def aclose(self) -> None:
        """Give the files back; a second call does nothing."""
        bee, self._bee, self.is_live = self._bee, None, False
        if bee is not None:
            await bee.close()

    async def remove(self) -> None:
        """Close it, and forget what is here of it."""
        await self.aclose()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
