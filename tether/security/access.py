"""Who may do what from outside: peers' public keys and their scopes. What is not allowed is refused; what is taken away ends at once."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from tether.errors import (
    BadNameError,
    BadScopeError,
    ForbiddenError,
    NoSpaceError,
    NotFoundError,
    ScopeStillOpenError,
    StoreError,
    UnknownModelError,
)
from tether.security.access_file import AccessFile, AccessState, AuditLine, PeerRow, add_line, drop_peer, put_peer
from tether.security.addresses import public_key
from tether.security.scopes import ENROL, Scope, Scopes

__all__ = ["Access", "Listener", "Peer", "Revocation"]

log = structlog.get_logger("tether.audit")
_MAX_LABEL = 80
_MAX_REASON = 200
_MAX_BANNED = 10_000
_NOTHING = Scopes()

Listener = Callable[[str], None]
"""Called with the key of a peer that has less than before, while the change holds the lock: it only passes on that what `may` no longer
allows is to be cut."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A key that the lab knows."""

    key: str
    label: str
    """For people; of the invitation that it came by."""
    scopes: Scopes
    since: float
    revoked: float | None
    banned: str | None
    """Why it is not spoken with."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """What was taken from a peer, and by what it could come back under another key."""

    peer: str
    scopes: Scopes
    open_invitations: tuple[str, ...]
    """Ids of those that it came by and that can still be used: revoke them too."""


class Access:
    """The peers of one lab. Any thread; `may` and `is_banned` wait for nobody."""

    def __init__(self, file: AccessFile, clock: Callable[[], float] = time.time) -> None:
        self.file, self.clock = file, clock
        self._listeners: tuple[Listener, ...] = ()
        self._rows: dict[str, PeerRow] = {}
        self._open: dict[str, Scopes] = {}
        """Those that may do something. Each change of either is one step, so that `may` takes no lock."""
        self._invited = 0.0
        """When the latest invitation was made."""
        with self.file.lock:
            self._load()

    def _load(self) -> None:
        self._invited = max(self._invited, self.file.last_invited())
        self._rows = {row.key: row for row in self.file.peers()}
        self._open = {key: scopes for key, row in self._rows.items() if (scopes := _active(row))}

    # --- asking

    def may(self, peer: str, method: str, model: str | None = None) -> bool:
        """Whether the holder of this key (hex) may call the method for a model; None: for any at all.

        `model`: by the name that the catalog resolved the caller's reference to (`VersionRecord.name`), never as the caller wrote it.
        """
        if method == ENROL:
            return not self.is_banned(peer)
        scopes = self._open.get(peer)
        return scopes is not None and scopes.may(method, model)

    def check(self, peer: str, method: str, model: str | None = None) -> None:
        """Return if it may. What does not exist and what is not allowed are answered alike.

        Raises: ForbiddenError: not the method; UnknownModelError: not for this model.
        """
        if not self.may(peer, method):
            raise ForbiddenError("there is no such method that this key may call: ask the lab to allow it (`tether allow KEY --scope …`)")
        if model is not None and not self.may(peer, method, model):
            raise UnknownModelError(
                "there is no such model that this key may use so: ask the lab to allow it (`tether allow KEY --scope …`)"
            )

    def scopes(self, peer: str) -> Scopes:
        """What it may do now; nothing, if it is not known."""
        return self._open.get(peer, _NOTHING)

    def is_banned(self, peer: str) -> bool:
        """Whether it is not to be spoken with at all, nor asked for anything."""
        row = self._rows.get(peer)
        return row is not None and row.banned is not None

    def peers(self) -> list[Peer]:
        """All that are known, also those that were sent away; by key."""
        with self.file.lock:
            rows = [self._rows[key] for key in sorted(self._rows)]
        return [_peer(row) for row in rows]

    def find(self, peer: str) -> Peer | None:
        """What is known of a key (hex)."""
        row = self._rows.get(peer)
        return None if row is None else _peer(row)

    def audit(self, most: int = 100) -> list[AuditLine]:
        """The latest changes, oldest first."""
        return self.file.audit(most)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call it whenever a peer has less than before; the returned function ends that."""
        with self.file.lock:
            self._listeners = (*self._listeners, listener)
        return lambda: self._unlisten(listener)

    def _unlisten(self, listener: Listener) -> None:
        with self.file.lock:
            self._listeners = tuple(each for each in self._listeners if each is not listener)

    # --- giving

    def allow(self, peer: str, scopes: Iterable[Scope], label: str | None = None) -> Scopes:
        """Add scopes; gives all that it has then. `peer`: a key or an address, enrolled or not.

        Raises: BadKeyError, BadAddressError, BadScopeError, BadNameError: `label`; ForbiddenError: it is banned; NoSpaceError, StoreError.
        """
        key, added = public_key(peer), Scopes(scopes)
        with self.file.lock:
            row = self._rows.get(key) or self._blank(key)
            if row.banned is not None:
                raise ForbiddenError(f"{key} is banned ({row.banned}): unban it first")
            scopes_then = _scopes(row).with_(added)
            named = row.label if label is None else checked_label(label)
            self._give(row._replace(label=named, scopes=_text(scopes_then), revoked=None), "allow", _text(added))
        return scopes_then

    def unban(self, peer: str) -> None:
        """Forgive it; it has the scopes again that it had. Raises: as `allow`; NotFoundError: it is not known."""
        key = public_key(peer)
        with self.file.lock:
            row = self._known(key)
            self._give(row._replace(banned=None), "unban", row.banned or "")

    def admit(self, db: sqlite3.Connection, peer: str, scopes: Scopes, label: str) -> PeerRow:
        """For invitations, inside their transaction: the peer's row as it is to be; `admitted` follows when that is durable."""
        row = self._rows.get(peer) or self._blank(peer)
        row = row._replace(label=row.label or label, scopes=_text(_scopes(row).with_(scopes)), revoked=None)
        put_peer(db, row)
        return row

    def admitted(self, row: PeerRow) -> Scopes:
        """An invitation admitted it, durably; gives all that it has."""
        self._hold(row)
        return self.scopes(row.key)

    def invited(self) -> float:
        """For invitations: the moment of one that is made now: after all revocations until now and not after those that follow."""
        with self.file.lock:
            last = max((row.revoked for row in self._rows.values() if row.revoked is not None), default=-math.inf)
            moment = max(self.clock(), math.nextafter(last, math.inf))
            self._invited = max(self._invited, moment)
        return moment

    def row(self, peer: str) -> PeerRow | None:
        """What is kept of it."""
        return self._rows.get(peer)

    # --- taking

    def disallow(self, peer: str, scopes: Iterable[Scope]) -> Scopes:
        """Take scopes away; gives those that are left. Holds at once, also where the disk refuses to remember it.

        Raises: BadKeyError, BadAddressError, BadScopeError; NotFoundError: it is not known; ScopeStillOpenError: another scope of its would
        still open some of it, and nothing was taken; NoSpaceError, StoreError: it is not remembered.
        """
        key, gone = public_key(peer), Scopes(scopes)
        with self.file.lock:
            row = self._known(key)
            held = _scopes(row)
            if still := held.still_open(gone):
                raise ScopeStillOpenError(
                    f"nothing was taken from {key}: it has {', '.join(still.texts())}, which opens the same as {', '.join(gone.texts())}; "
                    "take that one as well",
                    still.texts(),
                )
            left = held.without(gone)
            self._take(row._replace(scopes=_text(left)), "disallow", _text(gone))
        return left

    def revoke(self, peer: str) -> Revocation:
        """Take everything: live streams end at once; only `allow`, or an invitation made after this, lets the key in again.

        Raises: as `disallow`.
        """
        key, now = public_key(peer), self.clock()
        with self.file.lock:
            row = self._known(key)
            had = _scopes(row)
            # Not before any invitation, whatever the clock says: it may have been set back, or be another manager's.
            self._take(row._replace(scopes="", revoked=max(now, self._invited)), "revoke", _text(had))
            usable = [each.id for each in self.file.invitations_of(key) if each.problem(now) is None]
        return Revocation(key, had, tuple(usable))

    def ban(self, peer: str, reason: str) -> None:
        """Speak with it no more, whatever it was allowed: it sent what no honest peer sends. `peer`: a key, known or not.

        Raises: NoSpaceError, StoreError: it is not remembered.
        """
        why = printable(reason)[:_MAX_REASON]
        with self.file.lock:
            row = self._rows.get(peer) or self._blank(peer)
            self._take(row._replace(banned=why), "ban", why)
            self._forget_an_old_ban(peer)

    def mirror(self, state: AccessState) -> None:
        """Say what the writing manager's says. Raises: NoSpaceError, StoreError."""
        with self.file.lock:
            before, banned = self._open, {key for key in self._rows if self.is_banned(key)}
            self.file.replace(state)
            self._load()
            less = {key for key, scopes in before.items() if set(scopes) - set(self.scopes(key))}
            less |= {key for key in self._rows if self.is_banned(key)} - banned
        for key in sorted(less):
            self._tell(key)

    # --- how

    def _give(self, row: PeerRow, action: str, detail: str) -> None:
        """First it is durable, then it holds."""
        self._write(row, action, detail)
        self._hold(row)

    def _take(self, row: PeerRow, action: str, detail: str) -> None:
        """First it holds, then it is made durable: a full disk keeps nobody in."""
        self._hold(row)
        self._tell(row.key)
        try:
            self._write(row, action, detail)
        except (NoSpaceError, StoreError) as error:
            raise type(error)(
                f"{action} of {row.key} holds, but is forgotten at the next start, since it could not be written: {error}"
            ) from error

    def _write(self, row: PeerRow, action: str, detail: str) -> None:
        line = AuditLine(self.clock(), action, row.key, detail)
        with self.file.writing() as db:
            put_peer(db, row)
            add_line(db, line)
        tell(line, row.label)

    def _hold(self, row: PeerRow) -> None:
        self._rows[row.key] = row
        scopes = _active(row)
        if scopes:
            self._open[row.key] = scopes
        else:
            self._open.pop(row.key, None)

    def _tell(self, key: str) -> None:
        for listener in self._listeners:
            try:
                listener(key)
            except Exception:  # one that fails must not keep the others from cutting what they hold
                log.exception("a listener failed; the peer's streams there may live on", peer=key)

    def _forget_an_old_ban(self, latest: str) -> None:
        """Keys cost nothing: who lies under many of them must not fill the disk. Whom people sent away stays known as that."""
        banned = [row for row in self._rows.values() if row.banned is not None and not row.scopes and row.revoked is None]
        if len(banned) > _MAX_BANNED:
            oldest = min((row for row in banned if row.key != latest), key=lambda row: row.since)
            with self.file.writing() as db:
                drop_peer(db, oldest.key)
            del self._rows[oldest.key]

    def _known(self, key: str) -> PeerRow:
        row = self._rows.get(key)
        if row is None:
            raise NotFoundError(f"{key} is not known to this lab: `tether peers` lists those that are")
        return row

    def _blank(self, key: str) -> PeerRow:
        return PeerRow(key, "", "", self.clock(), None, None)

    def __repr__(self) -> str:
        return f"Access({str(self.file.path)!r}, {len(self._open)} peers)"


