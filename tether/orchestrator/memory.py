"""Keeps the record of the writer's lease in one file, over restarts of the orchestrator."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tether.errors import StoreError
from tether.orchestrator.lease import Record
from tether.security.files import written_aside

__all__ = ["Memory"]


class Memory:
    """One file. It is written when the lease changes hands or a follower comes into step, not at each renewal."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Record | None:
        """None: there never was a lease. Raises: StoreError: it can't be read."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Record)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise StoreError(
                f"{self._path} can't be read ({error}): restore it, or delete it if only one manager belongs to the cluster"
            ) from error

    def write(self, record: Record) -> None:
        """Durable when it returns. Raises: StoreError."""
        try:
            with written_aside(self._path, msgspec.json.encode(record)) as partial:
                partial.replace(self._path)
        except OSError as error:
            raise StoreError(f"{self._path} can't be written ({error.strerror}): mend the folder, no lease is given until then") from error
