"""The catalog: names, versions, aliases, trust and where blobs lie, in SQLite. One transaction makes a version exist."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tether.errors import (
    ConflictError,
    InternalError,
    NoSpaceError,
    StoreError,
    UnknownAliasError,
    UnknownModelError,
    UnknownVersionError,
)
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.store.faults import reach
from tether.store.format.packs import Located, Location
from tether.store.format.records import AliasChange, ModelRecord, NewVersion, VersionRecord
from tether.store.index import collection_tables, serving_tables
from tether.store.index.key_tables import SCHEMA as KEY_SCHEMA
from tether.store.index.rows import altered, located, location
from tether.types import Digest, ModelRef, model_name

__all__ = ["LATEST", "PROD", "Catalog"]

LATEST = "latest"
"""Alias that a publish moves to the new version."""
PROD = "prod"
"""Alias that a bare name means where it exists."""
_BUSY = 10.0
"""Seconds that a reader waits for the moment in which SQLite must be alone (start of a WAL, checkpoint): milliseconds in practice."""
_SHARED = ("-wal", "-shm")
"""Endings of the files that are there while a process has the catalog open, or died with it."""
_AT_ONCE = 500
"""Blobs that one query asks for: SQLite took 999 parameters before 3.32. One by one, half of the time goes into calls."""
_LABEL_DIGITS = 12
"""Hex digits of a publisher's key that stand for it where it was given no petname."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS packs (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS blobs (digest BLOB PRIMARY KEY, pack INTEGER NOT NULL REFERENCES packs, offset INTEGER NOT NULL,
  nbytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (id INTEGER PRIMARY KEY, publisher TEXT NOT NULL, name TEXT NOT NULL, next INTEGER NOT NULL DEFAULT 1,
  UNIQUE (publisher, name));
