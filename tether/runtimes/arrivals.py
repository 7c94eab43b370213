"""Files that come while a model is loaded from them: how far each is, told by who writes them, waited for by who reads them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Arrivals", "Coming"]

_OPEN_FOLDERS = Path("/proc/self/fd")
"""Linux's names of what a process has open: an open folder keeps its name there while it is renamed."""


class Arrivals:
    """How far each file of a folder has come. What was told is never taken back. Methods may be called from any thread."""

    def __init__(self, *, whole: bool = False) -> None:
        """`whole`: everything is there, nothing is ever waited for."""
        self._changed = threading.Condition()
        self._folder: Path | None = None
        self._reached: dict[str, int] = {}
        self._news: dict[str, int] = {}
        self._whole = whole
        self._error: BaseException | None = None

    # --- told by who writes them

    def begun(self, folder: Path) -> None:
        """They are being written to `folder`, each with its final size already; when all came it may be renamed."""
        with self._changed:
            self._folder = folder
            self._changed.notify_all()

    def grew(self, file: str, nbytes: int) -> None:
        """The first `nbytes` of a file are there. `file`: its path in the folder, with slashes."""
        with self._changed:
            self._reached[file] = self._news[file] = nbytes
            self._changed.notify_all()

    def finish(self) -> None:
        """Everything is there."""
        with self._changed:
            self._whole = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Nothing more comes: who waits gets this error."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    # --- waited for

    def wait(self, file: str, nbytes: int) -> None:
        """Until the first `nbytes` of the file are there. Raises: what `fail` was told."""
        self._until(lambda: self._reached.get(file, 0) >= nbytes)

    def wait_whole(self) -> None:
        """Until everything is there. Raises: what `fail` was told."""
        self._until(lambda: False)

    @contextmanager
    def folder(self, path: Path) -> Iterator[Path]:
        """Where they lie, by a name that stays true when they are moved to `path`, which they are in the end.

        Raises: what `fail` was told.
        """
        self._until(lambda: self._folder is not None)
        if self._whole or not _OPEN_FOLDERS.is_dir():
            self.wait_whole()
            yield path
            return
        with _opened(self, path) as descriptor:
            yield _OPEN_FOLDERS / str(descriptor)

    def changes(self) -> Iterator[tuple[Path | None, dict[str, int]]]:
        """Folder and files with news, as they come, until everything is there: for one who passes them on. Raises: what `fail` was told."""
        while not self._whole:
            self._until(lambda: bool(self._news))
            with self._changed:
                news, self._news = self._news, {}
            if news:
                yield self._folder, news

    def current_folder(self) -> Path | None:
        """Where they were last said to lie."""
        return self._folder

    def _until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._whole or self._error is not None or condition())
            if self._error is not None and not self._whole:
                raise self._error


@contextmanager
def _opened(arrivals: Arrivals, path: Path) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        descriptor = os.open(arrivals.current_folder() or path, flags)
    except FileNotFoundError:  # moved a moment ago
        arrivals.wait_whole()
        descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Coming:
    """Files that are fetched while a model is loaded from them."""

    path: Path
    """Where they lie in the end."""
    fetch: Callable[[Arrivals], object]
    """Fetches them, and tells how far they are. Blocks; what it raises fails the load."""
