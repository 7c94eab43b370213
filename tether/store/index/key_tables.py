"""The catalog's tables of keys: model keys (wrapped), to whom they were given, what was sealed with them. SQL only."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from tether.store.format.encrypted import ModelContext
from tether.store.format.manifest import Seal
from tether.types import Digest

__all__ = [
    "SCHEMA",
    "KeyRow",
    "SealRow",
    "add_grant",
    "add_key",
    "add_seals",
    "current_key",
    "find_key",
    "find_seals",
    "forget_seals",
    "grants_of",
    "grants_to",
    "keys_of",
    "remove_grant",
    "retire_keys",
    "rewrap",
    "stray_seals",
    "wrapped_by_others",
]

SCHEMA = """
CREATE TABLE IF NOT EXISTS model_keys (id TEXT PRIMARY KEY, publisher TEXT NOT NULL, name TEXT NOT NULL, wrapped BLOB NOT NULL,
  cluster_key TEXT NOT NULL, created REAL NOT NULL, retired REAL) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS current_model_keys ON model_keys (publisher, name) WHERE retired IS NULL;
CREATE TABLE IF NOT EXISTS grants (peer TEXT NOT NULL, publisher TEXT NOT NULL, name TEXT NOT NULL, granted REAL NOT NULL,
  PRIMARY KEY (peer, publisher, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seals (key TEXT NOT NULL, plain BLOB NOT NULL, digest BLOB NOT NULL, nbytes INTEGER NOT NULL,
  nonce BLOB NOT NULL, tag BLOB NOT NULL, PRIMARY KEY (key, plain)) WITHOUT ROWID;
"""
_KEYS = "SELECT id, publisher, name, wrapped, cluster_key, created, retired FROM model_keys"


class SealRow(NamedTuple):
    """What was sealed, without how."""

    key: str
    plain: bytes
    """Keyed hash of the plaintext's digest."""
    digest: Digest
    """Of the blob."""


class KeyRow(NamedTuple):
    """A model key as it is stored."""

    id: str
    publisher: str
    name: str
    wrapped: bytes
    """By the cluster key."""
    cluster_key: str
    """Id of it."""
    created: float
    """Seconds since 1970."""
    retired: float | None
    """When it was used for a new version for the last time, and for a peer's model when it came; None: it is the current one."""

    @property
    def context(self) -> ModelContext:
        return ModelContext(self.publisher, self.name)


def add_key(db: sqlite3.Connection, row: KeyRow) -> bool:
    """Whether it was not there before."""
    return db.execute("INSERT INTO model_keys VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING", row).rowcount == 1


def find_key(db: sqlite3.Connection, key: str) -> KeyRow | None:
    return _one(db.execute(f"{_KEYS} WHERE id = ?", (key,)))


def current_key(db: sqlite3.Connection, context: ModelContext) -> KeyRow | None:
    return _one(db.execute(f"{_KEYS} WHERE publisher = ? AND name = ? AND retired IS NULL", context))


def keys_of(db: sqlite3.Connection, context: ModelContext) -> list[KeyRow]:
    """All of a model, oldest first."""
    return _all(db.execute(f"{_KEYS} WHERE publisher = ? AND name = ? ORDER BY created, id", context))


def retire_keys(db: sqlite3.Connection, context: ModelContext, now: float) -> None:
    """Leave the model without a current key: what is published next gets a new one."""
    db.execute("UPDATE model_keys SET retired = ? WHERE publisher = ? AND name = ? AND retired IS NULL", (now, *context))


def wrapped_by_others(db: sqlite3.Connection, cluster_key: str, most: int) -> list[KeyRow]:
    """Keys that another cluster key than this one wraps."""
    return _all(db.execute(f"{_KEYS} WHERE cluster_key <> ? LIMIT ?", (cluster_key, most)))


def rewrap(db: sqlite3.Connection, rows: Iterable[tuple[bytes, str, str]]) -> None:
    """`rows`: wrapped, cluster key, id."""
    db.executemany("UPDATE model_keys SET wrapped = ?, cluster_key = ? WHERE id = ?", rows)


def add_grant(db: sqlite3.Connection, peer: str, context: ModelContext, now: float) -> None:
    db.execute("INSERT OR REPLACE INTO grants VALUES (?, ?, ?, ?)", (peer, *context, now))


def remove_grant(db: sqlite3.Connection, peer: str, context: ModelContext) -> None:
    db.execute("DELETE FROM grants WHERE peer = ? AND publisher = ? AND name = ?", (peer, *context))


def grants_of(db: sqlite3.Connection, context: ModelContext) -> list[str]:
    """The peers that were given the model's keys."""
    query = "SELECT peer FROM grants WHERE publisher = ? AND name = ? ORDER BY peer"
    return [peer for (peer,) in db.execute(query, context)]


def grants_to(db: sqlite3.Connection, peer: str) -> list[ModelContext]:
    """The models whose keys a peer was given."""
    query = "SELECT publisher, name FROM grants WHERE peer = ? ORDER BY publisher, name"
    return [ModelContext(*row) for row in db.execute(query, (peer,))]


def add_seals(db: sqlite3.Connection, key: str, seals: Iterable[tuple[bytes, Seal]]) -> None:
    """`seals`: keyed hash of the plaintext's digest, and its seal."""
    rows = ((key, plain, bytes.fromhex(seal.digest), seal.nbytes, seal.nonce, seal.tag) for plain, seal in seals)
    db.executemany("INSERT OR REPLACE INTO seals VALUES (?, ?, ?, ?, ?, ?)", rows)


def find_seals(db: sqlite3.Connection, key: str, plains: Sequence[bytes]) -> list[Seal | None]:
    """For each keyed hash its seal."""
    query = "SELECT digest, nbytes, nonce, tag FROM seals WHERE key = ? AND plain = ?"
    rows = (db.execute(query, (key, plain)).fetchone() for plain in plains)
    return [Seal(Digest(row[0].hex()), *row[1:]) if row else None for row in rows]


def stray_seals(db: sqlite3.Connection, going: Collection[Digest] = ()) -> list[SealRow]:
    """What was sealed and lies in no pack, but for blobs that are `going`."""
    query = "SELECT key, plain, seals.digest, blobs.digest IS NULL FROM seals LEFT JOIN blobs ON blobs.digest = seals.digest"
    found = ((SealRow(key, plain, Digest(digest.hex())), is_stray) for key, plain, digest, is_stray in db.execute(query))
    return [row for row, is_stray in found if is_stray or row.digest in going]


def forget_seals(db: sqlite3.Connection, rows: Iterable[SealRow]) -> None:
    db.executemany("DELETE FROM seals WHERE key = ? AND plain = ?", [(row.key, row.plain) for row in rows])


def _one(found: sqlite3.Cursor) -> KeyRow | None:
    row = found.fetchone()
    return KeyRow(*row) if row else None


def _all(found: sqlite3.Cursor) -> list[KeyRow]:
    return [KeyRow(*row) for row in found.fetchall()]
