"""The file of who may do what: peers' keys, invitations, what was changed. SQLite; one transaction a change, durable when it returns."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from tether.errors import ConfigError, FormatTooNewError, NoSpaceError, StoreError
from tether.security.files import sync_folder

__all__ = ["AccessFile", "AccessState", "AuditLine", "InvitationRow", "PeerRow"]

FORMAT = 1
_BUSY = 10.0
"""Seconds to wait for another process: there is none but a `tether backup`."""
_MAX_AUDIT = 100_000
"""Lines that are kept, the newest: 20 MB. Whoever may make the lab write one could fill the disk otherwise."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS peers (key TEXT PRIMARY KEY, label TEXT NOT NULL, scopes TEXT NOT NULL, since REAL NOT NULL, revoked REAL,
  banned TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS invitations (id TEXT PRIMARY KEY, stored BLOB NOT NULL, scopes TEXT NOT NULL, label TEXT NOT NULL,
  created REAL NOT NULL, expires REAL, uses INTEGER NOT NULL, used INTEGER NOT NULL, revoked REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS enrolments (invitation TEXT NOT NULL, peer TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (invitation, peer)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS audit (id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
  detail TEXT NOT NULL);
"""
_COLUMNS = {"peers": 6, "invitations": 9, "enrolments": 3}


class PeerRow(NamedTuple):
    """A key that was let in, sent away, or banned."""

    key: str
    label: str
    scopes: str
    """Separated by spaces."""
    since: float
    """When it was first known."""
    revoked: float | None
    """When everything was taken from it; None: it was not."""
    banned: str | None
    """Why it is not spoken with."""


class InvitationRow(NamedTuple):
    """An invitation as it is kept."""

    id: str
    stored: bytes
    """Hash of its secret."""
    scopes: str
    label: str
    created: float
    expires: float | None
    uses: int
    used: int
    revoked: float | None

    def problem(self, now: float) -> str | None:
        """Why it admits nobody any more; None: it does."""
        if self.revoked is not None:
            return "was revoked"
        if self.expires is not None and now >= self.expires:
            return "has expired"
        return "was used" if self.used >= self.uses else None


class AuditLine(NamedTuple):
    """A change, in the same transaction as the change."""

    at: float
    action: str
    subject: str
    """The peer's key, or the invitation's id."""
    detail: str


class AccessState(msgspec.Struct, frozen=True, array_like=True):
    """All but the audit lines, for a manager that may have to take over. Secrets are in it as hashes only."""

    peers: tuple[tuple[str, str, str, float, float | None, str | None], ...]
    invitations: tuple[tuple[str, bytes, str, str, float, float | None, int, int, float | None], ...]
    enrolments: tuple[tuple[str, str, float], ...]


class AccessFile:
    """The file. Any thread."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        """Use `open`."""
        self.path = path
        self._db = db
        self.lock = threading.RLock()
        """Held by whoever changes something, from reading what is there until memory says the same as the file."""
        self.commits = 0
        """Changes since this was opened."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open it; makes it (mode 0600) if there is none.

        Raises: ConfigError: it is no such file; FormatTooNewError; StoreError: it can't be read or written, or is damaged; NoSpaceError.
        """
        with _errors(path):
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
                path.chmod(0o600)  # restored from a backup, it may be anybody's to read; SQLite gives its other files the same mode
            except OSError as error:
                raise StoreError(f"{path} can't be read or written ({error.strerror}): mend the folder's permissions") from error
            db = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
            try:
                _prepare(db, path)
                sync_folder(path.parent)
            except BaseException:
                db.close()
                raise
        return cls(path, db)

    def close(self) -> None:
        """A second call does nothing."""
        with self.lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, alone, durable when it returns. Raises: NoSpaceError, StoreError: nothing was changed."""
        with self.lock, _errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
                self.commits += 1
            except BaseException:
                with suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.rollback()
                raise

    # --- rows

    def peers(self) -> list[PeerRow]:
        """All, by key."""
        return [PeerRow(*row) for row in self._all("SELECT * FROM peers ORDER BY key")]

    def invitations(self) -> list[InvitationRow]:
        """All, oldest first."""
        return [InvitationRow(*row) for row in self._all("SELECT * FROM invitations ORDER BY created, id")]

    def invitation(self, id_: str) -> InvitationRow | None:
        """One; None: there is none."""
        rows = self._all("SELECT * FROM invitations WHERE id = ?", (id_,))
        return InvitationRow(*rows[0]) if rows else None

    def last_invited(self) -> float:
        """When the latest of them was made."""
        ((created,),) = self._all("SELECT coalesce(max(created), 0.0) FROM invitations")
        return float(created)

    def enrolled(self, invitation: str) -> list[str]:
        """The keys that came by an invitation."""
        return [peer for (peer,) in self._all("SELECT peer FROM enrolments WHERE invitation = ? ORDER BY at, peer", (invitation,))]

    def invitations_of(self, peer: str) -> list[InvitationRow]:
        """Those that a key came by."""
        query = "SELECT * FROM invitations WHERE id IN (SELECT invitation FROM enrolments WHERE peer = ?) ORDER BY created, id"
        return [InvitationRow(*row) for row in self._all(query, (peer,))]

    def audit(self, most: int) -> list[AuditLine]:
        """The latest changes, oldest first."""
        rows = self._all("SELECT at, action, subject, detail FROM audit ORDER BY id DESC LIMIT ?", (most,))
        return [AuditLine(*row) for row in reversed(rows)]

    def _all(self, query: str, arguments: Sequence[object] = ()) -> list[Any]:
        with self.lock, _errors(self.path):
            return self._db.execute(query, arguments).fetchall()

    # --- for a manager that follows

    def state(self) -> AccessState:
        """All of it, at one moment."""
        with self.lock, _errors(self.path):
            self._db.execute("BEGIN")
            try:
                rows = {table: tuple(self._db.execute(f"SELECT * FROM {table}").fetchall()) for table in _COLUMNS}  # noqa: S608
            finally:
                self._db.rollback()
        return AccessState(**rows)

    def replace(self, state: AccessState) -> None:
        """Say what another manager's says."""
        with self.writing() as db:
            for table, columns in _COLUMNS.items():
                rows: Iterable[Sequence[object]] = getattr(state, table)
                db.execute(f"DELETE FROM {table}")  # noqa: S608 (names of ours)
                db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * columns)})", rows)  # noqa: S608


