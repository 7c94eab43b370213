"""How a store stays whole: verify, scrub, repair, rebuild the index, give up what was never published."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tether.errors import ChunkAlteredError, ChunkMissingError, ConflictError, MissingBlobsError
from tether.security.identity import verify
from tether.store.collecting.collected import GcReport
from tether.store.collecting.collection import GRACE
from tether.store.collecting.collector import Collector
from tether.store.collecting.marking import pack_files, scanned
from tether.store.format.manifest import MAX_NBYTES, decode, signed_message
from tether.store.format.records import Report, VersionRecord
from tether.store.index import mirror_tables
from tether.store.index.mirror_tables import CatalogState, Footing, ModelState, VersionState
from tether.store.packing.disk import disk_errors, sync_folder
from tether.store.packing.reserve import reserve_of
from tether.store.packing.staging import Planned, Run
from tether.store.publishing import Publishing, checked_alias
from tether.store.repair import RepairReport, Source, fetched
from tether.store.scrubbing import Cursor, Scrubbed, scrub
from tether.store.verification import Damage, problem, survey
from tether.types import Digest, ModelRef, model_name

__all__ = ["Upkeep"]

_BROKEN = ".broken"
"""Ending of a pack that was set aside because its index can't be read and nothing needs it any more. For people to look at, or delete."""


