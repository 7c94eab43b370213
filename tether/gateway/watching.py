"""`GET /tether/v1/events`: what happens in the lab, as a stream of server-sent events, or by asking again and again.

    retry: 1000 | id: <seq>          first: who comes back says Last-Event-ID, which any EventSource does by itself
    id: <seq> | data: <event>        JSON of a `LabEvent`
    :                                each 15 s in which nothing happened

A client that does not read is cut off as any other one: nothing is queued for it but what its socket holds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import msgspec

from tether.errors import MalformedRequestError
from tether.gateway.event_log import EventLog
from tether.gateway.routes import Answer, Call, Endpoint
from tether.routing.lab_events import LabEvent

__all__ = ["WATCHING"]

_KEEP_ALIVE: Final = 15.0
"""Seconds: proxies cut what is silent for a minute."""
_MOST_WAIT: Final = 60.0


async def _events(call: Call) -> Answer:
    log = call.door.dispatcher.events
    after = _number(call, "after", call.headers.get(b"last-event-id", b"").decode("latin-1"))
    seq = log.last if after is None else int(after)
    wait = _number(call, "wait", "")
    if wait is None:
        return Answer(200, b"retry: 1000\nid: %d\n\n" % seq, "text/event-stream", headers=_HEADERS, rest=_stream(log, seq))
    if after is not None:
        await log.wait(seq, min(wait, _MOST_WAIT))
    events = log.after(seq)
    return Answer(200, msgspec.json.encode({"events": events, "seq": events[-1].seq if events else max(seq, log.last)}))


async def _stream(log: EventLog, seq: int) -> AsyncIterator[bytes]:
    while not log.is_closed:
        events = log.after(seq)
        if events:
            seq = events[-1].seq
        yield b"".join(map(_encoded, events)) or b":\n\n"
        await log.wait(seq, _KEEP_ALIVE)


def _encoded(event: LabEvent) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (event.seq, msgspec.json.encode(event))


def _number(call: Call, name: str, otherwise: str) -> float | None:
    """Raises: MalformedRequestError."""
    text = call.query.get(name, otherwise)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 2**53:
        raise MalformedRequestError(f"{name} is {text[:40]!r}: give a number (after: the seq of an event; wait: seconds)")
    return value


_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}
WATCHING: Final = (
    Endpoint("GET", "/tether/v1/events", "manage", _events, "What happens in the lab (server-sent; JSON with ?after=&wait=)"),
)
