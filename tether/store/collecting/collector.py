"""Collects garbage: marks, copies what is needed out of mostly dead packs, moves the index in one transaction, then deletes.

Publishing is held up only while the marking reads the catalog and while a transaction moves the index, not while packs are copied. So a
publish may come between; each transaction looks again at what was published, promised and claimed since the marking, and leaves alone what
touches that. What a transaction is done with is *condemned* by it: a crash before the file is deleted does not bring it back.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tether.errors import ChunkAlteredError, ChunkMissingError, ConflictError, NoSpaceError
from tether.store.collecting.collected import UNNEEDED, GcReport, PackChange, planned, readable
from tether.store.collecting.collection import GRACE, WHOLE, Need, Plan, Rewrite, need_of
from tether.store.collecting.marking import Marked, Marker, Surroundings, scanned
from tether.store.collecting.sealed import count_stray_seals, forget_stray_seals
from tether.store.faults import reach
from tether.store.format.packs import MAGIC, Located, Location, index_bytes, place
from tether.store.format.records import Problem
from tether.store.index import collection_tables as tables
from tether.store.packing.disk import disk_errors, partial_of, sync, sync_folder, write_at, write_halves_at
from tether.store.packing.parallel import buffer
from tether.types import Digest

__all__ = ["Collector", "ReadInto"]

ReadInto = Callable[[Digest, memoryview, str, Location], memoryview]
"""Reads a blob from where it lies and verifies it. Raises: ChunkMissingError, ChunkAlteredError, StoreError."""
_MARGIN = 1 << 20
"""Bytes that a rewrite leaves free: the catalog's transaction needs some."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """A pack that was written."""

    name: str
    index: tuple[Located, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Change:
    """What one transaction does."""

    dead: Mapping[str, Sequence[Digest]]
    """By pack: what is forgotten. Packs in which nothing is left are deleted."""
    moved: Mapping[str, Sequence[Located]] = field(default_factory=dict)
    """By pack: where in the copy its blobs lie."""
    copy: _Copy | None = None
    written: float = 0.0


@dataclass(slots=True)
class _Done:
    """What was done so far."""

    deleted: list[PackChange] = field(default_factory=list)
    rewritten: list[PackChange] = field(default_factory=list)
    manifests: int = 0
    seals: int = 0
    skipped: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def report(self, plan: Plan) -> GcReport:
        return GcReport(
            dry_run=False,
            deleted=tuple(self.deleted),
            rewritten=tuple(self.rewritten),
            manifests=self.manifests,
            kept=plan.kept,
            skipped=(*plan.unknown, *self.skipped),
            seals=self.seals,
            problems=tuple(self.problems),
        )


class Collector:
    """The garbage collection of one store. Methods may be called from any thread."""

    def __init__(self, store: Surroundings, marker: Marker, read_into: ReadInto, let_go: Callable[[], None]) -> None:
        """`let_go` closes what this process has open of packs that are gone: the disk has their space back then."""
        self._store = store
        self._marker = marker
        self._read_into = read_into
        self._let_go = let_go
        self._collecting = threading.Lock()

    def collect(self, *, dry_run: bool, grace: float = GRACE, dropped: Collection[Digest] | None = None) -> GcReport:
        """`dropped`: as of `mark`.

        Raises: ConflictError: it runs already; StoreError: the disk refuses; what was done until then is done.
        """
        if not self._collecting.acquire(blocking=False):
            raise ConflictError("a garbage collection already runs in this store: wait for it")
        try:
            marked = self.mark(grace, dry_run=dry_run, dropped=dropped)
            return planned(marked.plan, count_stray_seals(self._store, marked.plan)) if dry_run else self.sweep(marked)
        finally:
            self._collecting.release()

    def mark(self, grace: float, *, dry_run: bool = False, dropped: Collection[Digest] | None = None) -> Marked:
        """Finish what an earlier collection left, enter what is unknown, decide. A dry run changes nothing.

        `dropped`: collect only what these manifests name, which are no version's any more.
        """
        if not dry_run:
            self.finish()
            with suppress(NoSpaceError):  # the next one does; what is unknown is not deleted anyway
                self._marker.adopt()
        return self._marker.mark(grace, dry_run=dry_run, dropped=dropped)

    def sweep(self, marked: Marked) -> GcReport:
        """Carry out the plan: deletions first, which need no space, then rewrites, the smallest first."""
        done, needs = _Done(), dict(marked.plan.needs)
        if marked.plan.drops:
            self._drop(marked, done)
        for rewrite in sorted(marked.plan.rewrites, key=lambda rewrite: rewrite.nbytes):
            self._rewrite(marked, rewrite, done, needs)
        done.manifests = self._delete_manifests(marked)
        done.seals = forget_stray_seals(self._store, marked.plan)
        with self._store.publishing:
            self._store.shared.declare(needs)
        return done.report(marked.plan)

    def _drop(self, marked: Marked, done: _Done) -> None:
        sizes = {pack.name: pack.nbytes for pack in marked.plan.drops}
        dead = {pack.name: [blob.digest for blob in pack.blobs] for pack in marked.plan.drops}
        gone = self._commit(marked, _Change(dead))
        done.deleted += [PackChange((name,), sizes[name], 0, UNNEEDED) for name in gone or ()]

    def _rewrite(self, marked: Marked, rewrite: Rewrite, done: _Done, needs: dict[str, Need]) -> None:
        free = shutil.disk_usage(self._store.packs).free
        try:
            if free < rewrite.nbytes + _MARGIN:
                raise NoSpaceError(_no_room(rewrite, free))
            copy = self._copy(rewrite, done)
            if copy is None or not self._commit_copy(marked, rewrite, copy):
                return
        except NoSpaceError:
            done.skipped.append(_no_room(rewrite, free))
            return
        moved = {line.digest for line in copy.index}
        left = [source.pack.name for source in rewrite.sources if not moved.issuperset(blob.digest for blob in source.keep)]
        names = tuple(source.pack.name for source in rewrite.sources)
        for name in set(names).difference(left):
            needs.pop(name, None)
        needs[copy.name] = need_of(copy.index) or WHOLE
        done.rewritten.append(PackChange(names, rewrite.before_nbytes, copy.nbytes, rewrite.reason))

    def _commit_copy(self, marked: Marked, rewrite: Rewrite, copy: _Copy) -> bool:
        """Raises: NoSpaceError."""
        committed = False
        try:
            committed = self._commit(marked, _change(rewrite, copy)) is not None
        finally:
            if not committed:
                self._withdraw(copy)
        return committed

    def _withdraw(self, copy: _Copy) -> None:
        """Take back a pack that came to nothing; in a shared folder another store may use it by now, and it is entered like any other."""
        with self._store.publishing:
            self._store.catalog.check_writer()  # another one may be about to enter it, as it enters all that is unknown
            used = self._store.catalog.packs().union(self._store.unsettled())
            if not self._store.shared.is_shared and copy.name not in used:
                _delete([self._store.packs / copy.name])

    # --- copying

    def _copy(self, rewrite: Rewrite, done: _Done) -> _Copy | None:
        """Write the new pack, durably, of the blobs that are whole; None: none is. Raises: NoSpaceError, StoreError: nothing is left."""
        folder = self._store.packs
        partial = partial_of(folder / "gc")
        with disk_errors(folder):
            try:
                with partial.open("xb", buffering=0) as file:
                    copy = self._write(file.fileno(), rewrite, done)
                if copy is not None and not self._is_there(copy):
                    partial.rename(folder / copy.name)
                    sync_folder(folder)
            finally:
                partial.unlink(missing_ok=True)
        reach("gc.copied")
        return copy

    def _write(self, descriptor: int, rewrite: Rewrite, done: _Done) -> _Copy | None:
        """Where nothing is damaged it becomes, byte for byte, the pack that the plan names."""
        index, end = [], len(MAGIC)
        write_at(descriptor, 0, MAGIC)
        with buffer() as view:
            for pack, blob in ((source.pack.name, blob) for source in rewrite.sources for blob in source.keep):
                data = self._whole(pack, blob, view, done)
                if data is not None:
                    line = Located(blob.digest, place(end, blob.offset), len(data))
                    write_halves_at(descriptor, line.offset, data, "gc.blob")
                    index.append(line)
                    end = line.offset + line.nbytes
        name, tail = index_bytes(index, end)
        write_at(descriptor, end, tail)
        sync(descriptor)
        return _Copy(name, tuple(index), end + len(tail)) if index else None

    def _whole(self, pack: str, blob: Located, view: memoryview, done: _Done) -> memoryview | None:
        try:
            return self._read_into(blob.digest, view, pack, Location(pack, blob.offset, blob.nbytes))
        except (ChunkAlteredError, ChunkMissingError) as error:
            done.problems.append(Problem(pack, blob.digest, error.code, str(error)))
            return None

    def _is_there(self, copy: _Copy) -> bool:
        """Whether another store of a shared folder has written the same pack already, and it is whole.

        It may have mapped it: a file server takes a file that is replaced away from those who read it, be it with the same bytes.
        """
        path = self._store.packs / copy.name
        if not self._store.shared.is_shared or scanned(path) != list(copy.index):
            return False
        ignored = _Done()
        with buffer() as view:
            return all(self._whole(copy.name, blob, view, ignored) is not None for blob in copy.index)

    # --- one transaction

    def _commit(self, marked: Marked, change: _Change) -> list[str] | None:
        """Let the catalog go over to it, unless what happened since the marking forbids; delete, and name, the packs that are done with."""
        store = self._store
        with store.publishing, store.shared.deleting(), store.promises.held() as promised:
            wanted = self._named_since(marked) | promised.keys()
            claims, unknown = store.shared.claims()
            free = [name for name, digests in change.dead.items() if not unknown and name not in claims and wanted.isdisjoint(digests)]
            if change.copy is None:
                change = _Change({name: change.dead[name] for name in free})
            elif not all(wanted.isdisjoint(digests) for digests in change.dead.values()) or store.shared.lacking([change.copy.name]):
                return None
            gone = self._transact(change, free)
            reach("gc.commit")
            aside = self._set_aside(gone)
        self._delete(aside)
        return gone

    def _named_since(self, marked: Marked) -> set[Digest]:
        with self._store.catalog.reading() as db:
            versions, forgotten = tables.versions(db), tables.forgotten(db)
        new = versions.keys() - marked.versions
        new |= {digest for digest, since in forgotten.items() if since != marked.forgotten.get(digest)} - marked.versions
        return {blob for digest in new for blob in self._store.manifest(digest).blobs()}

    def _transact(self, change: _Change, free: Sequence[str]) -> list[str]:
        try:
            return self._write_catalog(change, free)
        except NoSpaceError:
            if change.copy is not None:
                raise
        # Nothing in them is needed: deleting them first makes the room that the transaction takes.
        self._delete(self._set_aside(free))
        return self._write_catalog(change, free)

    def _write_catalog(self, change: _Change, free: Sequence[str]) -> list[str]:
        with self._store.catalog.writing() as db:
            if change.copy is not None:
                tables.add_pack(db, change.copy.name, change.written)
                tables.move(db, change.moved, change.copy.name)
            tables.forget_blobs(db, change.dead)
            return tables.condemn(db, free)

    # --- deleting

    def finish(self) -> None:
        """Delete what an earlier collection was done with and did not get to."""
        store = self._store
        with store.publishing:
            with store.catalog.reading() as db:
                names = set(tables.condemned(db)).difference(store.unsettled())
            if not names:
                return
            with store.shared.deleting():
                claims, unknown = store.shared.claims()
                aside = self._set_aside([name for name in names if name not in claims and not unknown])
        self._delete(aside)

    def _set_aside(self, packs: Iterable[str]) -> list[Path]:
        """Take files out of the way of everybody, at once; deleting large ones takes its time."""
        aside, folder = [], self._store.packs
        packs = list(packs)
        self._store.catalog.check_writer()  # another one may have taken a condemned pack back by now
        with disk_errors(folder):
            for name in packs:
                with suppress(FileNotFoundError):
                    aside.append((folder / name).rename(partial_of(folder / name)))
                    reach("gc.aside")
            sync_folder(folder)
        with suppress(NoSpaceError), self._store.catalog.writing() as db:  # else the next collection looks for them once more
            tables.forget_condemned(db, packs)
        return aside

    def _delete(self, aside: Iterable[Path]) -> None:
        self._let_go()
        _delete(aside)

    def _delete_manifests(self, marked: Marked) -> int:
        """Those that are still forgotten, and since then."""
        store, gone = self._store, []
        with store.publishing:
            store.catalog.check_writer()  # another one may be about to name one of them again
            with store.catalog.reading() as db:
                forgotten = tables.forgotten(db)
            for digest in marked.plan.manifests:
                if forgotten.get(digest, -math.inf) == marked.forgotten.get(digest):
                    with disk_errors(store.root / "manifests" / digest):
                        (store.root / "manifests" / digest).unlink(missing_ok=True)
                    gone.append(digest)
                    reach("gc.manifest")
            if gone:
                with suppress(NoSpaceError), store.catalog.writing() as db:
                    tables.forget_manifests(db, gone)
        return len(gone)


def _delete(files: Iterable[Path]) -> None:
    for path in files:
        with disk_errors(path):
            path.unlink(missing_ok=True)
        reach("gc.delete")


def _change(rewrite: Rewrite, copy: _Copy) -> _Change:
    places = {line.digest: line for line in copy.index}
    moved = {source.pack.name: [places[blob.digest] for blob in source.keep if blob.digest in places] for source in rewrite.sources}
    return _Change({source.pack.name: source.dead for source in rewrite.sources}, moved, copy, rewrite.written)


def _no_room(rewrite: Rewrite, free: int) -> str:
    return (
        f"not rewritten for want of space: {len(rewrite.sources)} packs that would shrink from {readable(rewrite.before_nbytes)} to "
        f"{readable(rewrite.nbytes)}; the new one needs that and {readable(_MARGIN)}, {readable(free)} are free"
    )