def put_peer(db: sqlite3.Connection, row: PeerRow) -> None:
    db.execute("INSERT OR REPLACE INTO peers VALUES (?, ?, ?, ?, ?, ?)", row)


def drop_peer(db: sqlite3.Connection, key: str) -> None:
    db.execute("DELETE FROM peers WHERE key = ?", (key,))


def add_invitation(db: sqlite3.Connection, row: InvitationRow) -> bool:
    """False: another has its id."""
    return db.execute("INSERT OR IGNORE INTO invitations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row).rowcount == 1


def use_invitation(db: sqlite3.Connection, invitation: str, peer: str, now: float) -> None:
    db.execute("UPDATE invitations SET used = used + 1 WHERE id = ?", (invitation,))
    db.execute("INSERT OR REPLACE INTO enrolments VALUES (?, ?, ?)", (invitation, peer, now))


def end_invitation(db: sqlite3.Connection, invitation: str, now: float) -> None:
    db.execute("UPDATE invitations SET revoked = ? WHERE id = ? AND revoked IS NULL", (now, invitation))


def add_line(db: sqlite3.Connection, line: AuditLine) -> None:
    """What is not written down does not happen: the same transaction. The oldest makes room."""
    (number,) = db.execute("INSERT INTO audit (at, action, subject, detail) VALUES (?, ?, ?, ?) RETURNING id", line).fetchone()
    db.execute("DELETE FROM audit WHERE id <= ?", (number - _MAX_AUDIT,))


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")  # a secret that was used is used after a power cut, too
    db.execute("PRAGMA secure_delete = ON")
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found > FORMAT:
        raise FormatTooNewError(f"{path} has format {found}; this Tether understands up to {FORMAT}: update Tether")
    db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(error, path) from error


def _translated(error: sqlite3.Error, path: Path) -> Exception:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return NoSpaceError(f"no space to write {path}: free some; nothing was changed")
    if code in {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}:
        return ConfigError(f"{path} is damaged or something else: restore it from a backup, or remove it, and invite everybody again")
    return StoreError(f"{path} can't be read or written ({error}): check the disk and the folder's permissions, then try again")
