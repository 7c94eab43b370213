"""Writes files so that they are whole or absent, and says what a disk's refusal means."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tether.errors import NoSpaceError, StoreError, TetherError
from tether.store.faults import reach

__all__ = ["PARTIAL", "dead_partials", "disk_errors", "partial_of", "sync_folder", "write_atomically", "write_halves"]

PARTIAL = ".partial"
"""Ending of what is being written. The name before it ends in the writer's process, so that a sweep spares the living."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_count = iter(range(1 << 62))
_token = os.urandom(4).hex()
"""Tells this process from an earlier one with the same id, as containers like to give."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Translate what the system says of `path`.

    Raises: NoSpaceError: disk, quota or file size limit is reached; StoreError: anything else (read-only, I/O error, permission).
    """
    try:
        yield
    except TetherError:
        raise
    except OSError as error:
        raise _translated(error, path) from error


def _translated(error: OSError, path: Path) -> StoreError | NoSpaceError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return NoSpaceError(f"no space to write {path} ({reason}): free some, or delete versions that are not needed; nothing was changed")
    if error.errno == errno.EROFS or isinstance(error, PermissionError):
        return StoreError(f"{path} can't be used ({reason}): make the data folder writable for this user, or choose another with --data")
    return StoreError(f"the disk refused {path} ({reason}): check the disk and the system's log, then try again")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(path: Path) -> Path:
    """A temporary name beside `path` that no other writer has."""
    return path.with_name(f"{path.name}.{next(_count)}.{os.getpid()}-{_token}{PARTIAL}")


def write_halves(descriptor: int, data: bytes, point: str) -> None:
    """Write all of `data`, passing the crash point in the middle."""
    view = memoryview(data)
    _write_all(descriptor, view[: len(view) // 2])
    reach(point)
    _write_all(descriptor, view[len(view) // 2 :])


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomically(path: Path, data: bytes, point: str) -> None:
    """Durably: temporary name, fsync, rename, fsync of the folder; passes the crash points `point`.write/.fsync/.rename/.folder."""
    partial = partial_of(path)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            reach(f"{point}.write")
            os.fsync(file.fileno())
        reach(f"{point}.fsync")
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    reach(f"{point}.rename")
    sync_folder(path.parent)
    reach(f"{point}.folder")


def dead_partials(folder: Path) -> list[Path]:
    """What processes that are gone left half-written in `folder`."""
    return [path for path in folder.glob(f"*{PARTIAL}") if not _is_alive(path)]


def _is_alive(partial: Path) -> bool:
    owner, _, token = partial.name.removesuffix(PARTIAL).rpartition(".")[2].partition("-")
    if not owner.isdecimal() or len(owner) > 9:  # noqa: PLR2004 (no process id has ten digits)
        return False
    if int(owner) == os.getpid():
        return token == _token
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
