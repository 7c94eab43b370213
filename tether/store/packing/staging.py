"""Blobs that no version names yet, each already where it will lie in its pack. A publish makes packs of them and moves few."""

from __future__ import annotations

import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tether.errors import DigestMismatchError, MissingBlobsError, PayloadTooLargeError
from tether.store.faults import reach
from tether.store.format.layout import BLOB_NBYTES
from tether.store.format.manifest import digest_of, is_digest
from tether.store.format.packs import Located
from tether.store.packing.disk import BAD_MEDIUM, PARTIAL, disk_errors, sync_folder
from tether.store.packing.parallel import buffer, in_order, threads_for
from tether.store.packing.pending import DATA, JOURNAL, PendingPack, Slot, State
from tether.types import Digest

__all__ = ["Planned", "Run", "Staging"]

_STALE = 24 * 3600.0
"""Seconds after which what was sent and never published is given up."""
_MAX_ROOM = 1 << 20
"""Blobs that room is kept for: 4 TB. A draft costs its sender a line; beyond this, blobs are taken as they come."""
_MAX_PLANS = 64
"""Pending packs beyond which no more room is kept: each has three descriptors."""
_ALONE = 64 * 1024 * 1024
"""Bytes from which a second pending pack is worth an fsync of its own; fewer are copied into the pack that is sealed anyway."""


class Planned(NamedTuple):
    """A blob that has or wants a place."""

    digest: Digest
    nbytes: int
    phase: int
    """Its offset in the file that it was cut from."""


Filling = tuple[Slot, bytes | memoryview]
"""A place and what is to lie there."""


class Run:
    """What one writer stages, blob after blob, so that it comes to lie together."""

    def __init__(self) -> None:
        self.pack: PendingPack | None = None


