"""Folders in memory, for plaintext that no disk may see: private, emptied at their end, swept where their process died before it.

Each is a folder of a tmpfs, and beside it a file that its process holds a lock on: whoever comes next removes what nobody holds. A lock
tells the dead from the living where process ids do not: in containers that share the memory, and after a number was given again.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import functools
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tether.errors import ConfigError, NoSpaceError, StoreError, TetherError
from tether.security.files import locked

__all__ = ["SETTING", "VolatileFolder", "sweep"]

SETTING = "TETHER_MEMORY"
"""Environment: a folder of a tmpfs to use in place of the system's."""
_USUAL = Path("/dev/shm")  # noqa: S108 (not a temporary file at a guessable place: below it lies a folder of this user's alone)
_IN_MEMORY = {"tmpfs", "ramfs"}
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OWNER = ".owner"
_FULL = {errno.ENOSPC, errno.EDQUOT}


class VolatileFolder:
    """A new, empty folder of this process's in memory, mode 0700. `close` empties it; so do the end of the process and, last, `sweep`.

    The system may write memory to its swap: where that is to be feared, it has to be encrypted or off.
    """

    def __init__(self, path: Path, owner: int) -> None:
        """Use `create`. `owner`: the descriptor that holds the lock."""
        self.path = path
        self._owner: int | None = owner
        self._process = os.getpid()
        _close_at_exit()
        _living.add(self)

    @classmethod
    def create(cls, purpose: str, base: Path | None = None) -> Self:
        """`purpose`, a word, begins its name; `base`: a folder of a tmpfs (None: what `TETHER_MEMORY` names, else the system's).

        Raises: ConfigError: there is no tmpfs, or somebody else's folder in our place; NoSpaceError: it is full; StoreError.
        """
        root = _root(base)
        path = root / f"{purpose}-{secrets.token_hex(8)}"
        with _memory_errors(root), locked(root / "lock"):
            _sweep(root)
            owner = os.open(_owner_of(path), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.mkdir(mode=0o700)
        return cls(path, owner)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Around what is written into it. Raises: NoSpaceError: the memory is full, with what to do about it; StoreError."""
        with _memory_errors(self.path):
            yield

    def close(self) -> None:
        """Remove it and all that is in it; a second call does nothing. What is mapped or open stays readable for those who have it."""
        if self._owner is None or self._process != os.getpid():
            return
        shutil.rmtree(self.path, ignore_errors=True)
        _owner_of(self.path).unlink(missing_ok=True)
        os.close(self._owner)
        self._owner = None
        _living.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"VolatileFolder({str(self.path)!r})"


def sweep(base: Path | None = None) -> int:
    """Remove what processes of this user left behind when they died; gives how many folders.

    For services at their start: where there is no tmpfs, or never was such a folder, it does nothing. Raises: StoreError.
    """
    root = _place(base)
    if not root.is_dir() or root.stat().st_uid != os.getuid():
        return 0
    with _memory_errors(root), locked(root / "lock"):
        return _sweep(root)


_living: set[VolatileFolder] = set()


@functools.cache
def _close_at_exit() -> None:
    atexit.register(_close_all)


def _close_all() -> None:
    for folder in list(_living):
        folder.close()


def _sweep(root: Path) -> int:
    """The lock of the root is held: nobody is between the two steps of making one."""
    dead = [path for path in root.glob(f"*{_OWNER}") if _is_dead(path)]
    for owner in dead:
        shutil.rmtree(owner.with_name(owner.name.removesuffix(_OWNER)), ignore_errors=True)
        owner.unlink(missing_ok=True)
    return len(dead)


def _is_dead(owner: Path) -> bool:
    try:
        descriptor = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # its process ends just now
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _owner_of(path: Path) -> Path:
    return path.with_name(path.name + _OWNER)


def _root(base: Path | None) -> Path:
    """This user's own folder below the tmpfs."""
    root = _place(base)
    chosen = root.parent
    if _filesystem(chosen) not in _IN_MEMORY:
        raise ConfigError(
            f"an encrypted model may lie in memory only, and {chosen} is no tmpfs here: mount one and name a folder of it with {SETTING}"
        )
    with _memory_errors(root):
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
        found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & _OTHERS:
        raise ConfigError(f"{root} is not a folder of this user's alone: remove it, or name another tmpfs with {SETTING}")
    return root


def _place(base: Path | None) -> Path:
    return (base or Path(os.environ.get(SETTING) or _USUAL)) / f"tether-{os.getuid()}"


def _filesystem(path: Path) -> str:
    """The kind of file system that a path lies on; "" where that can't be told (no Linux)."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    real = path.resolve()
    if not real.is_dir():
        return ""
    kinds = {Path(_unescaped(fields[1])): fields[2] for fields in (line.split() for line in mounts.splitlines())}
    return next((kinds[folder] for folder in (real, *real.parents) if folder in kinds), "")


def _unescaped(text: str) -> str:
    """The path as it is: the kernel writes blanks and tabs in octal (proc(5))."""
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


@contextlib.contextmanager
def _memory_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except NoSpaceError as error:
        if str(path) not in str(error):  # of a disk, which was written to beside it
            raise
        raise _no_room(path) from error
    except TetherError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(path) from error
        raise StoreError(f"{path} can't be used ({error.strerror or error}): mend it, or name another tmpfs with {SETTING}") from error


def _no_room(path: Path) -> NoSpaceError:
    return NoSpaceError(
        f"no room in memory for an encrypted model ({path}): unload models, give the tmpfs more (Docker: --shm-size), "
        f"or name a larger one with {SETTING}"
    )
