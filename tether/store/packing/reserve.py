"""Holds some space back, so that on a full disk a store can still be opened and versions deleted, which is how space comes back."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tether.errors import NoSpaceError

__all__ = ["Reserve", "reserve_of"]

_NBYTES = 1024 * 1024
"""A deletion writes some pages of 4 KiB to the catalog's log: this is room for dozens, and gc then brings it back."""
_T = TypeVar("_T")


class Reserve:
    """A file of nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self) -> None:
        """Take the space, where there is some."""
        with suppress(OSError):
            if not self._path.exists() or self._path.stat().st_size < _NBYTES:
                self._fill()

    def _fill(self) -> None:
        try:
            with self._path.open("wb", buffering=0) as file:
                file.write(os.urandom(_NBYTES))  # whatever the file system leaves out or compresses, it is not this
        except OSError:
            self._path.unlink(missing_ok=True)  # the last bytes of a full disk are for others

    def spend(self, work: Callable[[], _T]) -> _T:
        """Do it; where there is no space, with this space. Raises: what `work` raises."""
        try:
            return work()
        except NoSpaceError:
            if not self._give_up():
                raise
        return work()

    def _give_up(self) -> bool:
        """Whether that freed something."""
        with suppress(OSError):
            nbytes = self._path.stat().st_size
            self._path.unlink()
            return nbytes > 0
        return False


def reserve_of(root: Path) -> Reserve:
    """Of the store in a folder."""
    return Reserve(root / "reserve")
