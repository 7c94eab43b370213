"""What a lab's own people ask about copies: how many there are to be, for whom this lab holds some, and who has a model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

import msgspec

from tether.errors import BadInputError, MalformedRequestError
from tether.manager.asking import Operation
from tether.manager.operations import Operations
from tether.manager.peering.agreements import Agreements, Holding
from tether.manager.peering.copying import Copying, agreed, labs_of
from tether.manager.peering.feed_content import content_of
from tether.manager.peering.group_view import Said, View, mark
from tether.manager.peering.replication import Policy
from tether.sites import region_name
from tether.swarm.feeds.entries import Content, FeedModel
from tether.types import ModelRef, model_name

__all__ = ["Agreeing"]

_LONE = FeedModel()


class Agreeing:
    """Operations of one manager."""

    NAMES: ClassVar[tuple[str, ...]] = ("set_policy", "policies", "hold", "holdings", "end_holding", "copies")

    def __init__(self, operations: Operations, agreements: Agreements, copying: Callable[[], Copying | None]) -> None:
        """`copying`: what looks after copies now, while this lab is on the swarm."""
        self._operations, self._agreements, self._copying = operations, agreements, copying
        self.may_hold: Callable[[str], Awaitable[object]] = _nobody
        """Awaited before copies are held for a publisher. Raises: it does not allow it, is away; this lab can't be on the swarm."""
        self.ended: Callable[[str], Awaitable[None]] = _nobody
        """Awaited when no copies are held for a publisher any more."""

    def handlers(self) -> dict[str, Operation]:
        """What people ask of it, by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    async def set_policy(self, model: str, policy: Mapping[str, Any] | None) -> dict[str, Any]:
        """As the port says."""
        name = model if model == Agreements.EVERY else model_name(model)
        wanted = None if policy is None else await asyncio.to_thread(self._policy, policy)
        await self._change(self._agreements.agree, name, wanted)
        return {"model": name, "policy": msgspec.to_builtins(wanted)}

    async def policies(self) -> dict[str, Any]:
        """As the port says."""
        return {name: msgspec.to_builtins(policy) for name, policy in sorted(self._agreements.policies.items())}

    async def hold(self, publisher: str, region: str = "", room: int | None = None) -> dict[str, Any]:
        """As the port says."""
        key = await asyncio.to_thread(self._operations.admission.key_of, publisher)
        if key == self._operations.public:
            raise BadInputError("this lab has its own models anyway: name the lab for which it is to hold copies")
        if room is not None and room < 0:
            raise BadInputError("the room is a number of bytes")
        region = region and region_name(region)
        if not any(each.publisher == key for each in self._agreements.holdings):
            await self.may_hold(key)
        await self._change(self._agreements.hold, Holding(key, region, room))
        return {"publisher": key, "region": region, "room": room}

    async def holdings(self) -> list[dict[str, Any]]:
        """As the port says."""
        return [msgspec.to_builtins(holding) for holding in self._agreements.holdings]

    async def end_holding(self, publisher: str) -> dict[str, Any]:
        """As the port says."""
        key = await asyncio.to_thread(self._operations.admission.key_of, publisher)
        await self._change(self._agreements.release, key)
        await self.ended(key)
        return {"publisher": key}

    async def copies(self, model: str) -> dict[str, Any]:
        """As the port says."""
        record = await asyncio.to_thread(self._operations.repository.resolve, ModelRef.parse(model))
        name, copying = record.name.rpartition("~")[2], self._copying()
        view = None if copying is None else copying.view(record.publisher)
        if copying is None or view is None:
            view, petnames = await asyncio.to_thread(self._lone, record.publisher), {}
        else:
            petnames = dict(copying.petnames)
        found = labs_of(view, name, view.content.models.get(name, _LONE), self._operations.public, petnames)
        return {"model": record.name, "publisher": record.publisher, **found}

    async def _change(self, change: Callable[..., None], *arguments: object) -> None:
        """It counts as a change of the catalog: answered when followers in step have the file as well."""
        await asyncio.to_thread(change, *arguments)
        await asyncio.to_thread(self._operations.repository.touch)

    def _policy(self, asked: Mapping[str, Any]) -> Policy:
        try:
            policy = msgspec.convert(asked, Policy)
        except msgspec.ValidationError as error:
            raise MalformedRequestError(f"a policy has copies, regions, pin and budget: {error}") from None
        keys = tuple(dict.fromkeys(self._operations.admission.key_of(each) for each in policy.pin))
        return msgspec.structs.replace(policy, pin=keys).checked()

    def _lone(self, publisher: str) -> View:
        """What is known while this lab is not on the swarm: it has what it has."""
        models, own = self._operations.repository.snapshot().models, self._operations.public
        content = content_of(models, publisher)
        if publisher == own:
            content = agreed(content, self._agreements, frozenset())
        has = {name: mark(version.digest for version in model.versions.values()) for name, model in content.models.items()}
        return View(Content(content.models), {own: Said(holds=True, has=has)}, frozenset({own}))


async def _nobody(_: str) -> None:
    pass
