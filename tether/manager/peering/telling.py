"""What other labs are told of what happens here: of models that their scope shows, in the numbers of the lab's gateway."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import orjson

from tether.errors import MalformedRequestError, QueueFullError
from tether.manager.peering.gateway import Gateway
from tether.routing.lab_events import Kind
from tether.security.access import Access
from tether.swarm.rpc.rpc import Call

__all__ = ["Telling"]

_MOST_WAIT: Final = 30.0
"""Seconds for which a question may stay open: a peer that is gone without a word is forgotten then."""
_LISTEN: Final = 5.0
"""Seconds for which the gateway is asked at a time: of the ten that a manager has when it ends."""
_MOST_OPEN: Final = 16
"""Questions of one peer: notebooks of its user that listen at a time."""
_SHOWN: Final = ("seq", "at", "kind", "model", "version", "alias")
"""Nothing of workers, nor of why something failed, which has paths in it."""


class _Asked(msgspec.Struct):
    after: int | None = None
    """Number of the last one that the caller has; None: it wants to know that of now."""
    wait: float = 0.0
    """Seconds for another one."""


class Telling:
    """Of one lab. Nothing is kept, and the gateway is asked only while somebody asks here."""

    def __init__(self, gateway: Gateway, access: Access) -> None:
        self._gateway, self._access = gateway, access
        self._open = Counter[str]()
        self.is_leaving = False
        """Whether this manager is about to end: questions are answered soon."""

    async def events(self, call: Call, value: bytes) -> bytes:
        """`{"events", "seq"}`: what the caller may hear of, after a number; at once, or when there is something.

        Raises: MalformedRequestError; QueueFullError: it asks too much at a time; ServiceUnavailableError: no gateway answers here.
        """
        try:
            asked = msgspec.json.decode(value or b"{}", type=_Asked)
        except msgspec.DecodeError as error:
            raise MalformedRequestError(f"the value is not what this method takes: {error}") from None
        if self._open[call.peer] >= _MOST_OPEN:
            raise QueueFullError(f"{_MOST_OPEN} of your questions for events are open: wait for their answers")
        self._open[call.peer] += 1
        try:
            return orjson.dumps(await self._heard(call.peer, asked))
        finally:
            self._open -= Counter([call.peer])  # which forgets those who have none

    async def _heard(self, peer: str, asked: _Asked) -> dict[str, Any]:
        after, clock = asked.after, asyncio.get_running_loop().time
        end = clock() + min(asked.wait, _MOST_WAIT)
        while True:
            told = await self._gateway.events(after, max(0.0, min(end - clock(), _LISTEN)))
            shown = [{name: event[name] for name in _SHOWN if name in event} for event in told["events"] if self._may_hear(peer, event)]
            if shown or after is None or clock() >= end or self.is_leaving:
                return {"events": shown, "seq": told["seq"]}
            after = told["seq"]

    def _may_hear(self, peer: str, event: Mapping[str, Any]) -> bool:
        model = event.get("model")
        return event["kind"] == Kind.MISSED if model is None else self._access.may(peer, "events", model)