def checked_label(label: str) -> str:
    """What people call something. Raises: BadNameError: too long, or not printable."""
    if len(label) > _MAX_LABEL or not label.isprintable():
        raise BadNameError(f"label {printable(label)[:_MAX_LABEL]!r}: give up to {_MAX_LABEL} printable characters")
    return label


def printable(text: str) -> str:
    """What came from outside, fit for a terminal and a log."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def tell(line: AuditLine, label: str) -> None:
    """The log's copy of an audit line, once that is durable."""
    log.info("access", action=line.action, subject=line.subject, label=label, detail=line.detail)


def _peer(row: PeerRow) -> Peer:
    return Peer(row.key, row.label, _scopes(row), row.since, row.revoked, row.banned)


def _active(row: PeerRow) -> Scopes:
    return _scopes(row) if row.banned is None else _NOTHING


def _scopes(row: PeerRow) -> Scopes:
    """What is written in a row; what this version of Tether does not understand opens nothing."""
    found = []
    for text in row.scopes.split():
        try:
            found.append(Scope.parse(text))
        except BadScopeError:
            log.warning("a scope in the file of access is not understood and opens nothing", peer=row.key, scope=text[:80])
    return Scopes(found)


def _text(scopes: Scopes) -> str:
    return " ".join(scopes.texts())
