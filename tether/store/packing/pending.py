"""A pending pack: a file laid out as the pack it will become, filled in any order, and a journal that outlives the process.

    <name>.pending   as a pack (packs.py), but for the index
    <name>.journal   records of 56 bytes: digest (32), offset (u64), nbytes (u32), state (u32), CRC-32 of name and record (u32), 4 zeros

The journal is the "bitmap": the last record of a digest counts. A record whose CRC does not fit ends it: what comes behind was cut off.
Neither file is synced before the pack is sealed. So a record that another process wrote is a claim: its blob is hashed before it is used.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tether.store.faults import reach
from tether.store.format.layout import BLOB_NBYTES
from tether.store.format.packs import MAGIC, Located, index_bytes, place
from tether.store.packing.direct import DirectWriting
from tether.store.packing.disk import begin_sync, is_same_file, read_at, sync, sync_folder, write_at, write_halves_at, write_parts_at
from tether.types import Digest

__all__ = ["DATA", "JOURNAL", "PendingPack", "Slot", "State"]

DATA = ".pending"
JOURNAL = ".journal"
_BEGIN = 16 * 1024 * 1024
"""Bytes after which the disk is told to begin: it works while the next are hashed, and the one fsync of a publish waits for the last."""
_RECORD = struct.Struct("<32sQIII4x")
_CLAIM = struct.Struct("<32sQII")


class State(enum.IntEnum):
    """What a slot holds. The numbers are those of the journal."""

    ROOM = 1
    """Nothing yet."""
    CLAIMED = 2
    """The blob, as the journal of another process says."""
    DROPPED = 3
    """Nothing that is wanted any more."""
    FILLED = 4
    """The blob: this process hashed it. Written as CLAIMED."""


@dataclass(slots=True, eq=False)
class Slot:
    """The place of one blob in a pending pack."""

    pack: PendingPack
    digest: Digest
    offset: int
    nbytes: int
    state: State


class PendingPack:
    """One of them. Not for several threads at once, but for `write` and `read_into`."""

    def __init__(self, journal: Path, data: Path) -> None:
        """Use `create` or `load`."""
        self.data = data
        self.slots: dict[Digest, Slot] = {}
        self.is_open = True
        """Whether it still takes blobs that were not planned."""
        self.is_run = False
        """Whether it is, or may be, of a run that was interrupted and goes on in it."""
        self.is_planned = False
        """Whether its blobs come from elsewhere, to room that was kept for them: large ones are written past the system's cache."""
        self.is_sealing = False
        """From when it is being sealed: nothing is written to it any more."""
        self.is_suspect = False
        """After an fsync that failed no later one can be believed: what it holds is copied, it is never sealed itself."""
        self.users = 0
        """Threads that read or write its files now; the owner counts, and closes none before."""
        self.sealed: str | None = None
        """The pack that it became."""
        self._journal = journal
        self._name_check = zlib.crc32(journal.name.encode())
        self._end = len(MAGIC)
        self._journal_end = 0
        self._unsynced = 0
        self._opening = threading.Lock()
        self._closed = False
        self._descriptors: dict[str, int] = {}
        self._direct: DirectWriting | None = None

    @classmethod
    def create(cls, journal: Path, data: Path) -> PendingPack:
        """Raises: OSError: the disk refuses; nothing is left."""
        pack = cls(journal, data)
        try:
            for path in (journal, data):
                path.touch(exist_ok=False)
            write_at(pack._open(DATA), 0, MAGIC)
        except OSError:
            pack.remove()
            raise
        return pack

    @classmethod
    def load(cls, journal: Path, data: Path) -> PendingPack:
        """What another process left. Raises: OSError."""
        pack = cls(journal, data)
        pack.is_open, pack.is_run = False, True
        table = journal.read_bytes()
        for start in range(0, len(table) - _RECORD.size + 1, _RECORD.size):
            slot = pack._parse(table[start : start + _RECORD.size])
            if slot is None:
                break
            pack._journal_end = start + _RECORD.size
            pack._end = max(pack._end, slot.offset + slot.nbytes)
            pack.slots[slot.digest] = slot
        pack.slots = {digest: slot for digest, slot in pack.slots.items() if slot.state is not State.DROPPED}
        pack.is_planned = any(slot.state is State.ROOM for slot in pack.slots.values())
        return pack

    def _parse(self, record: bytes) -> Slot | None:
        digest, offset, nbytes, state, check = _RECORD.unpack(record)
        if check != self._check(record[: _CLAIM.size]) or not 0 < nbytes <= BLOB_NBYTES or not State.ROOM <= state <= State.DROPPED:
            return None
        return Slot(self, Digest(digest.hex()), offset, nbytes, State(state))

    def _check(self, claim: bytes) -> int:
        # with its name, so that an old journal's blocks, which a power cut may bring back, do not pass for this one's
        return zlib.crc32(claim, self._name_check)

    @property
    def nbytes(self) -> int:
        """Of all its blobs and of the room that was kept for some."""
        return self._end - len(MAGIC)

    @property
    def touched(self) -> float:
        """When something was last added (Unix time). Raises: OSError."""
        return (self._journal if self._journal.exists() else self.data).stat().st_mtime

    def reserve(self, digest: Digest, nbytes: int, phase: int) -> Slot:
        """Room at the end; `phase` is the blob's offset in its file. Not in the journal until `record`."""
        offset = place(self._end, phase)
        self._end = offset + nbytes
        slot = self.slots[digest] = Slot(self, digest, offset, nbytes, State.ROOM)
        return slot

    def record(self, slots: Iterable[Slot]) -> None:
        """Write their states to the journal. Raises: OSError."""
        data = b"".join(self._line(slot) for slot in slots)
        write_at(self._open(JOURNAL), self._journal_end, data)
        self._journal_end += len(data)

    def _line(self, slot: Slot) -> bytes:
        state = State.CLAIMED if slot.state is State.FILLED else slot.state
        claim = _CLAIM.pack(bytes.fromhex(slot.digest), slot.offset, slot.nbytes, state)
        return claim + struct.pack("<I4x", self._check(claim))

    def write(self, slot: Slot, data: bytes | memoryview, point: str) -> None:
        """Raises: OSError."""
        descriptor = self._open(DATA)
        if not (self.is_planned and self._directly().write(descriptor, slot.offset, data, point)):
            write_halves_at(descriptor, slot.offset, data, point)
            self._wrote(len(data))

    def write_run(self, first: Slot, parts: Sequence[bytes | memoryview], point: str) -> None:
        """The same for blobs that lie side by side from `first` on. Raises: OSError."""
        middle, half = len(parts) // 2, len(parts[len(parts) // 2]) // 2
        begun = write_parts_at(self._open(DATA), first.offset, [*parts[:middle], parts[middle][:half]])
        reach(point)
        begun += write_parts_at(self._open(DATA), first.offset + begun, [parts[middle][half:], *parts[middle + 1 :]])
        self._wrote(begun)

    def _wrote(self, nbytes: int) -> None:
        # Threads may count past each other: then the disk begins a little later.
        self._unsynced += nbytes
        if self._unsynced >= _BEGIN:
            self._unsynced = 0
            begin_sync(self._open(DATA))

    def read_into(self, slot: Slot, view: memoryview) -> memoryview:
        """What lies in the slot, not verified; shorter where the file is. Raises: OSError."""
        part = view[: slot.nbytes]
        return part[: read_at(self._open(DATA), slot.offset, part)]

    def seal(self, folder: Path) -> None:
        """Make it a pack, durably: index, one fsync, a rename, an fsync of the folder. Holds then what was FILLED.

        Raises: OSError: it is still pending, as it was.
        """
        name, tail = index_bytes(self.index(), self._end)
        descriptor = self._open(DATA)
        write_at(descriptor, self._end, tail)
        os.ftruncate(descriptor, self._end + len(tail))
        reach("pack.index")
        self._sync(descriptor)
        reach("pack.fsync")
        if is_same_file(folder / name, self.data):
            self.data.unlink()  # another store of a shared folder may have mapped the other: a file server takes away what is replaced
        else:
            self.data.rename(folder / name)
        self.data, self.sealed = folder / name, name
        reach("pack.rename")
        sync_folder(folder)
        reach("pack.folder")

    def _sync(self, descriptor: int) -> None:
        try:
            sync(descriptor)
        except OSError:
            self.is_suspect, self.is_open, self.is_run = True, False, False
            with suppress(OSError):
                self._journal.unlink()  # the next process would not know, and its fsync would succeed
            raise

    def index(self) -> list[Located]:
        """Of the pack that it is or would be."""
        lines = [Located(slot.digest, slot.offset, slot.nbytes) for slot in self.slots.values() if slot.state is State.FILLED]
        return sorted(lines, key=lambda line: line.offset)

    def drop(self, slots: Iterable[Slot]) -> None:
        """Forget blobs. Raises: OSError: they come back after a restart."""
        dropped = [self.slots.pop(slot.digest) for slot in list(slots) if slot.digest in self.slots]
        for slot in dropped:
            slot.state = State.DROPPED
        self.record(dropped)

    def remove(self) -> None:
        """Delete the journal, and the data unless they became a pack. Raises: OSError."""
        self.close()
        if self.sealed is None:
            self.data.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def close(self) -> None:
        """For good: a number that the system gives to another file must not be written to."""
        with self._opening:
            self._closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
            if self._direct is not None:
                self._direct.close()

    def _directly(self) -> DirectWriting:
        with self._opening:
            self._check_open()
            if self._direct is None:
                self._direct = DirectWriting(self.data)
            return self._direct

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "it was closed")

    def _open(self, which: str) -> int:
        with self._opening:
            self._check_open()
            if which not in self._descriptors:
                path = self.data if which == DATA else self._journal
                self._descriptors[which] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            return self._descriptors[which]
