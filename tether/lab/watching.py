"""What happens in a lab, as it happens: the part of `Operations` that listens, past lost connections and restarts."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any, Final, Protocol

import msgspec

from tether.errors import DeadlineExceededError, ServiceUnavailableError
from tether.lab.objects import described
from tether.routing.lab_events import LabEvent

__all__ = ["EventSource", "Watching"]

_WAIT: Final = 25.0
"""Seconds for which a question stays open: under the 30 that another lab bears."""
_PATIENCE: Final = 60.0
"""Seconds without an answer, after which the lab is taken to be gone: a restart takes less."""
_AGAIN: Final = 0.5


class EventSource(Protocol):
    """A lab that can be asked what happened."""

    async def events(self, after: int | None, wait: float) -> dict[str, Any]: ...


class _Told(msgspec.Struct, frozen=True):
    events: tuple[LabEvent, ...]
    seq: int


class Watching(ABC):
    """Mixed into `Operations`."""

    @property
    @abstractmethod
    def _teller(self) -> EventSource: ...

    async def recent_events(self) -> tuple[LabEvent, ...]:
        """What the lab can still tell, oldest first: the last few thousand since its gateway was started."""
        return described(_Told, await self._teller.events(0, 0.0)).events

    async def watch(self, after: int | None = None) -> AsyncGenerator[LabEvent]:
        """As `Lab.events`."""
        clock = asyncio.get_running_loop().time
        heard = clock()
        while True:
            try:
                told = described(_Told, await self._teller.events(after, _WAIT))
            except (ServiceUnavailableError, DeadlineExceededError):
                if clock() > heard + _PATIENCE:
                    raise
                await asyncio.sleep(_AGAIN)
                continue
            heard, after = clock(), told.seq
            for event in told.events:
                yield event
