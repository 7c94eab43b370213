"""The catalog as others mirror it: all that is public in it, as values; which store this is, and how far it has come. SQL only."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from tether.errors import ConflictError
from tether.store.index import collection_tables, serving_tables
from tether.types import Digest

__all__ = [
    "CatalogState",
    "Footing",
    "ModelState",
    "RestState",
    "VersionState",
    "apply",
    "begin_term",
    "enter",
    "follow",
    "footing",
    "lost",
    "read_state",
    "signatures",
    "state_of",
]

_APART = 1000
"""Changes that a new writer's count is ahead of what it knows: an earlier writer may have counted some that nobody saw."""


class VersionState(msgspec.Struct, frozen=True, array_like=True):
    """A version's row."""

    version: int
    digest: Digest
    signature: bytes
    created: float
    nbytes: int
    tags: bytes


class ModelState(msgspec.Struct, frozen=True, array_like=True):
    """A model, also one that has no version any more: its numbers are not given again."""

    publisher: str
    name: str
    next: int
    versions: tuple[VersionState, ...]
    aliases: dict[str, int]
    history: tuple[tuple[str, int], ...]
    """What aliases pointed at before, oldest first."""


class RestState(msgspec.Struct, frozen=True, array_like=True):
    """All else."""

    publishers: tuple[tuple[str, str], ...]
    """Key and petname."""
    trust: tuple[tuple[str, str], ...]
    """Publisher and scope."""
    keys: tuple[tuple[str, str, str, bytes, str, float, float | None], ...]
    """Model keys, wrapped by the cluster key."""
    grants: tuple[tuple[str, str, str, float], ...]
    """Peer, publisher, name, when."""
    serving: tuple[tuple[str, str, bytes], ...] = ()
    """Publisher, name, settings."""


class CatalogState(msgspec.Struct, frozen=True, array_like=True):
    """The catalog, or what changed in it."""

    change: int
    whole: bool
    """Whether models that it does not name have no versions."""
    models: tuple[ModelState, ...]
    rest: RestState | None
    """None: as before."""


class Footing(msgspec.Struct, frozen=True):
    """Which store this is among those of its cluster."""

    member: str
    term: int
    """The latest that it knows."""
    wrote: int
    """The latest in which it was written to by its own manager."""
    position: tuple[int, int]
    """Term and number of the last change that it has."""
    writes: bool
    """Whether that change was its own."""
    since: int = 0
    """Term since which nobody else's were in it: what it signed as the writer is the last that was signed."""


# --- which store this is


def footing(db: sqlite3.Connection) -> Footing | None:
    """None: it was never one of a cluster's."""
    row = db.execute("SELECT value FROM meta WHERE key = 'footing'").fetchone()
    if row is None:
        return None
    found = msgspec.json.decode(row[0], type=Footing)
    return msgspec.structs.replace(found, position=(found.wrote, _changes(db))) if found.writes else found


def begin_term(db: sqlite3.Connection, term: int) -> Footing:
    """From now on this store is written to, in this term. Raises: ConflictError: it knows of a later one."""
    known = footing(db)
    if known is not None and term < known.term:
        raise ConflictError(f"term {term} of the writer's lease is over: {known.term} began")
    if known is not None and not known.writes:
        db.execute("UPDATE meta SET value = max(value, ?) + ? WHERE key = 'changes'", (known.position[1], _APART))
    since = known.since if known is not None and known.writes else term
    return _stand(db, Footing(known.member if known else secrets.token_hex(8), term, term, (term, _changes(db)), writes=True, since=since))


def _stand(db: sqlite3.Connection, new: Footing) -> Footing:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('footing', ?)", (msgspec.json.encode(new).decode(),))
    return new


def enter(db: sqlite3.Connection) -> Footing:
    """Its footing; given a name where it had none."""
    return footing(db) or _stand(db, Footing(secrets.token_hex(8), 0, 0, (0, 0), writes=False))