class Upkeep(Publishing):
    """The maintenance half of a `Repository`."""

    def __init__(self, root: Path, clock: Callable[[], float], *, read_only: bool) -> None:
        super().__init__(root, clock, read_only=read_only)
        self._reserve = reserve_of(root)
        self._collector = Collector(self._surroundings, self._marker, self._blobs.read_into, self._blobs.files.let_go_of_deleted)

    def verify(self, ref: ModelRef | None = None) -> Report:
        """Read every byte of `versions_meant` (None: all, and all packs) and say what is damaged. Raises for an unknown `ref` only."""
        return self._survey(ref).report

    def versions_meant(self, ref: ModelRef) -> list[VersionRecord]:
        """All versions of a model where a bare name is given, else the one. Raises: NotFoundError and its kin."""
        one = self._catalog.resolve(ref)
        if (ref.version, ref.alias, ref.sha) != (None, None, None):
            return [one]
        return [version for model in self.models() if model.name == one.name for version in model.versions]

    def _survey(self, ref: ModelRef | None) -> Damage:
        versions = self.versions_meant(ref) if ref else [version for model in self.models() for version in model.versions]
        damage = survey(versions, self.manifest_bytes, self._blobs, [] if ref else self._pack_files())
        forged = [
            problem(f"{version.name}:{version.version}", version.digest, error) for version, error in self._signatures.wrong(versions)
        ]
        return damage._replace(report=replace(damage.report, problems=(*damage.report.problems, *forged)))

    def scrub(
        self, limit_nbytes_per_second: float, stop: Callable[[], bool] = lambda: False, start_after: Cursor | None = None
    ) -> Iterator[Scrubbed]:
        """Read all packs at a bounded rate, on the thread that iterates; gives each blob's cursor, to go on behind it, and its problem."""
        known = {self.root / "packs" / name for name in self._catalog.packs()}
        return scrub([*known.union(self._pack_files())], self._blobs, limit_nbytes_per_second, stop, start_after)

    def repair(self, source: Source, ref: ModelRef | None = None) -> RepairReport:
        """Mend what is missing or altered of `versions_meant` (None: all, and all packs) with what `source` has; call again for another.

        Good blobs of a pack whose index is lost move to a new pack, and it is set aside.
        """
        self._check_writable()
        found: dict[Digest, None] = {}
        failed: list[Digest] = []
        damage = self._survey(ref)
        if damage.manifests:
            found |= dict.fromkeys(damage.manifests)
            for digest, data in fetched(damage.manifests, source, failed, MAX_NBYTES):
                self._write_manifest(digest, data)
            damage = self._survey(ref)  # now it is known what those versions need
        salvaged = [line.digest for name in damage.packs for line in self._catalog.blobs_in(name)]
        whole = [digest for digest in salvaged if digest not in set(damage.blobs)]
        self._restore(fetched(damage.blobs, source, failed))
        self._restore((digest, self.read_blob(digest)) for digest in whole)
        self._set_aside(damage.packs)
        found |= dict.fromkeys([*damage.blobs, *whole])
        return RepairReport(tuple(found), tuple(digest for digest in found if digest not in set(failed)), tuple(failed))

    def _restore(self, blobs: Iterator[tuple[Digest, bytes]]) -> None:
        """Put blobs into a new pack, whatever the catalog says of where they lie."""
        run, digests = Run(), []
        for digest, data in blobs:
            digests.append(digest)
            while (slot := self._staging.reserve(Planned(digest, len(data), 0), run)) is not None:
                if self._staging.fill(slot, data):
                    break
        with self._publishing:
            self._store(digests)

    def _set_aside(self, broken: Sequence[str]) -> None:
        for name in broken:
            if self._catalog.blobs_in(name):
                continue  # some could not be repaired: another source may be asked
            with self._publishing, self._shared.deleting(), disk_errors(self.root / "packs"):
                claims, unknown = self._shared.claims()
                if not unknown and name not in claims:  # else others read its blobs, which their catalogs can find without its index
                    path = self.root / "packs" / name
                    path.replace(path.with_name(name + _BROKEN))
                    sync_folder(path.parent)
            self._catalog.forget_pack(name)

    def gc(self, *, dry_run: bool = False, grace: float = GRACE) -> GcReport:
        """Delete what no version names, once it is `grace` seconds old; `dry_run` only says what would be done, and why.

        What was staged and not added to in a day goes, too.

        Raises: ConflictError: it runs already.
        """
        self._check_writable()
        report = self._collector.collect(dry_run=dry_run, grace=grace)
        if not dry_run:
            with self._publishing:
                self._staging.give_up(self._clock())
            self._reserve.keep()
        return report

    def collect_dropped(self, manifests: Collection[Digest]) -> GcReport:
        """Delete at once what these manifests name, which are no version's any more, and nobody else needs; all else waits for `gc`.

        Raises: ConflictError: a collection runs already.
        """
        self._check_writable()
        return self._collector.collect(dry_run=False, grace=0.0, dropped=frozenset(manifests))

    def give_up_staged(self) -> None:
        """Remove what was staged and not added to in a day; `gc` does that, too. Waits while a version is made."""
        self._check_writable()
        with self._publishing:
            self._staging.give_up(self._clock())

    def forget_store(self, store: str) -> str:
        """Take a store that is gone for good (by the id that `gc` names) out of a shared folder of packs; gives its host and data folder.

        Raises: NotFoundError: no other store of this id uses it.
        """
        self._check_writable()
        with self._publishing:
            return self._shared.forget(store)

    def rebuild_index(self) -> int:
        """Forget where blobs lie and read it from the packs again; gives how many packs there are. Broken packs are left out."""
        self._check_writable()
        with self._publishing:
            found = {path.name: index for path in self._pack_files() if (index := scanned(path)) is not None}
            self._catalog.add_packs(found, replace=True)
        return len(found)

    def clear_staging(self) -> None:
        """Give up all uploads that were not published: frees space on a full disk."""
        self._check_writable()
        with self._publishing:
            self._staging.clear(self._catalog.packs())

    # --- of several stores in a cluster

    def footing(self) -> Footing:
        """Which of them this is, and how far it has come."""
        self._check_writable()
        with self._catalog.reading() as db:
            known = mirror_tables.footing(db)
        if known is None:
            with self._catalog.writing() as db:
                known = mirror_tables.enter(db)
        return known

    def set_own(self, publisher: str) -> None:
        """Be the store of this lab (key, hex): the publisher that bare names mean first."""
        self._check_writable()
        self._catalog.set_own(publisher)

    def begin_term(self, term: int) -> Footing:
        """It is written to from now on, under the lease of this term; nothing of an earlier one is mirrored any more.

        Raises: ConflictError: a later one is known.
        """
        self._check_writable()
        with self._catalog.writing() as db:
            return mirror_tables.begin_term(db, term)

    def touch(self) -> None:
        """Count a change of what lies beside the catalog and goes to followers with it: who waits for the count waits for that, too."""
        self._check_writable()
        with self._catalog.writing():
            pass

    def snapshot(self) -> CatalogState:
        """All that is public in the catalog, and the model keys, wrapped."""
        with self._catalog.reading() as db:
            return mirror_tables.read_state(db)

    def state_of(self, publisher: str, name: str) -> ModelState | None:
        """What the catalog says of one model, by its publisher's key; None: it never said anything."""
        with self._catalog.reading() as db:
            return mirror_tables.state_of(db, publisher, name)

    def mirror(self, term: int, state: CatalogState) -> tuple[str, ...]:
        """Make this catalog say what the writer's says, in one transaction; what the versions need is here already (`hold`).

        Gives the versions that only this store has, if it was the writer before: they are taken out, a copy of the catalog as it was lies
        beside it then, and their blobs stay until they are collected. Raises: ConflictError: a later term than this one is known.
        """
        self._check_writable()
        was_writer = state.whole and self.footing().writes
        lost = mirror_tables.lost(self.snapshot(), state) if was_writer else ()
        if lost:
            self._catalog.back_up(self.root / f"catalog-before-term-{term}.sqlite")
        with self._publishing, self._catalog.writing() as db:
            mirror_tables.apply(db, term, state, self._clock())
        if state.rest is not None:
            self._keeper.forget()
        return lost

    # --- of other publishers

    def follow(self, states: Sequence[ModelState]) -> None:
        """Make this catalog say of other publishers' models what `states` say, in one transaction; what they need is here (`hold`).

        Versions that a state does not name go as if deleted. Numbers that were given are not given again, whatever `next` says.

        Raises: ConflictError: it is a model of this lab's own, a number means another digest here, a manifest is not here, or a state
        contradicts itself; MissingBlobsError: blobs are not, or not durably; BadSignatureError: it is not the publisher's; BadNameError.
        """
        self._check_writable()
        own = self._catalog.own()
        for state in states:
            if state.publisher == own:
                raise ConflictError(f"{state.name} is this lab's own: what the catalog says of it is decided here, by publishing")
            model_name(state.name)
            for alias in (*state.aliases, *(alias for alias, _ in state.history)):
                checked_alias(alias)
        with self._publishing:
            for state in states:
                self._check_held(state)
            with self._catalog.writing() as db:
                mirror_tables.follow(db, states, self._clock())

    def _check_held(self, state: ModelState) -> None:
        """That all is here and signed of the versions that the catalog does not have so already."""
        with self._catalog.reading() as db:
            known = mirror_tables.signatures(db, state.publisher, state.name)
        for each in state.versions:
            if known.get(each.digest) != each.signature:
                self._check_durable(state, each)

    def _check_durable(self, state: ModelState, version: VersionState) -> None:
        try:
            data = self.manifest_bytes(version.digest)
        except (ChunkMissingError, ChunkAlteredError) as error:
            raise ConflictError(f"{state.name}:{version.version} can't be a version here yet: {error}") from error
        verify(state.publisher, signed_message(data), version.signature)
        manifest = decode(data)
        blobs = manifest.blobs()
        self._promised(blobs)
        self._check_blobs(manifest, blobs)
        stored = self._blobs.locate(blobs)
        lacking = [digest for digest in blobs if digest not in stored]
        if lacking:
            what = f"{state.name}:{version.version}"
            raise MissingBlobsError(f"{len(lacking)} blobs of {what} are not durable here: hold them first", lacking)

    def _pack_files(self) -> list[Path]:
        """Oldest first: of two copies of a blob the index keeps the later one, which was written because the other was damaged."""
        return pack_files(self.root / "packs")
