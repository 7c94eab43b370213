"""Who may write a store: the process that holds a lock on the file `writer.lock`, and that very file.

flock is on a file, not on its name: where somebody deletes the file, or puts another in its place (a backup that is restored, a folder
that is synchronised), a second process locks the new one. So a lock counts only while the name means the locked file. The writer looks
before it stages, and inside each of its transactions: whoever comes with a new file reads the catalog after that transaction.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from tether.errors import ConflictError, LockLostError
from tether.store.packing.disk import disk_errors

__all__ = ["WriterLock"]

_ATTEMPTS = 100
"""Each means that the file was replaced between opening and locking it."""


class WriterLock:
    """Held until `release`, and by no process that died."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        """Use `take`."""
        self._path, self._file = path, file
        self._process = os.getpid()

    @classmethod
    def take(cls, path: Path) -> Self:
        """Raises: ConflictError: naming the process that holds it; OSError."""
        for _ in range(_ATTEMPTS):
            lock = cls(path, _locked(path))
            try:
                if lock._is_named():
                    lock._say_who()
                    return lock
            except BaseException:
                lock.release()
                raise
            lock.release()
        raise ConflictError(f"{path} is replaced again and again: see which program does that, and stop it")

    def check(self) -> None:
        """Raises: LockLostError: the lock says nothing any more; StoreError: that can't be seen."""
        with disk_errors(self._path):
            is_named = self._file.closed or self._is_named()
        if not is_named:
            raise LockLostError(
                f"{self._path}, which keeps others from writing this store, was deleted or replaced while process {os.getpid()} held it: "
                "another one may write by now, so this one writes no more; nothing that was acknowledged is lost. Start it again, and "
                "leave that file alone: it does not mean that something went wrong"
            )

    def release(self) -> None:
        """A second call does nothing."""
        if not self._file.closed:
            if self._process == os.getpid():
                with suppress(OSError):  # what was written is told already; closing gives the lock up, too
                    fcntl.flock(self._file, fcntl.LOCK_UN)  # else it is held until the last forked child ends
            self._file.close()

    def _is_named(self) -> bool:
        held = os.fstat(self._file.fileno())
        try:
            named = self._path.stat()
        except FileNotFoundError:
            self._path.parent.stat()  # where the folder is gone with it, that is what there is to say
            return False
        return (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)

    def _say_who(self) -> None:
        with suppress(OSError):  # on a full disk the lock is held all the same, only by whom can't be told
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), f"{os.getpid()}\n".encode())


def _locked(path: Path) -> IO[str]:
    file = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(32).strip() or "unknown"
        file.close()
        raise ConflictError(f"process {holder} already writes the store {path.parent}: stop it, or open the store for reading") from None
    return file
