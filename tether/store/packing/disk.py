"""Writes files so that they are whole or absent, and says what a disk's refusal means."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import filecmp
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tether.errors import NoSpaceError, StoreError, TetherError
from tether.store.faults import reach

__all__ = [
    "BAD_MEDIUM",
    "PARTIAL",
    "begin_sync",
    "dead_partials",
    "disk_errors",
    "is_same_file",
    "partial_of",
    "read_at",
    "read_bytes_at",
    "sync",
    "sync_folder",
    "write_at",
    "write_atomically",
    "write_halves_at",
    "write_parts_at",
]

PARTIAL = ".partial"
"""Ending of what is being written. The name before it ends in the writer's process, so that a sweep spares the living."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TOO_MANY = {errno.EMFILE, errno.ENFILE}
BAD_MEDIUM = {errno.EIO, getattr(errno, "EUCLEAN", errno.EIO), errno.EBADMSG}
"""What a disk or file system says of a place that it can't read (the checksums of btrfs and XFS, too)."""
_NOT_FULLY = {errno.ENOTSUP, errno.ENOTTY, errno.EINVAL}
"""What a file system says (SMB, FUSE) that has no such thing as F_FULLFSYNC."""
_MOST_PARTS = 1024
"""IOV_MAX, as Linux and macOS have it."""
_SYNC_FILE_RANGE_WRITE = 2
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
    if error.errno in _TOO_MANY:
        return StoreError(f"{path} can't be opened ({reason}): raise the limit (`ulimit -n`), or end programs that hold many files open")
    if error.errno == errno.EROFS or isinstance(error, PermissionError):
        return StoreError(f"{path} can't be used ({reason}): make the data folder writable for this user, or choose another with --data")
    return StoreError(f"the disk refused {path} ({reason}): check the disk and the system's log, then try again")


def sync(descriptor: int) -> None:
    """Make what was written to a file durable. On macOS an fsync leaves it in the drive's own memory, which a power cut empties."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
        except OSError as error:
            if error.errno not in _NOT_FULLY:
                raise
        else:
            return
    os.fsync(descriptor)


def begin_sync(descriptor: int) -> None:
    """Tell the system to begin to write a file to the disk, where it can be told; nothing is durable, or known of errors, before `sync`."""
    call = _sync_file_range()
    if call is not None:
        call(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """Linux's; Python's `os` does not have it."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(path: Path) -> Path:
    """A temporary name beside `path` that no other writer has."""
    return path.with_name(f"{path.name}.{next(_count)}.{os.getpid()}-{_token}{PARTIAL}")


def read_at(descriptor: int, offset: int, view: memoryview) -> int:
    """Fill `view` with the bytes from `offset`; gives how many there were before the end of the file."""
    done = 0
    while done < len(view) and (count := os.preadv(descriptor, [view[done:]], offset + done)):
        done += count
    return done


def read_bytes_at(descriptor: int, offset: int, nbytes: int) -> bytes:
    """The bytes from `offset`, not copied; fewer before the end of the file."""
    data = os.pread(descriptor, nbytes, offset)
    while len(data) < nbytes and (more := os.pread(descriptor, nbytes - len(data), offset + len(data))):
        data += more
    return data


def write_at(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def write_parts_at(descriptor: int, offset: int, parts: Sequence[bytes | memoryview]) -> int:
    """Write all of them at `offset`, one behind the other, in as few calls as the system allows; gives how many bytes they have."""
    begin = offset
    for first in range(0, len(parts), _MOST_PARTS):
        some = parts[first : first + _MOST_PARTS]
        done = os.pwritev(descriptor, some, offset)
        for part in some:  # a call may write less than it was given
            left = max(0, len(part) - done)
            done -= len(part) - left
            write_at(descriptor, offset + len(part) - left, part[len(part) - left :])
            offset += len(part)
    return offset - begin


def is_same_file(path: Path, other: Path) -> bool:
    """Whether `path` is there and has the same bytes. Raises: OSError."""
    try:
        return path.exists() and filecmp.cmp(path, other, shallow=False)
    except OSError as error:
        if error.errno not in BAD_MEDIUM:
            raise
        return False  # a bad place in the old one: it is replaced


def write_halves_at(descriptor: int, offset: int, data: bytes | memoryview, point: str) -> None:
    """Write all of `data` at `offset`, passing the crash point in the middle."""
    view, half = memoryview(data), len(data) // 2
    write_at(descriptor, offset, view[:half])
    reach(point)
    write_at(descriptor, offset + half, view[half:])


def write_atomically(path: Path, data: bytes, point: str) -> None:
    """Durably: temporary name, fsync, rename, fsync of the folder; passes the crash points `point`.write/.fsync/.rename/.folder."""
    partial = partial_of(path)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            reach(f"{point}.write")
            sync(file.fileno())
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
