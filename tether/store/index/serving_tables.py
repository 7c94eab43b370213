"""The catalog's table of serving settings: of each model, its publisher and name, what its lab said. SQL only."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

import msgspec

from tether.serving_settings import DEFAULTS, ServingSettings

__all__ = ["SCHEMA", "amend", "forget_model", "read", "read_rows", "replace"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS serving (publisher TEXT NOT NULL, name TEXT NOT NULL, settings BLOB NOT NULL,
  PRIMARY KEY (publisher, name)) WITHOUT ROWID;
"""
Row = tuple[str, str, bytes]
"""Publisher, name, settings as JSON."""


def read_rows(db: sqlite3.Connection) -> tuple[Row, ...]:
    """In order. None in a catalog that was made before there was the table, and is only read."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'serving'").fetchone():
        return ()
    return tuple(db.execute("SELECT publisher, name, settings FROM serving ORDER BY publisher, name").fetchall())


def read(db: sqlite3.Connection) -> dict[tuple[str, str], ServingSettings]:
    """By publisher and name; models of which nothing is said are not among them."""
    return {(publisher, name): _decoded(settings) for publisher, name, settings in read_rows(db)}


def amend(db: sqlite3.Connection, publisher: str, name: str, changes: Mapping[str, Any] | None) -> ServingSettings:
    """What is said from now on; None: nothing. Raises: BadInputError: it makes no sense."""
    known = read(db).get((publisher, name), DEFAULTS)
    said = DEFAULTS if changes is None else known.amended(changes)
    if said == DEFAULTS:
        db.execute("DELETE FROM serving WHERE publisher = ? AND name = ?", (publisher, name))
    else:
        db.execute("INSERT OR REPLACE INTO serving VALUES (?, ?, ?)", (publisher, name, msgspec.json.encode(said)))
    return said


def forget_model(db: sqlite3.Connection, model: int) -> None:
    """Nothing is said of this row of `models` any more."""
    db.execute("DELETE FROM serving WHERE (publisher, name) = (SELECT publisher, name FROM models WHERE id = ?)", (model,))


def replace(db: sqlite3.Connection, rows: tuple[Row, ...]) -> None:
    """Say this, and nothing else."""
    db.execute("DELETE FROM serving")
    db.executemany("INSERT INTO serving VALUES (?, ?, ?)", rows)


def _decoded(settings: bytes) -> ServingSettings:
    """What the disk altered is as good as not said: a model is served without it, and none would be listed if it were an error."""
    try:
        return msgspec.json.decode(settings, type=ServingSettings)
    except (msgspec.MsgspecError, TypeError):
        return DEFAULTS
