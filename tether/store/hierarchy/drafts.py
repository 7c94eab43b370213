"""What is being written as a zarr store and is no version yet: keys in SQLite, large values in files. Knows nothing of zarr.

    drafts/<name>/keys.sqlite   WAL, synchronous=NORMAL: key → size, digests of its pieces, and the value itself up to 64 KiB
    drafts/<name>/values/       larger values, each in a file of a name of its own that is written before its key and not changed

Any thread and process of one host may write; each key's value is at any time a whole one that somebody set. A draft survives its process,
and a power cut but for what was set in the last seconds: it is acknowledged by publishing it, not by setting a key. One that is to be
encrypted lies in memory instead (`security.volatile`), names and all, and ends with the process that began it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from blake3 import blake3

from tether.errors import BadNameError, ChunkAlteredError, ConflictError, NoSpaceError, StoreError
from tether.store.format.layout import BLOB_NBYTES, slices
from tether.store.hierarchy.reading import Span, whole
from tether.store.packing.disk import disk_errors
from tether.types import Digest, model_name

__all__ = ["Draft", "Value"]

_INLINE = 64 * 1024
"""Values up to this many bytes lie in the table: one write instead of a file, and SQLite is the faster file system for such."""
_BUSY = 60.0
"""Seconds that a writer waits for the others: each holds the table for less than a millisecond."""
_ATTEMPTS = 100
"""A value's file that is gone was replaced meanwhile: look again; so many times in a row nobody is overtaken."""
_PAGE = 1000
"""Keys that are listed at a time, so that a reader of many holds up no writer."""
_DIGEST_NBYTES = 32
_SCHEMA = "CREATE TABLE draft (key BLOB PRIMARY KEY, nbytes INTEGER NOT NULL, digests BLOB NOT NULL, data BLOB, file TEXT)"
_INSERT = {
    True: "INSERT OR REPLACE INTO draft VALUES (?, ?, ?, ?, ?)",
    False: "INSERT OR IGNORE INTO draft VALUES (?, ?, ?, ?, ?)",
}
"""By whether a value that is there is replaced."""


class _GoneError(Exception):
    """A value was replaced between looking it up and opening its file."""


class Value(NamedTuple):
    """Where a key's value lies."""

    nbytes: int
    digests: bytes
    """BLAKE3 of each piece of 4 MiB, one after the other."""
    data: bytes | None
    file: str | None

    def sizes(self) -> list[int]:
        return [min(BLOB_NBYTES, self.nbytes - start) for start in range(0, self.nbytes, BLOB_NBYTES)]

    def digest(self, index: int) -> Digest:
        return Digest(self.digests[index * _DIGEST_NBYTES : (index + 1) * _DIGEST_NBYTES].hex())


