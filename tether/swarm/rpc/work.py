"""Calls that are being worked on, or whose bodies still come; and how a body is passed on, in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tether.swarm.rpc.bodies import Incoming, Room
from tether.swarm.rpc.replies import Reply
from tether.swarm.rpc.service import Call, Handler, PassingHandler
from tether.swarm.wire.pieces import Body

__all__ = ["Coming", "Passing", "Work", "passed", "passed_in_turn"]


@dataclass(slots=True, eq=False)
class Work:
    """A handler that is not done."""

    method: str
    answer: Awaitable[bytes | None]
    nbytes: int
    task: asyncio.Task[None]
    deadline: float | None
    unsent_nbytes: int = 0
    """Of its answer, if that is a large one."""
    body: Incoming | None = None
    """Of a request that is passed on while it comes."""
    reply: Reply | None = None
    """Where the answer goes out in pieces."""
    error: Exception | None = None
    """Why it was ended from here."""

    def stop(self, error: Exception) -> None:
        """End it, for its caller to be told why."""
        self.error = error
        self.task.cancel()


class Passing(NamedTuple):
    """A handler that takes bodies as they come."""

    handler: PassingHandler


class Coming(NamedTuple):
    """A request whose body comes in pieces."""

    method: str
    handler: Handler | Passing
    body: Body
    deadline: float | None


async def passed(handler: PassingHandler, call: Call, body: Incoming, reply: Reply) -> bytes | None:
    """The answer, where it goes out whole."""
    await handler(call, body, reply)
    return await reply.finish()


async def passed_in_turn(handler: PassingHandler, call: Call, body: Incoming, reply: Reply, rooms: Sequence[Room]) -> bytes | None:
    """As `passed`, once there is room for the body in one after the other: nothing of it comes before."""
    nbytes = min(body.nbytes, *(room.nbytes for room in rooms))
    held: list[Room] = []
    try:
        for room in rooms:
            await room.take(nbytes)
            held.append(room)
        body.open()
        return await passed(handler, call, body, reply)
    finally:
        body.close()
        for room in held:
            room.give_back(nbytes)
