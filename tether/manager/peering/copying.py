"""Copies of models by their publishers' policies: asks the other labs that hold some, plans as each of them does, and does its own part."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import structlog

from tether.errors import ForbiddenError, MalformedRequestError, NoSpaceError, RequestError, TetherError
from tether.manager.peering.agreements import Agreements
from tether.manager.peering.feed_content import content_of
from tether.manager.peering.freeing import Freeing
from tether.manager.peering.group import INTERVAL, AskMember, Group
from tether.manager.peering.group_view import Asked, Said, View, chosen, config_of, mark, nbytes_of, policy_of, stated
from tether.manager.peering.keeping import Kept
from tether.manager.peering.leaving import GRACE, Leaving
from tether.manager.peering.members import Members
from tether.manager.peering.replication import Policy
from tether.security.access import Access
from tether.store import Repository
from tether.store.index.mirror_tables import ModelState
from tether.swarm.feeds.entries import Content, FeedModel
from tether.types import Digest

__all__ = ["Copying", "CopyingSide", "agreed", "labs_of", "readers_of"]

log = structlog.get_logger("tether.swarm")
_REFUSAL = 600.0
"""Seconds until what could not be taken is tried again: by then the disk may have room, or a person trusts the publisher."""
_AGAIN = 5.0
"""Seconds until those that have a model are asked again by one whom they did not let in."""


@dataclass(frozen=True, slots=True)
class CopyingSide:
    """What it needs of the lab."""

    own: str
    """The lab's key, hex."""
    repository: Repository
    access: Access
    agreements: Agreements
    members: Members
    ask: AskMember
    holding: Callable[[str], Kept]
    """A publisher for which copies are held → what keeps its models here; begun where it is not there yet."""
    say: Callable[[], None]
    """The own feed is to say something else than before."""
    grace: float = GRACE
    """Seconds for which a copy is one too many before it is dropped."""


class _Facts(NamedTuple):
    """What this host knows, as of one look."""

    models: Sequence[ModelState]
    petnames: Mapping[str, str]
    readers: frozenset[str]
    """Keys that may have all of this lab's models: whom it names in its feed."""


