"""Looks at all that garbage collection has to know: packs and their age, what versions name, what was promised, what others need."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tether.errors import NoSpaceError, StoreError, TetherError
from tether.store.collecting.collection import GRACE, Inventory, Plan, StoredPack, plan
from tether.store.collecting.promises import Promises
from tether.store.collecting.sharing import PackFolder
from tether.store.faults import reach
from tether.store.format.manifest import Manifest, is_digest
from tether.store.format.packs import SUFFIX, Located
from tether.store.index import collection_tables as tables
from tether.store.index.catalog import Catalog
from tether.store.packing.disk import disk_errors
from tether.store.packing.pack_files import scan
from tether.types import Digest

__all__ = ["Marked", "Marker", "Surroundings", "pack_files", "scanned"]


_LOOK = 1.0
"""Seconds."""


class Surroundings(NamedTuple):
    """What garbage collection needs of the store that it works for."""

    root: Path
    catalog: Catalog
    manifest: Callable[[Digest], Manifest]
    publishing: threading.Lock
    """Held by who commits a version or enters packs."""
    unsettled: Callable[[], Collection[str]]
    """Packs that are in the folder and that a publish, which did not get to its end, will enter when it is tried again."""
    staged: Callable[[Digest], int | None]
    """Size of a blob that lies in no pack yet; None: it is not staged."""
    promises: Promises
    shared: PackFolder
    clock: Callable[[], float]

    @property
    def packs(self) -> Path:
        return self.root / "packs"


@dataclass(frozen=True, slots=True)
class Marked:
    """What there was at one moment, and what is to be done about it."""

    versions: frozenset[Digest]
    """The manifests that were versions."""
    forgotten: Mapping[Digest, float]
    """Those that were no version's any more, and since when."""
    plan: Plan


class _Seen(NamedTuple):
    """One state of the catalog."""

    packs: dict[str, tuple[Located, ...]]
    written: dict[str, float]
    versions: dict[Digest, str]
    forgotten: dict[Digest, float]
    promised: dict[Digest, float]


