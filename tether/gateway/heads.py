"""Pure: whether the head of a message may pass, before anything of its body is read."""

from __future__ import annotations

from typing import Final, NamedTuple

from tether.errors import HeadersTooLargeError, MalformedRequestError, PayloadTooLargeError
from tether.gateway.admission import Headers
from tether.gateway.door import Settings

__all__ = ["Head", "body_too_large", "check_head", "headers_too_large", "prelude"]

_ONCE: Final = frozenset({b"authorization", b"host", b"inference-header-content-length", b"origin"})
"""Headers that must not come twice: two readers could take different ones."""


class Head(NamedTuple):
    """Request line and headers as they came."""

    url: bytes
    headers: list[tuple[bytes, bytes]]
    version: str
    fits: bool
    """What was received so far is under the limit of headers: they need not be added up."""


def check_head(head: Head, sent: Headers, settings: Settings) -> None:
    """`sent` are the same headers as a mapping.

    Raises: HeadersTooLargeError; MalformedRequestError: Host is missing, or a header that decides something comes twice;
        PayloadTooLargeError: by Content-Length.
    """
    headers = head.headers
    if len(headers) > settings.header_count or not (head.fits or _nbytes(head) <= settings.header_nbytes):
        raise headers_too_large(settings)
    if len(sent) != len(headers):
        _check_doubles(headers)
    if b"host" not in sent and head.version == "1.1":
        raise MalformedRequestError("the Host header is missing; HTTP/1.1 needs it")
    length = sent.get(b"content-length")
    if length is not None and int(length) > settings.limits.body_nbytes:
        raise body_too_large(settings)


def _nbytes(head: Head) -> int:
    return len(head.url) + sum(len(name) + len(value) for name, value in head.headers)


def headers_too_large(settings: Settings) -> HeadersTooLargeError:
    """The refusal of headers over the limit."""
    return HeadersTooLargeError(f"the headers are over {settings.header_nbytes} bytes or {settings.header_count} lines; send fewer")


def body_too_large(settings: Settings) -> PayloadTooLargeError:
    """The refusal of a body over the limit."""
    return PayloadTooLargeError(f"the body is over the limit of {settings.limits.body_nbytes} bytes; send smaller batches")


def prelude(sent: Headers) -> bytes:
    """A request whose body is framed as that of `sent`; empty where it has none."""
    if b"transfer-encoding" in sent:
        return b"POST / HTTP/1.1\r\ntransfer-encoding: %b\r\n\r\n" % sent[b"transfer-encoding"]
    length = int(sent.get(b"content-length", b"0"))
    return b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % length if length else b""


def _check_doubles(headers: list[tuple[bytes, bytes]]) -> None:
    names = [name for name, _value in headers]
    for name in _ONCE:
        if names.count(name) > 1:
            raise MalformedRequestError(f"the header {name.decode()} comes twice; send it once")
