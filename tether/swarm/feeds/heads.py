r"""Pure: the end of a feed, as its publisher signs it.

    head  =  signature (64 bytes, by the lab's identity) of "tether feed v1\0" + body, then the body: msgpack array of the fields of `Head`

A head says: my feed is this Hypercore, so long, and this is the root of its tree. Hypercore signs lengths, too, with the core's key; that
does not tell whose core it is, and by design it lets a core be cut off and go on otherwise (its fork count). A lab's history is not cut.
"""

from __future__ import annotations

import re

import msgspec

from tether.errors import BadSignatureError, MalformedFeedError
from tether.security.identity import Identity, verify

__all__ = ["MAX_HEAD_NBYTES", "Head", "parse_head", "sign_head"]

MAX_HEAD_NBYTES = 512
_SIGNED = b"tether feed v1\0"
_SIGNATURE_NBYTES = 64
_HEX = re.compile(r"[0-9a-f]{64}")
_MOST = 1 << 53
"""What JavaScript counts to."""
_FORMAT = 1


class Head(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The end of a feed, as its publisher signed it."""

    publisher: str
    """The lab's key, hex."""
    core: str
    """Public key of the Hypercore, hex."""
    era: int
    """Which core of the lab's this is: grows. The Unix time at which it was begun, or one more than the last where that is larger."""
    length: int
    """Blocks."""
    fork: int
    """How often the core was cut off: 0, in a lab that does as it should."""
    root: str
    """Of the tree over all blocks (`core.treeHash(length)`), hex."""
    began: int
    """Unix time of the era's first head: a lab signs nothing of an earlier era after it."""
    signed: int
    """Unix time; in one era it never goes back."""
    format: int = _FORMAT


def sign_head(identity: Identity, head: Head) -> bytes:
    """Raises: MalformedFeedError: it would not be one."""
    _check(head)
    data = msgspec.msgpack.encode(head)
    return identity.sign(_SIGNED + data) + data


def parse_head(data: bytes, publisher: str) -> Head:
    """The head, if `publisher` (key, hex) signed it. Raises: MalformedFeedError."""
    if not _SIGNATURE_NBYTES < len(data) <= MAX_HEAD_NBYTES:
        raise MalformedFeedError(f"a signed head has up to {MAX_HEAD_NBYTES} bytes, this has {len(data)}")
    body = data[_SIGNATURE_NBYTES:]
    try:
        head = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFeedError(f"the head of a feed can't be read ({error}): its lab may have another version of Tether") from None
    _check(head)
    try:
        verify(publisher, _SIGNED + body, data[:_SIGNATURE_NBYTES])
    except BadSignatureError as error:
        raise MalformedFeedError(f"the head was not signed by {publisher[:64]}") from error
    if head.publisher != publisher or msgspec.msgpack.encode(head) != body:
        raise MalformedFeedError(f"the head is not one of {publisher[:64]}, or not written in the one way that counts")
    return head


_decoder = msgspec.msgpack.Decoder(Head, strict=True)


def _check(head: Head) -> None:
    """Raises: MalformedFeedError."""
    named = all(map(_HEX.fullmatch, (head.publisher, head.core, head.root)))
    counted = 0 < head.era < _MOST and 0 <= head.length < _MOST and 0 <= head.fork < _MOST and 0 <= head.began <= head.signed < _MOST
    if not named or not counted or head.format != _FORMAT:
        raise MalformedFeedError("the head of a feed breaks a rule of the format")