class Draft:
    """The draft of one name under a store's root, made when it is first used. Each method raises StoreError (NoSpaceError) of the disk."""

    def __init__(self, root: Path, name: str, *, in_memory: bool = False) -> None:
        """`in_memory`: `root` is a `VolatileFolder`, which nobody may make again once it is gone: it would be swept by nobody.

        Raises: BadNameError: `name` is not one that a model could have.
        """
        self.root = root.absolute()
        self.in_memory = in_memory
        self.name = model_name(name)
        self.folder = self.root / "drafts" / name
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._pid = 0

    # --- one key

    def read(self, key: str, span: Span | None = None) -> bytes | None:
        """The value, or a part of it, verified; None: it was not set. Raises: ChunkAlteredError."""
        for _ in range(_ATTEMPTS):
            value = self._find(key)
            if value is None:
                return None
            try:
                return self._bytes(key, value, *(span or whole)(value.nbytes))
            except _GoneError:
                continue
        raise StoreError(f"key {key[:200]!r} of draft {self.name} lost its file: set it again")

    def size(self, key: str) -> int | None:
        value = self._find(key)
        return None if value is None else value.nbytes

    def write(self, key: str, data: bytes, *, replace: bool = True) -> bool:
        """Set the value at once for all readers; `replace=False`: only where there is none, and says whether it was set."""
        digests = b"".join(blake3(data[start : start + BLOB_NBYTES]).digest() for start in range(0, len(data), BLOB_NBYTES))
        inline = len(data) <= _INLINE
        with self._errors():
            value = Value(len(data), digests, data if inline else None, None if inline else self._write_file(data))
        gone = value.file
        try:
            with self._writing() as db:
                old = _row(db, key)
                done = db.execute(_INSERT[replace], (_encoded(key), *value)).rowcount == 1
            gone = (old.file if old else None) if done else value.file
        finally:
            self._remove_files([gone])
        return done

    def delete(self, key: str) -> None:
        """What was not set needs no deleting."""
        self._delete("key = ?", _encoded(key))

    # --- many keys

    def delete_under(self, prefix: str) -> None:
        """All keys that begin with `prefix`."""
        self._delete("key >= ? AND key < ?", *_range(prefix))

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Those that begin with `prefix`, in order."""
        first, end = _range(prefix)
        while page := self._select("SELECT key FROM draft WHERE key >= ? AND key < ? ORDER BY key LIMIT ?", first, end, _PAGE):
            yield from (row[0].decode() for row in page)
            first = page[-1][0] + b"\0"

    def children(self, folder: str) -> Iterator[str]:
        """The parts that follow `folder/` ("": of all keys), each once, without walking what is below them."""
        prefix = f"{folder}/" if folder else ""
        first, end = _range(prefix)
        seen = set()
        while found := self._select("SELECT key FROM draft WHERE key >= ? AND key < ? ORDER BY key LIMIT 1", first, end):
            key: bytes = found[0][0]
            name, below, _ = key[len(_encoded(prefix)) :].partition(b"/")
            first = _encoded(prefix) + name + b"0" if below else key + b"\0"  # "0" is what follows "/"
            if name not in seen:
                seen.add(name)
                yield name.decode()

    def values(self) -> list[tuple[str, Value]]:
        """All keys in order with where their values lie, as they were at one moment; without the small values' data."""
        rows = self._select("SELECT key, nbytes, digests, NULL, file FROM draft ORDER BY key")
        return [(key.decode(), Value(nbytes, digests, data, file)) for key, nbytes, digests, data, file in rows]

    def pieces(self, key: str, value: Value) -> Iterator[tuple[Digest, bytes]]:
        """A value's bytes, 4 MiB at a time, verified. Raises: ConflictError: it was replaced since `values`; ChunkAlteredError."""
        found = self._find(key) if value.file is None else value
        if found is None or found.digests != value.digests:
            raise self._changed(key)
        start = 0
        for index, size in enumerate(found.sizes()):
            try:
                yield found.digest(index), self._bytes(key, found, start, start + size)
            except _GoneError:
                raise self._changed(key) from None
            start += size

    def _changed(self, key: str) -> ConflictError:
        return ConflictError(f"draft {self.name} was changed at {key[:200]!r} while it was read: let its writers finish, then try again")

    def discard(self) -> None:
        """Remove all of it. Who still writes into it writes into nothing."""
        with self._lock, self._errors():
            if self._db is not None:
                self._db.close()
                self._db = None
            shutil.rmtree(self.folder, ignore_errors=not self.folder.exists())

    # --- inside

    def _find(self, key: str) -> Value | None:
        with self._lock, self._errors():
            return _row(self._database(), key)

    def _bytes(self, key: str, value: Value, start: int, stop: int) -> bytes:
        if value.data is not None:
            return _verified(value.data, value.digest(0), key)[start:stop] if value.nbytes else b""
        if value.file is None:
            raise _GoneError
        parts = []
        with self._errors(), self._opened(value.file) as file:
            for index, piece in slices(value.sizes(), start, stop):
                data = os.pread(file.fileno(), value.sizes()[index], index * BLOB_NBYTES)
                parts.append(_verified(data, value.digest(index), key)[piece.offset : piece.offset + piece.nbytes])
        return b"".join(parts)

    def _opened(self, name: str) -> IO[bytes]:
        try:
            return (self.folder / "values" / name).open("rb", buffering=0)
        except FileNotFoundError:
            raise _GoneError from None

    def _write_file(self, data: bytes) -> str:
        name = uuid.uuid4().hex
        path = self.folder / "values" / name
        self._make_folder(path.parent)
        try:
            with path.open("xb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) or 0 :]
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return name

    def _remove_files(self, names: Iterable[str | None]) -> None:
        with self._errors():
            for name in filter(None, names):
                (self.folder / "values" / name).unlink(missing_ok=True)

    def _delete(self, where: str, *arguments: bytes) -> None:
        with self._writing() as db:
            files = [file for (file,) in db.execute(f"SELECT file FROM draft WHERE {where}", arguments)]  # noqa: S608 (ours)
            db.execute(f"DELETE FROM draft WHERE {where}", arguments)  # noqa: S608
        self._remove_files(files)

    def _select(self, query: str, *arguments: bytes | int) -> list[Any]:
        with self._lock, self._errors():
            return self._database().execute(query, arguments).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            db = self._database()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.rollback()
                raise

    def _database(self) -> sqlite3.Connection:
        """A connection of this process: SQLite's don't survive a fork."""
        if self._db is None or self._pid != os.getpid():
            path = self.folder / "keys.sqlite"
            if not path.exists():
                self._make_folder(path.parent)
                _make_database(path)
            self._db, self._pid = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False), os.getpid()
            weakref.finalize(self, self._db.close)
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA temp_store = MEMORY")  # no value goes to a temporary file on a disk
        return self._db

    def _make_folder(self, folder: Path) -> None:
        """Raises: StoreError: the memory that it lay in is gone."""
        if not self.in_memory:
            folder.mkdir(parents=True, exist_ok=True)
            return
        try:
            for each in [*reversed(folder.relative_to(self.root).parents), folder.relative_to(self.root)][1:]:
                (self.root / each).mkdir(exist_ok=True)
        except FileNotFoundError:
            raise StoreError(
                f"draft {self.name} lay in memory and is gone: it was discarded, or the process that began it has ended; begin it again"
            ) from None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with disk_errors(self.folder):
                yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise NoSpaceError(f"no space to write {self.folder}: free some, or discard drafts that are not needed") from error
            raise StoreError(
                f"the draft {self.folder} refused ({error}): check the disk and the folder's permissions, then try again"
            ) from error