class Copying:
    """Of one lab. Belongs to one event loop."""

    def __init__(self, side: CopyingSide) -> None:
        self._with = side
        self._groups: dict[str, Group] = {}
        self._facts = _Facts((), {}, frozenset())
        self._change = -1
        self._has: dict[str, dict[str, str]] = {}
        self._assigned: dict[str, frozenset[str]] = {}
        self._leaving: dict[str, Leaving] = defaultdict(lambda: Leaving(side.grace))
        self._freeing = Freeing(side.repository)
        self._refused: dict[tuple[str, str], float] = {}
        self._told: object = None
        self._own_content: tuple[object, Content] = (None, Content())
        """With what it was made of."""
        self._says: dict[str, Said] = {}
        """Of the groups, as of this look: each member asks for it once a second."""
        self._viewed: dict[str, tuple[View, dict[str, tuple[str, ...]]]] = {}
        """What was seen, and what follows of it for this lab: while it is seen again, nothing is planned."""
        self._shorts: dict[tuple[str, str], str] = {}
        self._asked_again: dict[str, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                try:
                    await self.look()
                except TetherError as error:
                    log.warning("copies of models can't be looked after now", error=str(error))
                except Exception:  # a bug here must not end the others' reason to ask this lab
                    log.exception("copies of models could not be looked after")
                await asyncio.sleep(INTERVAL)
        finally:
            for group in self._groups.values():
                await group.aclose()
            await self._freeing.aclose()

    async def look(self) -> None:
        """See who is there, and do what is this lab's part now. Raises: StoreError."""
        await self._read()
        self._says.clear()
        self._speak()
        await self._gather()
        members = {publisher: self._members(publisher) for publisher in self._groups}
        self._with.members.meet({publisher: peers | {publisher} for publisher, peers in members.items()}, self._facts.petnames)
        for publisher, group in self._groups.items():
            group.meet(peer for peer in members[publisher] | {publisher} if peer != self._own and not self._with.access.is_banned(peer))
            if any(each.publisher == publisher for each in self._with.agreements.holdings):
                await self._do_part(group)

    async def have(self, peer: str, value: bytes) -> bytes:
        """What a member is answered. Raises: MalformedRequestError, ForbiddenError."""
        try:
            asked = msgspec.json.decode(value, type=Asked)
        except msgspec.DecodeError as error:
            raise MalformedRequestError(f"have: the value names a publisher and what was seen: {error}") from None
        if not self._with.members.may_ask(peer, asked.publisher):
            raise ForbiddenError("this lab holds no copies for that publisher together with this key")
        said = self._said(asked.publisher)
        return msgspec.json.encode(Said(said.state) if asked.seen == said.state else said)

    def view(self, publisher: str) -> View | None:
        """What is known of a publisher's group; None: this lab is in none."""
        group = self._groups.get(publisher)
        return None if group is None else group.view(self._own, self._said(publisher))

    @property
    def petnames(self) -> Mapping[str, str]:
        """Of keys."""
        return self._facts.petnames

    # --- what is known here

    @property
    def _own(self) -> str:
        return self._with.own

    async def _read(self) -> None:
        change = await asyncio.to_thread(self._with.repository.change_count)
        models = self._facts.models
        if change != self._change:
            models = await asyncio.to_thread(lambda: self._with.repository.snapshot().models)
            self._has = {}
            for model in models:
                if model.versions:
                    self._has.setdefault(model.publisher, {})[model.name] = mark(each.digest for each in model.versions)
            self._change = change
        petnames, readers = await asyncio.to_thread(self._people)
        self._facts = _Facts(models, petnames, readers)

    def _people(self) -> tuple[Mapping[str, str], frozenset[str]]:
        access = self._with.access
        return self._with.repository.publishers(), readers_of(access)

    def _said(self, publisher: str) -> Said:
        """By this lab, of what it has of a publisher's."""
        if publisher not in self._groups:
            return self._stated(publisher)
        if publisher not in self._says:
            self._says[publisher] = self._stated(publisher)
        return self._says[publisher]

    def _stated(self, publisher: str) -> Said:
        has = self._has.get(publisher, {})
        if publisher == self._own:
            return stated(Said(holds=True, has=has))
        holding = next((each for each in self._with.agreements.holdings if each.publisher == publisher), None)
        if holding is None:
            return stated(Said(has=has))
        coming = tuple(sorted(self._assigned.get(publisher, frozenset())))
        refused = tuple(sorted(name for whose, name in self._refused if whose == publisher))
        leaving = tuple(sorted(self._leaving[publisher].names))
        return stated(Said("", True, holding.region, holding.room, has, coming, leaving, refused))

    def _members(self, publisher: str) -> frozenset[str]:
        """As its feed names them."""
        if publisher == self._own:
            return frozenset(chosen(self._facts.readers))
        content = self._groups[publisher].content
        return frozenset(chosen(content.peers)) if content else frozenset()

    # --- what is said, and to whom

    def _speak(self) -> None:
        """Have the own feed say what was agreed, if that is other than before."""
        policies = dict(self._with.agreements.policies)
        now = (policies, self._facts.readers if policies else frozenset())
        if self._told is not None and now != self._told:
            self._with.say()
        self._told = now

    async def _gather(self) -> None:
        """Be in the groups that were agreed, and in no other."""
        wanted = {each.publisher for each in self._with.agreements.holdings}
        if self._with.agreements.policies:
            wanted.add(self._own)
        for publisher in self._groups.keys() - wanted:
            await self._groups.pop(publisher).aclose()
            self._assigned.pop(publisher, None)
            self._viewed.pop(publisher, None)
            self._leaving.pop(publisher, None)
        for publisher in wanted - self._groups.keys():
            self._groups[publisher] = Group(publisher, self._with.ask)
        for publisher, group in self._groups.items():
            if publisher == self._own:
                group.content = self._agreed()
            else:
                group.content = self._with.holding(publisher).content

    def _agreed(self) -> Content:
        """What the own feed says."""
        agreements, readers = self._with.agreements, self._facts.readers
        made_of = (self._change, agreements.policies, readers)
        if made_of != self._own_content[0]:
            self._own_content = made_of, agreed(content_of(self._facts.models, self._own), agreements, readers)
        return self._own_content[1]

    # --- the own part

    async def _do_part(self, group: Group) -> None:
        """Have fetched what the plan gives this lab, and dropped what it takes from it."""
        publisher, kept = group.publisher, self._with.holding(group.publisher)
        self._note_refusals(publisher, kept)
        if group.content is None or not group.is_clear():
            return
        view = group.view(self._own, self._said(publisher))
        known = self._viewed.get(publisher)
        if known is None or known[0] != view:
            plan = view.plan()
            sources = {copy.model: copy.sources for copy in plan.fetched_by(self._own)}
            mine = {name: sources.get(name, ()) for name, peers in plan.holders.items() if self._own in peers}
            await self._take(publisher, kept, frozenset(sources))
            known = self._viewed[publisher] = view, mine
            self._assigned[publisher] = frozenset(sources)
            self._tell(publisher, plan.short)
        kept.assign(known[1])  # also where nothing changed: it may be another one than before
        await self._leave(group, kept, known[1])

    # --- what is one too many

    async def _take(self, publisher: str, kept: Kept, coming: frozenset[str]) -> None:
        """Remember what comes as a copy and for no other reason: that alone may be dropped again. What people want is theirs for good."""
        has, before = self._has.get(publisher, {}), self._with.agreements.taken(publisher)
        taken = {name for name in (*before, *coming) if (name in before or name not in has) and not kept.is_asked_for(name)}
        if taken != before:
            await asyncio.to_thread(self._with.agreements.take, publisher, frozenset(taken))

    async def _leave(self, group: Group, kept: Kept, mine: Collection[str]) -> None:
        """Say which copies are left, and drop those that enough others keep. Raises: StoreError."""
        publisher, has = group.publisher, self._has.get(group.publisher, {})
        await self._take(publisher, kept, frozenset())
        models = {} if group.content is None else group.content.models
        surplus = (self._with.agreements.taken(publisher) & has.keys() & models.keys()) - set(mine)
        leaving = self._leaving[publisher]
        leaving.look({name: has[name] for name in surplus}, asyncio.get_running_loop().time())
        self._says.pop(publisher, None)  # from here on nobody is told otherwise
        if not leaving.names:
            return
        view = group.view(self._own, self._said(publisher))
        for name in leaving.names:
            model = models[name]
            wanted = (policy_of(model.config) or Policy()).wanted(nbytes_of(model))
            keepers = {peer: at for peer in view.keepers(name, model) - {self._own} if (at := group.asked(peer)) is not None}
            if leaving.may_drop(name, wanted, keepers):
                await self._drop(publisher, kept, name)

    async def _drop(self, publisher: str, kept: Kept, name: str) -> None:
        """Take it out of the catalog, and its bytes off the disk."""
        repository, removed = self._with.repository, list[Digest]()

        def remove() -> None:
            state = repository.state_of(publisher, name)
            if state is not None:
                repository.follow([msgspec.structs.replace(state, versions=(), aliases={}, history=())])
                removed.extend(version.digest for version in state.versions)

        if await kept.drop(name, lambda: asyncio.to_thread(remove)):
            log.info("a copy that was one too many is dropped", publisher=publisher, model=name)
            self._freeing.free(removed)
            left = self._with.agreements.taken(publisher) - {name}
            await asyncio.to_thread(self._with.agreements.take, publisher, left)

    def _note_refusals(self, publisher: str, kept: Kept) -> None:
        now = asyncio.get_running_loop().time()
        self._refused = {key: until for key, until in self._refused.items() if until > now}
        for name in self._assigned.get(publisher, frozenset()):
            state = kept.models.get(name)
            if state is None or not isinstance(state.error, RequestError | NoSpaceError):
                continue
            if type(state.error) is ForbiddenError:  # by a holder that has not read yet that this lab is a member: soon it has
                self._again(publisher, kept, now)
            else:
                log.warning("a copy is not taken: another lab is to have it", publisher=publisher, model=name, error=str(state.error))
                self._refused[publisher, name] = now + _REFUSAL

    def _again(self, publisher: str, kept: Kept, now: float) -> None:
        if now - self._asked_again.get(publisher, -_AGAIN) >= _AGAIN:
            self._asked_again[publisher] = now
            kept.nudge()

    def _tell(self, publisher: str, short: Mapping[str, str]) -> None:
        """People, of what has fewer copies than was agreed, once."""
        for name, why in short.items():
            if self._shorts.get((publisher, name)) != why:
                log.warning("fewer copies than agreed", publisher=publisher, model=name, why=why)
        others = {key: why for key, why in self._shorts.items() if key[0] != publisher}
        self._shorts = others | {(publisher, name): why for name, why in short.items()}


def readers_of(access: Access) -> frozenset[str]:
    """Keys that may have all models: they are named in the feed. May wait for a write of the file of access."""
    return frozenset(peer.key for peer in access.peers() if access.may(peer.key, "have"))


def agreed(content: Content, agreements: Agreements, readers: frozenset[str]) -> Content:
    """The own content, with policies and, where there is any, the labs that may have copies."""
    policies = {name: agreements.of(name) for name in content.models}
    models = {
        name: model if (policy := policies[name]) is None else msgspec.structs.replace(model, config=config_of(policy))
        for name, model in content.models.items()
    }
    return Content(models, frozenset(chosen(readers)) if any(policies.values()) else frozenset())


def labs_of(view: View, name: str, model: FeedModel, own: str, petnames: Mapping[str, str]) -> dict[str, Any]:
    """Who has a model, for people: whole or on its way, here or away; and what was agreed."""
    copies = view.copies(name, model)
    policy = policy_of(model.config)
    if copies is None or policy is None:
        return {"policy": None, "labs": [], "short": None}
    states = {**dict.fromkeys(copies.coming, "coming"), **dict.fromkeys(copies.held, "whole")}
    states |= {peer: "surplus" for peer in copies.held if name in view.said[peer].leaving}
    labs = [
        {"peer": peer, "petname": petnames.get(peer), "own": peer == own, "state": states[peer], "here": peer in view.here}
        for peer in sorted(states, key=lambda peer: (peer != own, states[peer], peer))
    ]
    return {"policy": msgspec.to_builtins(policy), "labs": labs, "short": view.plan().short.get(name)}
