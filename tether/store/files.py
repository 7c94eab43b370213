"""Cuts a model's files on this disk into staged blobs."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tether.errors import BadModelError, NoModelFileError
from tether.store.layout import BLOB_NBYTES, FILES, HIDDEN, path_problem
from tether.store.manifest import ArrayEntry, Segment, digest_of
from tether.types import Digest

__all__ = ["cut_bytes", "cut_files"]

Put = Callable[[Digest, bytes], None]


def cut_files(source: Path, put: Put) -> list[ArrayEntry]:
    """Cut a file, or all files below a folder, and give each blob to `put`; never more than a blob in memory.

    Raises: NoModelFileError: nothing there, or unreadable; BadModelError: a link, a device, a name that no version may hold.
    """
    entries = [_cut_file(path, name, put) for path, name in _walk(source)]
    if not entries:
        raise NoModelFileError(f"{source} is an empty folder: name the file or folder of the model")
    return sorted(entries, key=lambda entry: entry.path)


def cut_bytes(name: str, data: bytes, put: Put) -> ArrayEntry:
    """The same for a file that exists in memory only (an example). Raises: BadModelError."""
    _check_name(name)
    blobs = (data[offset : offset + BLOB_NBYTES] for offset in range(0, len(data), BLOB_NBYTES))
    return _entry(name, blobs, put)


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


def _check_name(name: str) -> None:
    problem = path_problem(f"{FILES}/{name}")
    if problem:
        raise BadModelError(f"the file name {name[:200]!r} {problem}: rename the file and publish again")


def _cut_file(path: Path, name: str, put: Put) -> ArrayEntry:
    _check_name(name)
    if name == HIDDEN or name.startswith(HIDDEN + "/"):
        raise BadModelError(f"{path}: the name {HIDDEN!r} is Tether's own inside of a model; rename or move it")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise BadModelError(f"{path} is a symbolic link: put the file itself there (`cp -L`), or publish what it points to") from None
        raise NoModelFileError(f"{path} can't be read ({error.strerror}): make it readable for this user") from None
    with os.fdopen(descriptor, "rb", buffering=0):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadModelError(f"{path} is neither a file nor a folder (a device, pipe or socket): move it out of the model's folder")
        return _entry(name, _blobs(descriptor), put)


def _blobs(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while data := _full(descriptor, offset):
        yield data
        offset += len(data)


def _full(descriptor: int, offset: int) -> bytes:
    """A whole blob; shorter only at the end of the file."""
    data = os.pread(descriptor, BLOB_NBYTES, offset)
    while 0 < len(data) < BLOB_NBYTES and (more := os.pread(descriptor, BLOB_NBYTES - len(data), offset + len(data))):
        data += more
    return data


def _entry(name: str, blobs: Iterator[bytes], put: Put) -> ArrayEntry:
    segments = []
    for data in blobs:
        digest = digest_of(data)
        put(digest, data)
        segments.append(Segment(digest, 0, len(data)))
    return ArrayEntry(f"{FILES}/{name}", "uint8", (sum(segment.nbytes for segment in segments),), tuple(segments))
