"""Versions as files for the libraries that want a path: the cache, and export. Each byte is verified on its way, in several threads."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tether.errors import ConflictError
from tether.store.faults import reach
from tether.store.format.encrypted import vault_of
from tether.store.format.layout import FILES, HIDDEN
from tether.store.format.manifest import ArrayEntry, Manifest, Segment, digest_of
from tether.store.format.packs import Location
from tether.store.packing.blobs import Blobs, cut_out
from tether.store.packing.disk import dead_partials, disk_errors, partial_of, read_at, write_at
from tether.store.packing.parallel import buffer, in_batches, threads_for
from tether.types import Digest

__all__ = ["Checkouts", "export"]

_READ_ONLY = 0o444
"""A runtime that wrote into a checkout would change what the next one loads."""
_RACES = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR}
"""What the system says when another process built or discarded the same checkout meanwhile; then we look again."""
_ATTEMPTS = 20


class Checkouts:
    """The cache of versions as files. Several processes may use it at once: folders and files appear by rename only."""

    def __init__(self, folder: Path, blobs: Blobs) -> None:
        self._folder = folder
        self._blobs = blobs

    def provide(self, digest: Digest, manifest: Manifest) -> Path:
        """The folder with the version's files and nothing else, each byte verified in this call.

        Raises: ChunkMissingError, ChunkAlteredError, NoSpaceError, StoreError.
        """
        target, files = self._folder / digest, list(manifest.files())
        with disk_errors(target), closing(self._blobs.files):  # a worker that idles from here on keeps no pack from being deleted
            for _ in range(_ATTEMPTS - 1):
                try:
                    return self._build_or_mend(target, files)
                except OSError as error:
                    if error.errno not in _RACES:
                        raise
            return self._build_or_mend(target, files)

    def _build_or_mend(self, target: Path, files: list[ArrayEntry]) -> Path:
        if target.is_symlink() or not target.is_dir():
            target.unlink(missing_ok=True)
            if self._build(target, files):
                return target
        self._mend(target, files)
        return target

    def _build(self, target: Path, files: list[ArrayEntry]) -> bool:
        """False: another process was first."""
        partial = partial_of(target)
        try:
            partial.mkdir()
            _write_files(self._blobs, _under(partial, files))
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if target.is_dir():
                return False
            raise
        reach("checkout.rename")
        return True

    def _mend(self, target: Path, files: list[ArrayEntry]) -> None:
        """Remove what does not belong, replace what is not byte for byte the version's. Loaders see each file old or new, never half."""
        wanted = {_relative(array): array for array in files}
        for path in list(_strangers(target, wanted)):
            _remove(path)
        partials = {name: partial_of(target) for name in _differing(self._blobs, target, wanted)}
        _write_files(self._blobs, [(path, wanted[name]) for name, path in partials.items()])
        for name, path in partials.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(target / name)

    def discard(self, digest: Digest) -> None:
        """Remove a checkout; one that is loaded stays readable through its open files."""
        with disk_errors(self._folder):
            aside = partial_of(self._folder / digest)
            try:
                (self._folder / digest).rename(aside)
            except FileNotFoundError:
                return
            shutil.rmtree(aside)

    def sweep(self) -> None:
        """Remove what processes that are gone left half-built."""
        with disk_errors(self._folder):
            for path in dead_partials(self._folder):
                _remove(path)


def export(blobs: Blobs, manifest: Manifest, directory: Path) -> None:
    """Write the model's own files, byte for byte, to a new or empty folder, which appears complete.

    Raises: ConflictError: something is there already; ChunkMissingError, ChunkAlteredError, NoSpaceError, StoreError.
    """
    with disk_errors(directory):
        if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
            raise ConflictError(f"{directory} is not empty: name a new folder to export to")
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(directory.absolute())
        try:
            partial.mkdir()
            files = [array for array in manifest.files() if not array.path.startswith(f"{FILES}/{HIDDEN}/")]
            _write_files(blobs, _under(partial, files), mode=0o644)
            partial.rename(directory)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _relative(array: ArrayEntry) -> str:
    return array.path.removeprefix(FILES + "/")


def _under(folder: Path, files: Iterable[ArrayEntry]) -> list[tuple[Path, ArrayEntry]]:
    return [(folder / _relative(array), array) for array in files]


# --- pieces of files, for several threads


@dataclass(frozen=True, slots=True)
class _Piece:
    """One segment of a file on disk; None: the file has none."""

    descriptor: int
    array: ArrayEntry
    offset: int
    segment: Segment | None
    location: Location | None
    is_last: bool


