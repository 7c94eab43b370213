"""Pure: what is read of a gateway's answers, and how a lab is named in a path."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from tether.errors import RemoteError
from tether.security.addresses import SCHEME
from tether.types import InferResponse
from tether.wire.faults import decode_error
from tether.wire.oip import decode_response
from tether.wire.parts import Part

__all__ = ["lab_part", "part_of", "rows"]


def rows(answer: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects that it has under `key`. Raises: RemoteError: it has no list of them."""
    found = answer.get(key)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise RemoteError(f"the gateway's answer has no list {key!r}; do its version and this one differ?")
    return found


def lab_part(publisher: str) -> str:
    """A key, an address or a petname, as one part of a path."""
    return quote(publisher.removeprefix(SCHEME), safe="")


def part_of(part: Part) -> InferResponse:
    """Raises: what the lab says in the part's place."""
    if part.status != 200:  # noqa: PLR2004 (HTTP's OK)
        raise decode_error(part.status, part.body)
    return decode_response(part.body, part.header_nbytes)