class Staging:
    """The pending packs of one store. Methods may be called from any thread, `seal` and what follows it by one at a time."""

    def __init__(self, folder: Path, packs: Path) -> None:
        self._folder = folder
        self._target = packs
        # A rename must make the pack: where the packs lie on another disk, the pending ones grow there.
        self._data_folder = folder if _device(folder) == _device(packs) else packs
        self._changed = threading.Condition()
        self._packs: list[PendingPack] = []
        self._slots: dict[Digest, Slot] = {}
        self._uploads = Run()

    # --- what is here

    def nbytes(self, digest: Digest) -> int | None:
        """Size of a staged blob; None where it is not staged."""
        slot = self._slots.get(digest)
        return slot.nbytes if slot is not None and slot.state is not State.ROOM else None

    def read(self, digest: Digest) -> bytes | None:
        """The bytes of a staged blob, hashed again; None: it is not staged, or was altered and is forgotten now."""
        with self._changed:
            slot = self._slots.get(digest)
            if slot is None or slot.state is State.ROOM:
                return None
            slot.pack.users += 1
        with disk_errors(slot.pack.data), self._leaving(slot.pack), buffer() as view:
            data = bytes(slot.pack.read_into(slot, view))
        if digest_of(data) == digest:
            return data
        self._forget([slot])
        return None

    # --- filling

    def plan(self, blobs: Iterable[Planned]) -> None:
        """Keep room for blobs in this order: they will lie side by side, however they come. Raises: NoSpaceError, StoreError."""
        with self._changed, disk_errors(self._folder):
            wanted = {blob.digest: blob for blob in blobs if blob.digest not in self._slots and 0 < blob.nbytes <= BLOB_NBYTES}
            room = sum(slot.state is State.ROOM for slot in self._slots.values())
            if not wanted or room + len(wanted) > _MAX_ROOM or len(self._packs) >= _MAX_PLANS:
                return
            pack = self._new_pack()
            pack.is_open, pack.is_planned = False, True
            slots = [pack.reserve(*blob) for blob in wanted.values()]
            try:
                pack.record(slots)
            except OSError:
                self._remove(pack)
                raise
            self._slots |= {slot.digest: slot for slot in slots}

    def put(self, digest: Digest, data: bytes) -> None:
        """Raises: PayloadTooLargeError, DigestMismatchError, NoSpaceError, StoreError."""
        if len(data) > BLOB_NBYTES:
            raise PayloadTooLargeError(f"a blob of {len(data)} bytes: cut files every {BLOB_NBYTES} bytes")
        if not is_digest(digest) or digest_of(data) != digest:
            raise DigestMismatchError(f"the bytes sent as blob {digest[:64]!r} have another BLAKE3 digest: send them again", digest[:64])
        blob = Planned(digest, len(data), 0)
        while (slot := self.reserve(blob, self._uploads)) is not None:
            if self.fill(slot, data):
                return

    def reserve(self, blob: Planned, run: Run) -> Slot | None:
        """The slot for a blob that was hashed; None: it is here. New ones of a run lie in the order of these calls.

        Raises: NoSpaceError, StoreError.
        """
        with self._changed, disk_errors(self._folder):
            slot = self._slots.get(blob.digest)
            if slot is not None and slot.state is not State.FILLED and (slot.pack.is_sealing or slot.nbytes != blob.nbytes):
                self._forget([slot])
                slot = None
            if slot is None:
                slot = self._slots[blob.digest] = self._pack_of(run).reserve(*blob)
            elif run.pack is None and run is not self._uploads and slot.pack.is_run and not slot.pack.is_sealing:
                run.pack = slot.pack  # what was interrupted goes on where it stopped
                run.pack.is_open = True
            return None if slot.state is State.FILLED else slot

    def _pack_of(self, run: Run) -> PendingPack:
        if run.pack is None or not run.pack.is_open or run.pack.is_sealing:
            run.pack = self._new_pack()
            run.pack.is_run = run is not self._uploads
        return run.pack

    def _new_pack(self) -> PendingPack:
        for unused in [pack for pack in self._packs if not pack.slots and not pack.users]:
            self._remove(unused)
        name = secrets.token_hex(8)
        pack = PendingPack.create(self._folder / f"{name}{JOURNAL}", self._data_folder / f"{name}{DATA}")
        self._packs.append(pack)
        return pack

    def fill(self, slot: Slot, data: bytes | memoryview) -> bool:
        """Write a blob that was hashed into its slot; False: its pack was sealed before that, reserve again.

        Raises: NoSpaceError, StoreError.
        """
        return not self.fill_all([(slot, data)])

    def fill_all(self, blobs: Iterable[Filling]) -> list[Filling]:
        """The same for several, which go to the journal together; gives those whose pack was sealed before."""
        return [late for pack, some in groupby(blobs, lambda each: each[0].pack) for late in self._fill(pack, list(some))]

    def _fill(self, pack: PendingPack, blobs: list[Filling]) -> list[Filling]:
        with self._changed:
            if pack.is_sealing:
                return blobs
            late = [each for each in blobs if self._slots.get(each[0].digest) is not each[0]]
            pack.users += 1
        with self._leaving(pack), disk_errors(pack.data):
            self._write(pack, [each for each in blobs if each not in late] if late else blobs)
        return late

    def _write(self, pack: PendingPack, blobs: Sequence[Filling]) -> None:
        written = [slot for slot, data in blobs if slot.state is not State.ROOM and _holds(slot, data)]
        try:
            for run in _runs([each for each in blobs if each[0] not in written] if written else blobs):
                _write_run(pack, run)
                written += [slot for slot, _ in run]
        except OSError:
            self._take_back(pack, [slot for slot, _ in blobs if slot not in written])
            raise
        finally:
            with self._changed:
                for slot in written:
                    slot.state = State.FILLED
                pack.record(written)
        reach("stage.journal")

    @contextmanager
    def _leaving(self, pack: PendingPack) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                pack.users -= 1
                self._changed.notify_all()

    def _take_back(self, pack: PendingPack, slots: Iterable[Slot]) -> None:
        """The disk refused. What comes next goes to a new file: this one may have met a limit that a shorter one does not."""
        with self._changed:
            empty = [slot for slot in slots if slot.state is not State.FILLED]  # the others another thread wrote meanwhile
            if pack.is_open and empty:
                pack.is_open = pack.is_run = False
                for slot in empty:
                    pack.slots.pop(slot.digest, None)
                    self._slots.pop(slot.digest, None)

    def _forget(self, slots: Iterable[Slot]) -> None:
        """Blobs that are not wanted or not what they should be."""
        with self._changed:
            by_pack: dict[PendingPack, list[Slot]] = defaultdict(list)
            for slot in slots:
                if self._slots.get(slot.digest) is slot:
                    del self._slots[slot.digest]
                    by_pack[slot.pack].append(slot)
            for pack, dropped in by_pack.items():
                with suppress(OSError):  # then they are hashed and dropped again after a restart
                    pack.drop(dropped)

    # --- sealing

    def seal(self, digests: Iterable[Digest]) -> dict[str, list[Located]]:
        """Make the staged ones of these blobs durable; gives the packs that hold them and are to be entered, with their indexes.

        A pending pack most of which is something else keeps that, and its blobs are copied.

        Raises: MissingBlobsError: blobs that were staged before a power cut and are altered; OSError: nothing is lost, try again.
        """
        slots = [slot for digest in digests if (slot := self._slots.get(digest)) is not None and slot.state is not State.ROOM]
        wrong = self._check(slots)
        if wrong:
            lost = [slot.digest for slot in wrong]
            raise MissingBlobsError(f"{len(lost)} blobs are not staged any more: upload them again, then send the manifest again", lost)
        earlier = [pack for pack in self._packs if pack.sealed]  # of a publish that did not get to its end
        if earlier:
            sync_folder(self._target)
        slots = [slot for slot in slots if not slot.pack.sealed]
        chosen = self._chosen(slots)
        self._move([slot for slot in slots if slot.pack not in chosen], chosen)
        for pack in chosen:
            self._seal(pack)
        return {pack.sealed: pack.index() for pack in [*earlier, *chosen] if pack.sealed}

    def _check(self, slots: Sequence[Slot]) -> list[Slot]:
        """Hash what another process wrote; gives, and forgets, what is wrong."""
        claimed = [slot for slot in slots if slot.state is State.CLAIMED]
        right = list(in_order(_is_right, claimed, threads_for(sum(slot.nbytes for slot in claimed))))
        for slot, good in zip(claimed, right, strict=True):
            if good and slot.state is State.CLAIMED:
                slot.state = State.FILLED
        wrong = [slot for slot, good in zip(claimed, right, strict=True) if not good]
        self._forget(wrong)
        return wrong

    def _chosen(self, slots: Sequence[Slot]) -> list[PendingPack]:
        """The pending packs to seal: the one that holds most of the blobs, and others that are large; each at least half ours."""
        shares: dict[PendingPack, int] = defaultdict(int)
        for slot in slots:
            shares[slot.pack] += slot.nbytes
        mostly = [pack for pack, share in shares.items() if 2 * share >= pack.nbytes and not pack.is_suspect]
        mostly.sort(key=shares.__getitem__, reverse=True)
        return mostly[:1] + [pack for pack in mostly[1:] if shares[pack] >= _ALONE]

    def _move(self, slots: Sequence[Slot], chosen: list[PendingPack]) -> None:
        """Copy blobs into the first of the chosen packs; into a new one where none is."""
        if not slots:
            return
        with self._changed:
            if not chosen:
                chosen.append(self._new_pack())
            chosen[0].users += 1  # an empty pack without users is swept away by the next thread that needs one
        with self._leaving(chosen[0]):
            for slot in slots:
                self._copy(slot, chosen[0])

    def _copy(self, slot: Slot, target: PendingPack) -> None:
        with self._reading(slot.pack), buffer() as view:
            data = slot.pack.read_into(slot, view)
            if digest_of(data) != slot.digest:
                self._forget([slot])
                raise MissingBlobsError(f"blob {slot.digest} was altered before it was published: upload it again", [slot.digest])
            with self._changed:
                copy = target.reserve(slot.digest, slot.nbytes, slot.offset)
            target.write(copy, data, "blob")
        with self._changed:
            copy.state = State.FILLED
            target.record([copy])
            self._forget([slot])
            self._slots[copy.digest] = copy

    @contextmanager
    def _reading(self, pack: PendingPack) -> Iterator[None]:
        with self._changed:
            pack.users += 1
        with self._leaving(pack):
            yield

    def _seal(self, pack: PendingPack) -> None:
        self._check([slot for slot in pack.slots.values() if slot.state is State.CLAIMED])
        with self._changed:
            pack.is_sealing = True
            self._changed.wait_for(lambda: not pack.users)
            for slot in [slot for slot in pack.slots.values() if slot.state is not State.FILLED]:
                del pack.slots[slot.digest]
                if self._slots.get(slot.digest) is slot:
                    del self._slots[slot.digest]
        try:
            pack.seal(self._target)
        finally:
            pack.is_sealing = pack.sealed is not None

    def settle(self, digests: Iterable[Digest]) -> None:
        """The catalog has them: forget them, and the packs that were sealed. What can't be removed stays for the next sweep."""
        with self._changed:
            self._forget([slot for digest in digests if (slot := self._slots.get(digest)) is not None and not slot.pack.sealed])
            for pack in [pack for pack in self._packs if pack.sealed or not pack.slots]:
                self._remove(pack)
                reach("clean")

    def _remove(self, pack: PendingPack) -> None:
        if pack not in self._packs:  # another thread did, while the caller waited
            return
        pack.is_sealing = True
        self._packs.remove(pack)
        for slot in pack.slots.values():
            if self._slots.get(slot.digest) is slot:
                del self._slots[slot.digest]
        self._changed.wait_for(lambda: not pack.users)
        with suppress(OSError):
            pack.remove()

    def unsettled(self) -> list[str]:
        """Packs that were made and that `settle` was not called for: the publish did not get to its end and may be tried again."""
        with self._changed:
            return [pack.sealed for pack in self._packs if pack.sealed]

    # --- giving up

    def sweep(self, stored: Callable[[Iterable[Digest]], Collection[Digest]], now: float) -> None:
        """Take over what an earlier process left; remove what is half-written, stored by now, or a day old. Only at the start."""
        with disk_errors(self._folder):
            names = {entry.name for entry in os.scandir(self._folder)}
            for name in names:
                path = self._folder / name
                if name.endswith(JOURNAL):
                    self._take_over(path, stored, now)
                elif is_digest(name) or name.endswith(PARTIAL) or (name.endswith(DATA) and path.stem + JOURNAL not in names):
                    path.unlink(missing_ok=True)

    def _take_over(self, journal: Path, stored: Callable[[Iterable[Digest]], Collection[Digest]], now: float) -> None:
        pack = PendingPack.load(journal, self._data_folder / f"{journal.stem}{DATA}")
        done = stored(pack.slots)
        pack.slots = {digest: slot for digest, slot in pack.slots.items() if digest not in done}
        if now - pack.touched > _STALE or not pack.slots or not pack.data.exists():
            pack.remove()
            return
        self._packs.append(pack)
        for digest, slot in pack.slots.items():
            if self.nbytes(digest) is None:
                self._slots[digest] = slot

    def give_up(self, now: float) -> None:
        """Remove what nobody added to in a day. Not while something is sealed."""
        with self._changed, disk_errors(self._folder):
            for pack in [pack for pack in self._packs if not pack.sealed and not pack.users]:
                if now - pack.touched > _STALE:
                    self._remove(pack)

    def clear(self, entered: Collection[str]) -> None:
        """Give up all that is staged: the way to space on a full disk. `entered`: packs that the catalog knows."""
        with self._changed:
            for pack in list(self._packs):
                self._remove(pack)
                if pack.sealed and pack.sealed not in entered:
                    with suppress(OSError):
                        pack.data.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files; all stays where it is."""
        with self._changed:
            self._changed.wait_for(lambda: not any(pack.users for pack in self._packs))
            for pack in self._packs:
                pack.close()


def _device(folder: Path) -> int | None:
    try:
        return folder.stat().st_dev
    except FileNotFoundError:  # a reader, which stages nothing
        return None


def _runs(blobs: Iterable[Filling]) -> Iterator[list[Filling]]:
    """Those that will lie side by side: written in one go, they come into larger pages of the system's cache, in half of the time."""
    run: list[Filling] = []
    for slot, data in blobs:
        if run and run[-1][0].offset + len(run[-1][1]) != slot.offset:
            yield run
            run = []
        run.append((slot, data))
    if run:
        yield run


def _write_run(pack: PendingPack, run: Sequence[Filling]) -> None:
    if len(run) == 1:
        pack.write(*run[0], "stage")
    else:
        pack.write_run(run[0][0], [data for _, data in run], "stage")


def _is_right(slot: Slot) -> bool:
    with buffer() as view:
        try:
            return digest_of(slot.pack.read_into(slot, view)) == slot.digest
        except OSError as error:
            if error.errno not in BAD_MEDIUM:
                raise
            return False


def _holds(slot: Slot, data: bytes | memoryview) -> bool:
    return len(data) == slot.nbytes and _is_right(slot)
