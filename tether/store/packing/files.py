"""Cuts a model's files on this disk into blobs, read and hashed by several threads, given a place in the order of the files."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tether.errors import BadModelError, NoModelFileError
from tether.store.format.layout import BLOB_NBYTES, FILES, HIDDEN, Piece, cut, path_problem
from tether.store.format.manifest import ArrayEntry, Segment, digest_of
from tether.store.packing.disk import read_at
from tether.store.packing.parallel import buffer, in_order, threads_for
from tether.store.packing.staging import Planned
from tether.types import Digest

__all__ = ["Taker", "cut_bytes", "cut_file", "cut_files"]

Put = Callable[[Digest, bytes], None]
_RUN = 1 << 20
"""Bytes of small pieces that are one job: to take turns and to write a journal cost as much as hashing 100 KiB."""


class Taker(Protocol):
    """Takes the pieces of files, several at a time. Called from several threads, for each in this order."""

    def needs(self, digests: Sequence[Digest]) -> Collection[Digest]:
        """Those of these blobs that are not stored, whole, already. The longest part: it may read the stored ones."""
        ...

    def place(self, blobs: Sequence[Planned]) -> Callable[[Sequence[memoryview]], None]:
        """Give them places, in the order of the files; the answer writes them there, at any time."""
        ...


@dataclass(slots=True, eq=False)
class _File:
    """A file that is being cut."""

    path: Path
    name: str
    nbytes: int
    descriptor: int
    segments: list[Segment] = field(default_factory=list)

    def entry(self) -> ArrayEntry:
        os.close(self.descriptor)
        self.descriptor = -1
        return ArrayEntry(f"{FILES}/{self.name}", "uint8", (self.nbytes,), tuple(self.segments))


@dataclass(frozen=True, slots=True)
class _Job:
    number: int
    file: _File
    pieces: Sequence[Piece]
    """Side by side, a blob's length at most; none: the file is empty."""
    is_last: bool


def cut_files(source: Path, taker: Taker, boundaries: Mapping[str, Sequence[Piece]]) -> list[ArrayEntry]:
    """Cut a file, or all files below a folder, at the tensors that `boundaries` gives for a relative path; sorted by path.

    Raises: NoModelFileError: nothing there, or unreadable; BadModelError: a link, a device, a name that no version may hold.
    """
    entries = _cut_all(_checked(_walk(source)), taker, boundaries)
    if not entries:
        raise NoModelFileError(f"{source} is an empty folder: name the file or folder of the model")
    return sorted(entries, key=lambda entry: entry.path)


def cut_file(path: Path, name: str, taker: Taker, ranges: Sequence[Piece]) -> ArrayEntry:
    """One file, under any name that a version may hold. Raises: as `cut_files`."""
    _check_name(name)
    (entry,) = _cut_all([(path, name)], taker, {name: ranges})
    return entry


def cut_bytes(name: str, data: bytes, put: Put) -> ArrayEntry:
    """The same for a file that exists in memory only (an example). Raises: BadModelError."""
    _check_name(name)
    segments = []
    for piece in cut(len(data)):
        blob = data[piece.offset : piece.offset + piece.nbytes]
        digest = digest_of(blob)
        put(digest, blob)
        segments.append(Segment(digest, 0, len(blob)))
    return ArrayEntry(f"{FILES}/{name}", "uint8", (len(data),), tuple(segments))


# --- finding files


def _walk(source: Path) -> Iterator[tuple[Path, str]]:
    try:
        mode = source.lstat().st_mode
    except OSError as error:
        raise NoModelFileError(f"{source} can't be read ({error.strerror}): check the path") from None
    if not stat.S_ISDIR(mode):
        yield source, source.name
        return
    for base, folders, files in os.walk(source, onerror=_unreadable):
        folders.sort()
        for name in sorted([*files, *(folder for folder in folders if Path(base, folder).is_symlink())]):
            path = Path(base, name)
            yield path, path.relative_to(source).as_posix()


def _unreadable(error: OSError) -> None:
    raise NoModelFileError(f"{error.filename} can't be read ({error.strerror}): make it readable for this user") from None