CREATE TABLE IF NOT EXISTS versions (model INTEGER NOT NULL REFERENCES models, version INTEGER NOT NULL, digest TEXT NOT NULL,
  signature BLOB NOT NULL, created REAL NOT NULL, nbytes INTEGER NOT NULL, tags BLOB NOT NULL,
  PRIMARY KEY (model, version), UNIQUE (model, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS aliases (model INTEGER NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (model, alias),
  FOREIGN KEY (model, version) REFERENCES versions) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS alias_history (id INTEGER PRIMARY KEY, model INTEGER NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS publishers (key TEXT PRIMARY KEY, label TEXT NOT NULL UNIQUE) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trust (publisher TEXT NOT NULL, scope TEXT NOT NULL, PRIMARY KEY (publisher, scope)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blobs_by_pack ON blobs (pack, offset);
INSERT OR IGNORE INTO meta VALUES ('changes', 0);
"""
_ENTER_BLOB = "INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, ?)"
_KEEP_BLOB = "INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, ?)"
_LOCATIONS = "SELECT digest, packs.name, offset, nbytes FROM blobs JOIN packs ON packs.id = pack"
_VERSIONS = "SELECT publisher, name, version, digest, created, nbytes, tags FROM versions JOIN models ON id = model"


class Catalog:
    """The catalog, for any thread. Readers of other processes see each transaction whole or not at all.

    Single blobs are found over a connection of their own, which sees what is committed: not what its thread is about to commit.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Raises: StoreError: it can't be opened; NoSpaceError."""
        self._path = path
        self._lock = threading.RLock()
        self._single_lock = threading.Lock()
        self._check: Callable[[], None] = lambda: None
        with self._errors():
            self._db = _connection(path, read_only=read_only)
            try:
                self._prepare(read_only=read_only)
                self._single = _connection(path, read_only=True)  # for what each read of a blob asks: it waits for no long transaction
                self._single.execute("SELECT 1 FROM sqlite_master").fetchone()  # its files are opened now, while they are there
            except sqlite3.Error:
                self._db.close()
                raise

    def _prepare(self, *, read_only: bool) -> None:
        if read_only:
            self._db.execute("SELECT value FROM meta").fetchone()
            return
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a commit that returned survives a power cut
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA secure_delete = ON")  # a key that was wrapped anew must not linger in a free corner of a page
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'blobs'").fetchone():
            # Without its index no pack counts as known: the repository scans them all again.
            self._db.executescript("DROP TABLE IF EXISTS packs")
        self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {KEY_SCHEMA} {collection_tables.SCHEMA} {serving_tables.SCHEMA} COMMIT;")

    def guard(self, check: Callable[[], None]) -> None:
        """Do nothing that `check` raises at: it is called inside each transaction, when no other process can begin one."""
        self._check = check

    def check_writer(self) -> None:
        """Raises: what `check` does."""
        self._check()

    def close(self) -> None:
        with self._lock, self._single_lock:
            self._single.close()
            self._db.close()

    # --- transactions

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> StoreError | NoSpaceError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return NoSpaceError(f"no space to write {self._path}: free some, or delete versions that are not needed; nothing was changed")
        if code == sqlite3.SQLITE_CANTOPEN and self._path.exists():
            return StoreError(f"the catalog {self._path} can't be opened: check its permissions and the limit of open files (`ulimit -n`)")
        if code == sqlite3.SQLITE_CANTOPEN:
            return StoreError(f"there is no catalog at {self._path}: start the lab (`tether up`) or name its data folder with --data")
        return StoreError(f"the catalog {self._path} refused ({error}): check the disk and the folder's permissions, then try again")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """All reads inside see one state."""
        with self._lock, self._errors():
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._db.rollback()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, durable when it returns; counts as one change."""
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._check()
                reach("catalog.begin")
                yield self._db
                self._db.execute("UPDATE meta SET value = value + 1 WHERE key = 'changes'")
                reach("catalog.prepared")
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.rollback()
                raise
            reach("catalog.commit")

    def reading(self) -> AbstractContextManager[sqlite3.Connection]:
        """For modules with tables of their own: all reads inside see one state."""
        return self._reading()

    def writing(self) -> AbstractContextManager[sqlite3.Connection]:
        """The same for writing: all or nothing, durable when it returns, alone."""
        return self._writing()

    def scrub(self) -> None:
        """Leave nothing of what was overwritten or deleted in the catalog's files.

        The files are written anew: `secure_delete` clears what a row gives up, not what is left behind where SQLite moved a row to another
        page (seen after one of ten rotations of 250 keys).

        Raises: ConflictError: a reader is in the way; NoSpaceError.
        """
        with self._lock, self._single_lock, self._errors():
            self._db.execute("VACUUM")
            (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise ConflictError(f"another process keeps reading {self._path}, so that its log can't be emptied: try again when it is done")

    def back_up(self, path: Path) -> None:
        """Write a copy of the catalog as it is; one that is there already stays. Raises: StoreError, NoSpaceError."""
        if not path.exists():
            with self._lock, self._errors():
                self._db.execute("VACUUM INTO ?", (str(path),))

    def change_count(self) -> int:
        with self._lock, self._errors():
            return int(self._db.execute("SELECT value FROM meta WHERE key = 'changes'").fetchone()[0])

    # --- blobs

    def locate(self, digest: Digest) -> Location | None:
        with self._single_lock, self._errors():
            row = self._single.execute(f"{_LOCATIONS} WHERE digest = ?", (bytes.fromhex(digest),)).fetchone()
        return location(digest, row[1:]) if row else None

    def locate_many(self, digests: Iterable[Digest]) -> dict[Digest, Location]:
        """Those of them that a pack holds, and where."""
        wanted = {bytes.fromhex(digest): digest for digest in digests}
        found = {}
        with self._reading() as db:
            for some in _slices(list(wanted), _AT_ONCE):
                for key, *row in db.execute(f"{_LOCATIONS} WHERE digest IN ({_marks(some)})", some):
                    digest = wanted[key]
                    found[digest] = location(digest, row)
        return found

    def blobs_in(self, pack: str) -> list[Located]:
        """What the catalog says lies in a pack, by offset; copies that a later pack replaced are not among it."""
        query = "SELECT digest, offset, nbytes FROM blobs WHERE pack = (SELECT id FROM packs WHERE name = ?) ORDER BY offset"
        with self._reading() as db:
            return [located(*row) for row in db.execute(query, (pack,))]

    def forget_pack(self, pack: str) -> None:
        """Take a pack, and what the catalog says lies in it, out of the index."""
        with self._writing() as db:
            db.execute("DELETE FROM blobs WHERE pack = (SELECT id FROM packs WHERE name = ?)", (pack,))
            db.execute("DELETE FROM packs WHERE name = ?", (pack,))

    def packs(self) -> set[str]:
        """Those that need not be looked at: entered, or done with and about to be deleted."""
        with self._reading() as db:
            return {name for (name,) in db.execute("SELECT name FROM packs UNION SELECT name FROM condemned_packs")}

    def add_packs(
        self, found: Mapping[str, Sequence[Located]], *, replace: bool = False, keep: bool = False, now: float | None = None
    ) -> None:
        """Enter the indexes of packs; `replace` forgets all others. Of blobs that lie elsewhere too, the new copy counts; with `keep` the
        old one. The packs' age counts from `now`, else from the next garbage collection.
        """
        with self._writing() as db:
            done_with: set[str] = set()
            if replace:
                done_with = set(collection_tables.condemned(db))
                db.execute("DELETE FROM blobs")
                db.execute("DELETE FROM packs")
            for name, index in found.items():
                if name not in done_with:
                    _add_pack(db, name, index, now, keep=keep)

    # --- versions

    def own(self) -> str | None:
        with self._reading() as db:
            return _own(db)

    def set_own(self, publisher: str) -> None:
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('own', ?)", (publisher,))

    def version_of(self, publisher: str, name: str, digest: Digest) -> int | None:
        query = "SELECT version FROM versions JOIN models ON id = model WHERE publisher = ? AND name = ? AND digest = ?"
        with self._reading() as db:
            row = db.execute(query, (publisher, name, digest)).fetchone()
        return int(row[0]) if row else None

    def add_version(self, new: NewVersion, packs: Mapping[str, Sequence[Located]]) -> int:
        """Give it the next number and move `latest` and its aliases to it; enter the packs that were written for it."""
        with self._writing() as db:
            for name, index in packs.items():
                _add_pack(db, name, index, new.created)
            db.execute("INSERT OR IGNORE INTO models (publisher, name) VALUES (?, ?)", (new.publisher, new.name))
            query = "UPDATE models SET next = next + 1 WHERE publisher = ? AND name = ? RETURNING id, next - 1"
            ((model, version),) = db.execute(query, (new.publisher, new.name)).fetchall()
            row = (model, version, new.digest, new.signature, new.created, new.nbytes, msgspec.json.encode(new.tags, order="sorted"))
            db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            for alias in dict.fromkeys((LATEST, *new.aliases)):
                _point(db, model, alias, version)
        return int(version)

    def delete_version(self, ref: ModelRef, version: int, now: float) -> None:
        """Raises: UnknownModelError, UnknownVersionError; ConflictError: an alias other than `latest` points at it."""
        with self._writing() as db:
            model = _model(db, ref, None)
            record = _record(db, _version_row(db, model, ref, version))
            aliases = [name for name, at in _aliases(db, model).items() if at == version and name != LATEST]
            if aliases:
                raise ConflictError(f"{ref.name}:{version} is what @{', @'.join(aliases)} points at: move or delete that alias first")
            _forget_version(db, model, version)
            collection_tables.remember_manifest(db, record.digest, now)

    def resolve(self, ref: ModelRef, publisher: str | None = None) -> VersionRecord:
        """Raises: UnknownModelError, UnknownVersionError, UnknownAliasError; ConflictError: two publishers have the name."""
        with self._reading() as db:
            model = _model(db, ref, publisher)
            return _record(db, _version_row(db, model, ref, _number(db, model, ref)))

    def models(self) -> list[ModelRecord]:
        """Those that have a version, sorted by name as in a URL."""
        with self._reading() as db:
            said = serving_tables.read(db)
            rows = db.execute("SELECT id, publisher, name FROM models").fetchall()
            found = [_model_record(db, model, publisher, name, said.get((publisher, name), DEFAULTS)) for model, publisher, name in rows]
        return sorted((model for model in found if model.versions), key=lambda model: model.name)

    def versions_of(self, digest: Digest) -> list[VersionRecord]:
        """Those that have this manifest, the lab's own first, then by name."""
        with self._reading() as db:
            own = _own(db)
            found = [_record(db, row) for row in db.execute(f"{_VERSIONS} WHERE digest = ?", (digest,)).fetchall()]
        return sorted(found, key=lambda record: (record.publisher != own, record.name, record.version))

    def signature(self, digest: Digest, publisher: str) -> bytes | None:
        query = "SELECT signature FROM versions JOIN models ON id = model WHERE digest = ? AND publisher = ?"
        with self._reading() as db:
            row = db.execute(query, (digest, publisher)).fetchone()
        return bytes(row[0]) if row else None

    def signature_of(self, record: VersionRecord) -> bytes | None:
        """What stands in the version's own row: another model's row may name the same manifest."""
        query = "SELECT signature FROM versions JOIN models ON id = model WHERE publisher = ? AND name = ? AND version = ? AND digest = ?"
        name = record.name.rpartition("~")[2]
        with self._reading() as db:
            row = db.execute(query, (record.publisher, name, record.version, record.digest)).fetchone()
        return row[0] if row and isinstance(row[0], bytes) else None

    # --- aliases

    def set_alias(self, ref: ModelRef, aliases: Sequence[str], version: int, publisher: str | None = None) -> list[AliasChange]:
        """Point aliases at a version; what they pointed at before goes to their history."""
        if not aliases:
            return []
        with self._writing() as db:
            model = _model(db, ref, publisher)
            _version_row(db, model, ref, version)
            return [_point(db, model, alias, version) for alias in aliases]

    def delete_alias(self, ref: ModelRef, alias: str) -> None:
        """Raises: UnknownModelError, UnknownAliasError; ConflictError: it is `latest`."""
        if alias == LATEST:
            raise ConflictError("the alias 'latest' can't be deleted: it follows each publish")
        with self._writing() as db:
            model = _model(db, ref, None)
            if db.execute("DELETE FROM aliases WHERE model = ? AND alias = ?", (model, alias)).rowcount == 0:
                raise _unknown_alias(db, model, ref, alias)
            db.execute("DELETE FROM alias_history WHERE model = ? AND alias = ?", (model, alias))

    def rollback(self, ref: ModelRef, alias: str | None) -> AliasChange:
        """Move the alias (None: the one that a bare name means) back to what it was before; again: further back.

        Raises: UnknownModelError, UnknownAliasError; ConflictError: there is nothing before.
        """
        with self._writing() as db:
            model = _model(db, ref, None)
            known = _aliases(db, model)
            chosen = alias or (PROD if PROD in known else LATEST)
            if chosen not in known:
                raise _unknown_alias(db, model, ref, chosen)
            return _step_back(db, model, chosen, known[chosen])

    # --- publishers

    def name_publisher(self, publisher: str, label: str) -> None:
        """Give a publisher a petname; its models are then also found under their bare names.

        Raises: BadNameError; ConflictError: another publisher has it.
        """
        with self._writing() as db:
            row = db.execute("SELECT key FROM publishers WHERE label = ? AND key <> ?", (model_name(label), publisher)).fetchone()
            if row:
                raise ConflictError(f"the name {label!r} is already that of publisher {row[0]}: choose another")
            db.execute("INSERT OR REPLACE INTO publishers VALUES (?, ?)", (publisher, label))

    def publishers(self) -> dict[str, str]:
        """Petnames by key."""
        with self._reading() as db:
            return dict(db.execute("SELECT key, label FROM publishers ORDER BY key").fetchall())

    def trust(self, publisher: str, scopes: Sequence[str]) -> None:
        with self._writing() as db:
            db.executemany("INSERT OR IGNORE INTO trust VALUES (?, ?)", [(publisher, scope) for scope in scopes])

    def distrust(self, publisher: str, scopes: Sequence[str]) -> None:
        with self._writing() as db:
            db.executemany("DELETE FROM trust WHERE publisher = ? AND scope = ?", [(publisher, scope) for scope in scopes])

    def trusted(self, publisher: str, scope: str) -> bool:
        """Whether the publisher was given this scope; the lab's own has all."""
        with self._reading() as db:
            if publisher == _own(db):
                return True
            row = db.execute("SELECT 1 FROM trust WHERE publisher = ? AND scope = ?", (publisher, scope)).fetchone()
        return row is not None


def _slices(values: Sequence[bytes], count: int) -> Iterator[Sequence[bytes]]:
    return (values[start : start + count] for start in range(0, len(values), count))


def _marks(values: Sequence[bytes]) -> str:
    return ",".join("?" * len(values))


def _connection(path: Path, *, read_only: bool) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{_mode(path, read_only=read_only)}"
    return sqlite3.connect(uri, uri=True, timeout=_BUSY, isolation_level=None, check_same_thread=False)


def _mode(path: Path, *, read_only: bool) -> str:
    """Parameters for SQLite. It shares memory beside the catalog even to read; on a medium that takes nothing there is nothing to share."""
    if not read_only:
        return "mode=rwc"
    still = (
        path.exists()
        and os.statvfs(path.parent).f_flag & os.ST_RDONLY
        and not any(path.with_name(path.name + end).exists() for end in _SHARED)
    )
    return "mode=ro&immutable=1" if still else "mode=ro"


def _add_pack(db: sqlite3.Connection, name: str, index: Sequence[Located], now: float | None, *, keep: bool = False) -> None:
    db.execute("INSERT OR IGNORE INTO packs (name) VALUES (?)", (name,))
    (pack,) = db.execute("SELECT id FROM packs WHERE name = ?", (name,)).fetchone()
    rows = [(bytes.fromhex(line.digest), pack, line.offset, line.nbytes) for line in index]
    db.executemany(_KEEP_BLOB if keep else _ENTER_BLOB, rows)
    collection_tables.enter_pack(db, name, now)


def _own(db: sqlite3.Connection) -> str | None:
    row = db.execute("SELECT value FROM meta WHERE key = 'own'").fetchone()
    return str(row[0]) if row else None


def _label(db: sqlite3.Connection, publisher: str) -> str:
    row = db.execute("SELECT label FROM publishers WHERE key = ?", (publisher,)).fetchone()
    return str(row[0]) if row else publisher[:_LABEL_DIGITS]


def _url_name(db: sqlite3.Connection, publisher: str, name: str) -> str:
    return name if publisher == (_own(db) or publisher) else f"{_label(db, publisher)}~{name}"


def _model(db: sqlite3.Connection, ref: ModelRef, publisher: str | None) -> int:
    """The model that a reference means: by publisher where it names one, else one's own, else the one under a petname."""
    query = "SELECT id, publisher FROM models WHERE name = ? AND EXISTS (SELECT 1 FROM versions WHERE model = id)"
    found: dict[str, int] = {key: model for model, key in db.execute(query, (ref.name,))}
    own = _own(db)
    if publisher is not None:
        found = {key: model for key, model in found.items() if key == publisher}
    elif ref.publisher is not None:
        found = {key: model for key, model in found.items() if _label(db, key) == ref.publisher or key == ref.publisher}
    elif own in found:
        return found[own]
    elif own is not None:
        named = {key for (key,) in db.execute("SELECT key FROM publishers")}
        found = {key: model for key, model in found.items() if key in named}
    if not found:
        whose = f" of publisher {ref.publisher or publisher}" if ref.publisher or publisher else ""
        raise UnknownModelError(f"model {ref.name!r}{whose} is not in this store; `tether models` lists what there is")
    if len(found) > 1:
        names = ", ".join(sorted(f"{_label(db, key)}/{ref.name}" for key in found))
        raise ConflictError(f"several publishers have a model {ref.name!r}: say which, one of {names}")
    return next(iter(found.values()))


def _number(db: sqlite3.Connection, model: int, ref: ModelRef) -> int:
    if ref.version is not None:
        return ref.version
    if ref.sha is not None:
        return _number_of_sha(db, model, ref)
    known = _aliases(db, model)
    alias = ref.alias or (PROD if PROD in known else LATEST)
    if alias not in known:
        raise _unknown_alias(db, model, ref, alias)
    return known[alias]


def _number_of_sha(db: sqlite3.Connection, model: int, ref: ModelRef) -> int:
    query = "SELECT version FROM versions WHERE model = ? AND substr(digest, 1, ?) = ?"
    found = db.execute(query, (model, len(ref.sha or ""), ref.sha)).fetchall()
    if len(found) > 1:
        raise ConflictError(f"{ref} fits several versions ({', '.join(str(version) for (version,) in found)}): give more digits")
    if not found:
        raise _unknown_version(db, model, ref, f"sha-{ref.sha}")
    return int(found[0][0])


def _aliases(db: sqlite3.Connection, model: int) -> dict[str, int]:
    return dict(db.execute("SELECT alias, version FROM aliases WHERE model = ? ORDER BY alias", (model,)).fetchall())


def _version_row(db: sqlite3.Connection, model: int, ref: ModelRef, version: int) -> tuple[Any, ...]:
    query = f"{_VERSIONS} WHERE model = ? AND version = ?"
    row: tuple[Any, ...] | None = db.execute(query, (model, version)).fetchone()
    if row is None:
        raise _unknown_version(db, model, ref, str(version))
    return row


def _record(db: sqlite3.Connection, row: tuple[Any, ...]) -> VersionRecord:
    publisher, name, *_, tags = row
    try:
        values = dict(
            zip(
                VersionRecord.__struct_fields__,
                (_url_name(db, publisher, name), publisher, *row[2:-1], msgspec.json.decode(tags)),
                strict=True,
            )
        )
        return msgspec.convert(values, VersionRecord)
    except (msgspec.MsgspecError, TypeError, ValueError):
        raise altered(f"its entry of a version of {str(name)[:64]!r}") from None


def _model_record(db: sqlite3.Connection, model: int, publisher: str, name: str, serving: ServingSettings) -> ModelRecord:
    query = f"{_VERSIONS} WHERE model = ? ORDER BY version"
    versions = tuple(_record(db, row) for row in db.execute(query, (model,)).fetchall())
    return ModelRecord(_url_name(db, publisher, name), publisher, versions, _aliases(db, model), serving)


def _point(db: sqlite3.Connection, model: int, alias: str, version: int) -> AliasChange:
    before = _aliases(db, model).get(alias)
    if before is not None and before != version:
        db.execute("INSERT INTO alias_history (model, alias, version) VALUES (?, ?, ?)", (model, alias, before))
    db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (model, alias, version))
    return AliasChange(alias, before, version)


def _step_back(db: sqlite3.Connection, model: int, alias: str, current: int) -> AliasChange:
    query = "SELECT id, version FROM alias_history WHERE model = ? AND alias = ? ORDER BY id DESC"
    for row, version in db.execute(query, (model, alias)).fetchall():
        db.execute("DELETE FROM alias_history WHERE id = ?", (row,))
        if version != current:
            db.execute("UPDATE aliases SET version = ? WHERE model = ? AND alias = ?", (version, model, alias))
            return AliasChange(alias, current, version)
    raise ConflictError(f"@{alias} never pointed at another version that is still there: set it with `tether alias`")


def _forget_version(db: sqlite3.Connection, model: int, version: int) -> None:
    db.execute("DELETE FROM alias_history WHERE model = ? AND version = ?", (model, version))
    (other,) = db.execute("SELECT max(version) FROM versions WHERE model = ? AND version <> ?", (model, version)).fetchone()
    if other is None:
        db.execute("DELETE FROM aliases WHERE model = ?", (model,))
        serving_tables.forget_model(db, model)
    else:
        db.execute("UPDATE aliases SET version = ? WHERE model = ? AND version = ?", (other, model, version))
    if db.execute("DELETE FROM versions WHERE model = ? AND version = ?", (model, version)).rowcount != 1:
        raise InternalError(f"version {version} vanished inside a transaction")


def _unknown_version(db: sqlite3.Connection, model: int, ref: ModelRef, wanted: str) -> UnknownVersionError:
    numbers = [str(number) for (number,) in db.execute("SELECT version FROM versions WHERE model = ? ORDER BY version", (model,))]
    return UnknownVersionError(f"model {ref.name!r} has no version {wanted}; it has {', '.join(numbers)}")


def _unknown_alias(db: sqlite3.Connection, model: int, ref: ModelRef, alias: str) -> UnknownAliasError:
    return UnknownAliasError(f"model {ref.name!r} has no alias {alias!r}; it has {', '.join(_aliases(db, model)) or 'none'}")