def _pieces(descriptor: int, array: ArrayEntry, located: dict[Digest, Location]) -> Iterator[_Piece]:
    offset = 0
    for index, segment in enumerate(array.segments, start=1):
        yield _Piece(descriptor, array, offset, segment, located.get(segment.digest), index == len(array.segments))
        offset += segment.nbytes
    if not array.segments:
        yield _Piece(descriptor, array, 0, None, None, is_last=True)


def _nbytes(piece: _Piece) -> int:
    return piece.segment.nbytes if piece.segment else 0


def _located(blobs: Blobs, arrays: Iterable[ArrayEntry]) -> dict[Digest, Location]:
    return blobs.locate({segment.digest for array in arrays for segment in array.segments})


def _write_files(blobs: Blobs, files: list[tuple[Path, ArrayEntry]], mode: int = _READ_ONLY) -> None:
    """New files, all of them or none."""
    arrays = [array for _, array in files]
    located, opened = _located(blobs, arrays), set[int]()

    def pieces() -> Iterator[_Piece]:
        for target, array in files:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            opened.add(descriptor)
            yield from _pieces(descriptor, array, located)

    try:
        threads = threads_for(sum(array.nbytes for array in arrays))
        with closing(in_batches(lambda piece: _write_piece(blobs, piece), pieces(), _nbytes, threads)) as written:
            for piece in written:
                if piece.is_last:
                    os.fchmod(piece.descriptor, mode)
                    opened.remove(piece.descriptor)
                    os.close(piece.descriptor)
                    reach("checkout")
    except OSError:
        for target, _ in files:
            target.unlink(missing_ok=True)
        raise
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _write_piece(blobs: Blobs, piece: _Piece) -> _Piece:
    if piece.segment is not None:
        with buffer() as view:
            write_at(piece.descriptor, piece.offset, _segment(blobs, piece, piece.segment, view))
    return piece


def _segment(blobs: Blobs, piece: _Piece, segment: Segment, view: memoryview) -> memoryview:
    blob = blobs.open_into(piece.array, segment.digest, view, piece.location)
    return cut_out(blob, segment.digest, segment.offset, segment.nbytes, piece.array.path)


def _differing(blobs: Blobs, folder: Path, wanted: dict[str, ArrayEntry]) -> list[str]:
    """The files that are not, byte for byte, what they should be; in the order of `wanted`."""
    located, opened, differing = _located(blobs, wanted.values()), set[int](), set[str]()

    def pieces() -> Iterator[_Piece]:
        for name, array in wanted.items():
            descriptor = _open_copy(folder / name, array.nbytes)
            if descriptor is None:
                differing.add(name)
                continue
            opened.add(descriptor)
            yield from _pieces(descriptor, array, located)

    try:
        threads = threads_for(sum(array.nbytes for array in wanted.values()))
        with closing(in_batches(lambda piece: (piece, _is_same(blobs, piece)), pieces(), _nbytes, threads)) as compared:
            for piece, same in compared:
                if not same:
                    differing.add(_relative(piece.array))
                if piece.is_last:
                    opened.remove(piece.descriptor)
                    os.close(piece.descriptor)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return [name for name in wanted if name in differing]


def _open_copy(path: Path, nbytes: int) -> int | None:
    """A plain file of this size; None: something else, or nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size == nbytes:
        return descriptor
    os.close(descriptor)
    return None


def _is_same(blobs: Blobs, piece: _Piece) -> bool:
    if piece.segment is None:
        return True
    with buffer() as view:
        data = view[: piece.segment.nbytes]
        try:
            data = data[: read_at(piece.descriptor, piece.offset, data)]
        except OSError:  # a bad place of the disk: another copy is made from the pack, which may be whole
            return False
        if vault_of(piece.array) is None:
            if piece.segment.offset == 0 and digest_of(data) == piece.segment.digest:
                return True
            if piece.location is not None and piece.location.nbytes == piece.segment.nbytes:
                return False
        # A part of a blob, or an encrypted one, has no digest of its own: compare with the blob.
        with buffer() as other:
            return bytes(_segment(blobs, piece, piece.segment, other)) == bytes(data)


# --- what else lies in a folder


def _strangers(target: Path, wanted: Iterable[str]) -> Iterator[Path]:
    """What lies in the folder and is neither a wanted file nor a folder above one."""
    names = set(wanted)
    folders = {parent.as_posix() for name in names for parent in Path(name).parents}
    for base, inner, files in os.walk(target):
        for name in [*inner, *files]:
            path = Path(base, name)
            relative = path.relative_to(target).as_posix()
            is_folder = path.is_dir() and not path.is_symlink()
            if relative not in (folders if is_folder else names):
                yield path
        inner[:] = [name for name in inner if Path(base, name).relative_to(target).as_posix() in folders]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
