"""One request from admission to its reply, and each try to have it answered."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Final

from tether.errors import InternalError, ModelFailedError
from tether.gateway.parts import Parts
from tether.gateway.traffic import VersionTraffic
from tether.ports import Hop, HopReply
from tether.routing.health import Verdict
from tether.routing.shedding import Place
from tether.routing.table import VersionEntry
from tether.routing.tracks import Track
from tether.types import ModelVersion
from tether.wire.frames import OK

__all__ = ["Attempt", "Call", "Done", "Trial", "session_of", "verdict_of"]

Done = Callable[[HopReply], None]
_FAILED: Final = f'"code":"{ModelFailedError.code}"'.encode()
"""In a body of ours no text can hold this: quotes in it are escaped."""
_BROKEN: Final = frozenset({InternalError.http_status, 502})
_SEQUENCE: Final = re.compile(rb'"sequence_id"\s*:\s*("(?:[^"\\]|\\.){1,256}"|[0-9]{1,20})')
_ENDS: Final = 1024
"""Bytes at either end of a request's JSON in which its sequence is looked for, as its deadline is."""


class Call:
    """One request. It has one try under way, or two where the first takes long, or none while it waits for a worker."""

    __slots__ = (
        "avoid", "begun", "deadline", "done", "doubted", "entry", "fallback", "hedging", "hop", "live", "losses", "name", "needs_token",
        "not_before", "parts", "place", "traffic", "trial", "tries", "version",
    )  # fmt: skip

    def __init__(self, name: str, version: str | None, hop: Hop, done: Done) -> None:
        self.name, self.version, self.hop, self.done = name, version, hop, done
        self.begun = time.monotonic()
        self.deadline = self.begun + hop.timeout
        self.parts: Parts | None = None
        """Of an answer that comes in parts."""
        self.entry: VersionEntry | None = None
        self.traffic: VersionTraffic | None = None
        """Of the version, once it is known."""
        self.place: Place | None = None
        """Among those that wait, if it waits for one answer."""
        self.live: list[Attempt] = []
        """What is under way."""
        self.avoid: list[Track] = []
        """Where it was tried."""
        self.tries = self.losses = 0
        self.not_before = 0.0
        """While it waits for another try."""
        self.needs_token = False
        """Whether that try is one more than the retry budget was asked for."""
        self.fallback: HopReply | None = None
        """The answer, if no other try has a better one."""
        self.doubted: Track | None = None
        """Where the model raised: it is asked elsewhere whether the input is at fault."""
        self.hedging: asyncio.TimerHandle | None = None
        self.trial: Trial | None = None
        """If a rollout has to do with it."""

    @property
    def may_run_again(self) -> bool:
        """Whether it does no harm if two workers run it."""
        return self.entry is not None and self.entry.info.pure and self.parts is None and not self.hop.alone


class Trial:
    """What a rollout did with a request (`canaries.py`)."""

    __slots__ = ("blamed", "is_answered", "is_tried", "new")

    def __init__(self, new: ModelVersion, *, is_tried: bool) -> None:
        self.new, self.is_tried = new, is_tried
        """`is_tried`: the new version has it now; else the old one, and it is copied, or was given back."""
        self.blamed: VersionTraffic | None = None
        """The new version's, if it failed what the old one may answer."""
        self.is_answered = False
        """Whether the old one answered."""


class Attempt:
    """A request at one worker."""

    __slots__ = ("abandon", "call", "is_retry", "sent", "track")

    def __init__(self, call: Call, track: Track, sent: float, *, is_retry: bool) -> None:
        self.call, self.track, self.sent, self.is_retry = call, track, sent, is_retry
        self.abandon: Callable[[], None] = _nothing


def _nothing() -> None:
    """It was not sent yet."""


def verdict_of(reply: HopReply) -> Verdict:
    """What an answer says of the worker. A model that ends its own process is judged by its inputs (`suspicion.py`)."""
    if reply.status == OK:
        return Verdict.FINE
    if reply.status in _BROKEN:
        return Verdict.BROKEN
    if reply.status == ModelFailedError.http_status and _FAILED in reply.body:
        return Verdict.MODEL
    return Verdict.NEUTRAL


def session_of(hop: Hop) -> bytes:
    """What requests that belong together have in common: the header `x-session-id`, else the protocol's parameter `sequence_id`; else b"".

    The parameter is found without parsing, near the ends of the JSON, where clients write it. 0 is no sequence.
    """
    if hop.session:
        return hop.session
    end = hop.header_nbytes or len(hop.body)
    for begin, stop in ((0, min(end, _ENDS)), (max(end - _ENDS, 0), end)):
        if found := _SEQUENCE.search(hop.body, begin, stop):
            return b"" if found[1] == b"0" else found[1]
    return b""
