"""Endpoints that ask the manager one thing: for what the path names, with a text and a number of the body at most."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from tether.errors import MalformedRequestError
from tether.gateway.routes import Answer, Call, as_json, json_object
from tether.ports import Management

__all__ = ["SMALL_NBYTES", "passed_on", "text_and_number"]

SMALL_NBYTES: Final = 64 << 10
"""Of such a body."""
Ask = Callable[[Management, Mapping[str, str]], Awaitable[Any]]
"""The manager, the variable parts of the path → its answer."""


def passed_on(ask: Ask, key: str | None = None) -> Callable[[Call], Awaitable[Answer]]:
    """What the manager answers; `key`: the name under which it is told, where it is no object by itself."""

    async def handle(call: Call) -> Answer:
        answer = await ask(call.door.dispatcher.management, call.path)
        return as_json(answer if key is None else {key: answer})

    return handle


def text_and_number(call: Call, text: str, default: str, number: str) -> tuple[str, int | None]:
    """Two fields of the body, by their names, and what the first one is where it is not there. Raises: MalformedRequestError."""
    body = json_object(call)
    said, amount = body.get(text, default), body.get(number)
    if not isinstance(said, str) or not (amount is None or type(amount) is int):
        raise MalformedRequestError(f'"{text}" must be a text, "{number}" a number or null')
    return said, amount
