"""Turns versions back into files: in the cache, for runtimes to load, and in a folder of the user's."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tether.errors import ConflictError
from tether.store.blobs import Blobs
from tether.store.disk import dead_partials, disk_errors, partial_of
from tether.store.faults import reach
from tether.store.layout import FILES, HIDDEN
from tether.store.manifest import ArrayEntry, Manifest
from tether.types import Digest

__all__ = ["Checkouts", "export"]

_READ_ONLY = 0o444
"""A runtime that wrote into a checkout would change what the next one loads."""
_RACES = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY}
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
        with disk_errors(target):
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
            _write_files(self._blobs, partial, files)
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
        for name, array in wanted.items():
            if not self._blobs.is_copy(target / name, array):
                partial = partial_of(target)
                _write_file(self._blobs, partial, array)
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                partial.replace(target / name)

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
            files = [array for array in manifest.files() if not array.path.startswith(f"{FILES}/{HIDDEN}/")]
            _write_files(blobs, partial, files, mode=0o644)
            partial.rename(directory)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _write_files(blobs: Blobs, folder: Path, files: list[ArrayEntry], mode: int = _READ_ONLY) -> None:
    folder.mkdir()
    for array in files:
        target = folder / _relative(array)
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_file(blobs, target, array, mode)
        reach("checkout")


def _write_file(blobs: Blobs, target: Path, array: ArrayEntry, mode: int = _READ_ONLY) -> None:
    try:
        with target.open("xb", buffering=0) as file:
            for data in blobs.segments(array):
                view = memoryview(data)
                while view:
                    view = view[file.write(view) or 0 :]
            os.fchmod(file.fileno(), mode)
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _relative(array: ArrayEntry) -> str:
    return array.path.removeprefix(FILES + "/")


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
