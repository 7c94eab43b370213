"""The catalog's tables for garbage collection: how old packs are, which manifests are forgotten, which packs are done with. SQL only."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from itertools import groupby

from tether.store.format.packs import Located
from tether.store.index.rows import located, seconds
from tether.types import Digest

__all__ = [
    "SCHEMA",
    "add_pack",
    "blobs_by_pack",
    "condemn",
    "condemned",
    "enter_pack",
    "forget_blobs",
    "forget_condemned",
    "forget_manifests",
    "forgotten",
    "membership",
    "move",
    "remember_manifest",
    "set_membership",
    "stamp",
    "versions",
    "written",
]

SCHEMA = """
CREATE TABLE IF NOT EXISTS pack_ages (name TEXT PRIMARY KEY, written REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS forgotten_manifests (digest TEXT PRIMARY KEY, since REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS condemned_packs (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""


# --- what there is


def blobs_by_pack(db: sqlite3.Connection) -> dict[str, tuple[Located, ...]]:
    """Every pack, with the blobs that lie in it, by offset."""
    found: dict[str, tuple[Located, ...]] = {name: () for (name,) in db.execute("SELECT name FROM packs")}
    query = "SELECT name, digest, offset, nbytes FROM blobs JOIN packs ON id = pack ORDER BY pack, offset"
    for name, rows in groupby(db.execute(query), lambda row: row[0]):
        found[name] = tuple(located(*row[1:]) for row in rows)
    return found


def versions(db: sqlite3.Connection) -> dict[Digest, str]:
    """The manifest of each version, and a name for people."""
    rows = db.execute("SELECT digest, name, version FROM versions JOIN models ON id = model")
    return {Digest(digest): f"{name}:{version}" for digest, name, version in rows}


def written(db: sqlite3.Connection) -> dict[str, float]:
    """When the packs were written, where that is known."""
    return {name: seconds(since) for name, since in db.execute("SELECT name, written FROM pack_ages")}


def forgotten(db: sqlite3.Connection) -> dict[Digest, float]:
    """Manifests that no version has any more, and since when."""
    query = "SELECT digest, since FROM forgotten_manifests WHERE digest NOT IN (SELECT digest FROM versions)"
    return {Digest(digest): seconds(since) for digest, since in db.execute(query)}


def condemned(db: sqlite3.Connection) -> list[str]:
    """Packs that are done with and whose files may still be there."""
    return [name for (name,) in db.execute("SELECT name FROM condemned_packs ORDER BY name")]


# --- what changes


def stamp(db: sqlite3.Connection, packs: Iterable[str], manifests: Iterable[Digest], now: float) -> None:
    """What is seen for the first time counts from now."""
    db.executemany("INSERT OR IGNORE INTO pack_ages VALUES (?, ?)", [(name, now) for name in packs])
    db.executemany("INSERT OR IGNORE INTO forgotten_manifests VALUES (?, ?)", [(digest, now) for digest in manifests])


def enter_pack(db: sqlite3.Connection, pack: str, now: float | None) -> None:
    """What is entered is not done with, and young; None: as old as it was, if that is known."""
    db.execute("DELETE FROM condemned_packs WHERE name = ?", (pack,))
    if now is not None:
        db.execute("INSERT OR REPLACE INTO pack_ages VALUES (?, ?)", (pack, now))


def remember_manifest(db: sqlite3.Connection, digest: Digest, now: float) -> None:
    """A version that had this manifest was deleted."""
    db.execute("INSERT OR REPLACE INTO forgotten_manifests VALUES (?, ?)", (digest, now))


def forget_manifests(db: sqlite3.Connection, digests: Iterable[Digest]) -> None:
    db.executemany("DELETE FROM forgotten_manifests WHERE digest = ?", [(digest,) for digest in digests])


def forget_condemned(db: sqlite3.Connection, packs: Iterable[str]) -> None:
    db.executemany("DELETE FROM condemned_packs WHERE name = ?", [(name,) for name in packs])


def add_pack(db: sqlite3.Connection, pack: str, written: float) -> None:
    """A pack that blobs are moved to."""
    db.execute("INSERT OR IGNORE INTO packs (name) VALUES (?)", (pack,))
    enter_pack(db, pack, written)


def move(db: sqlite3.Connection, blobs: Mapping[str, Iterable[Located]], target: str) -> None:
    """Point blobs, by the pack they lie in, at their places in another; those that lie elsewhere by now stay."""
    ids = _ids(db)
    for pack, lines in blobs.items():
        rows = [(ids[target], line.offset, bytes.fromhex(line.digest), ids.get(pack)) for line in lines]
        db.executemany("UPDATE blobs SET pack = ?, offset = ? WHERE digest = ? AND pack = ?", rows)


def forget_blobs(db: sqlite3.Connection, blobs: Mapping[str, Iterable[Digest]]) -> None:
    """By the pack they lie in; those that lie elsewhere by now stay."""
    ids = _ids(db)
    for pack, digests in blobs.items():
        rows = [(bytes.fromhex(digest), ids.get(pack)) for digest in digests]
        db.executemany("DELETE FROM blobs WHERE digest = ? AND pack = ?", rows)


def condemn(db: sqlite3.Connection, packs: Iterable[str]) -> list[str]:
    """Those of them in which nothing lies any more: forget them, and that their files are still there. Gives their names."""
    query = "SELECT 1 FROM packs WHERE name = ? AND NOT EXISTS (SELECT 1 FROM blobs WHERE pack = id)"
    gone = [name for name in packs if db.execute(query, (name,)).fetchone()]
    db.executemany("DELETE FROM packs WHERE name = ?", [(name,) for name in gone])
    db.executemany("DELETE FROM pack_ages WHERE name = ?", [(name,) for name in gone])
    db.executemany("INSERT OR IGNORE INTO condemned_packs VALUES (?)", [(name,) for name in gone])
    return gone


def membership(db: sqlite3.Connection) -> tuple[str, str] | None:
    """Of this store in a shared folder of packs: its id and its last token."""
    row = db.execute("SELECT value FROM meta WHERE key = 'membership'").fetchone()
    store, _, token = row[0].partition(" ") if row else ("", "", "")
    return (store, token) if row else None


def set_membership(db: sqlite3.Connection, store: str, token: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('membership', ?)", (f"{store} {token}",))


def _ids(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT name, id FROM packs").fetchall())
