"""Hyperbees of Holepunch's own code: sorted keys on a log that its publisher signs, readable by any program with that package."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from tether.errors import EngineError, MalformedFeedError
from tether.swarm.engine.engine import Engine
from tether.swarm.engine.values import hex_key

__all__ = ["Change", "Entry", "FeedServer", "Head", "Hyperbee", "serve"]

Change = Literal["append", "truncate", "conflict", "ended"]
"""What became of a log: it grew; its publisher cut it back (a follower refuses); its publisher signed two things for one place; or of the
connection over which it is followed: it is gone."""
CHANGES: tuple[Change, ...] = ("append", "truncate", "conflict", "ended")
"""In the order of `js/feeds.js`."""
_BLOCKS_NBYTES = 64 << 10
"""Of one answer: 20 ms, in which the loop does nothing else."""
_MALFORMED = "MALFORMED"
MAX_ENTRIES = 10_000
"""Of one answer: it crosses in one piece."""


@dataclass(frozen=True, slots=True)
class Head:
    """How far a log goes, and what it is up to there."""

    length: int
    """Blocks; the first one is Hyperbee's own."""
    fork: int
    """How often it was cut back."""
    digest: bytes
    """Of all its blocks: two logs with one key and length and another digest are a fork."""
    nbytes: int
    """Of all its blocks."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key and its value, as they were written by block `seq`."""

    seq: int
    kind: Literal["put", "del"]
    key: str
    value: str | None


class Hyperbee:
    """One feed, open in a folder of its own. Needs a live `Engine`, whose interpreter it runs in."""

    def __init__(self, engine: Engine, opened: dict[str, Any]) -> None:
        self._engine = engine
        self._feed = int(opened["feed"])
        self.key = bytes.fromhex(opened["key"])
        """What followers know it by."""
        self.topic = bytes.fromhex(opened["topic"])
        """Where who serves it announces itself."""
        self.writable = bool(opened["writable"])

    @classmethod
    async def open(
        cls,
        engine: Engine,
        folder: Path,
        *,
        seed: bytes | None = None,
        key: bytes | None = None,
        whole: bool = True,
        on_change: Callable[[Change], None] | None = None,
    ) -> Self:
        """Of one's own, under the signing key of `seed`; or another's, by its `key`, which then is kept `whole` and grows when it does.

        Not `whole`: only what is asked for is fetched, so that its size can be looked at first.

        Raises: EngineError: the folder can't be written, or holds another feed; BadKeyError.
        """
        keys = {"seed": None if seed is None else hex_key(seed, "seed"), "key": None if key is None else hex_key(key, "feed's key")}
        opened = await engine.call("feedOpen", folder=_text(folder), whole=whole, **keys)
        feed = cls(engine, opened)
        if on_change is not None:
            engine.on_feed_change(feed._feed, lambda number: on_change(CHANGES[number]))
        return feed

    async def head(self) -> Head:
        """How far it goes now."""
        return _head(await self._call("feedHead"))

    async def put(self, changes: Sequence[tuple[str, str | None]]) -> Head:
        """Write several keys at once, None deletes one; durable when it returns."""
        return _head(await self._call("feedPut", changes=list(changes)))

    async def get(self, key: str, length: int | None = None) -> str | None:
        """The value of a key, now or when the log had `length` blocks."""
        value: str | None = await self._call("feedGet", key=key, length=length)
        return value

    async def range(self, first: str, behind: str, limit: int = MAX_ENTRIES, length: int | None = None) -> list[Entry]:
        """Keys from `first` up to `behind`, which is not one of them."""
        return _entries(await self._call("feedRange", first=first, behind=behind, limit=min(limit, MAX_ENTRIES), length=length))

    async def history(self, first: int = 1, limit: int = MAX_ENTRIES) -> list[Entry]:
        """What was written, block by block, from block `first` on."""
        return _entries(await self._call("feedHistory", first=first, limit=min(limit, MAX_ENTRIES)))

    async def blocks(self, first: int, behind: int) -> AsyncIterator[bytes]:
        """The log itself, from block `first` to before `behind`: what anybody may have written, so bounded and not decoded.

        Raises: MalformedFeedError: a block is larger than any entry; PeerUnreachableError: one that is not here does not come.
        """
        while first < behind:
            try:
                found = await self._call("feedBlocks", first=first, behind=behind, nbytes=_BLOCKS_NBYTES)
            except EngineError as error:
                if error.args[1:2] != (_MALFORMED,):
                    raise
                raise MalformedFeedError(f"the feed's log can't be read ({error}): nothing of it was taken") from None
            for block in found:
                yield bytes.fromhex(block)
            first += len(found)

    async def follow(self, publisher: bytes) -> Head:
        """Connect to who serves it and take what is new, now and from then on while the connection lasts.

        Raises: PeerNotFoundError, PeerUnreachableError.
        """
        return _head(await self._call("feedFollow", publicKey=hex_key(publisher, "public key")))

    async def close(self) -> None:
        """Give the files back."""
        self._engine.on_feed_change(self._feed, None)
        await self._call("feedClose")

    async def _call(self, method: str, **values: Any) -> Any:
        return await self._engine.call(method, feed=self._feed, **values)


class FeedServer:
    """Gives feeds to whoever knows their keys and may, under a key of its own."""

    def __init__(self, engine: Engine, made: dict[str, Any]) -> None:
        self._engine, self._server = engine, int(made["server"])
        self.public_key = bytes.fromhex(made["publicKey"])
        """What followers connect to."""

    @classmethod
    async def open(cls, engine: Engine, seed: bytes, admits: Callable[[bytes], bool]) -> Self:
        """Under the key of `seed`. `admits`: whether a peer may follow at all, asked with its proven key when it connects."""
        server = cls(engine, await engine.call("feedServe", seed=hex_key(seed, "seed")))
        engine.on_feed_peer(server._server, lambda key, _address: not admits(key))
        return server

    async def offer(self, feeds: Sequence[Hyperbee]) -> None:
        """These and no others, announced on each one's topic. Who is connected has to connect again."""
        await self._call("feedOffer", feeds=[feed._feed for feed in feeds])  # noqa: SLF001 (this module's own)

    async def cut(self, peer: bytes) -> None:
        """End the peer's connection: it is not admitted any more."""
        await self._call("feedCut", publicKey=hex_key(peer, "public key"))

    async def aclose(self) -> None:
        """Nobody is given anything any more."""
        try:
            await self._call("feedUnserve")
        finally:
            self._engine.on_feed_peer(self._server, None)

    async def _call(self, method: str, **values: Any) -> Any:
        return await self._engine.call(method, server=self._server, **values)


async def serve(engine: Engine, seed: bytes, feeds: Sequence[Hyperbee]) -> bytes:
    """Give feeds to whoever knows their keys, until the engine closes; the public key that followers connect to."""
    server = await FeedServer.open(engine, seed, lambda _: True)
    await server.offer(feeds)
    return server.public_key


def _text(folder: Path) -> str:
    return str(folder.absolute())


def _head(found: dict[str, Any]) -> Head:
    return Head(int(found["length"]), int(found["fork"]), bytes.fromhex(found["hash"]), int(found["nbytes"]))


def _entries(found: list[dict[str, Any]]) -> list[Entry]:
    return [Entry(int(entry["seq"]), entry["type"], entry["key"], entry["value"]) for entry in found]
