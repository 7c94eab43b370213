"""What a lab answers to its peers, and what one of them may make it keep or do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple

from tether.swarm.rpc.bodies import Incoming, Room
from tether.swarm.rpc.replies import Reply

__all__ = ["Authorise", "Call", "Handler", "PassingHandler", "RpcLimits", "Service"]


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """What one peer may make us keep or do."""

    max_request_nbytes: int = 16 << 20
    max_reply_nbytes: int = 1 << 30
    """Of an answer, to either side; and of what is here of all large ones together that wait for the peer to take them."""
    max_whole_nbytes: int = 96 << 20
    """Of an answer of the peer that is kept until it is whole: the largest is a manifest, in base64."""
    max_in_flight: int = 1024
    """Its requests that are worked on; further ones are answered with `queue_full`."""
    max_held_nbytes: int = 64 << 20
    """Bodies of its requests that are worked on, or that still come."""
    max_passing_nbytes: int = 128 << 20
    """Bodies over 1 MiB of its requests that are passed on; further ones are asked for when there is room."""
    patience: float = 30.0
    """Seconds in which it sends 64 KiB, or all that is left, of bodies that there is room for, and in which it takes more of an answer,
    or of anything at all: who reads nothing that long is cut."""
    max_unread_nbytes: int = 32 << 20
    """Small answers that wait while it reads nothing; then it is cut. Larger ones wait where they are."""


class Call(NamedTuple):
    """What a handler is told of a call besides its value."""

    peer: str
    """The caller's public key, hex, which the stream has proven."""
    method: str
    deadline: float | None
    """On the loop's clock: nobody waits for the answer any longer. The handler is cancelled then."""


Handler = Callable[[Call, bytes], bytes | Awaitable[bytes]]
"""Answers a call. What it raises of Tether's errors is told to the caller, anything else as an internal error."""
PassingHandler = Callable[[Call, Incoming, Reply], Coroutine[Any, Any, None]]
"""Takes the value as it comes, and gives its answer in the same way: neither has to be in memory as a whole."""
Authorise = Callable[[str, str], None]
"""Called with the caller's key and the method before anything of the value is read. Raises: ForbiddenError: it may not."""


class Service:
    """What a lab answers, on any number of connections; it may change at any time."""

    def __init__(self, authorise: Authorise, passing_nbytes: int = 512 << 20) -> None:
        """`passing_nbytes`: of bodies that are passed on, of all peers together: what is behind this holds them whole."""
        self.authorise = authorise
        self.handlers: dict[str, Handler] = {}
        self.passing: dict[str, tuple[PassingHandler, int]] = {}
        """Handler, and the most bytes of a request."""
        self.room = Room(passing_nbytes)

    def pass_on(self, method: str, handler: PassingHandler, max_nbytes: int) -> None:
        """Answer calls of `method`, whose values have up to `max_nbytes`."""
        self.passing[method] = handler, max_nbytes

    def respond(self, method: str, handler: Handler) -> None:
        """Answer calls of `method`. A handler that has its answer at once gives `bytes`: that costs no task."""
        self.handlers[method] = handler

    def unrespond(self, method: str) -> None:
        """Answer them no more."""
        self.handlers.pop(method, None)
        self.passing.pop(method, None)