def _make_database(path: Path) -> None:
    """Whole or not at all, and by one of several that start at once: turning a database to WAL bears no company."""
    made = path.with_name(f"{uuid.uuid4().hex}.sqlite")
    try:
        db = sqlite3.connect(made, isolation_level=None)
        with closing(db):
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(_SCHEMA)
        with suppress(FileExistsError):
            os.link(made, path)
    finally:
        made.unlink(missing_ok=True)


def _row(db: sqlite3.Connection, key: str) -> Value | None:
    row = db.execute("SELECT nbytes, digests, data, file FROM draft WHERE key = ?", (_encoded(key),)).fetchone()
    return Value(*row) if row else None


def _encoded(key: str) -> bytes:
    try:
        return key.encode()
    except UnicodeEncodeError:
        raise BadNameError(f"key {key[:200]!r} is not valid Unicode: name the node otherwise") from None


def _range(prefix: str) -> tuple[bytes, bytes]:
    """From the first key that could begin with `prefix` to the first that could not any more; no UTF-8 has the byte 0xff."""
    encoded = _encoded(prefix)
    return encoded, encoded[:-1] + bytes([encoded[-1] + 1]) if encoded else b"\xff"


def _verified(data: bytes, digest: Digest, key: str) -> bytes:
    if blake3(data).hexdigest() != digest:
        raise ChunkAlteredError(
            f"the value of {key[:200]!r} in a draft was altered on disk, or cut by a power cut: set it again", digest, key
        )
    return data
