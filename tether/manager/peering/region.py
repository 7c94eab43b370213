"""Where a lab is, in words that labs agreed on: said once and remembered, told in its record and to those for whom it holds copies."""

from __future__ import annotations

from pathlib import Path

from tether.config import lab_region
from tether.errors import ConfigError, StoreError
from tether.security.files import sync_folder, written_aside

__all__ = ["Region"]


class Region:
    """Of one lab."""

    def __init__(self, path: Path, wished: str | None) -> None:
        """`wished`: what a person said just now, which is remembered; "": none any more; None: as before.

        Raises: ConfigError: that is no region; StoreError: it can't be remembered.
        """
        self._path, self._is_wished = path, wished is not None
        self.name = "" if wished is None else lab_region(wished)
        """"": nobody said."""
        if wished is None:
            self.read_again()
        else:
            self._remember()

    def read_again(self) -> None:
        """The file may be another one than before; what was said of this manager itself stays. Raises: StoreError."""
        if self._is_wished:
            return
        try:
            self.name = lab_region(self._path.read_text().strip())
        except FileNotFoundError:
            self.name = ""
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise StoreError(f"{self._path} can't be read ({error}): remove it, and say --region again") from error

    def _remember(self) -> None:
        if not self.name and not self._path.exists():
            return
        try:
            with written_aside(self._path, self.name.encode()) as partial:
                partial.replace(self._path)
                sync_folder(self._path.parent)
        except OSError as error:
            raise StoreError(f"{self._path} can't be written ({error.strerror}): free space, or mend its permissions") from error
