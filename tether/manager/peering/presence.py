"""This lab on the swarm, from the start of its node to its end: what peers call and get, whom it finds, what it keeps of others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import orjson
import structlog

from tether.config import DataFolder
from tether.errors import TetherError
from tether.manager.operations import Operations
from tether.manager.peering.agreements import Agreements
from tether.manager.peering.copying import Copying, CopyingSide, agreed, readers_of
from tether.manager.peering.feed_content import content_of
from tether.manager.peering.feeds import FollowedFeed, Following, News, OwnFeed
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.handing_on import HandingOn, HandingOnSide
from tether.manager.peering.keeping import Kept, Surroundings
from tether.manager.peering.leaving import GRACE
from tether.manager.peering.lines import Lines
from tether.manager.peering.members import Members
from tether.manager.peering.methods import Ask, Methods
from tether.manager.peering.neighbours import Neighbours
from tether.manager.peering.offering import Offering
from tether.manager.peering.pulling import Pulling, PullOptions, Rim
from tether.manager.peering.relaying import Relaying
from tether.manager.peering.shelf import RepositoryShelf
from tether.manager.peering.staged import StagedShares
from tether.manager.peering.subscriptions import Subscription, Subscriptions
from tether.swarm.blobs.blobs import PeerBlobs
from tether.swarm.engine.engine import Engine
from tether.swarm.feeds.entries import Content
from tether.swarm.feeds.state import FeedStates
from tether.swarm.node.node import Node, NodeSettings, Standing
from tether.swarm.records.records import Capabilities

__all__ = ["LabSide", "Presence"]

log = structlog.get_logger("tether.swarm")
_ANSWER = 30.0
"""Seconds for one answer of a peer, connecting included."""
_HAVE = 3.0
"""Seconds for one answer about copies: it is asked each second, and who is silent for ten is gone."""
_GOODBYE = 2.0
"""Seconds for taking leave."""


@dataclass(frozen=True, slots=True)
class LabSide:
    """What the swarm needs of the lab."""

    data: DataFolder
    operations: Operations
    ask: Ask
    gateway: Gateway
    subscriptions: Subscriptions
    agreements: Agreements
    members: Members
    offering: Offering
    lines: Lines
    staged: StagedShares
    changed: Callable[[], None]
    """To be called when the catalog was changed by what came from others."""
    surplus: float = GRACE
    """Seconds for which a copy has to be one too many before it is dropped."""

    def follows(self, peer: str) -> bool:
        """Whether the user follows this key, or keeps what it has."""
        followed = any(peer == each.publisher or peer in each.via for each in self.subscriptions.all())
        return followed or any(peer == each.publisher for each in self.agreements.holdings)

    def standing(self, peer: str) -> Standing:
        """What a key is to this lab."""
        access = self.operations.access
        if access.is_banned(peer):
            return Standing.BANNED
        return Standing.KNOWN if access.scopes(peer) or self.follows(peer) or self.members.knows(peer) else Standing.UNKNOWN

    def acquaintances(self) -> set[str]:
        """Keys that its people let in, gave a name, follow, or lend workers to. Blocks."""
        let_in = {peer.key for peer in self.operations.access.peers() if peer.scopes}
        followed = {key for each in self.subscriptions.all() for key in (each.publisher, *each.via)}
        held = {each.publisher for each in self.agreements.holdings}
        named = self.operations.repository.publishers().keys()
        return (let_in | followed | held | named | self.lines.borrowers) - {self.operations.public}


class Presence:
    """Use `begin`. Belongs to the main thread's loop: PythonMonkey must run there."""

    def __init__(self, lab: LabSide, node: Node, methods: Methods, shelf: RepositoryShelf, relays: tuple[str, ...]) -> None:
        """`relays`: those that a person chose, of which the node knows."""
        self._lab, self.node, self._methods, self._shelf = lab, node, methods, shelf
        operations, feeds = lab.operations, lab.data.root / "feeds"
        self._states = FeedStates(feeds / "states")
        self.own_feed = OwnFeed(
            self._engine, operations.repository, operations.identity, feeds / "own", lambda peer: operations.access.may(peer, "feed")
        )
        self.own_feed.more = lambda content: agreed(content, lab.agreements, readers_of(operations.access))
        methods.feed = self.own_feed.answer
        methods.on_admitted = node.welcome
        self.neighbours = Neighbours(node, operations.identity, operations.access, self._offered, lab.follows)
        self.relaying = Relaying(node, self.neighbours, lab.acquaintances, relays)
        rim = Rim(shelf.arriving, lambda digest, places: node.have(digest, tuple(places)), self._lied)
        self._pulling = Pulling(operations.repository, self._unchecked, lab.data.run / "pulling", PullOptions(operations.public, rim=rim))
        node.on_have.append(self._pulling.gained)
        node.on_back.append(self._back)
        self._kept: dict[str, Kept] = {}
        self._doing: set[asyncio.Task[None]] = set()
        self._unlisten = operations.access.listen(_on_loop(self._less))
        self.copying = Copying(self._copying_side())
        handing_on = HandingOn(self._handing_on_side())
        methods.heads = handing_on.answer
        methods.have, methods.claimed = self.copying.have, lab.staged.claimed
        methods.opens, methods.may = lab.members.opens, lab.members.may
        lab.lines.begin(node, methods, self._pulling, lab.changed)
        self._tasks = [asyncio.create_task(self._appear(), name="neighbours")]
        self._tasks.append(asyncio.create_task(self.relaying.run(self.neighbours.changed), name="relaying"))
        self._tasks.append(asyncio.create_task(lab.offering.run(self.neighbours.changed), name="offering"))
        for subscription in lab.subscriptions.all():
            self.keep(subscription)
        self._tasks.append(asyncio.create_task(self.copying.run(), name="copying"))
        self._tasks.append(asyncio.create_task(handing_on.run(), name="handing-on"))

    @classmethod
    async def begin(cls, lab: LabSide, settings: NodeSettings) -> Self:
        """Raises: MissingDependencyError: PythonMonkey is not installed; EngineError."""
        operations = lab.operations
        methods = Methods(operations.public, lab.ask, operations.repository, operations.access, lab.gateway)
        shelf = RepositoryShelf(operations.repository, lab.members)
        try:
            node = await Node.start(operations.identity.seed, methods.service(), shelf, lab.standing, settings)
        except BaseException:
            shelf.close()
            raise
        return cls(lab, node, methods, shelf, tuple(relay.hex() for relay in settings.engine.relays))

    async def retire(self, grace: float) -> None:
        """Before `aclose`: what peers ask is not begun any more, what runs ends within `grace` seconds."""
        self._methods.leave()
        await asyncio.gather(self._lab.lines.retire(grace), self.node.retire(grace))

    async def aclose(self) -> None:
        """Take leave and close everything."""
        self._unlisten()
        await self._lab.lines.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._doing, return_exceptions=True)
        await asyncio.gather(*(kept.aclose() for kept in self._kept.values()))
        await asyncio.gather(self._take_leave(), self.own_feed.aclose())
        await self.node.aclose()
        await self._methods.running.aclose()
        self._pulling.close()
        self._shelf.close()

    def changed(self) -> None:
        """The catalog is another one."""
        self._methods.changed()
        self.neighbours.changed()
        self.relaying.changed()
        for kept in self._kept.values():
            kept.trust_changed()
        self._do(asyncio.create_task(self.own_feed.changed()))

    def keep(self, subscription: Subscription) -> Kept:
        """Keep these models up to date."""
        kept = self._kept.get(subscription.publisher)
        if kept is None:
            surroundings = Surroundings(self._asked, self._pulling, self._following, self.neighbours.holders, self._lab.changed)
            kept = self._kept[subscription.publisher] = Kept(subscription, surroundings)
        else:
            kept.subscribe(subscription)
        return kept

    def hold(self, publisher: str) -> Kept:
        """What keeps models of a publisher for which copies are held."""
        kept = self._kept.get(publisher) or self.keep(Subscription(publisher, ()))
        kept.hold()
        return kept

    async def end_holding(self, publisher: str) -> None:
        """Keep of this publisher what is kept besides copies."""
        await self.release(publisher)
        subscription = self._lab.subscriptions.of(publisher)
        if subscription is not None:
            self.keep(subscription)

    async def release(self, publisher: str) -> None:
        """Keep nothing of this publisher any more, but for the copies that were agreed."""
        if any(each.publisher == publisher for each in self._lab.agreements.holdings):
            self.keep(Subscription(publisher, ()))
            return
        kept = self._kept.pop(publisher, None)
        if kept is not None:
            await kept.aclose()

    # --- what happens

    async def _appear(self) -> None:
        # The first record is to say all: who found one looks for no other soon.
        await asyncio.gather(self._lab.offering.look(), self.relaying.knows_itself())
        await self.neighbours.run()

    async def _take_leave(self) -> None:
        with contextlib.suppress(TetherError, TimeoutError):
            async with asyncio.timeout(_GOODBYE):
                await self.neighbours.leave()

    def _less(self, peer: str) -> None:
        """It may do less than before."""
        self.node.cut(peer)
        self._lab.lines.less(peer)
        self._do(asyncio.create_task(self._methods.running.less(peer, self._methods.may)))
        self._do(asyncio.create_task(self.own_feed.cut(peer)))

    def _lied(self, peer: str, error: TetherError) -> None:
        self._do(asyncio.create_task(self._ban(peer, error)))

    async def _ban(self, peer: str, error: TetherError) -> None:
        try:
            await self._lab.ask("ban", peer=peer, reason=str(error))
        except TetherError as failure:
            log.warning("a peer that gave wrong bytes could not be banned", peer=peer, error=str(failure))

    def _do(self, task: asyncio.Task[None]) -> None:
        self._doing.add(task)
        task.add_done_callback(self._doing.discard)

    def _back(self) -> None:
        for kept in self._kept.values():
            kept.nudge()

    # --- what is needed of the node

    def _offered(self) -> Capabilities:
        return replace(self._lab.offering.offered(), relays=self.relaying.is_of_use)

    async def _unchecked(self, peer: str) -> PeerBlobs:
        """What it gives, for `Pulling`: the store hashes what it stages, and who gave other bytes is banned."""
        return (await self.node.blobs(peer)).unchecked()

    async def _engine(self) -> Engine:
        return self.node.engine

    async def _asked(self, peer: str, method: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = orjson.loads(await self.node.request(peer, method, orjson.dumps(value), _ANSWER))
        return answer

    def _handing_on_side(self) -> HandingOnSide:
        def feeds() -> dict[str, FollowedFeed]:
            return {publisher: kept.feed for publisher, kept in self._kept.items()}

        async def ask(peer: str, value: bytes) -> bytes:
            return await self.node.request(peer, "heads", value, _ANSWER)

        return HandingOnSide(feeds, lambda: {each.peer for each in self.node.connections()}, ask)

    def _copying_side(self) -> CopyingSide:
        lab, operations = self._lab, self._lab.operations

        async def ask(peer: str, value: bytes) -> bytes:
            return await self.node.request(peer, "have", value, _HAVE)

        def say() -> None:
            self._do(asyncio.create_task(self.own_feed.changed()))

        own, repository, access = operations.public, operations.repository, operations.access
        return CopyingSide(own, repository, access, lab.agreements, lab.members, ask, self.hold, say, lab.surplus)

    def _following(self, publisher: str, on_content: Callable[[str, News], None]) -> Following:
        async def ask() -> Mapping[str, Any]:
            return await self._asked(publisher, "feed", {})

        return Following(
            self._engine, ask, on_content, lambda: self._bound(publisher), self._states, self._lab.data.root / "feeds" / publisher
        )

    def _bound(self, publisher: str) -> Content:
        return content_of(self._lab.operations.repository.snapshot().models, publisher)


def _on_loop(deed: Callable[[str], None]) -> Callable[[str], None]:
    """To be called from any thread, which holds a lock then: it is only passed on."""
    loop = asyncio.get_running_loop()

    def pass_on(key: str) -> None:
        loop.call_soon_threadsafe(deed, key)

    return pass_on