def _changes(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT value FROM meta WHERE key = 'changes'").fetchone()[0])


# --- what it holds


def read_state(db: sqlite3.Connection) -> CatalogState:
    """The whole catalog, at one moment."""
    models = tuple(_read_model(db, *row) for row in db.execute("SELECT id, publisher, name, next FROM models ORDER BY id").fetchall())
    rest = RestState(
        publishers=tuple(db.execute("SELECT key, label FROM publishers ORDER BY key").fetchall()),
        trust=tuple(db.execute("SELECT publisher, scope FROM trust ORDER BY publisher, scope").fetchall()),
        keys=tuple(db.execute("SELECT id, publisher, name, wrapped, cluster_key, created, retired FROM model_keys ORDER BY id").fetchall()),
        grants=tuple(db.execute("SELECT peer, publisher, name, granted FROM grants ORDER BY peer, publisher, name").fetchall()),
        serving=serving_tables.read_rows(db),
    )
    return CatalogState(change=_changes(db), whole=True, models=models, rest=rest)


def state_of(db: sqlite3.Connection, publisher: str, name: str) -> ModelState | None:
    """One model; None: nothing was ever heard of it."""
    row = db.execute("SELECT id, publisher, name, next FROM models WHERE publisher = ? AND name = ?", (publisher, name)).fetchone()
    return _read_model(db, *row) if row else None


def _read_model(db: sqlite3.Connection, model: int, publisher: str, name: str, following: int) -> ModelState:
    query = "SELECT version, digest, signature, created, nbytes, tags FROM versions WHERE model = ? ORDER BY version"
    versions = tuple(VersionState(*row) for row in db.execute(query, (model,)))
    aliases = dict(db.execute("SELECT alias, version FROM aliases WHERE model = ? ORDER BY alias", (model,)).fetchall())
    history = tuple(db.execute("SELECT alias, version FROM alias_history WHERE model = ? ORDER BY id", (model,)).fetchall())
    return ModelState(publisher, name, following, versions, aliases, history)


# --- making it the same


def lost(mine: CatalogState, theirs: CatalogState) -> tuple[str, ...]:
    """The versions that the one has and the other, which is whole, has not."""
    return tuple(sorted(_named(mine).keys() - _named(theirs).keys()))


def _named(state: CatalogState) -> dict[str, Digest]:
    return {f"{model.name}:{each.version} ({each.digest})": each.digest for model in state.models for each in model.versions}


def apply(db: sqlite3.Connection, term: int, state: CatalogState, now: float) -> None:
    """Make this catalog say what the writer's says. Raises: ConflictError: a later term than this one is known here."""
    known = enter(db)
    if term < known.term or (known.writes and term == known.term):
        raise ConflictError(f"a change of term {term} came late: {known.term} began")
    if state.whole:
        named = {(model.publisher, model.name) for model in state.models}
        for publisher, name, following in db.execute("SELECT publisher, name, next FROM models").fetchall():
            if (publisher, name) not in named:
                _replace(db, ModelState(publisher, name, following, (), {}, ()), now)
    for model in state.models:
        _replace(db, model, now)
    if state.rest is not None:
        _replace_rest(db, state.rest)
    _stand(db, Footing(known.member, term, known.wrote, (term, state.change), writes=False))


def signatures(db: sqlite3.Connection, publisher: str, name: str) -> dict[Digest, bytes]:
    """The versions of one model, by digest, and how the catalog has them signed."""
    query = "SELECT digest, signature FROM versions JOIN models ON id = model WHERE publisher = ? AND name = ?"
    return {Digest(digest): signature for digest, signature in db.execute(query, (publisher, name))}


def follow(db: sqlite3.Connection, states: Iterable[ModelState], now: float) -> None:
    """Make this catalog say of single models, all of other publishers, what their states say; footing and all else stay.

    Raises: ConflictError: a number means another digest here, or a state contradicts itself.
    """
    for state in states:
        _check_consistent(state)
        key = (state.publisher, state.name)
        query = "SELECT version, digest FROM versions JOIN models ON id = model WHERE publisher = ? AND name = ?"
        here: dict[int, str] = dict(db.execute(query, key).fetchall())
        for each in state.versions:
            if here.get(each.version, each.digest) != each.digest:
                raise ConflictError(
                    f"{state.name}:{each.version} of publisher {state.publisher} is {here[each.version][:12]}… here and "
                    f"{each.digest[:12]}… there: delete it here if it was brought in by hand; else the publisher gave a number twice"
                )
        given = [following for (following,) in db.execute("SELECT next FROM models WHERE publisher = ? AND name = ?", key)]
        following = max([state.next, *given, *(each.version + 1 for each in state.versions)])
        _replace(db, msgspec.structs.replace(state, next=following), now)


def _check_consistent(state: ModelState) -> None:
    numbers = {each.version for each in state.versions}
    named = {*state.aliases.values(), *(at for _, at in state.history)}
    if not named <= numbers or (numbers and "latest" not in state.aliases) or len({each.digest for each in state.versions}) < len(numbers):
        raise ConflictError(
            f"what is to be said of {state.name} of publisher {state.publisher} contradicts itself: each alias points at one of its "
            "versions, `latest` too, and each version has a digest of its own"
        )


def _replace(db: sqlite3.Connection, new: ModelState, now: float) -> None:
    db.execute("INSERT OR IGNORE INTO models (publisher, name) VALUES (?, ?)", (new.publisher, new.name))
    query = "UPDATE models SET next = ? WHERE publisher = ? AND name = ? RETURNING id"
    ((model,),) = db.execute(query, (new.next, new.publisher, new.name)).fetchall()
    kept = {each.version: each.digest for each in new.versions}
    before = db.execute("SELECT version, digest FROM versions WHERE model = ?", (model,)).fetchall()
    gone = [(version, digest) for version, digest in before if kept.get(version) != digest]
    db.execute("DELETE FROM aliases WHERE model = ?", (model,))
    db.execute("DELETE FROM alias_history WHERE model = ?", (model,))
    db.executemany("DELETE FROM versions WHERE model = ? AND version = ?", [(model, version) for version, _ in gone])
    rows = [(model, *msgspec.structs.astuple(each)) for each in new.versions]
    db.executemany("INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    db.executemany("INSERT INTO aliases VALUES (?, ?, ?)", [(model, *each) for each in new.aliases.items()])
    db.executemany("INSERT INTO alias_history (model, alias, version) VALUES (?, ?, ?)", [(model, *each) for each in new.history])
    for _, digest in gone:
        if digest not in kept.values():
            collection_tables.remember_manifest(db, Digest(digest), now)


def _replace_rest(db: sqlite3.Connection, rest: RestState) -> None:
    tables: Iterable[tuple[str, int, Sequence[Sequence[object]]]] = (
        ("publishers", 2, rest.publishers),
        ("trust", 2, rest.trust),
        ("model_keys", 7, rest.keys),
        ("grants", 4, rest.grants),
    )
    for table, columns, rows in tables:
        db.execute(f"DELETE FROM {table}")  # noqa: S608 (names of ours)
        db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * columns)})", rows)  # noqa: S608
    serving_tables.replace(db, rest.serving)
