"""Pure: who may call what, from headers and the facts of a connection: keys, Host, Origin, deadlines.

Rules (DESIGN §7). Health is open. Inference and metadata need an API key, except on loopback from sockets of this user or root. Metrics
need a key, except on loopback. Management always needs a key. A key that is sent and not valid is refused everywhere, so that a typo shows.
On loopback the Host header must name loopback (DNS rebinding), and an Origin header must be ours or allowed (another site's page).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import urlsplit

from tether.errors import ForbiddenError, MalformedRequestError, UnauthenticatedError

__all__ = ["PROXIED", "Admission", "Headers", "Keys", "Need", "Peer", "fingerprint", "new_key", "timeout_of"]

Need = Literal["open", "infer", "metrics", "manage"]
"""What an endpoint asks of its caller; `infer` covers metadata."""
Headers = Mapping[bytes, bytes]
"""Lower-case names; a name that was sent twice has been refused before."""

_KEY: Final = re.compile(rb"Bearer +(tk_[A-Za-z0-9_-]{20,200})", re.IGNORECASE)
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
PROXIED: Final = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"})
"""Headers of a request that a proxy on this host passed on: its socket may be this user's, its caller is not."""
_BODY_TIMEOUT: Final = re.compile(rb'"timeout"\s*:\s*([0-9]{1,15})\s*[,}]')
_ENDS: Final = 1024
"""Bytes at either end of a JSON body in which a `timeout` parameter is looked for: clients write parameters first or last."""
_LONGEST: Final = 3600.0
"""Seconds; a deadline beyond is taken for this one."""


def new_key() -> str:
    """A new API key: `tk_` and 256 random bits. Only its fingerprint is to be kept."""
    return "tk_" + secrets.token_urlsafe(32)


def fingerprint(key: str) -> str:
    """SHA-256 of a key, as hex: what is kept at rest. The keys are random, so a slow hash would add nothing."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The API keys that are valid now. `replace` may be called at any time; `generation` tells caches that it was."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        """`names`: fingerprint → name of the key."""
        self.generation = 0
        self._names = dict(names or {})

    def __repr__(self) -> str:
        return f"Keys({sorted(self._names.values())})"

    def replace(self, names: Mapping[str, str]) -> None:
        """Keys that are not in `names` end at once, on open connections too."""
        self._names = dict(names)
        self.generation += 1

    def name(self, authorization: bytes) -> str:
        """The name of the key in an Authorization header.

        Raises: UnauthenticatedError: it is no key, or not a valid one.
        """
        sent = _KEY.fullmatch(authorization.strip())
        if sent is None:
            raise UnauthenticatedError("the Authorization header is not 'Bearer tk_…'; the lab's key is in keys/api-key of its data folder")
        digest = hashlib.sha256(sent[1]).hexdigest()
        found = None
        for known, name in self._names.items():  # all of them, each compared in constant time
            if hmac.compare_digest(known, digest):
                found = name
        if found is None:
            raise UnauthenticatedError(
                "the API key is not valid: mistyped, or of another lab; this lab's is in keys/api-key of its data folder"
            )
        return found


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection."""

    address: str | None = None
    loopback: bool = False
    """Both ends are on this host."""
    same_user: bool = False
    """The socket belongs to this process's user or to root."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The rules of one gateway."""

    keys: Keys
    allow_origins: AbstractSet[str] = frozenset()
    """Origins (`https://host`) whose pages may call."""
    allow_hosts: AbstractSet[str] = field(default_factory=frozenset)
    """Names that a Host header may have besides loopback's; empty: any, where the gateway is bound to another address."""

    def check_site(self, headers: Headers, peer: Peer) -> None:
        """Host and Origin.

        Raises: ForbiddenError: the request was made for another host, or by another site's page.
        """
        host = headers.get(b"host", b"")
        if peer.loopback or self.allow_hosts:
            self._check_host(host)
        origin = headers.get(b"origin")
        if origin is not None and not self.allowed_origin(origin, host):
            raise ForbiddenError("this page's origin may not call this gateway; start it with --allow-origin and the page's URL")

    def _check_host(self, host: bytes) -> None:
        name = _host_name(host)
        if name not in _LOOPBACK and name not in self.allow_hosts:
            raise ForbiddenError("the Host header names another host; use localhost, 127.0.0.1 or the name that the gateway was given")

    def allowed_origin(self, origin: bytes, host: bytes) -> bool:
        """Whether a page of `origin` may call: it is on the list, or was served by this gateway itself."""
        text = origin.decode("latin-1")
        if text in self.allow_origins:
            return True
        scheme, found, netloc = text.partition("://")
        return bool(found) and scheme in {"http", "https"} and netloc.lower().encode("latin-1") == host.lower()

    def caller(self, headers: Headers, peer: Peer, need: Need) -> str | None:
        """The name of the API key, or None where none is needed and none was sent.

        Raises: UnauthenticatedError: a key is needed, or the one sent is not valid.
        """
        authorization = headers.get(b"authorization")
        if need == "open":
            return None
        if authorization is not None:
            return self.keys.name(authorization)
        if peer.loopback and PROXIED.isdisjoint(headers) and (need == "metrics" or (need == "infer" and peer.same_user)):
            return None
        raise UnauthenticatedError("an API key is needed ('Authorization: Bearer tk_…'); the lab's is in keys/api-key of its data folder")


def _host_name(host: bytes) -> str:
    """The name in `name[:port]` or `[::1][:port]`; "" where it is neither."""
    text = host.decode("latin-1").lower()
    if not text or any(mark in text for mark in "@/?#\\ "):
        return ""
    try:
        parts = urlsplit("//" + text)
        return parts.hostname or "" if parts.port is None or parts.port else ""
    except ValueError:
        return ""


def timeout_of(headers: Headers, body: bytes, header_nbytes: int, default: float) -> float:
    """Seconds for the answer: `x-request-timeout` (seconds), else the protocol's parameter `timeout` (µs), else `default`.

    The parameter is found without parsing, near the ends of the JSON, where clients write it; elsewhere the worker still keeps it.

    Raises: MalformedRequestError: `x-request-timeout` is not a number of seconds over 0.
    """
    text = headers.get(b"x-request-timeout")
    if text is not None:
        return min(_seconds(text), _LONGEST)
    end = header_nbytes or len(body)
    microseconds = _parameter(body, 0, min(end, _ENDS)) or (_parameter(body, end - _ENDS, end) if end > _ENDS else 0)
    return min(microseconds / 1e6, _LONGEST) if microseconds else default


def _parameter(body: bytes, start: int, end: int) -> int:
    """The value of `timeout`; 0, which in the protocol means no deadline, where there is none."""
    if body.find(b'"timeout"', start, end) < 0:  # five times faster than the expression
        return 0
    found = _BODY_TIMEOUT.search(body, start, end)
    return int(found[1]) if found else 0


def _seconds(text: bytes) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise MalformedRequestError(f"x-request-timeout is {text[:40]!r}; give seconds, over 0")
    return seconds