class Marker:
    """Marks, and enters what the catalog does not know yet."""

    def __init__(self, store: Surroundings) -> None:
        self._store = store
        self._looked = -math.inf

    def mark(self, grace: float, *, dry_run: bool, dropped: Collection[Digest] | None = None) -> Marked:
        """Decide. A dry run changes nothing. `dropped`: only of these manifests, and of what they name."""
        store = self._store
        now, grace = store.clock(), max(grace, store.shared.least_grace)
        seen = self._seen()
        orphans = self._manifests_on_disk() - seen.versions.keys() - seen.forgotten.keys()
        if not dry_run:
            self._stamp(seen.packs.keys() - seen.written.keys(), orphans, now)
        forgotten = seen.forgotten | dict.fromkeys(orphans, now)
        named, unreadable = self._named(seen.versions)
        if not dry_run and self._recover(named - {blob.digest for blobs in seen.packs.values() for blob in blobs}):
            return self.mark(grace, dry_run=dry_run, dropped=dropped)
        claims, problems = store.shared.claims()
        packs = (StoredPack(name, self._nbytes(name), seen.written.get(name, now), blobs) for name, blobs in seen.packs.items())
        inventory = Inventory(
            packs=tuple(packs),
            named=named,
            promised=seen.promised,
            forgotten=forgotten,
            lingering=self._lingering(forgotten, now - grace),
            claims=claims,
            unreadable=(*unreadable, *problems),
        )
        if dropped is not None:
            inventory = self._narrowed(inventory, dropped, now)
        reach("gc.mark")
        return Marked(frozenset(seen.versions), forgotten, plan(inventory, now, grace))

    def _seen(self) -> _Seen:
        """Between two publishes: what one of them claims, and is not seen here, outlives what is declared afterwards."""
        with self._store.publishing, self._store.promises.held() as promised:
            self._store.shared.begin()
            with self._store.catalog.reading() as db:
                return _Seen(tables.blobs_by_pack(db), tables.written(db), tables.versions(db), tables.forgotten(db), dict(promised))

    def _stamp(self, packs: Collection[str], manifests: Collection[Digest], now: float) -> None:
        """What is seen for the first time counts from now; where the disk is full, from the next time."""
        if packs or manifests:
            with suppress(NoSpaceError), self._store.catalog.writing() as db:
                tables.stamp(db, packs, manifests, now)

    def _manifests_on_disk(self) -> set[Digest]:
        folder = self._store.root / "manifests"
        with disk_errors(folder):
            return {Digest(entry.name) for entry in os.scandir(folder) if is_digest(entry.name)}

    def _nbytes(self, pack: str) -> int:
        """0 where it is gone: nothing needs to be freed then, but it is forgotten with the others."""
        with disk_errors(self._store.packs):
            try:
                return (self._store.packs / pack).stat().st_size
            except FileNotFoundError:
                return 0

    def _recover(self, lost: Collection[Digest]) -> int:
        """Enter what a version needs and the index does not know, but a pack has: else that pack would pass for garbage."""
        if not lost:
            return 0
        found = {path.name: [line for line in scanned(path) or () if line.digest in lost] for path in pack_files(self._store.packs)}
        found = {name: lines for name, lines in found.items() if lines}
        if found:
            with self._store.publishing:
                self._store.catalog.add_packs(found, keep=True)
        return len(found)

    def _named(self, versions: Mapping[Digest, str]) -> tuple[set[Digest], list[str]]:
        named: set[Digest] = set()
        unreadable = []
        for digest, name in versions.items():
            try:
                named.update(self._store.manifest(digest).blobs())
            except TetherError as error:
                unreadable.append(f"nothing is deleted: it is not known what {name} is made of ({error}); repair or delete that version")
        return named, unreadable

    def _lingering(self, forgotten: Mapping[Digest, float], expired: float) -> dict[Digest, float]:
        """The blobs of manifests that were forgotten after `expired`, and when the last of those was."""
        lingering: dict[Digest, float] = {}
        for digest, since in sorted(forgotten.items(), key=lambda item: item[1]):
            if since > expired:
                with suppress(TetherError):  # nobody can take back a deletion without it
                    lingering |= dict.fromkeys(self._store.manifest(digest).blobs(), since)
        return lingering

    def _narrowed(self, inventory: Inventory, dropped: Collection[Digest], now: float) -> Inventory:
        """To these manifests, and to what they name and no other one does whose deletion may be taken back."""
        meant = {digest: since for digest, since in inventory.forgotten.items() if digest in dropped}
        others = {digest: since for digest, since in inventory.forgotten.items() if digest not in dropped}
        only = self._lingering(meant, -math.inf).keys() - self._lingering(others, now - GRACE).keys()
        return replace(inventory, forgotten=meant, lingering={}, only=only)

    def look(self) -> int:
        """Enter what other stores wrote since; gives how many packs. At most once a second: a folder on another host is slow to list."""
        if not self._store.shared.is_shared or time.monotonic() - self._looked < _LOOK:
            return 0
        self._looked = time.monotonic()
        return self.adopt()

    def adopt(self) -> int:
        """Enter packs that the catalog does not know; gives how many.

        A publish died before its commit, the index was lost, or another store wrote them. None is deleted for being unknown: the catalog
        may be the older of the two (restored from a backup). Of two copies of a blob the later counts, which was written because the
        other was damaged; in a shared folder the one that is known, which is claimed.
        """
        keep = self._store.shared.is_shared
        with self._store.publishing:
            known = self._store.catalog.packs().union(self._store.unsettled())
            found = {path.name: index for path in pack_files(self._store.packs) if path.name not in known and (index := scanned(path))}
            if found:
                self._store.catalog.add_packs(found, now=self._store.clock(), keep=keep)
        return len(found)


def pack_files(folder: Path) -> list[Path]:
    """The packs in a folder, oldest first."""
    found = []
    with disk_errors(folder):
        for path in folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # stores that share the folder delete packs, too
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def scanned(path: Path) -> list[Located] | None:
    """A pack's index; None where it is broken, which `verify` reports."""
    try:
        return scan(path)
    except StoreError:
        return None
