"""To which labs this one lends workers, and for which of their models: one small file, so that a restart goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec

from tether.errors import StoreError
from tether.manager.peering.lent_state import EVERY
from tether.security.files import sync_folder, written_aside

__all__ = ["Lending", "Lendings"]


class Lending(msgspec.Struct, frozen=True, order=True):
    """To one lab."""

    publisher: str
    """Its key, hex."""
    models: str = EVERY
    """Glob of its own models that are run here."""
    slots: int | None = None
    """Requests that it may have run here at a time; None: as the workers allow."""


class Lendings:
    """Of one lab. Any thread; each change is durable when it returns."""

    def __init__(self, path: Path) -> None:
        """Raises: StoreError: the file can't be read, or is none."""
        self._path, self._lock = path, threading.Lock()
        self._known = self._read()

    def all(self) -> tuple[Lending, ...]:
        """By publisher."""
        return self._known

    def of(self, publisher: str) -> Lending | None:
        """What is lent to a lab."""
        return next((each for each in self._known if each.publisher == publisher), None)

    def lend(self, lending: Lending) -> None:
        """From now on, in place of what was. Raises: StoreError: it can't be remembered."""
        with self._lock:
            self._write(tuple(sorted((*self._others(lending.publisher), lending))))

    def end(self, publisher: str) -> None:
        """Nothing to this lab any more. Raises: StoreError."""
        with self._lock:
            self._write(self._others(publisher))

    def read_again(self) -> None:
        """The file is another one than before. Raises: StoreError."""
        with self._lock:
            self._known = self._read()

    def _others(self, publisher: str) -> tuple[Lending, ...]:
        return tuple(each for each in self._known if each.publisher != publisher)

    def _read(self) -> tuple[Lending, ...]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=tuple[Lending, ...])
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.DecodeError) as error:
            raise StoreError(f"{self._path} can't be read ({error}): restore it, or remove it and lend again") from error

    def _write(self, lendings: tuple[Lending, ...]) -> None:
        try:
            with written_aside(self._path, msgspec.json.encode(lendings)) as partial:
                partial.replace(self._path)
                sync_folder(self._path.parent)
        except OSError as error:
            raise StoreError(f"{self._path} can't be written ({error.strerror}): free space, or mend its permissions") from error
        self._known = lendings
