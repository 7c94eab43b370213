"""Which labs this one's streams may go through where no hole can be punched, and whether it can do that for others.

A lab that relays says so in its record. Who is known here and says so is used; a relay sees who speaks with whom, and how much, so nobody
else is. Whom it serves the relay decides: the keys that it knows itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

import structlog

from tether.errors import TetherError
from tether.manager.peering.reachability import Aid
from tether.swarm.records.records import Record
from tether.swarm.relaying.relay import RelayStatus

__all__ = ["Labs", "Relayed", "Relaying"]

log = structlog.get_logger("tether.swarm")
_LOOK: Final = 300.0
"""Seconds between looks: records are written anew as often."""
_SPACING: Final = 2.0
"""Seconds between looks, however often it changes who is known."""
_AGAIN: Final = 30.0
"""Seconds until what failed is tried again."""
_PATIENCE: Final = 5.0
"""Seconds to look for what labs say of which nothing is known yet."""
_MOST: Final = 8
"""Relays at a time: each stream takes any of them."""


class Relayed(Protocol):
    """What is needed of the node; keys are hex."""

    @property
    def relaying(self) -> RelayStatus | None: ...

    async def ready(self) -> None: ...

    async def probe(self) -> bool: ...

    async def relay_through(self, relays: Sequence[str]) -> None: ...


class Labs(Protocol):
    """What others say of themselves: `Neighbours`."""

    async def meet(self, peers: Iterable[str], seconds: float) -> None: ...

    def said(self) -> Mapping[str, Record]: ...


class Relaying:
    """Of one presence on the swarm. Belongs to its event loop."""

    def __init__(self, node: Relayed, labs: Labs, known: Callable[[], AbstractSet[str]], fixed: tuple[str, ...] = ()) -> None:
        """`known`: keys of labs that may see with whom this one speaks; blocks.

        `fixed`: relays that a person chose, in place of all that could be learnt, of which the node was told.
        """
        self._node, self._labs, self._known, self._fixed = node, labs, known, fixed
        self._through = fixed
        self._is_open: bool | None = None
        self._changed = asyncio.Event()
        self._looked = asyncio.Event()

    @property
    def is_of_use(self) -> bool:
        """Whether others can use this lab as a relay."""
        return self._node.relaying is not None and bool(self._is_open)

    @property
    def aid(self) -> Aid:
        """How it stands, for people."""
        relaying = self._node.relaying
        return Aid(relaying is not None, 0 if relaying is None else relaying.pairs, len(self._through))

    async def knows_itself(self) -> None:
        """Wait until it was tried to find out whether this lab can relay, if it is to: so that its first record says so."""
        if self._node.relaying is not None:
            await self._looked.wait()

    def changed(self) -> None:
        """Others may be known than before."""
        self._changed.set()

    async def run(self, changed: Callable[[], None]) -> None:
        """Until cancelled. `changed`: told when the record is to say something else."""
        while True:
            self._changed.clear()
            pause = _LOOK
            try:
                await self._node.ready()
                await self._look_at_itself(changed)
                await self._look_for_relays()
            except TetherError as error:
                log.debug("relays were not looked for", error=str(error))
                pause = _AGAIN
            if self.aid.relays and not self._is_open:
                pause = _AGAIN
            self._looked.set()
            await asyncio.sleep(_SPACING)
            try:
                async with asyncio.timeout(pause - _SPACING):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _look_at_itself(self, changed: Callable[[], None]) -> None:
        """A relay that packets don't reach unasked is none; who is to be one and can't is told so once."""
        if self._node.relaying is None:
            return
        before, self._is_open = self._is_open, await self._node.probe()
        if before is None and not self._is_open:
            log.warning(
                "this lab is to relay (--relay), but it is behind a NAT or firewall: no other lab can use it. Run it where the address is "
                "public, or forward a UDP port to it"
            )
        if bool(before) != self._is_open:
            changed()

    async def _look_for_relays(self) -> None:
        if self._fixed:
            return
        known = await asyncio.to_thread(self._known)
        await self._labs.meet(known, _PATIENCE)
        said = self._labs.said()
        found = tuple(peer for peer in sorted(known & said.keys()) if said[peer].relays)[:_MOST]
        if found != self._through:
            await self._node.relay_through(found)
            self._through = found
            log.info("labs that relay where no hole can be punched", relays=found)
