"""Invitations to a lab: made, used, revoked. A secret that was used is used for good before anybody hears that it was right."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from tether.errors import (
    BadAddressError,
    BadInvitationError,
    BadKeyError,
    BadScopeError,
    BadTermsError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    TooManyTriesError,
)
from tether.security import access_file as tables
from tether.security.access import Access, checked_label, tell
from tether.security.access_file import AuditLine, InvitationRow
from tether.security.addresses import Secret, public_key
from tether.security.guesses import Guesses
from tether.security.scopes import Scope, Scopes

__all__ = ["EXPIRES", "Invitation", "Invitations", "seconds_of"]

log = structlog.get_logger("tether.audit")
EXPIRES = 30 * 86400.0
"""Seconds for which an invitation is good where nothing else is said: a link in an old mail should not open a lab."""
_MAX_USES = 10_000
_MAX_OPEN = 10_000
"""Invitations that can be used: who makes more than that wants one with many uses."""
_NOBODY = bytes(32)
"""Compared with where there is no invitation, so that this takes the same time."""
_NO_SUCH = "there is no such invitation: ask the lab for a new one"


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a lab knows of an invitation: all but its secret."""

    id: str
    scopes: Scopes
    label: str
    created: float
    expires: float | None
    uses: int
    peers: tuple[str, ...]
    """Keys that came by it."""
    problem: str | None
    """Why it admits nobody any more; None: it does."""