def _checked(files: Iterable[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
    for path, name in files:
        _check_name(name)
        if name == HIDDEN or name.startswith(HIDDEN + "/"):
            raise BadModelError(f"{path}: the name {HIDDEN!r} is Tether's own inside of a model; rename or move it")
        yield path, name


def _check_name(name: str) -> None:
    problem = path_problem(f"{FILES}/{name}")
    if problem:
        raise BadModelError(f"the file name {name[:200]!r} {problem}: rename the file and publish again")


def _open(path: Path, name: str) -> _File:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise BadModelError(f"{path} is a symbolic link: put the file itself there (`cp -L`), or publish what it points to") from None
        raise NoModelFileError(f"{path} can't be read ({error.strerror}): make it readable for this user") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BadModelError(f"{path} is neither a file nor a folder (a device, pipe or socket): move it out of the model's folder")
    return _File(path, name, status.st_size, descriptor)


# --- cutting


def _cut_all(files: Iterable[tuple[Path, str]], taker: Taker, boundaries: Mapping[str, Sequence[Piece]]) -> list[ArrayEntry]:
    opened: list[_File] = []
    turns = _Turns()
    try:
        jobs = _jobs(files, boundaries, opened)
        with closing(in_order(lambda job: _cut(job, taker, turns), jobs, threads_for(BLOB_NBYTES + 1))) as done:
            return [job.file.entry() for job in done if job.is_last]
    finally:
        for file in opened:
            if file.descriptor >= 0:
                os.close(file.descriptor)


def _jobs(files: Iterable[tuple[Path, str]], boundaries: Mapping[str, Sequence[Piece]], opened: list[_File]) -> Iterator[_Job]:
    number = 0
    for path, name in files:
        file = _open(path, name)
        opened[:] = [*(each for each in opened if each.descriptor >= 0), file]
        for pieces in _runs(cut(file.nbytes, boundaries.get(name, ()))):
            yield _Job(number, file, pieces, sum(pieces[-1]) == file.nbytes)
            number += 1
        if not file.nbytes:
            yield _Job(number, file, (), is_last=True)
            number += 1


def _runs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Small ones are read, placed and written down together."""
    run: list[Piece] = []
    for piece in pieces:
        if run and piece.offset + piece.nbytes - run[0].offset > _RUN:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _cut(job: _Job, taker: Taker, turns: _Turns) -> _Job:
    if not job.pieces:
        with turns.await_turn(job.number):
            return job
    with buffer() as view, turns.kept(job.number):
        parts = _read(job.file, job.pieces, view)
        digests = [digest_of(part) for part in parts]
        needed = taker.needs(digests)
        chosen = [index for index, digest in enumerate(digests) if digest in needed]
        blobs = [Planned(digests[index], len(parts[index]), job.pieces[index].offset) for index in chosen]
        with turns.await_turn(job.number):
            job.file.segments += [Segment(digest, 0, len(part)) for digest, part in zip(digests, parts, strict=True)]
            write = taker.place(blobs)
        write([parts[index] for index in chosen])
    return job


def _read(file: _File, pieces: Sequence[Piece], view: memoryview) -> list[memoryview]:
    start, nbytes = pieces[0].offset, sum(piece.nbytes for piece in pieces)
    try:
        done = read_at(file.descriptor, start, view[:nbytes])
    except OSError as error:
        raise NoModelFileError(f"{file.path} can't be read ({error.strerror}): check the disk that it is on") from None
    if done != nbytes:
        raise NoModelFileError(f"{file.path} became shorter while it was read: publish it again when nothing writes to it")
    return [view[piece.offset - start : piece.offset - start + piece.nbytes] for piece in pieces]


class _OvertakenError(Exception):
    """An earlier piece failed: its error is the one that is told."""


class _Turns:
    """Lets threads through in the order of their numbers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = 0
        self._failed: int | None = None

    @contextmanager
    def kept(self, number: int) -> Iterator[None]:
        """What fails inside, fails those behind as well: they would wait for ever."""
        try:
            yield
        except BaseException:
            with self._changed:
                self._failed = number if self._failed is None else min(self._failed, number)
                self._changed.notify_all()
            raise

    @contextmanager
    def await_turn(self, number: int) -> Iterator[None]:
        """Inside, all with lower numbers were here, and nobody else is."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == number or (self._failed is not None and self._failed < number))
            if self._next != number:
                raise _OvertakenError
            yield
            self._next += 1
            self._changed.notify_all()
