"""Pure: a head that a client sends again byte by byte, as nearly all do, need not be parsed again.

The parser, the checks of the head and the admission of its caller decide by these bytes alone, until the keys change. They are what a
small request costs most in the gateway: a third of its Python.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tether.gateway.admission import Headers
from tether.gateway.oip import Target

__all__ = ["KnownHead", "candidate"]

_END: Final = b"\r\n\r\n"
_START: Final = b"POST "


class KnownHead(NamedTuple):
    """A head that was parsed and may pass, and what it says."""

    head: bytes
    """From the request line to the empty line."""
    nbytes: int
    """Of the body, at least one."""
    url: bytes
    target: Target
    sent: Headers
    caller: str | None
    generation: int
    """Of the keys by which the caller was admitted."""

    def found_in(self, data: bytes, body_nbytes: int) -> KnownHead | None:
        """The same with its bytes, of the data that began with it and that had `body_nbytes` of its body by the parser's account.

        None: they are not where they should be; nothing that a parser reads in another way is ever taken for a head.
        """
        end = data.find(_END) + len(_END)
        if not data.startswith(_START) or end < len(_END) or len(data) - end != body_nbytes:
            return None
        return self._replace(head=data[:end])


def candidate(sent: Headers, url: bytes, target: Target, caller: str | None, generation: int) -> KnownHead | None:
    """What was just parsed, if it has a body of known length."""
    nbytes = int(sent.get(b"content-length", b"0"))
    return KnownHead(b"", nbytes, url, target, sent, caller, generation) if nbytes and b"transfer-encoding" not in sent else None