class Invitations:
    """Of one lab. Any thread."""

    def __init__(self, access: Access, monotonic: Callable[[], float] = time.monotonic) -> None:
        """`monotonic`: what tries are counted by; expiry goes by the clock of `access`."""
        self._access, self._monotonic = access, monotonic
        self._file, self._guesses = access.file, Guesses()

    def invite(self, scopes: Iterable[Scope], *, expires: float | None = EXPIRES, uses: int = 1, label: str = "") -> Secret:
        """Make one. The secret is nowhere but in the answer. `expires`: seconds from now; None: never.

        Raises: BadScopeError: none, or too many; BadNameError: `label`; BadTermsError: `uses`, `expires`; ConflictError: there are
        too many; NoSpaceError, StoreError.
        """
        granted, now, secret = Scopes(scopes), self._access.clock(), Secret.new()
        if not granted:
            raise BadScopeError("an invitation to nothing: give at least one scope, such as infer:digits")
        if not 1 <= uses <= _MAX_USES or (expires is not None and not 0 < expires < float("inf")):
            raise BadTermsError(f"an invitation has 1 to {_MAX_USES} uses, and expires after some seconds or never")
        until, named, texts = None if expires is None else now + expires, checked_label(label), " ".join(granted.texts())
        with self._file.lock:
            row = InvitationRow(secret.id, secret.stored(), texts, named, self._access.invited(), until, uses, 0, None)
            if sum(each.problem(now) is None for each in self._file.invitations()) >= _MAX_OPEN:
                raise ConflictError(f"{_MAX_OPEN} invitations are open: revoke some, or make one with many uses")
            self._write(row, AuditLine(now, "invite", secret.id, f"{row.scopes}, {uses} uses"))
        return secret

    def _write(self, row: InvitationRow, line: AuditLine) -> None:
        with self._file.writing() as db:
            if not tables.add_invitation(db, row):
                raise ConflictError("two invitations happened to get the same number: make it again")
            tables.add_line(db, line)
        tell(line, row.label)

    def enrol(self, secret: str, peer: str) -> Scopes:
        """Let the holder of this key (hex; proven by the handshake) in; gives all that it may do. Durable when it returns.

        The same key may come again with the same secret: its first answer may have been lost. `secret`: as it stands behind the `#`.

        Raises: BadInvitationError; TooManyTriesError: `args[1]` says when to come again; ForbiddenError: banned; BadKeyError: nobody's key;
        NoSpaceError, StoreError.
        """
        if public_key(peer) != peer:
            raise BadKeyError(f"{peer[:80]!r} is no key as a handshake proves it: 64 lower-case hex digits")
        with self._file.lock:
            if self._access.is_banned(peer):
                raise ForbiddenError("this lab does not speak with this key")
            row = self._right(_parsed(secret), peer, self._monotonic())
            return self._admit(row, peer)

    def _right(self, secret: Secret | None, peer: str, now: float) -> InvitationRow:
        """The invitation whose secret it is."""
        row = self._file.invitation(secret.id) if secret else None
        known = row.id if row else None
        wait = self._guesses.wait(peer, known, now)
        if wait > 0:
            raise TooManyTriesError(f"wrong invitations were tried too often: come again in {wait:.0f} s, with a new one", wait)
        is_right = (secret or _INVENTED).fits(row.stored if row else _NOBODY)
        if row is None or not is_right:
            self._guesses.wrong(peer, known, now)
            log.warning("wrong invitation", peer=peer, invitation=known)
            raise BadInvitationError(_NO_SUCH)
        self._guesses.right(peer)
        return row

    def _admit(self, row: InvitationRow, peer: str) -> Scopes:
        """The lock is held: two that come with one secret come one after the other."""
        now, known = self._access.clock(), self._access.row(peer)
        revoked = known.revoked if known else None
        came_before = peer in self._file.enrolled(row.id)
        if revoked is not None and row.created <= revoked:
            raise BadInvitationError("what this key was allowed was taken back: ask the lab for a new invitation")
        if came_before and revoked is None:
            return self._access.scopes(peer)
        problem = row.problem(now)
        if problem is not None:
            raise BadInvitationError(f"this invitation {problem}: ask the lab for a new one")
        line = AuditLine(now, "enrol", peer, f"invitation {row.id}: {row.scopes}")
        with self._file.writing() as db:
            tables.use_invitation(db, row.id, peer, now)
            admitted = self._access.admit(db, peer, Scopes.parse(row.scopes.split()), row.label)
            tables.add_line(db, line)
        tell(line, row.label)
        return self._access.admitted(admitted)

    def revoke(self, invitation: str) -> Invitation:
        """Admit nobody by it any more. Those that came by it stay: `Access.revoke` sends them away; the answer names them.

        Raises: NotFoundError; NoSpaceError, StoreError.
        """
        now = self._access.clock()
        with self._file.lock:
            row = self._row(invitation)
            line = AuditLine(now, "revoke-invitation", row.id, row.scopes)
            with self._file.writing() as db:
                tables.end_invitation(db, row.id, now)
                tables.add_line(db, line)
            tell(line, row.label)
            return self._shown(row._replace(revoked=row.revoked or now), now)

    def get(self, invitation: str) -> Invitation:
        """One. Raises: NotFoundError."""
        return self._shown(self._row(invitation), self._access.clock())

    def list(self) -> list[Invitation]:
        """All, oldest first."""
        now = self._access.clock()
        return [self._shown(row, now) for row in self._file.invitations()]

    def _row(self, invitation: str) -> InvitationRow:
        row = self._file.invitation(invitation)
        if row is None:
            raise NotFoundError(f"there is no invitation {invitation[:40]!r}: `tether invite --list` shows their numbers")
        return row

    def _shown(self, row: InvitationRow, now: float) -> Invitation:
        scopes, peers = Scopes.parse(row.scopes.split()), tuple(self._file.enrolled(row.id))
        return Invitation(row.id, scopes, row.label, row.created, row.expires, row.uses, peers, row.problem(now))


def seconds_of(text: str) -> float | None:
    """What people say of how long something is good: `90s`, `45m`, `12h`, `30d`, `never` (None).

    >>> seconds_of("30d"), seconds_of("never")
    (2592000.0, None)

    Raises: BadTermsError.
    """
    if text == "never":
        return None
    found = _SPAN.fullmatch(text)
    if found is None:
        raise BadTermsError(f"{text[:40]!r} is no span of time: write 90s, 45m, 12h, 30d or never")
    return float(found[1]) * _SECONDS[found[2]]


_SPAN = re.compile(r"([1-9][0-9]{0,8})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_INVENTED = Secret("0" * 8, bytes(16))


def _parsed(text: str) -> Secret | None:
    try:
        return Secret.parse(text[:200])
    except BadAddressError:
        return None
